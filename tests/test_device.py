"""Nothing stays behind on the CPU: the whole code runs on a device that refuses to be mixed with it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import PartialState
from datasets import Dataset
from methods import METHODS, PROMPTS, method_named, text_reward
from peft import LoraConfig
from pretended_device import MixedDevices, is_on_device, pretended_device
from test_continuation import mixed_states
from tiny import MIXTURES, A, B, coded_prompts, tiny_mixture, tiny_model, tiny_sdar, tiny_tokenizer
from trainer_helpers import parameters_of

from trl_diffusion.credit import StepAwareReward
from trl_diffusion.evaluation import (
    AccuracyCallback,
    ConfusionZoneCallback,
    Measurement,
    Problems,
    evaluate_accuracy,
    measure,
)
from trl_diffusion.evaluation.lm_eval.likelihood_bound import is_greedy, log_likelihood_bound
from trl_diffusion.losses import SequenceRatio
from trl_diffusion.models import DreamModel, compiled_windows
from trl_diffusion.runtime.rollouts import RolloutEngine
from trl_diffusion.sampling import CanvasState, SamplingConfig, row_generators, sample, sampler
from trl_diffusion.sampling.unmasking import RULES, Candidates, Choice, Rule
from trl_diffusion.trainers import SFTConfig, SFTTrainer

ROWS = 16
LORA = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
SMALL: dict[str, Any] = {"gradient_accumulation_steps": 1}


@pytest.fixture
def device():
    with pretended_device() as made:
        yield made


# ------------------------------------------- the pretended device


def test_tensors_know_where_they_are(device):
    made = torch.zeros(2, 3, device=device)
    assert made.device == device and made.is_cuda and not made.is_cpu
    assert torch.zeros(2).device.type == "cpu" and not torch.zeros(2).is_cuda
    for derived in (made.T, made[1:], made + 1, made.long(), made.new_ones(3), torch.zeros_like(made), made.sum()):
        assert is_on_device(derived)
    for copied in (made.cpu(), made.to("cpu"), torch.zeros_like(made, device="cpu"), torch.tensor(made.tolist())):
        assert not is_on_device(copied)
    for moved in (torch.ones(2).to(device), torch.ones(2).cuda(), torch.ones(2, dtype=torch.long).to(made)):
        assert is_on_device(moved)
    assert made.to(device) is made
    layer = torch.nn.Linear(3, 2).to(device)
    assert is_on_device(layer.weight) and is_on_device(layer(made))
    layer(made).sum().backward()
    assert is_on_device(layer.weight.grad)


def test_a_gradient_returns_to_the_cpu(device):
    weight = torch.ones(3, requires_grad=True)
    (weight.to(device) * torch.ones(3, device=device)).sum().backward()
    assert not is_on_device(weight.grad) and weight.grad.tolist() == [1, 1, 1]


def test_a_saved_tensor_returns_to_its_device(device, tmp_path):
    torch.save({"here": torch.ones(2), "there": torch.ones(2, device=device)}, tmp_path / "saved.pt")
    loaded = torch.load(tmp_path / "saved.pt")
    assert is_on_device(loaded["there"]) and not is_on_device(loaded["here"])
    assert not is_on_device(torch.load(tmp_path / "saved.pt", map_location="cpu")["there"])


MIXING = {
    "add": lambda there, here: there + here,
    "in place": lambda there, here: here.add_(there),
    "where": lambda there, here: torch.where(there > 0, there, here),
    "cat": lambda there, here: torch.cat([there, here]),
    "stack of numbers": lambda there, here: torch.stack([there.sum(), here.sum()]),
    "gather": lambda there, here: there.gather(0, here.long()),
    "index of a tensor of the CPU": lambda there, here: here[there.long()],
    "index of the CPU": lambda there, here: there[here.long()],
    "number of the device": lambda there, here: here + there.sum(),
    "written number": lambda there, here: here.sum().add_(there.sum()),
    "write": lambda there, here: there.index_put_((here.long(),), here),
    "embedding": lambda there, here: torch.nn.functional.embedding(here.long(), there.view(3, 1)),
    "in the backward pass": lambda there, here: _Backward.apply(there.requires_grad_(), here).sum().backward(),
}


class _Backward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, there, here):
        ctx.here = here
        return there.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.here, None


@pytest.mark.parametrize("how", MIXING)
def test_mixing_is_refused(how, device):
    with pytest.raises(MixedDevices):
        MIXING[how](torch.zeros(3, device=device), torch.zeros(3))


def test_what_cuda_allows_is_allowed(device):
    there, here = torch.zeros(3, device=device), torch.arange(3)
    there + torch.tensor(1.0), there[0], there.index_put((there.long(),), torch.tensor(1.0)), there.copy_(here)
    here.copy_(there)
    assert there.sum().item() == 3 and there.tolist() == [0, 1, 2] and there.cpu().numpy().sum() == 3
    for refused in (there.numpy, lambda: np.asarray(there)):
        with pytest.raises(TypeError, match="cannot be made an array of numpy"):
            refused()


# ------------------------------------------- sampling

PARALLEL = {"confidence_threshold": 0.6, "entropy_bound": 0.5}
PARALLEL_RULES = [(name, rule) for name, rule in RULES.items() if rule.parallel]
SAMPLING = {
    **{rule: {"unmasking": rule} for rule in RULES},
    **{
        f"{rule}, parallel": {"unmasking": rule, x.parallel: PARALLEL[x.parallel]}
        for rule, x in RULES.items()
        if x.parallel
    },
    "truncated": {"top_k": 2, "top_p": 0.9},
    "greedy": {"temperature": 0.0, "unmasking": "max_prob"},
    "signals": {"record_signals": True, "shift_window": 2},
}
NETWORKS = {
    "none": lambda: tiny_model(5, 10.0),
    "prefix": lambda: tiny_model(5, 10.0),
    "dual": lambda: tiny_model(5, 10.0, DreamModel),
    "block": lambda: tiny_sdar(5, 10.0),
}


def everything_on_device(trajectory) -> bool:
    return all(is_on_device(value) for value in vars(trajectory).values() if isinstance(value, torch.Tensor))


def draw(device, model, config: SamplingConfig, **others):
    prompts, mask = (part.to(device) for part in coded_prompts(ROWS))
    return sample(model.to(device), prompts, mask, config, row_generators(0, rows=range(ROWS)), **others)


@pytest.mark.parametrize("settings", SAMPLING)
@pytest.mark.parametrize("cache", NETWORKS)
def test_sampling(cache, settings, device):
    steps = 8 if "parallel" in settings else 4
    config = SamplingConfig(**{"canvas_length": 8, "denoising_steps": steps, "block_length": 4} | SAMPLING[settings])
    model, seen = NETWORKS[cache](), []
    assert everything_on_device(draw(device, model, replace(config, cache=cache), observer=seen.append))
    assert seen and all(is_on_device(commits.positions) for commits in seen)


@pytest.mark.parametrize("cache", NETWORKS)
def test_sampling_continues_canvases(cache, device):
    model = NETWORKS[cache]()
    state = mixed_states(model, ROWS)
    state = CanvasState(state.canvas.to(device), state.length.to(device))
    assert everything_on_device(draw(device, model, SamplingConfig(12, 6, 4, cache=cache), state=state))


@pytest.mark.parametrize("cache", NETWORKS)
def test_sampling_goes_on_with_other_processes(cache, device):
    """Which share the weights, and write longer: dummy forwards follow."""
    asked = []

    def any_process(here: bool) -> bool:
        asked.append(here)
        return here or len(asked) < 40

    drawn = draw(device, NETWORKS[cache](), SamplingConfig(8, 4, 4, cache=cache), any_process=any_process)
    assert everything_on_device(drawn) and drawn.sync_forwards > 0


@pytest.mark.parametrize("cache", ["dual", "block"])
def test_steps_of_a_compiled_network(cache, device, monkeypatch):
    """The inputs of the compiled function are on the device, and its outputs stay there."""
    monkeypatch.setattr(compiled_windows, "compiled", lambda device_type: compiled_windows.window_states)
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: None)
    config = SamplingConfig(12, 6, 4, cache=cache, rollout_compile=True)
    assert everything_on_device(draw(device, NETWORKS[cache](), config))


def test_sampling_in_batches(device, monkeypatch):
    monkeypatch.setattr(sampler, "prompt_buckets", lambda lengths, *_: [[1, 0], list(range(2, len(lengths)))])
    assert everything_on_device(draw(device, tiny_model(5, 10.0), SamplingConfig(8, 4, 4)))


@pytest.mark.parametrize("family", MIXTURES)
def test_mixtures_of_experts(family, device):
    assert everything_on_device(draw(device, tiny_mixture(family), SamplingConfig(8, 4, 4)))


def test_a_cast_network(device):
    model = tiny_model().to(device, torch.bfloat16)
    assert all(map(is_on_device, model.state_dict().values())) and is_on_device(model.model.rotary_emb.inv_freq)
    assert everything_on_device(draw(device, model, SamplingConfig(8, 4, 4)))


def test_a_tensor_left_behind_in_a_rule_is_found(device, monkeypatch):
    def left_behind(candidates: Candidates) -> Choice:
        columns = torch.arange(candidates.is_masked.size(1))  # no device
        order = candidates.order_noise + 0 * columns
        return RULES["random"].choose(candidates._replace(order_noise=order))

    monkeypatch.setitem(RULES, "left behind", Rule(left_behind, "as random", reads_logits=False))
    with pytest.raises(MixedDevices, match=r"add\.Tensor .* device \[16, 4\], CPU \[4\]"):
        draw(device, tiny_model(), SamplingConfig(8, 8, 4, unmasking="left behind"))


# ------------------------------------------- training


def train(method, tmp_path, **settings):
    """Train a method with eight rows a step; returns the trainer."""
    trainer = method.make(tmp_path, **SMALL | settings)
    before = parameters_of(trainer)
    trainer.train()
    assert is_on_device(before) and not torch.equal(before, parameters_of(trainer))
    return trainer


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_an_update_of_every_method(method, tmp_path, device):
    """Rollout, credit, the views of every likelihood, and every loss."""
    trainer = train(method, tmp_path)
    trajectory, _ = trainer.last_rollout
    assert everything_on_device(trajectory)


SPECIAL: dict[str, tuple[str, dict[str, Any]]] = {
    "LoRA and a reference": ("diffu_grpo", {"peft_config": LORA, "beta": 0.1, "loss_type": "dr_grpo"}),
    "a reference model that follows": ("espo", {"beta": 0.1, "sync_ref_model": True, "ref_model_sync_steps": 1}),
    "learnt bound": (
        "diffpo",
        {"learn_bound": True, "unmasking": "entropy", "entropy_bound": 0.2, "denoising_steps": 8},
    ),
    "checkpointed layers": ("diffu_grpo", {"gradient_checkpointing": True}),
    "AdamW and clipping": ("agrpo", {"optim": "adamw_torch", "max_grad_norm": 0.1, "learning_rate": 0.1}),
    "corrected rollouts": (
        "agrpo",
        {"cache": "dual", "unmasking": "max_prob", "rollout_correction_cap": 2.0, "num_iterations": 2, "max_steps": 2},
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", SPECIAL)
def test_what_a_setting_adds_to_an_update(case, tmp_path, device):
    name, settings = SPECIAL[case]
    train(method_named(name), tmp_path, **settings)


@pytest.mark.slow
def test_continuations_that_judge_denoising_steps(tmp_path, device):
    """SAPO's, with a function that says what succeeded, and rewards that fail."""
    judged = []

    def success(completions, **others):
        judged.append(len(completions))
        return [True] * len(completions)

    def failing(completions, completion_ids, **others):
        rewards = text_reward(completions, completion_ids)
        return [None, *rewards[1:]]

    def wrap(reward):
        return StepAwareReward(reward, success=success, num_rollouts=2, baseline="earlier_state")

    longer = {"max_completion_length": 16, "denoising_steps": 8}
    refused = {"reward_error": "none", "reward_nonfinite": "none"}
    train(replace(method_named("sapo"), wrap=wrap), tmp_path, reward=failing, **longer, **refused)
    assert len(judged) > 1  # of the finished texts and of continuations


