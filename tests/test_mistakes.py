"""The session of mistakes in the documentation is what the command line prints.

`python tests/test_mistakes.py` writes it anew.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import tempfile
import textwrap
from pathlib import Path

import pytest
from huggingface_hub import constants

from trl_diffusion.cli import app

PAGE = Path(__file__).parents[1] / "docs" / "pages" / "mistakes.md"
COMMANDS = [
    "trl-diffusion trian agrpo",
    "trl-diffusion train agpro",
    "trl-diffusion train agrpo --learing_rate 1e-5",
    "trl-diffusion train agrpo --max_steps ten",
    "trl-diffusion train agrpo --task countdwn",
    "trl-diffusion train agrpo --config llada_8b/gsm8k_agrp",
    "trl-diffusion train agrpo --config mine.yaml",
    "trl-diffusion train agrpo --accelerate_config zero8",
    "trl-diffusion train agrpo --model_name_or_path embeded",
    "trl-diffusion train agrpo --dataset_path problem.jsonl",
    "trl-diffusion train agrpo --dataset_path cuontdown=embedded",
    "trl-diffusion train agrpo --block_length 7",
    "trl-diffusion train agrpo --use_peft --lora_target_modules q_prj",
    "trl-diffusion evaluate --tasks sudoko=embedded",
    "trl-diffusion evaluate --adapter outputs/gsm8k",
]
SESSION = re.compile(r"```text\n(?P<session>(?:\$.*?)?)```", re.DOTALL)


def printed(command: str) -> str:
    """Run a command in this process and return the first line that it prints of an error."""
    error = io.StringIO()
    with contextlib.redirect_stderr(error), contextlib.redirect_stdout(io.StringIO()):
        assert app.main([*command.split()[1:], *["--use_cpu"] * ("train" in command)]) == 1
    (line,) = [line for line in error.getvalue().splitlines() if line.startswith("Error: ")]
    return line


def prepare(folder: Path) -> None:
    (folder / "problems.jsonl").write_text('{"question": "1 + 1?", "answer": "#### 2"}\n')
    (folder / "mine.yaml").write_text("max_step: 300\n")


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_a_mistake_is_answered_as_documented(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    prepare(tmp_path)
    found = SESSION.search(PAGE.read_text())
    assert found is not None
    answers = {part.split("\n")[0]: " ".join(part.split("\n")[1:]) for part in found["session"].split("$ ")[1:]}
    assert " ".join(answers[command].split()) == " ".join(printed(command).split())


if __name__ == "__main__":
    constants.HF_HUB_OFFLINE = True
    folder = Path(tempfile.mkdtemp())
    prepare(folder)
    os.chdir(folder)
    parts = [f"$ {command}\n{textwrap.fill(printed(command), 78, break_on_hyphens=False)}\n" for command in COMMANDS]
    session = "\n".join(parts)
    PAGE.write_text(SESSION.sub(lambda _: f"```text\n{session}```", PAGE.read_text(), count=1))
