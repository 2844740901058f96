"""Held-out problems before and after training: the completions that accuracy was measured on, and their table."""

from __future__ import annotations

import json
from functools import partial
from io import StringIO

import pytest
from datasets import Dataset
from methods import PROMPTS, method_named
from rich.console import Console
from tiny import tiny_tokenizer

from trl_diffusion.evaluation import AccuracyCallback, evaluate_accuracy
from trl_diffusion.sampling import SamplingConfig
from trl_diffusion.trainers.held_out_samples import FILE, HeldOutSample, HeldOutSamples, prompt_text

AGRPO = method_named("agrpo")
HELD_OUT = Dataset.from_dict({"prompt": PROMPTS, "wanted": ["a", "b"] * (len(PROMPTS) // 2)})
GREEDY = SamplingConfig(8, 4, 4, temperature=0.0, unmasking="max_prob")


def begins_as_wanted(text: str, row: dict) -> bool:
    return text.startswith(row["wanted"])


class Watched:
    """`evaluate_accuracy` with everything that it decodes kept, a list per measurement."""

    def __init__(self):
        self.seen: list[list[dict]] = []

    def __call__(self, model, dataset, on_sample):
        self.seen.append([])

        def both(sample):
            self.seen[-1].append(sample)
            on_sample(sample)

        settings = {"decoding": GREEDY, "batch_size": 3, "progress": False, "on_sample": both}
        return evaluate_accuracy(model, tiny_tokenizer(), dataset, begins_as_wanted, **settings)


def trained(folder, watched, resume=None, **settings):
    trainer = AGRPO.make(folder, max_steps=4, **settings)
    samples = HeldOutSamples(folder)
    trainer.add_callback(AccuracyCallback(trainer, HELD_OUT, watched, every=2, samples=samples))
    trainer.train(resume_from_checkpoint=resume)
    return samples


def lines(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / FILE).read_text().splitlines()]


def test_the_first_problems_are_kept_from_the_measurements_and_nothing_is_decoded_for_it(tmp_path):
    watched = Watched()
    samples = trained(tmp_path, watched)
    assert [len(seen) for seen in watched.seen] == [len(PROMPTS)] * 3  # at 0, 2 and 4 updates
    kept = lines(tmp_path)
    assert [(line["step"], line["row"]) for line in kept] == [(step, row) for step in (0, 2, 4) for row in range(3)]
    for line in kept:
        (sample,) = [one for one in watched.seen[line["step"] // 2] if one["row"] == line["row"]]
        assert (line["completion"], line["correct"]) == (sample["completion"], sample["scores"]["accuracy"] == 1.0)
        assert line["prompt"] == PROMPTS[line["row"]]
    assert len({line["completion"] for line in kept if line["row"] == 0}) > 1  # training changes them
    assert [*samples.kept.values()] == [HeldOutSample(**line) for line in kept]


def test_a_resumed_run_finds_the_beginning(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 1}
    trained(tmp_path, Watched(), **settings)
    whole, watched = lines(tmp_path), Watched()
    trained(tmp_path, watched, resume=str(tmp_path / "checkpoint-3"), **settings)
    assert lines(tmp_path) == whole and len(watched.seen) == 1
    # In another folder it has the end alone.
    samples = trained(tmp_path / "other", Watched(), resume=str(tmp_path / "checkpoint-3"), **settings)
    assert [line["step"] for line in lines(tmp_path / "other")] == [4] * 3
    assert drawn(samples).count("–") == 3


def drawn(samples: HeldOutSamples) -> str:
    console = Console(file=StringIO(), width=200)
    console.print(samples.table())
    return console.file.getvalue()


def test_the_table_shows_problem_before_and_after(tmp_path):
    samples = HeldOutSamples(tmp_path / "new")
    texts = {0: ["[red]3[/red]", "7"], 1: ["x " * 200 + "the end", "8"]}
    for step in (0, 1):
        samples.add(HeldOutSample(step, row, f"problem {row}", texts[row][step], step == 1) for row in (1, 0))
    shown = drawn(samples)
    assert shown.index("problem 0") < shown.index("problem 1") and "after 1 update " in shown
    assert "✗ [red]3[/red]" in shown and "✓ 7" in shown and "✓ 8" in shown  # texts are no markup
    assert "✗ …  x x x" in shown and "x the end" in shown and shown.count("x ") < 200


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("a b", "a b"),
        ([{"role": "system", "content": "s"}, {"role": "user", "content": "u"}], "u"),
        ([{"role": "user", "content": "u"}, {"role": "assistant", "content": "<reasoning>"}], "u"),
    ],
)
def test_prompts_in_words(prompt, words):
    assert prompt_text(prompt) == words


def test_without_samples_a_measure_needs_no_argument_for_them(tmp_path):
    trainer = AGRPO.make(tmp_path, max_steps=1)
    measure = partial(
        evaluate_accuracy, tokenizer=tiny_tokenizer(), correct=begins_as_wanted, decoding=GREEDY, progress=False
    )
    callback = AccuracyCallback(trainer, HELD_OUT, lambda model, dataset: measure(model, dataset=dataset))
    trainer.add_callback(callback)
    trainer.train()
    assert len(callback.history) == 2 and not (tmp_path / FILE).exists()