@pytest.mark.slow
def test_a_rollout_of_processes_that_share_the_weights(tmp_path, device, monkeypatch):
    draw_alone, asked = RolloutEngine.sample, []

    def draw_together(engine, *args, **kwargs):
        asked.append(engine)
        return draw_alone(replace(engine, sharded=True), *args, **kwargs)

    monkeypatch.setattr(RolloutEngine, "sample", draw_together)
    train(method_named("agrpo"), tmp_path)
    assert asked


@pytest.mark.slow
def test_a_tensor_left_behind_in_a_loss_is_found(tmp_path, device):
    class LeftBehind(SequenceRatio):
        def __call__(self, inputs):
            columns = torch.arange(inputs.logps.size(-1))  # no device
            return super().__call__(replace(inputs, logps=inputs.logps + 0 * columns))

    with pytest.raises(MixedDevices, match=r"device \[8, 4, 8\], CPU \[8\]"):
        train(method_named("espo"), tmp_path, choices={"loss": LeftBehind()})


def all_right(completions, **others) -> list[bool]:
    return [True] * len(completions)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["stable_drl", "atpo, sampled by group"])
def test_a_run_resumes_with_evaluations(name, tmp_path, device):
    """Inside of a rollout, with what a checkpoint holds of it."""
    method = method_named(name)
    settings = SMALL | dict(num_iterations=2, save_strategy="steps", save_steps=1, record_signals=True)
    train(method, tmp_path, max_steps=1, **settings)
    again = method.make(tmp_path, max_steps=3, **settings)
    held_out = Dataset.from_dict({"prompt": PROMPTS[:4]})
    again.add_callback(AccuracyCallback(again, held_out, accuracy, every=1))
    again.add_callback(
        ConfusionZoneCallback(again, every=1, success=lambda completions, **_: [1.0] * len(completions))
    )
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert again.state.global_step == 3 and any("eval_accuracy" in entry for entry in again.state.log_history)


