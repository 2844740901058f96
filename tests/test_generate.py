"""`generate()` and `pipeline("text-generation")` for people who come from transformers."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from peft import LoraConfig, get_peft_model
from test_sampling import always, network
from tiny import END, MASK, TAIL, A, B, coded_prompts, forwards_of, tiny_model, tiny_sdar, tiny_tokenizer, without_ends
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, TextStreamer, pipeline

from trl_diffusion.models import DreamModel, LLaDAModelLM
from trl_diffusion.models.embedded import EMBEDDED_MODEL, EMBEDDED_SDAR_MODEL
from trl_diffusion.sampling import (
    CanvasState,
    DiffusionGenerateOutput,
    SamplingConfig,
    Trajectory,
    row_generators,
    sample,
)
from trl_diffusion.sampling.generation import canvas_plan

PROMPTS = torch.tensor([[A, B, A], [B, B, A]])


def seeded(model, *args, seed: int = 0, **kwargs):
    return model.generate(*args, generator=torch.Generator().manual_seed(seed), **kwargs)


def long_network(family: str):
    """A network that never ends a text, with room for 100 tokens."""
    if family == "sdar":
        return without_ends(tiny_sdar(max_position_embeddings=128))
    model_class = {"llada": LLaDAModelLM, "dream": DreamModel}[family]
    return without_ends(tiny_model(5, 10.0, model_class, max_position_embeddings=128))


# ------------------------------------------- canvases of any length


@pytest.mark.parametrize("length", [1, 16, 45, 97, 100])
@pytest.mark.parametrize("family", ["llada", "dream", "sdar"])
def test_any_length_without_a_second_setting(family, length):
    model = long_network(family)
    with forwards_of(model) as calls:
        ids = model.generate(PROMPTS, max_new_tokens=length)
    assert ids.shape == (2, 3 + length) and ids.dtype == torch.long
    assert torch.equal(ids[:, :3], PROMPTS) and not (ids == MASK).any() and (ids[:, 3:] >= A).all()
    trajectory = model.generate(PROMPTS, max_new_tokens=length, return_trajectory=True)
    assert trajectory.completion_ids.shape == trajectory.logps.shape == (2, length)
    assert torch.equal(trajectory.completion_ids, ids[:, 3:])
    assert (trajectory.unmask_step >= 0).all()
    block = 4 if family == "sdar" else min(length, 32)
    for row in trajectory.unmask_step.tolist():  # two tokens a step, blocks from left to right
        blocks = [row[start : start + block] for start in range(0, length, block)]
        assert [len(set(steps)) for steps in blocks] == [(len(steps) + 1) // 2 for steps in blocks]
        assert all(max(one) < min(other) for one, other in pairwise(blocks))
    if family != "sdar":  # positions that were not asked for are not there
        assert {call["input_ids"].size(1) for call in calls} == {3 + length}


def test_a_shorter_last_block_is_a_canvas_that_ends_there():
    model = network()
    prompts, mask = coded_prompts(8)
    trajectory = seeded(
        model, prompts, mask, max_new_tokens=10, block_length=4, temperature=1.2, return_trajectory=True
    )
    seed = int(torch.randint(2**62, (), generator=torch.Generator().manual_seed(0)))
    state = CanvasState(torch.full((8, 12), MASK), torch.full((8,), 10))
    config = SamplingConfig(12, 6, 4, 1.2, unmasking="max_prob")
    expected = sample(model, prompts, mask, config, row_generators(seed, rows=range(8)), state=state)
    assert torch.equal(trajectory.completion_ids, expected.completion_ids[:, :10])
    assert torch.equal(trajectory.logps, expected.logps[:, :10]) and not expected.logps[:, 10:].any()


@pytest.mark.parametrize(
    ("length", "block", "steps", "attention", "expected"),
    [
        (256, None, None, None, (256, 128, 32)),
        (64, None, None, None, (64, 32, 32)),
        (32, 8, None, None, (32, 16, 8)),
        (9, 9, None, None, (9, 4, 9)),
        (45, None, None, None, (64, 32, 32)),
        (16, None, None, None, (16, 8, 16)),
        (1, None, None, None, (1, 1, 1)),
        (45, 8, None, None, (48, 24, 8)),
        (6, None, None, 4, (8, 4, 4)),
        (64, None, 64, None, (64, 64, 32)),
        (100, None, 50, None, (100, 50, 20)),
        (45, None, 45, None, (45, 45, 15)),
        (96, None, 32, None, (96, 32, 24)),
        (256, 32, 64, None, (256, 64, 32)),
    ],
)
def test_the_plan_of_a_canvas(length, block, steps, attention, expected):
    assert canvas_plan(length, block, steps, attention) == expected
    SamplingConfig(*expected)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            dict(max_new_tokens=64, denoising_steps=33),
            r"denoising_steps=33 cannot.*64 positions.*multiple of 2 \(blocks",
        ),
        (dict(max_new_tokens=8, block_length=0), r"block_length \(0\) must be at least 1"),
        (
            dict(max_new_tokens=8, denoising_steps=9),
            r"denoising_steps \(9\) must be .* at most the canvas length \(8\)",
        ),
        (dict(max_new_tokens=0), "max_new_tokens must be at least 1, got 0"),
        (dict(max_length=3), "max_length=3 counts the prompt, which has 3 tokens"),
        (dict(max_new_tokens=4, max_length=9), "max_new_tokens=4 and max_length=9 both"),
        (dict(max_new_tokens=62), r"canvas of 62 does not fit: .* has 3 tokens.*64 positions.*at most 61"),
        (dict(max_new_tokens=8, do_sample=False, temperature=0.7), "do_sample=False and temperature=0.7 contradict"),
        (dict(max_new_tokens=8, do_sample=True, temperature=0.0), "do_sample=True and temperature=0.0 contradict"),
        (dict(max_new_tokens=8, num_return_sequences=2), "num_return_sequences=2 greedy completions.*all be equal"),
        (dict(max_new_tokens=8, num_return_sequences=0), "num_return_sequences must be at least 1, got 0"),
        (dict(max_new_tokens=8, eos_token_id=MASK), "eos_token_id holds 4.*4 is the mask"),
        (dict(max_new_tokens=8, eos_token_id=[A, -1]), "eos_token_id holds -1, an id that is never sampled"),
        (dict(max_new_tokens=8, num_beams=4), r"does not have these settings: num_beams \(use num_return_sequences"),
        (dict(max_new_tokens=8, repetition_penalty=1.2), "does not have these settings: repetition_penalty"),
        (dict(max_new_tokens=8, maxnew_tokens=4, foo=1), "does not have these settings: maxnew_tokens; foo"),
        (dict(unmaskin="random"), r"these settings: unmaskin\. .* has max_new_tokens, .*, unmasking, confidence_thre"),
        (
            dict(max_new_tokens=8, streamer=TextStreamer(tiny_tokenizer())),
            r"settings: streamer \(see `observer` of `trl_diffusion.sampling.sample`",
        ),
        (dict(max_new_tokens=8, stop_strings=["b"]), r"settings: stop_strings \(cut the decoded text"),
        (dict(max_new_tokens=8, temperature=1.0, top_p=0.9, return_trajectory=True), "top_p=0.9 needs top_k > 0"),
        (
            dict(max_new_tokens=8, temperature=float("nan")),
            "temperature must be at least 0, got nan; it must be finite",
        ),
        (dict(generation_config=GenerationConfig(num_beams=3)), "does not have these settings: num_beams"),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(settings, message):
    with pytest.raises(ValueError, match=message):
        network().generate(PROMPTS, **settings)


def test_no_prompt_and_no_config_are_refused():
    with pytest.raises(ValueError, match="at least one token of a prompt"):
        network().generate(max_new_tokens=4)
    with pytest.raises(TypeError, match="must be a GenerationConfig, got dict"):
        network().generate(PROMPTS, generation_config={"max_new_tokens": 4})


def test_settings_that_ask_for_nothing_are_no_error():
    expected = network().generate(PROMPTS, max_new_tokens=8)
    neutral = dict(
        num_beams=1, use_cache=True, repetition_penalty=1.0, output_scores=False, streamer=None, bos_token_id=A
    )
    assert torch.equal(network().generate(PROMPTS, max_new_tokens=8, **neutral), expected)


# ------------------------------------------- greedy or sampled


@pytest.mark.parametrize(
    ("arguments", "config", "temperature"),
    [
        ({}, {}, 0.0),
        ({"do_sample": False}, {}, 0.0),
        ({"do_sample": True}, {}, 1.0),
        ({"temperature": 0.7}, {}, 0.7),
        ({"do_sample": True, "temperature": 0.7}, {}, 0.7),
        ({}, {"do_sample": True}, 1.0),
        ({}, {"do_sample": True, "temperature": 0.6}, 0.6),
        ({}, {"do_sample": False, "temperature": 0.6}, 0.0),
        ({"do_sample": False}, {"do_sample": True, "temperature": 0.6}, 0.0),
        ({"do_sample": True}, {"temperature": 0.6}, 0.6),
        ({"do_sample": True}, {"temperature": 0.0}, 1.0),
        ({"temperature": 0.3}, {"do_sample": True, "temperature": 0.6}, 0.3),
    ],
)
def test_the_temperature(arguments, config, temperature):
    model = network()
    settings = dict(max_new_tokens=8, return_trajectory=True)
    given = model.generate(PROMPTS, generation_config=GenerationConfig(**config), **arguments, **settings)
    assert given.temperature == temperature
    model.generation_config = GenerationConfig(**config)  # what a checkpoint brings along
    assert model.generate(PROMPTS, **arguments, **settings).temperature == temperature


def test_do_sample_alone_is_temperature_one_of_the_whole_vocabulary():
    model = network()
    expected = seeded(model, PROMPTS, max_new_tokens=16, temperature=1.0)
    assert torch.equal(seeded(model, PROMPTS, max_new_tokens=16, do_sample=True), expected)
    assert not torch.equal(model.generate(PROMPTS, max_new_tokens=16), expected)


def test_top_p_alone_draws_from_what_top_k_of_all_tokens_draws_from():
    model = network(max_position_embeddings=256)
    prompts, mask = coded_prompts(32)
    settings = dict(max_new_tokens=64, do_sample=True, temperature=1.5)
    expected = seeded(model, prompts, mask, top_p=0.6, top_k=5, **settings)
    alone = seeded(model, prompts, mask, top_p=0.6, **settings)
    assert torch.equal(alone, expected)
    assert not torch.equal(alone, seeded(model, prompts, mask, **settings))
    output = seeded(model, prompts, mask, top_p=0.6, return_dict_in_generate=True, **settings)
    assert output.trajectory is None and torch.equal(output.sequences, expected)


def test_num_return_sequences_repeats_prompts():
    model = network()
    prompts, mask = coded_prompts(4)
    settings = dict(max_new_tokens=8, do_sample=True)
    three = seeded(model, prompts, mask, num_return_sequences=3, **settings)
    expected = seeded(model, prompts.repeat_interleave(3, 0), mask.repeat_interleave(3, 0), **settings)
    assert torch.equal(three, expected)
    assert len({tuple(row) for row in three[:3].tolist()}) > 1
    assert model.generate(prompts, mask, max_new_tokens=8, num_return_sequences=2, unmasking="random").shape[0] == 8


# ------------------------------------------- where a text ends


def test_what_follows_a_finished_text_is_padding():
    model, (prompts, mask) = network(), coded_prompts(16)
    output = model.generate(
        prompts, mask, max_new_tokens=8, block_length=4, pad_token_id=3, return_dict_in_generate=True
    )
    assert isinstance(output, DiffusionGenerateOutput) and isinstance(output.trajectory, Trajectory)
    canvas, completions = output.trajectory.completion_ids, output.sequences[:, 8:]
    differs = 0
    for written, returned in zip(canvas.tolist(), completions.tolist(), strict=True):
        length = next((i + 1 for i, token in enumerate(written) if token in (TAIL, END)), 8)
        assert returned == written[:length] + [3] * (8 - length)
        differs += written[length:] != [TAIL] * (8 - length)
    assert differs > 0  # text that was written into the block of an end
    plain = model.generate(prompts, mask, max_new_tokens=8, block_length=4)
    assert set(plain[:, 8:][completions != canvas].tolist()) == {TAIL}


def test_more_ids_that_end_a_text():
    model = always(A)
    settings = dict(max_new_tokens=8, block_length=4, return_trajectory=True)
    assert model.generate(PROMPTS, **settings).forwards == 4
    ended = model.generate(PROMPTS, eos_token_id=A, **settings)
    assert ended.forwards == 2 and (ended.unmask_step[:, 4:] == -1).all()
    ids = model.generate(PROMPTS, eos_token_id=[B, A], max_new_tokens=8, block_length=4)
    assert ids[:, 3:].tolist() == [[A] + [TAIL] * 7] * 2
    # the family's own ids end a text in any case
    ids = always(END).generate(PROMPTS, eos_token_id=B, max_new_tokens=8, block_length=4)
    assert ids[:, 3:].tolist() == [[END] + [TAIL] * 7] * 2


# ------------------------------------------- lengths and configs


def test_lengths_of_arguments_and_configs():
    model = network()

    def length(**settings):
        return model.generate(PROMPTS, **settings).size(1) - 3

    assert length(max_length=12) == 9
    assert length(generation_config=GenerationConfig(max_new_tokens=5)) == 5
    assert length(generation_config=GenerationConfig(max_new_tokens=5), max_length=11) == 8
    assert length(generation_config=GenerationConfig(max_length=11), max_new_tokens=5) == 5
    assert length(generation_config=GenerationConfig(max_length=11)) == 8
    model.generation_config.max_new_tokens = 7
    assert length() == 7
    assert length(generation_config=GenerationConfig(do_sample=False)) == 7
    assert length(generation_config=GenerationConfig(max_length=11)) == 8
    assert network(max_position_embeddings=300).generate(PROMPTS).size(1) == 3 + 256


def test_a_checkpoint_s_settings_of_another_sampler_are_named(monkeypatch):
    model, said = network(), []
    model.generation_config.update(repetition_penalty=1.1, max_new_tokens=6)
    model.generation_config.alg = "origin"  # Dream's remote code reads it
    monkeypatch.setattr("trl_diffusion.sampling.generation.logger.warning_once", said.append)
    assert model.generate(PROMPTS).size(1) == 9
    assert "repetition_penalty" in said[0] and "alg" in said[0]
    assert model.generate(PROMPTS, generation_config=model.generation_config).size(1) == 9  # as the pipeline does
    with pytest.raises(ValueError, match="does not have these settings: repetition_penalty"):
        model.generate(PROMPTS, generation_config=GenerationConfig(repetition_penalty=1.3))


def test_integers_and_masks_of_any_type():
    model, (prompts, mask) = network(), coded_prompts(8)
    expected = model.generate(prompts, mask, max_new_tokens=8)
    for ids_type, mask_type in (
        (torch.int32, torch.float32),
        (torch.int16, torch.bool),
        (torch.int64, torch.bfloat16),
    ):
        ids = model.generate(prompts.to(ids_type), mask.to(mask_type), max_new_tokens=8)
        assert ids.dtype == torch.long and torch.equal(ids, expected)


def test_an_adapter_and_an_empty_batch():
    model = network()
    expected = model.generate(PROMPTS, max_new_tokens=8)
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
    assert torch.equal(adapted.generate(input_ids=PROMPTS, max_new_tokens=8, do_sample=False), expected)
    assert adapted.generate(input_ids=PROMPTS[:0], max_new_tokens=8).shape == (0, 11)


# ------------------------------------------- pipeline

CHAT = [{"role": "user", "content": "Tom has 7 pens and gets 5 more. How many pens now?"}]


@pytest.fixture(scope="module")
def parts():
    return AutoModelForCausalLM.from_pretrained(EMBEDDED_MODEL), AutoTokenizer.from_pretrained(EMBEDDED_MODEL)


@pytest.fixture(scope="module")
def generator(parts):
    model, tokenizer = parts
    return pipeline("text-generation", model=model, tokenizer=tokenizer)


def greedy_text(parts, prompt: str, length: int) -> str:
    model, tokenizer = parts
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    ids = model.generate(**inputs, max_new_tokens=length)
    return tokenizer.decode(ids[0, inputs["input_ids"].size(1) :], skip_special_tokens=True)


def test_a_pipeline_completes_texts(parts, generator):
    expected = greedy_text(parts, "Tom has", 45)
    assert generator("Tom has", max_new_tokens=45, do_sample=False) == [{"generated_text": f"Tom has{expected}"}]
    [[one], [other]] = generator(["Tom has", "Ann"], max_new_tokens=16, do_sample=False, return_full_text=False)
    assert one["generated_text"] == greedy_text(parts, "Tom has", 16)
    assert other["generated_text"] == greedy_text(parts, "Ann", 16)


def test_a_pipeline_answers_chats(parts, generator):
    prompt = parts[1].apply_chat_template(CHAT, add_generation_prompt=True, tokenize=False)
    model, tokenizer = parts
    ids = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")["input_ids"]
    ids = model.generate(ids, max_new_tokens=100)[0, ids.size(1) :]
    expected = tokenizer.decode(ids, skip_special_tokens=True)
    [answer] = generator(CHAT, max_new_tokens=100, do_sample=False)
    assert answer["generated_text"] == [*CHAT, {"role": "assistant", "content": expected}]
    assert "####" in expected and "<|" not in expected and len(expected) < 60  # nothing after the end of the text
    both = generator([CHAT, CHAT], max_new_tokens=100, do_sample=False, batch_size=2)
    assert both == [[answer], [answer]]
    begun = [*CHAT, {"role": "assistant", "content": "7 + 5 ="}]
    [answer] = generator(begun, max_new_tokens=32, do_sample=False)
    assert [message["role"] for message in answer["generated_text"]] == ["user", "assistant"]
    assert answer["generated_text"][1]["content"].startswith("7 + 5 =")


@pytest.mark.parametrize("checkpoint", [EMBEDDED_MODEL, EMBEDDED_SDAR_MODEL])
def test_a_pipeline_needs_no_settings(checkpoint):
    answers = pipeline("text-generation", model=checkpoint)(CHAT, num_return_sequences=3)  # samples at 0.7
    assert len(answers) == 3 and all(answer["generated_text"][:1] == CHAT for answer in answers)


def test_a_pipeline_returns_trajectories_as_generate_does(parts, generator):
    [record] = generator("Tom has", max_new_tokens=16, do_sample=False, return_dict_in_generate=True)
    assert record["generated_text"] == "Tom has" + greedy_text(parts, "Tom has", 16)
    with pytest.raises(ValueError, match=r"stop_strings \(cut the decoded text"):
        generator("Tom has", max_new_tokens=16, stop_sequence="now")
