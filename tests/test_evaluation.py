"""Evaluation: fixed batches, samples that survive a kill, intervals, tables, loading."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import PartialState
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import END, MASK, TAIL, A, B, forwards_of, tiny_model, tiny_tokenizer

from trl_diffusion.evaluation import (
    Measurement,
    Problems,
    evaluate_accuracy,
    join_processes,
    load_model,
    markdown_table,
    measure,
    merge_for_decoding,
    weights_checksum,
    wilson_interval,
    write_results,
)
from trl_diffusion.evaluation.decoding import decode_batch, fixed_batches
from trl_diffusion.evaluation.lm_eval.likelihood_bound import is_greedy, log_likelihood_bound
from trl_diffusion.evaluation.results import console_table, describe_decoding, plot, summarise
from trl_diffusion.evaluation.samples import SampleStore, read_lines
from trl_diffusion.models.embedded import EMBEDDED_MODEL
from trl_diffusion.sampling import SamplingConfig, row_generators, sample
from trl_diffusion.tasks.word_problems import correctness_reward, load_word_problems
from trl_diffusion.tokenization import encode_prompt, left_pad

GREEDY = SamplingConfig(32, 8, 8, temperature=0.0, unmasking="max_prob")
ROWS = 20


def score(text: str, row: dict) -> dict[str, float]:
    return {"accuracy": correctness_reward([text], [row["answer"]])[0], "digits": float(text[-1:].isdigit())}


@pytest.fixture(scope="module")
def embedded():
    return load_model(EMBEDDED_MODEL)


@pytest.fixture(scope="module")
def problems(embedded):
    return Problems.encode("words", load_word_problems("test", ROWS), score, embedded[1], {"source": "embedded"})


@pytest.fixture(scope="module")
def measurement(problems):
    return Measurement(problems, GREEDY, {"model": "embedded"}, batch_size=6)


@pytest.fixture(scope="module")
def finished(embedded, measurement, tmp_path_factory):
    """An evaluation that nothing interrupted: its folder and its result."""
    folder = tmp_path_factory.mktemp("finished")
    (result,) = measure(*embedded, [measurement], folder, PartialState(cpu=True), progress=False)
    return folder / measurement.name, result


# Batches


@settings(max_examples=100, derandomize=True, deadline=None)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=60), st.integers(1, 9))
def test_batches_hold_every_index_once_and_neighbours_in_length(lengths, size):
    batches = fixed_batches(lengths, size)
    order = [index for batch in batches for index in batch]
    assert sorted(order) == list(range(len(lengths)))
    assert [lengths[index] for index in order] == sorted(lengths)
    assert all(len(batch) == size for batch in batches[:-1]) and len(batches) == math.ceil(len(lengths) / size)


def test_an_empty_batch_is_refused():
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        fixed_batches([3], 0)


def test_an_assistant_message_begins_the_answer(embedded):
    tokenizer = embedded[1]
    question = [{"role": "user", "content": "2 + 2?"}]
    ids = encode_prompt([*question, {"role": "assistant", "content": "4 is"}], tokenizer)
    header = tokenizer.apply_chat_template(question, add_generation_prompt=True, tokenize=False)
    assert tokenizer.decode(ids) == header + "4 is"
    assert encode_prompt(question, tokenizer) == tokenizer(header, add_special_tokens=False)["input_ids"]


# Samples


def test_every_sample_says_what_was_measured_and_how(embedded, measurement, finished):
    folder, result = finished
    samples = read_lines(folder / "samples.jsonl")
    assert [one["index"] for one in samples] == list(range(ROWS)) == [one["row"] for one in samples]
    model, tokenizer = embedded
    batch = measurement.batches[0]
    ids, mask = left_pad([measurement.problems.prompts[index] for index in batch], 1)
    trajectory = sample(model, ids, mask, GREEDY, row_generators(0, rows=batch))
    for place, index in enumerate(batch):
        one, row = samples[index], measurement.problems.rows[index]
        steps, canvas = trajectory.unmask_step[place], trajectory.completion_ids[place]
        length = next((i + 1 for i, token in enumerate(canvas.tolist()) if token in (1, 2)), 32)
        assert one["forwards"] == len(set(steps[steps >= 0].tolist())) and one["tokens"] == length
        assert one["tokens_per_forward"] == length / one["forwards"]
        assert one["completion"] == tokenizer.decode(canvas[:length], skip_special_tokens=True)
        assert one["ended"] == (length < 32 or canvas[-1].item() in (1, 2))
        assert row["prompt"][0]["content"] in one["prompt"] and one["prompt"].startswith("<|startoftext|>")
        assert one["reference"] == {"answer": row["answer"], "kind": row["kind"]}
        assert one["scores"] == score(one["completion"], row) and one["seed"] == 0
        assert one["decoding"] == {
            "canvas_length": 32,
            "denoising_steps": 8,
            "block_length": 8,
            "temperature": 0.0,
            "top_k": 0,
            "top_p": 1.0,
            "unmasking": "max_prob",
            "confidence_threshold": None,
            "entropy_bound": None,
            "cache": "auto",
            "cache_refresh": 0,
            "fallback": "surest",
            "position_temperature": 0.5,
            "rollout_compile": False,
        }
    assert result.scores["accuracy"].value == sum(one["scores"]["accuracy"] for one in samples) / ROWS
    assert {path.name for path in folder.iterdir()} == {"samples.jsonl", "settings.json"}


def test_it_counts_as_the_callback_in_training_does(embedded, problems, finished):
    accuracy = evaluate_accuracy(
        *embedded,
        problems.rows,
        lambda text, row: score(text, row)["accuracy"] == 1,
        decoding=GREEDY,
        batch_size=6,
        progress=False,
    )
    estimate = finished[1].scores["accuracy"]
    assert 0 < accuracy.value < 1
    assert accuracy == estimate


@pytest.mark.slow
@pytest.mark.parametrize(
    ("decoding", "completions"),
    [
        (GREEDY, 1),
        (replace(GREEDY, temperature=1.0), 3),
        (replace(GREEDY, temperature=1.0, unmasking="random", top_k=20), 3),
    ],
    ids=["greedy", "sampled", "top-k in a random order"],
)
def test_the_batch_size_changes_neither_the_accuracy_nor_a_completion(embedded, problems, decoding, completions):
    rows = problems.rows.select(range(6))

    def evaluated(batch_size: int, seed: int = 0):
        texts: dict[str, list[str]] = {}

        def correct(text: str, row: dict) -> bool:
            texts.setdefault(str(row), []).append(text)
            return score(text, row)["accuracy"] == 1

        accuracy = evaluate_accuracy(
            *embedded,
            rows,
            correct,
            decoding=decoding,
            batch_size=batch_size,
            completions_per_prompt=completions,
            seed=seed,
            progress=False,
        )
        return accuracy, texts

    accuracy, texts = evaluated(1)
    assert accuracy.total == len(texts) == 6 and all(len(drawn) == completions for drawn in texts.values())
    for batch_size in (2, 4, 5, 18):
        assert evaluated(batch_size) == (accuracy, texts), batch_size
    if completions > 1:
        assert any(len(set(drawn)) > 1 for drawn in texts.values())
        assert evaluated(5, seed=1)[1] != texts


def test_parallel_unmasking_counts_the_forwards_that_were_run(embedded, problems):
    """A block ends as soon as it is written, so fewer steps are taken than the number of the last one says."""
    config = SamplingConfig(32, 32, 8, temperature=0.0, unmasking="max_prob", confidence_threshold=0.7)
    prompts = problems.prompts[:4]
    with forwards_of(embedded[0]) as calls:
        (decoded,) = decode_batch(*embedded, prompts[:1], config, row_generators(0, rows=[0]))
    assert decoded.forwards == len(calls) < 32
    for one in decode_batch(*embedded, prompts, config, row_generators(0, rows=range(4))):
        assert one.forwards < 32


class Stopped(Exception):
    pass


def stop_after(problems: Problems, completions: int) -> Problems:
    """The same problems with a score that raises when it is asked for more."""
    asked = iter(range(completions))

    def limited(text, row):
        if next(asked, None) is None:
            raise Stopped
        return score(text, row)

    return replace(problems, score=limited)


def test_a_stopped_evaluation_goes_on_without_repeating_work(embedded, measurement, finished, tmp_path):
    state = PartialState(cpu=True)
    with pytest.raises(Stopped):
        half = replace(measurement, problems=stop_after(measurement.problems, 14))
        measure(*embedded, [half], tmp_path, state, progress=False)
    part = tmp_path / measurement.name / "part-0.jsonl"
    assert len(read_lines(part)) == 12  # two batches of 6; the third was stopped
    # the last thing a killed process writes may be half a line
    part.write_bytes(part.read_bytes() + b'{"index": 3, "row"')
    rest = replace(measurement, problems=stop_after(measurement.problems, ROWS - 12))
    (result,) = measure(*embedded, [rest], tmp_path, state, progress=False)
    assert result == finished[1]
    # and a finished one is read, not measured
    measure(*embedded, [replace(rest, problems=stop_after(rest.problems, 0))], tmp_path, state, progress=False)
    for name in ("samples.jsonl", "settings.json"):
        assert (tmp_path / measurement.name / name).read_bytes() == (finished[0] / name).read_bytes()
    assert not part.exists()


def test_a_batch_of_which_lines_are_missing_is_decoded_again(measurement, finished, tmp_path):
    folder = tmp_path / "samples"
    shutil.copytree(finished[0], folder)
    lines = (folder / "samples.jsonl").read_bytes().splitlines(keepends=True)
    (folder / "samples.jsonl").unlink()
    first, second, *_ = measurement.batches
    # process 3 finished one batch; process 1 did too, but its last line got no further than its newline
    (folder / "part-3.jsonl").write_bytes(b"".join(lines[index] for index in first))
    (folder / "part-1.jsonl").write_bytes(b"".join(lines[index] for index in second)[:-1])
    store = SampleStore(folder, measurement.settings, measurement.batches)
    store.prepare()
    assert store.pending() == [1, 2, 3]
    assert [path.name for path in folder.glob("part-*")] == ["part-0.jsonl"]
    assert sorted(one["index"] for one in read_lines(folder / "part-0.jsonl")) == sorted(first)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"decoding": replace(GREEDY, denoising_steps=16)}, "decoding.denoising_steps is 8 there and 16 here"),
        ({"seed": 1}, "seed is 0 there and 1 here"),
        ({"batch_size": 7}, "batch_size is 6 there and 7 here"),
        ({"model_facts": {"model": "embedded", "weights": "0"}}, "model.weights is None there and '0' here"),
    ],
)
def test_samples_of_other_settings_are_refused(measurement, finished, change, message):
    other = replace(measurement, **change)
    with pytest.raises(ValueError, match=f"other settings: {message}.*another output_dir"):
        SampleStore(finished[0], other.settings, other.batches).prepare()


def test_other_problems_under_the_same_name_are_refused(embedded, problems, measurement, finished):
    rows = problems.rows.map(lambda row, index: {**row, "answer": "0"} if index == 3 else row, with_indices=True)
    other = replace(measurement, problems=Problems.encode("words", rows, score, embedded[1], problems.origin))
    with pytest.raises(ValueError, match=r"fingerprint_of_problems is .* there"):
        SampleStore(finished[0], other.settings, other.batches).prepare()


def test_damaged_files_are_named(measurement, finished, tmp_path):
    folder = tmp_path / "samples"
    shutil.copytree(finished[0], folder)
    store = SampleStore(folder, measurement.settings, measurement.batches)
    samples = folder / "samples.jsonl"
    lines = samples.read_bytes().splitlines(keepends=True)
    samples.write_bytes(b"".join([lines[0], b"nonsense\n", *lines[2:]]))
    with pytest.raises(ValueError, match=r"samples.jsonl is damaged: line 2 is not JSON"):
        store.read()
    samples.write_bytes(b"".join([lines[0], b"[]\n", *lines[2:]]))
    with pytest.raises(ValueError, match=r"samples.jsonl is damaged: '?b?'?.*is not a JSON object"):
        store.read()
    samples.write_bytes(b"".join(lines[:-1]))
    with pytest.raises(ValueError, match=f"holds {ROWS - 1} samples, not the {ROWS} expected"):
        store.read()
    (folder / "settings.json").unlink()
    with pytest.raises(ValueError, match=r"without settings.json"):
        store.prepare()


def test_sampling_draws_each_completion_from_its_own_stream(embedded, problems, tmp_path):
    config = SamplingConfig(32, 16, 8, temperature=1.0, unmasking="random")
    few = replace(problems, rows=problems.rows.select(range(8)), prompts=problems.prompts[:8])
    one = Measurement(few, config, {"model": "embedded"}, completions_per_prompt=2, batch_size=16)
    state = PartialState(cpu=True)

    def texts(measurement, folder):
        measure(*embedded, [measurement], tmp_path / folder, state, progress=False)
        lines = read_lines(tmp_path / folder / measurement.name / "samples.jsonl")
        return [line["row"] for line in lines], [line["completion"] for line in lines]

    rows, first = texts(one, "a")
    assert rows == [row for row in range(8) for _ in range(2)]
    assert first == texts(one, "b")[1] != texts(replace(one, seed=1), "c")[1]
    assert sum(left != right for left, right in zip(first[::2], first[1::2], strict=True)) >= 2


# What does not fit


def test_what_cannot_be_measured_is_refused(embedded, problems, measurement, tmp_path):
    state = PartialState(cpu=True)
    long = replace(measurement, decoding=SamplingConfig(256, 128, 32, temperature=0.0, unmasking="max_prob"))
    longest = max(map(len, problems.prompts))
    match = rf"canvas of 256 does not fit.*words has {longest} tokens.*256 positions.*at most {256 - longest},"
    with pytest.raises(ValueError, match=match):
        measure(*embedded, [long], tmp_path, state)
    with pytest.raises(ValueError, match="more than once: words-canvas32-steps8"):
        measure(*embedded, [measurement, measurement], tmp_path, state)
    with pytest.raises(ValueError, match=r"words has 1 rows with \['question'\]"):
        Problems.encode("words", Dataset.from_list([{"question": "?"}]), score, embedded[1])
    with pytest.raises(ValueError, match="words has 0 rows"):
        Problems.encode("words", problems.rows.select([]), score, embedded[1])
    assert not list(tmp_path.iterdir())


def test_processes_that_do_not_know_of_each_other_are_refused(monkeypatch):
    assert join_processes(use_cpu=True).num_processes == 1
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RuntimeError, match="started 2 processes, but 1 joined"):
        join_processes(use_cpu=True)


# Results


def fake_samples(scores: list[float], rows: list[int]) -> list[dict]:
    return [
        {"row": row, "scores": {"accuracy": value}, "forwards": 4, "tokens": 6 + index, "ended": index > 0}
        for index, (value, row) in enumerate(zip(scores, rows, strict=True))
    ]


def fake_settings(**decoding) -> dict:
    decoding = {
        "canvas_length": 32,
        "denoising_steps": 16,
        "block_length": 8,
        "temperature": 0.0,
        "top_k": 0,
        "top_p": 1.0,
        "unmasking": "max_prob",
        **decoding,
    }
    return {
        "task": "words",
        "source": "embedded",
        "problems": 2,
        "completions_per_prompt": 2,
        "seed": 0,
        "batch_size": 4,
        "model": {"model": "m", "adapter": None},
        "decoding": decoding,
    }


def test_summary_by_hand():
    result = summarise(fake_settings(), fake_samples([1.0, 0.0, 1.0, 1.0], [0, 0, 1, 1]))
    assert result.scores["accuracy"].value == 0.75
    # two prompts, however many completions of each
    assert (result.scores["accuracy"].low, result.scores["accuracy"].high) == wilson_interval(1.5, 2)
    assert (result.completions, result.forwards, result.tokens, result.ended) == (4, 4, 7.5, 0.75)
    assert result.tokens_per_forward == 30 / 16


def test_wilson_interval_is_too_wide_for_shares_rather_than_too_narrow():
    """Means of 30 shares in [0, 1] with mean 0.4: the interval must hold it at least 95 % of the time."""
    rng = np.random.default_rng(0)
    shares = rng.binomial(5, 0.4, size=(2000, 30)) / 5
    ends = [wilson_interval(total, 30) for total in shares.sum(1)]
    assert sum(low <= 0.4 <= high for low, high in ends) / 2000 > 0.999


def test_decoding_settings_stand_beside_every_number(tmp_path):
    greedy = summarise(fake_settings(), fake_samples([1.0, 0.0], [0, 1]))
    drawn = fake_settings(canvas_length=64, temperature=0.6, top_k=150, top_p=0.99, unmasking="random")
    results = [greedy, summarise(drawn, fake_samples([0.5, 0.5], [0, 1]))]
    assert describe_decoding(drawn["decoding"]).endswith("random, temperature 0.6, top-k 150, top-p 0.99")
    fast = fake_settings(confidence_threshold=0.9, cache="dual", cache_refresh=4)["decoding"]
    assert describe_decoding(fast).endswith("max_prob, threshold 0.9, dual cache renewed every 4 steps, greedy")
    rows = [line.split(" | ") for line in markdown_table(results).splitlines()[2:]]
    assert [row[1:6] for row in rows] == [
        ["accuracy", "50.0 [9.5, 90.5]", "2 × 2", "canvas 32, 16 steps, block 8, max_prob, greedy", "4.0"],
        ["accuracy", "50.0 [9.5, 90.5]", "2 × 2", describe_decoding(drawn["decoding"]), "4.0"],
    ]
    assert console_table(results).row_count == 2
    write_results(results, tmp_path)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary[1]["scores"]["accuracy"]["value"] == 0.5 and summary[1]["settings"] == drawn
    assert "- words: source embedded\n" in (tmp_path / "summary.md").read_text()
    assert (tmp_path / "accuracy.png").stat().st_size > 5000


def test_plot_shows_accuracy_against_forwards():
    half, full = fake_samples([1.0, 0.0], [0, 1]), fake_samples([1.0, 1.0], [0, 1])
    for one in full:
        one["forwards"] = 8
    other = {**fake_settings(canvas_length=64), "task": "sums"}
    panels = plot([summarise(fake_settings(), full), summarise(fake_settings(), half), summarise(other, half)]).axes
    assert [panel.get_title() for panel in panels] == ["words", "sums"]
    (line,) = panels[0].containers
    assert line.get_label() == "canvas 32"
    assert line.lines[0].get_xydata().tolist() == [[4.0, 50.0], [8.0, 100.0]]


# Loading


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """A LoRA adapter of the embedded model that changes it."""
    folder = tmp_path_factory.mktemp("adapter")
    model, _ = load_model(EMBEDDED_MODEL)
    torch.manual_seed(0)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "up_proj"], init_lora_weights=False))
    adapted.save_pretrained(folder)
    return str(folder), weights_checksum(adapted)


def test_an_adapter_comes_with_its_base(adapter):
    folder, checksum = adapter
    for arguments in ((None, folder), (folder, None), (EMBEDDED_MODEL, folder)):
        model, tokenizer = load_model(*arguments)
        assert weights_checksum(model) == checksum and not model.training
        assert tokenizer.padding_side == "left"
    assert checksum != weights_checksum(load_model(EMBEDDED_MODEL)[0])


def test_an_adapter_is_merged_where_only_rounding_changes(adapter, monkeypatch):
    folder, _ = adapter
    ids = torch.tensor([[5, 6, 7, 8]])

    def merged(wanted, **settings):
        given, _ = load_model(folder, **settings)
        with torch.no_grad():
            expected = given(input_ids=ids).logits
            model, said = merge_for_decoding(given, wanted)
            return (model(input_ids=ids).logits - expected).abs().max().item(), isinstance(model, PeftModel), said

    difference, adapted, said = merged(None)
    assert difference < 1e-4 and not adapted and said == "yes"
    assert merged(False) == (0.0, True, "no: merge_adapter is off")
    difference, adapted, said = merged(None, dtype="bfloat16")
    assert (difference, adapted) == (0.0, True) and said.startswith(
        "no: weights are bfloat16, in which a merged weight"
    )
    difference, adapted, said = merged(True, dtype="bfloat16")
    assert difference > 1e-3 and not adapted and said == "yes"
    plain, _ = load_model(EMBEDDED_MODEL)
    assert merge_for_decoding(plain) == (plain, None)
    with pytest.raises(ValueError, match="merge_adapter=True cannot be done: there is no adapter"):
        merge_for_decoding(plain, True)
    monkeypatch.setattr("trl_diffusion.adapters.merging.products_are_exact", lambda device: False)
    assert "as TF32 does" in merged(None)[2] and merged(True)[2] == "yes"


def other_base(folder: Path, **overrides) -> str:
    model = tiny_model(**overrides)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


def test_an_adapter_for_another_base_is_refused(adapter, tmp_path):
    folder, _ = adapter
    base = other_base(tmp_path / "base", num_hidden_layers=4, hidden_size=96, num_attention_heads=4)
    with pytest.raises(ValueError, match=f"was trained on '.*embedded', not on '{base}'"):
        load_model(base, folder)
    with pytest.raises(ValueError, match="does not fit the weights"):  # other shapes
        load_model(base, folder, allow_other_base=True)
    shallow = other_base(tmp_path / "shallow", num_hidden_layers=2, hidden_size=96, intermediate_size=256)
    # two layers × two modules × two matrices are left over
    with pytest.raises(ValueError, match=r"does not fit the weights.*layers\.2.*\(8 in all\)"):
        load_model(shallow, folder, allow_other_base=True)


def test_embedded_models_load_by_name():
    assert [load_model(name)[0].config.model_type for name in ("embedded", "embedded_sdar")] == ["llada", "sdar"]


def test_what_is_no_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match="got neither"):
        load_model(None)
    with pytest.raises(ValueError, match=r"holds no adapter: there is no adapter_config.json"):
        load_model(EMBEDDED_MODEL, str(tmp_path))


def test_checksum_sees_every_weight(tmp_path):
    model, same = tiny_model(), tiny_model()
    assert weights_checksum(model) == weights_checksum(same) != weights_checksum(tiny_model(seed=1))
    assert weights_checksum(model.bfloat16()) != weights_checksum(same)
    with torch.no_grad():
        next(same.parameters())[0, 0] += 1e-6
    assert weights_checksum(same) != weights_checksum(tiny_model())


# Likelihood


def exact_bound(model, context: list[int], continuation: list[int]) -> float:
    """The bound by enumeration of every set of hidden positions."""
    length, total = len(continuation), 0.0
    for count in range(1, length + 1):
        sets = list(combinations(range(length), count))
        for hidden in sets:
            canvas = [MASK if i in hidden else token for i, token in enumerate(continuation)]
            logits = model(input_ids=torch.tensor([[*context, *canvas]])).logits[0, len(context) :]
            logits[:, MASK] = -torch.inf
            log_probs = logits.log_softmax(-1)
            value = sum(log_probs[i, continuation[i]].item() for i in hidden)
            total += value * length / count / len(sets) / length
    return total


@pytest.mark.slow
@torch.no_grad()
def test_likelihood_bound_is_that_of_enumeration():
    model = tiny_model().eval()
    contexts = [[A, B], [B, B, A], [A], [B, A]]
    continuations = [[A, B, A], [B, A], [B], [B, END, TAIL]]
    generators = row_generators(0, rows=range(4))
    bounds = log_likelihood_bound(model, contexts, continuations, generators, views=20_000, batch_size=2000)
    for context, continuation, bound in zip(contexts, continuations, bounds, strict=True):
        assert bound == pytest.approx(exact_bound(model, context, continuation), abs=0.04)
    # one token: one view, and exact
    assert bounds[2] == pytest.approx(exact_bound(model, contexts[2], continuations[2]), abs=1e-5)
    # no estimate depends on what else is asked, nor on the batch
    alone = log_likelihood_bound(model, contexts[3:], continuations[3:], row_generators(0, rows=[3]), 20_000, 512)
    assert alone[0] == pytest.approx(bounds[3], abs=1e-4)


@torch.no_grad()
def test_greedy_is_what_the_sampler_writes():
    model = tiny_model(seed=3).eval()
    config = SamplingConfig(4, 4, 4, temperature=0.0, unmasking="max_prob")
    for context in ([A, B], [B], [A, A, B, B]):
        written = sample(model, torch.tensor([context]), None, config, row_generators(0, rows=[0])).completion_ids[0]
        assert is_greedy(model, context, written.tolist())
        for place in range(4):
            other = written.clone()
            other[place] = B if written[place] != B else A
            assert not is_greedy(model, context, other.tolist())
