"""The gradient of the trainer's own loss, through TRL, against automatic differentiation of the enumerated E[r].

Four words, two blocks, texts that end early, and a reward that depends on the length of the text.
"""

from __future__ import annotations

from itertools import product

import pytest
import torch
from datasets import Dataset
from enumeration import enumerate_paths, trajectory_of
from tiny import END, MASK, TAIL, A, B, tiny_model, tiny_tokenizer
from trainer_helpers import plan_of

from trl_diffusion.trainers import AGRPOConfig, AGRPOTrainer

PROMPT = [A, B, A]
LENGTH, BLOCK = 4, 2
LOSS_TYPES = ["grpo", "dr_grpo", "dapo", "luspo", "cispo", "sapo"]


def reward_of(tokens: list[int]) -> float:
    ends = [i for i, token in enumerate(tokens) if token in (TAIL, END)]
    text = tokens[: ends[0]] if ends else tokens
    return 1.0 * text.count(A) - 0.4 * len(text) + 0.7 * (len(text) == 2) + 0.3 * (B in text[:1])


def make_trainer(model, tmp_path, rows: int, **settings) -> AGRPOTrainer:
    defaults = dict(
        output_dir=str(tmp_path),
        per_device_train_batch_size=rows,
        num_generations=rows,
        max_completion_length=LENGTH,
        block_length=BLOCK,
        denoising_steps=4,
        num_mc_samples=4,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        bf16=False,
        use_cpu=True,
        report_to=[],
        gradient_checkpointing=False,
    )
    dataset = Dataset.from_dict({"prompt": ["a b a"] * 4})
    args = AGRPOConfig(**defaults | settings)
    trainer = AGRPOTrainer(
        model, lambda completions, **_: [0.0] * len(completions), args, dataset, None, tiny_tokenizer()
    )
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()
    return trainer


def as_rows(trainer: AGRPOTrainer, paths) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """The trainer's buffer rows for given trajectories, without advantages, and the eligible steps [B]."""
    trajectory = trajectory_of(paths, trainer.args.temperature)
    rows = {"completion_ids": trajectory.completion_ids, "global_row": torch.arange(len(paths))}
    rows |= plan_of(trainer, trajectory, rows)
    rows["prompt_ids"] = torch.tensor([PROMPT] * len(paths))
    rows["prompt_mask"] = torch.ones_like(rows["prompt_ids"])
    rows["num_items_in_batch"] = rows["completion_mask"].sum()
    return rows, rows["unmask_step"].masked_fill(rows["completion_mask"] == 0, -1).max(1).values.long() + 1


def every_step(trainer: AGRPOTrainer, rows, num_eligible) -> None:
    """Replace the random draws by their expectation: view s shows step s, weighted by q(s) · w(s)."""
    steps = torch.arange(trainer.args.denoising_steps)
    inside = steps < num_eligible.unsqueeze(1)
    # q·w is 1 for the sum over steps and 1/N for the mean; the loss divides by M
    weights = inside.float() * trainer.args.num_mc_samples
    if trainer.args.step_reduction == "mean":
        weights = weights / num_eligible.unsqueeze(1)
    rows["view_steps"] = steps.expand(len(num_eligible), 1, -1)
    rows["view_weights"] = weights.unsqueeze(1)


def gradient(model, loss) -> torch.Tensor:
    gradients = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True, retain_graph=True)
    return torch.cat([g.flatten() for g in gradients if g is not None])


def trainer_gradient(trainer, rows) -> torch.Tensor:
    views = range(rows["view_steps"].size(2))
    return gradient(trainer.model, sum(trainer._view_loss(trainer.model, rows, 0, view) for view in views))


@pytest.fixture
def model():
    # float64, so that differences are the formula's
    return tiny_model(seed=3).double()


@pytest.fixture(params=[2, 1], ids=["2 steps per block", "1 step per block"])
def enumerated(model, request):
    model.eval()
    return request.param, enumerate_paths(model, PROMPT, LENGTH, BLOCK, request.param)


def test_enumeration_is_a_distribution(enumerated):
    steps_per_block, paths = enumerated
    assert float(sum(path.probability for path in paths)) == pytest.approx(1.0, abs=1e-9)
    ended = [path for path in paths if -1 in path.steps]
    assert 0.1 < float(sum(path.probability for path in ended)) < 0.9  # both fates occur
    assert len(paths) == (280 if steps_per_block == 2 else 12 + 4 * 16)


def test_exact_sum_is_the_policy_gradient(model, enumerated, tmp_path):
    steps_per_block, paths = enumerated
    trainer = make_trainer(
        model, tmp_path, len(paths), step_scope="exact", step_reduction="sum", denoising_steps=2 * steps_per_block
    )
    probability = torch.stack([path.probability for path in paths])
    rewards = torch.tensor([reward_of(path.tokens) for path in paths], dtype=torch.float64)
    exact = gradient(model, (probability * rewards).sum())

    # Two completions per prompt, every pair: the advantage that TRL gives the first, averaged over the second.
    group_mean = (rewards.unsqueeze(1) + rewards.unsqueeze(0)) / 2
    advantages = (rewards.unsqueeze(1) - group_mean) @ probability.detach()
    rows, num_eligible = as_rows(trainer, paths)
    rows["advantages"] = probability.detach() * advantages * len(paths)
    every_step(trainer, rows, num_eligible)
    found = -trainer_gradient(trainer, rows)

    factor = (2 - 1) / 2
    torch.testing.assert_close(found, (factor * exact).to(found.dtype), atol=1e-6, rtol=1e-6)
    assert exact.norm() > 0.1
    # negative control: a state that is one step late
    rows["unmask_step"] = torch.where(rows["unmask_step"] > 0, rows["unmask_step"] - 1, rows["unmask_step"])
    assert (-trainer_gradient(trainer, rows) - factor * exact).norm() > 1e-3 * exact.norm()


