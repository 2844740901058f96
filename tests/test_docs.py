"""The page on adding a method shows the real code and a method that works; the overview, the order of imports."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest
from methods import Method
from test_imports import FLOOR
from trainer_helpers import largest_log_ratio, losses_seen, parameters_of

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "pages" / "adding_a_method.md"
FENCE = re.compile(r"^```python(?: title=\"(?P<path>[^\"]+)\")?\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)

BLOCKS = [(match["path"], match["code"]) for match in FENCE.finditer(PAGE.read_text())]
SNIPPETS = [(path, code) for path, code in BLOCKS if path is not None]
(NEW_METHOD,) = [code for path, code in BLOCKS if path is None and code.startswith('"""')]


def test_every_block_of_python_names_its_file_or_runs_as_it_stands():
    assert len(BLOCKS) == PAGE.read_text().count("```python") and len(SNIPPETS) >= 2
    assert len(BLOCKS) == len(SNIPPETS) + 2  # test_docs_run.py runs these


def test_the_method_of_the_page_is_one_short_file_that_trains(tmp_path, monkeypatch):
    """The page is followed literally: the file is written, imported and trained, and its ratios are 1 on policy."""
    assert NEW_METHOD.count("\n") <= 80
    (tmp_path / "sequence_replay.py").write_text(NEW_METHOD)
    monkeypatch.syspath_prepend(tmp_path)
    module = importlib.import_module("sequence_replay")
    settings = {"shrink": 2, "denoising_steps": 8, "num_iterations": 2}
    method = Method("sequence replay", module.SequenceReplayTrainer, module.SequenceReplayConfig, settings)
    trainer = method.make(tmp_path / "run", num_mc_samples=0)
    seen, before = losses_seen(trainer, monkeypatch), parameters_of(trainer).clone()
    trainer.train()
    assert largest_log_ratio(seen) <= 1e-4
    assert (parameters_of(trainer) - before).norm() > 1e-3


@pytest.mark.parametrize(("path", "code"), SNIPPETS)
def test_snippets_are_whole_lines_of_their_file(path, code):
    source = "\n" + (ROOT / path).read_text()
    assert "\n" + code in source
    assert "\n" + code.replace("(", "((", 1).replace('"', "'", 1) not in source


def test_the_overview_lists_the_packages_in_the_order_of_their_imports():
    listed = re.findall(r"^\| `trl_diffusion\.(\w+)` \|", (PAGE.parent / "concepts.md").read_text(), re.MULTILINE)
    assert {*listed} == {part for part in FLOOR if (ROOT / "trl_diffusion" / part).is_dir()}
    assert [FLOOR[part] for part in listed] == sorted(FLOOR[part] for part in listed)
