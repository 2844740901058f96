"""d1's protocol gives the scores published for real outputs of LLaDA-8B-Instruct; ours differs where it says so."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from trl_diffusion.cli import rescore
from trl_diffusion.cli.evaluate import scorer
from trl_diffusion.evaluation import Measurement, Problems, join_processes, load_model, measure
from trl_diffusion.evaluation.samples import read_lines
from trl_diffusion.models.embedded import EMBEDDED_MODEL
from trl_diffusion.sampling import SamplingConfig
from trl_diffusion.tasks import TASKS
from trl_diffusion.tasks import d1_scores as d1

ROOT = Path(__file__).parent.parent
DATA = ROOT.parent / "shared" / "data"
PAGES = [ROOT / "docs" / "pages" / name for name in ("evaluation_protocols.md", "lab/published_outputs.md")]
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"public data files are not at {DATA}")

# task, canvas → score under d1's protocol as published, the same of ours, puzzles solved (percent, two decimals)
SCORES = {
    ("gsm8k", 128): ("69.29", "70.27"),
    ("gsm8k", 512): ("78.14", "78.67"),
    ("math500", 128): ("26.00", "29.20"),
    ("math500", 512): ("36.20", "40.00"),
    ("countdown", 128): ("20.70", "21.09"),
    ("countdown", 512): ("16.02", "16.02"),
    ("sudoku", 128): ("11.72", "1.90"),
    ("sudoku", 512): ("5.47", "0.34"),
}
LOOSER, STRICTER = ("gsm8k", "math500", "countdown"), ("sudoku",)


def rescored(task: str, canvas: int) -> rescore.Rescored:
    gold = rescore.gold_answers(DATA / "gsm8k_test.jsonl")
    (outputs,) = rescore.read_outputs([DATA / f"llada_8b_instruct_{task}_{canvas}.jsonl"], gold)
    return rescore.rescore(outputs)


@needs_data
@pytest.mark.parametrize(("task", "canvas"), SCORES)
def test_published_scores_and_ours(task, canvas):
    result = rescored(task, canvas)
    shares = [f"{100 * score / result.rows:.2f}" for score in (result.d1, result.own)]
    assert tuple(shares) == SCORES[task, canvas]
    changes = [difference.own - difference.d1 for difference in result.differences]
    assert sum(changes) == pytest.approx(result.own - result.d1)
    if task in LOOSER:
        assert all(change == 1 for change in changes)
    # Every figure on the page is one of these, and every reason stands there.
    page = "".join(page.read_text() for page in PAGES)
    assert all(share in page for share in shares)
    for reason, count in Counter(difference.reason for difference in result.differences).items():
        assert f"| {count} | {reason} |" in page, (reason, count)


@needs_data
def test_solved_puzzles_are_not_right_cells():
    solved = [(rescored("sudoku", canvas).solved, rescored("sudoku", canvas).d1) for canvas in (128, 512)]
    assert solved == [(1, 30), (0, 14)]


@needs_data
def test_the_published_scores_are_those_of_the_answers_not_of_the_parser_alone():
    """Negative control: answers of other questions do not reproduce them."""
    records = rescore.read_rows(DATA / "llada_8b_instruct_gsm8k_512.jsonl", ("generation", "ground_truth"), "gsm8k")
    shifted = [*records[1:], records[0]]
    right = sum(
        d1.score_gsm8k(record["generation"], {"answer": other["ground_truth"]})["accuracy"]
        for record, other in zip(records, shifted, strict=True)
    )
    assert right / len(records) < 0.05


def test_a_file_needs_a_task_in_its_name():
    with pytest.raises(ValueError, match=r"'other\.jsonl'.*gsm8k"):
        rescore.task_of(Path("other.jsonl"))


def test_parts_of_a_run_in_d1_s_form_are_one_row(tmp_path):
    """As d1's repository has them: one JSON file per process, with the completion in `generations`."""
    texts = [["\\boxed{1,000}", "\\boxed{2}"], ["<answer>**7**</answer>"]]
    truths = [[1000.0, None], [7.0]]
    paths = []
    for part, (completions, golds) in enumerate(zip(texts, truths, strict=True)):
        found = [
            {"question": f"q{text}", "generations": text, "ground_truth": gold}
            for text, gold in zip(completions, golds, strict=True)
        ]
        paths.append(tmp_path / f"gsm8k_instruct_128_64_{part}_generations.json")
        paths[-1].write_text(json.dumps({"generations": found, "gen_length": 128}))
    (outputs,) = rescore.read_outputs(paths, {"q\\boxed{2}": "2"})
    result = rescore.rescore(outputs)
    assert (outputs.name, result.rows, result.own, result.d1) == ("gsm8k_instruct_128_64", 3, 3, 1)
    paths[0].write_text("{}")
    with pytest.raises(ValueError, match=r"gsm8k_instruct_128_64_0_generations.json.*`generations`"):
        rescore.read_outputs(paths, {})