def test_paper_mean_is_its_own_objective_and_not_the_policy_gradient(model, tmp_path):
    paths = enumerate_paths(model.eval(), PROMPT, LENGTH, BLOCK, 2)
    trainer = make_trainer(model, tmp_path, len(paths), step_scope="paper", step_reduction="mean")
    probability = torch.stack([path.probability for path in paths]).detach()
    rewards = torch.tensor([reward_of(path.tokens) for path in paths], dtype=torch.float64)

    def last_step(path) -> int:
        ends = [i for i, token in enumerate(path.tokens) if token in (TAIL, END)]
        text = ends[0] + 1 if ends else LENGTH
        return max(u for i, u in enumerate(path.steps) if u >= 0 and (path.tokens[i] != TAIL or i < text))

    own = torch.stack(
        [
            sum(path.token_logps[i] for i, u in enumerate(path.steps) if 0 <= u <= last_step(path))
            / (last_step(path) + 1)
            for path in paths
        ]
    )
    expected = gradient(model, (probability * rewards * own).sum())
    rows, num_eligible = as_rows(trainer, paths)
    rows["advantages"] = probability * rewards * len(paths)
    every_step(trainer, rows, num_eligible)
    found = -trainer_gradient(trainer, rows)
    torch.testing.assert_close(found, expected.to(found.dtype), atol=1e-6, rtol=1e-6)

    policy = gradient(model, (torch.stack([path.probability for path in paths]) * rewards).sum())
    cosine = torch.nn.functional.cosine_similarity(found, policy.to(found.dtype), dim=0)
    assert 1 - cosine > 1e-3  # the agreement above is to 1e-6


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_entropy_draws_have_the_uniform_gradient(model, tmp_path, loss_type):
    """Every joint draw of steps for a micro-batch of two completions, weighted by its probability."""
    averages = {draws: average_over_draws(model, tmp_path, draws, loss_type) for draws in ("uniform", "entropy")}
    assert averages["uniform"].norm() > 1e-3
    torch.testing.assert_close(averages["entropy"], averages["uniform"], atol=1e-6, rtol=1e-5)


def test_a_normaliser_that_depends_on_the_draw_breaks_it(model, tmp_path, monkeypatch):
    monkeypatch.setattr(AGRPOConfig, "_refuse_biased_weights", lambda self: None)
    averages = [average_over_draws(model, tmp_path, draws, "bnpo") for draws in ("uniform", "entropy")]
    assert (averages[0] - averages[1]).norm() > 1e-3 * averages[0].norm()


def test_weighted_kl_has_the_uniform_gradient(model, tmp_path):
    averages = [average_over_draws(model, tmp_path, draws, "dr_grpo", beta=0.3) for draws in ("uniform", "entropy")]
    without = average_over_draws(model, tmp_path, "uniform", "dr_grpo")
    assert (averages[0] - without).norm() > 1e-3
    torch.testing.assert_close(averages[1], averages[0], atol=1e-6, rtol=1e-5)


def average_over_draws(model, tmp_path, draws: str, loss_type: str, beta: float = 0.0) -> torch.Tensor:
    paths = enumerate_paths(model.eval(), PROMPT, LENGTH, BLOCK, 2)
    early = next(path for path in paths if -1 in path.steps)
    # uneven steps, so that a normaliser over drawn tokens would show
    late = next(path for path in reversed(paths) if path.tokens[:2] == [A, B] and path.tokens[3] in (A, B))
    trainer = make_trainer(
        model,
        tmp_path,
        2,
        num_mc_samples=1,
        step_draws=draws,
        loss_type=loss_type,
        beta=beta,
        step_scope="exact",
    )
    rows, num_eligible = as_rows(trainer, [early, late])
    rows["unmask_step"][1] = torch.tensor([0, 1, 2, 2], dtype=torch.int32)  # two tokens in one step, none in the last
    rows["completion_mask"] = (rows["unmask_step"] >= 0).long()
    num_eligible = torch.tensor([2, 3])
    rows["entropies"] = torch.tensor([early.entropies, late.entropies])
    rows["advantages"] = torch.tensor([0.8, -0.5])
    # off policy, so that ratios, clipping and the KL term all act
    rows["old_per_token_logps"] = rows["old_per_token_logps"] + torch.tensor(
        [[0.3, -0.4, 0.1, 0.2], [-0.1, 0.5, -0.3, 0.2]]
    )
    if beta:
        rows["ref_per_token_logps"] = (rows["old_per_token_logps"] - 0.25).view(2, 1, 1, LENGTH)
    entropy_mass = torch.zeros(2, 4, dtype=torch.float64)
    for row in range(2):
        for position, step in enumerate(rows["unmask_step"][row].tolist()):
            if step >= 0:
                entropy_mass[row, step] += rows["entropies"][row, position]
    inside = torch.arange(4) < num_eligible.unsqueeze(1)
    q = ((entropy_mass + 1e-8) if draws == "entropy" else torch.ones(2, 4, dtype=torch.float64)) * inside
    q = q / q.sum(1, keepdim=True)
    total = torch.zeros(())
    for first, second in product(range(num_eligible[0]), range(num_eligible[1])):
        steps = torch.tensor([first, second])
        chosen = q[torch.arange(2), steps]
        rows["view_steps"] = steps.view(2, 1, 1)
        rows["view_weights"] = (1 / (num_eligible * chosen)).view(2, 1, 1)
        total = total + chosen.prod() * trainer._view_loss(model, rows, 0, 0)
    return gradient(model, total)


def test_mask_token_is_never_a_word(enumerated):
    assert all(MASK not in path.tokens for path in enumerated[1])