# ------------------------------------------- evaluation, fine-tuning

GREEDY = SamplingConfig(8, 4, 4, 0.0, unmasking="max_prob")


def accuracy(model, dataset):
    return evaluate_accuracy(
        model, tiny_tokenizer(), dataset, lambda text, row: "a" in text, decoding=GREEDY, progress=False
    )


def test_evaluation(device, tmp_path):
    problems = Problems.encode(
        "words", Dataset.from_dict({"prompt": PROMPTS}), lambda text, row: {"accuracy": 1.0}, tiny_tokenizer(), {}
    )
    measurement = Measurement(problems, GREEDY, {}, batch_size=4)
    model = tiny_model().to(device)
    (result,) = measure(model, tiny_tokenizer(), [measurement], tmp_path, PartialState(cpu=True), progress=False)
    assert result.scores["accuracy"].value == 1.0


def test_the_likelihood_bound_of_continuations(device):
    model = tiny_model().to(device).eval()
    found = log_likelihood_bound(model, [[A, B], [B]], [[A, A, B], [B]], row_generators(0, rows=range(2)), views=4)
    assert all(value < 0 for value in found) and is_greedy(model, [A, B], [A, A]) in (True, False)


def test_generate(device):
    prompts, mask = (part.to(device) for part in coded_prompts(ROWS))
    found = tiny_model().to(device).generate(prompts, attention_mask=mask, max_new_tokens=8, block_length=4)
    assert is_on_device(found)


@pytest.mark.slow
def test_fine_tuning(device, tmp_path):
    args = SFTConfig(
        str(tmp_path),
        max_completion_length=8,
        per_device_train_batch_size=4,
        max_steps=1,
        eval_strategy="steps",
        eval_steps=1,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
    )
    rows = Dataset.from_list([{"prompt": prompt, "completion": "a b"} for prompt in PROMPTS])
    trainer = SFTTrainer(tiny_model(num_hidden_layers=1), args, rows, rows, processing_class=tiny_tokenizer())
    trainer.train()
    assert is_on_device(parameters_of(trainer)) and "eval_loss" in str(trainer.state.log_history)