def evaluated(folder: Path) -> dict[str, list[dict]]:
    """An evaluation of the embedded model; the samples of every measurement."""
    model, tokenizer = load_model(EMBEDDED_MODEL)
    measurements = []
    for name in ("countdown", "sudoku", "word_problems"):
        task = TASKS[name]
        protocols = ["own"] if task.score_d1 is None else ["own", "d1"]
        rows = task.load("test", source="embedded", limit=6)
        problems = Problems.encode(name, rows, scorer(task, protocols), tokenizer)
        measurements.append(Measurement(problems, SamplingConfig(32, 8, 8, temperature=0), {}))
    measure(model, tokenizer, measurements, folder, join_processes(use_cpu=True), progress=False)
    return {m.name: read_lines(folder / m.name / "samples.jsonl") for m in measurements}


def test_what_evaluate_writes_can_be_rescored(tmp_path):
    samples = evaluated(tmp_path)
    results = {outputs.name: rescore.rescore(outputs) for outputs in rescore.read_outputs([tmp_path], {})}
    assert set(results) == {name for name in samples if not name.startswith("word_problems")}
    for name, result in results.items():
        score = "cells_correct" if result.task == "sudoku" else "accuracy"
        assert result.rows == 6
        assert result.own == pytest.approx(sum(sample["scores"][score] for sample in samples[name]))
        assert result.d1 == pytest.approx(sum(sample["scores"][f"d1 {score}"] for sample in samples[name]))
    assert any(result.own > 0 for result in results.values())
    one = tmp_path / next(name for name in samples if name.startswith("sudoku"))
    for path in (one, one / "samples.jsonl"):
        assert [outputs.name for outputs in rescore.read_outputs([path], {})] == [one.name]
    other = tmp_path / next(name for name in samples if name.startswith("word_problems"))
    with pytest.raises(ValueError, match=r"holds no samples.jsonl of gsm8k.*no protocol for other tasks"):
        rescore.read_outputs([other], {})


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("\\boxed{12} and \\boxed{13}", 12),
        ("\\boxed{...} \\boxed{13}", 13),
        ("\\boxed{1,234}", 1),
        ("\\boxed{12\nno} \\boxed{13}", 13),
        ("\\boxed{x} <answer>2 and 3</answer>", 3),
        ("<answer>2", None),
        ("#### 12", None),
        ("\\boxed{-3.5 m}", -3.5),
    ],
)
def test_d1_reads_the_first_box(text, number):
    assert d1.read_gsm8k(text) == number


@pytest.mark.parametrize(
    ("given", "gold", "same"),
    [
        ("\\dfrac12", "\\frac{1}{2}", True),
        ("0.5", "\\frac{1}{2}", True),
        ("1/2", "\\frac{1}{2}", True),
        ("a/b", "a/b", True),
        ("a / b", "a/b", False),
        ("x=5", "5", True),
        ("abc=5", "5", False),
        ("5\\text{ cm}", "5", True),
        ("5\\text{cm}", "5", False),
        ("5\\text{ cm}", "5\\text{ m}", True),
        ("\\sqrt3", "\\sqrt{3}", True),
        ("\\sqrt", "\\sqrt", True),
        ("90^\\circ", "90", True),
        (".5", "0.5", True),
        ("58500", "58,500", False),
    ],
)
def test_d1_compares_maths_as_strings(given, gold, same):
    assert d1.same_math_string(given, gold) is same


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("\\boxed{(3+5)*2}", 1),
        ("\\boxed{(3+5)*2 = 16}", 1),
        ("<answer>(3+5)*2</answer>", 0),  # without a box d1 takes the whole text
        ("it is (3+5)*2 = 16", 1),
        ("\\boxed{(3+5)\\times 2}", 1),
        ("\\boxed{3+5+2", 0),
        ("\\boxed{(3+5)*2} \\boxed{8*2}", 0),
        ("\\boxed{3**2+5+2}", 0),
    ],
)
def test_d1_reads_countdown(text, right):
    assert d1.score_countdown(text, {"numbers": [2, 3, 5], "target": 16}) == {"accuracy": right}


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("<answer>\n1234 34</answer>", "1234 34"),
        ("<answer>so ```\n1234\n``` </answer>", "1234"),
        ("<answer>12<|eot_id|>34", "12"),
        ("<answer>12", "12"),
        ("</answer> 12 <|endoftext|>", "12"),
        ("1234341221434321</answer>", "1234341221434321"),
        ("so 1234341221434321.", "1234341221434321"),
        ("so 12343412214343210.", ""),
    ],
)
def test_d1_reads_sudoku(text, read):
    assert d1.read_sudoku(text) == read


def test_d1_pads_and_cuts_grids():
    row = {"puzzle": "0234341221434320", "solution": "1234341221434321"}
    assert d1.score_sudoku("<answer>1</answer>", row)["cells_correct"] == 0.5
    assert d1.score_sudoku("<answer>12343412214343219</answer>", row) == {"cells_correct": 1, "puzzles_solved": 1}
