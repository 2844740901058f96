"""TRL's own GRPO script, as installed, trains a diffusion language model with three changed lines."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest
import torch
import trl.scripts.grpo
from documentation import ROOT, blocks_of, commands, patched
from transformers import AutoModelForCausalLM

from trl_diffusion.models.embedded import EMBEDDED_MODEL
from trl_diffusion.tasks.word_problems import load_word_problems

ORIGINAL = Path(trl.scripts.grpo.__file__).read_text()
PAGE = blocks_of(ROOT / "docs" / "pages" / "from_trl.md")
(DIFF,) = [block.code for block in PAGE if block.language == "diff"]
(COMMAND,) = [commands(block.code)[0] for block in PAGE if block.language == "bash"]


def test_the_page_changes_three_lines():
    """The diff of the page adds one line, replaces two, and removes nothing else."""
    before, after = ORIGINAL.splitlines(), patched(ORIGINAL, DIFF).splitlines()
    new = [line for line in after if line not in before]
    gone = [line for line in before if line not in after]
    assert (len(new), len(gone), len(after) - len(before)) == (3, 2, 1)
    assert [line for line in after if line not in new] == [line for line in before if line not in gone]


def test_a_line_that_is_not_there_is_found():
    with pytest.raises(AssertionError, match="is there 0 times"):
        patched(ORIGINAL, DIFF.replace("GRPOTrainer(", "GRPOTrainer2("))


@pytest.mark.slow
def test_the_changed_script_trains_the_bundled_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("my_grpo.py").write_text(patched(ORIGINAL, DIFF))
    (tmp_path / "my_model").symlink_to(EMBEDDED_MODEL)
    load_word_problems("train", 64).to_json("my_data/train.jsonl")
    start = COMMAND.index("my_grpo.py")
    short = ["--max_steps", "2", "--report_to", "none", "--save_strategy", "no"]
    monkeypatch.setattr(sys, "argv", [*COMMAND[start:], *short])
    runpy.run_path("my_grpo.py", run_name="__main__")
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "outputs" / "my_grpo").state_dict()
    given = AutoModelForCausalLM.from_pretrained(EMBEDDED_MODEL).state_dict()
    moved = [name for name, weight in given.items() if not torch.equal(trained[name], weight)]
    assert trained.keys() == given.keys() and len(moved) == len(given)
