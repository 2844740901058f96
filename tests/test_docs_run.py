"""README and documentation run: every fenced block of Python and bash, and the options of every command.

A block of Python runs as it stands. A block of bash has a marker on the line before it, an HTML comment that a reader
does not see; a block of Python may have one:

    <!-- run: --max_steps 1 -->           runs with these arguments added to every recipe (bash)
    <!-- run: max_steps=1, bf16=False --> runs with these fields added to the trainer's config (Python)
    <!-- skip: needs a GPU -->            does not run; the reason is for people

A diff changes the file that its title names. Run or not, the arguments of every command are read by the recipe's
parser and by that of `accelerate launch`, so an unknown option, a missing file or a config with an unknown key is
found. Recipes run in this process and as one process, whatever the launcher's config says. The blocks of a page share
a folder and run in their order, so that what one writes meets what the next one writes. `STAND_INS`, `hub_data` and
`earlier_runs` replace what CI has not.
"""

from __future__ import annotations

import argparse
import ast
import os
import runpy
import shutil
import subprocess
import sys
from importlib.metadata import metadata
from importlib.util import find_spec
from pathlib import Path
from unittest import mock

import pytest
from accelerate.commands.launch import launch_command_parser
from datasets import Dataset
from documentation import MARKER, PAGES, ROOT, Block, blocks_of, commands, inline_commands, patched
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM
from trl import TrlParser

from trl_diffusion import trainers
from trl_diffusion.cli.app import COMMANDS
from trl_diffusion.cli.launching import split
from trl_diffusion.cli.names import ACCELERATE_CONFIGS, config_file
from trl_diffusion.cli.parsing import Parser
from trl_diffusion.models import export_adapter
from trl_diffusion.models.embedded import EMBEDDED_MODEL
from trl_diffusion.tasks import countdown, gsm8k, rows
from trl_diffusion.tasks.word_problems import load_word_problems

pytestmark = pytest.mark.slow

# What runs in the place of a large model.
STAND_INS = {"GSAI-ML/LLaDA-8B-Instruct": EMBEDDED_MODEL}

CONFIGS = {name for name in dir(trainers) if name.endswith("Config")} | {"SFTConfig"}

BLOCKS = [block for page in PAGES for block in blocks_of(page)]
# Blocks of Python with a title are parts of the file that they name: tests/test_docs.py compares them.
CODE = [
    block for block in BLOCKS if block.language == "diff" or (block.language in ("python", "bash") and not block.title)
]
SENTENCES = [(str(page.relative_to(ROOT)), command) for page in PAGES for command in inline_commands(page)]


# ---------------------------------------------------------------- what CI has not


def hub_data(source: str, name: str | None = None, split: str = "train") -> Dataset:
    """Generated problems in place of GSM8K and of the Countdown data set; there are no others."""
    if source == gsm8k.HUB_ID:
        problems = load_word_problems(split, 64)
        pairs = zip(problems["prompt"], problems["completion"], strict=True)
        return Dataset.from_list([{"question": q[0]["content"], "answer": a[0]["content"]} for q, a in pairs])
    assert source == countdown.HUB_ID, f"no stand-in for the data set {source}"
    return countdown.load_countdown(split, 64).rename_column("numbers", "nums").select_columns(["nums", "target"])


@pytest.fixture(scope="module")
def earlier_runs(tmp_path_factory) -> Path:
    """A folder with a file of d1's, and adapters as training on LLaDA-8B leaves them, here of the embedded model."""
    folder = tmp_path_factory.mktemp("earlier_runs")
    (folder / "countdown_cd3_test.jsonl").write_text('{"input": "3,7,25", "output": "46"}\n')
    config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(EMBEDDED_MODEL), config)
    model.save_pretrained(folder / "outputs" / "llada_8b_gsm8k_agrpo")
    export_adapter(folder / "outputs" / "llada_8b_gsm8k_agrpo", folder / "trained_with_the_hubs_code")
    return folder


@pytest.fixture(scope="module")
def folders() -> dict[str, Path]:
    return {}


@pytest.fixture
def enter(earlier_runs, folders, tmp_path_factory, monkeypatch):
    """Go to the folder of a page, where its blocks find the recipes, earlier runs and no Hub."""

    def to(page: str) -> None:
        if page not in folders:
            folders[page] = tmp_path_factory.mktemp("page")
            shutil.copytree(earlier_runs, folders[page], dirs_exist_ok=True)
            for folder in ("recipes", "trl_diffusion"):
                (folders[page] / folder).symlink_to(ROOT / folder)
        monkeypatch.chdir(folders[page])

    monkeypatch.setattr(rows, "load_dataset", hub_data)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with mock.patch.dict(os.environ):  # transformers and the benchmarks write to it
        yield to


# ---------------------------------------------------------------- Python


class ForCI(ast.NodeTransformer):
    """Large models become their stand-ins, and configs of trainers get further fields."""

    def __init__(self, fields: str):
        call = ast.parse(f"config({fields})", mode="eval").body
        assert isinstance(call, ast.Call)
        self.fields, self.changed = call.keywords, not fields

    def visit_Constant(self, node):
        return ast.Constant(STAND_INS.get(node.value, node.value)) if isinstance(node.value, str) else node

    def visit_Call(self, node):
        self.generic_visit(node)
        if isinstance(node.func, ast.Name) and node.func.id in CONFIGS:
            new = {field.arg for field in self.fields}
            node.keywords = [field for field in node.keywords if field.arg not in new] + self.fields
            self.changed = True
        return node


def run_python(block: Block) -> None:
    """Run a block of Python, or only compile it if it is skipped."""
    if block.marker == "skip":
        compile(block.code, block.place, "exec")
        return
    fields = ForCI(block.note)
    tree = ast.fix_missing_locations(fields.visit(ast.parse(block.code)))
    assert fields.changed, f"the marker adds fields ({block.note}), but the block has no config of a trainer"
    exec(compile(tree, block.place, "exec"), {"__name__": "__main__"})


# ---------------------------------------------------------------- commands


class Parsed(Exception):
    """Raised where a recipe would begin its work."""


def stop_after_parsing(monkeypatch) -> None:
    ways = (Parser, "parse"), (TrlParser, "parse_args_and_config"), (argparse.ArgumentParser, "parse_args")
    for parser, name in ways:
        original = getattr(parser, name)

        def parse(self, *args, original=original, parser=parser, **kwargs):
            parsed = original(self, *args, **kwargs)
            if type(self) is parser:  # a subclass has something left to check
                raise Parsed
            return parsed

        monkeypatch.setattr(parser, name, parse)


def launched(command: list[str]) -> list[tuple[str, list[str]]]:
    """Scripts (or modules, after `-m`) that a command starts, with their arguments; the rest is checked here.

    Raises:
        AssertionError: for a command that this function does not know.
    """
    program, *arguments = command
    match Path(program).name:
        case "python":
            return [("-m " + arguments[1], arguments[2:]) if arguments[0] == "-m" else (arguments[0], arguments[1:])]
        case "accelerate":
            launch = launch_command_parser().parse_args(arguments[1:])
            assert arguments[0] == "launch" and (launch.config_file is None or Path(launch.config_file).is_file())
            return [("-m " * bool(launch.module) + launch.training_script, launch.training_script_args)]
        case "trl-diffusion":
            options, others = split(arguments)
            if options.accelerate_config is not None:
                config_file(options.accelerate_config, ACCELERATE_CONFIGS)
            return [("-m trl_diffusion", others)]
        case "make":
            plan = subprocess.run(["make", "--dry-run", *arguments], cwd=ROOT, capture_output=True, text=True)
            assert plan.returncode == 0, plan.stderr
            planned = [words for words in commands(plan.stdout) if Path(words[0]).name == "accelerate"]
            return [start for words in planned for start in launched(words)]
        case "pip":
            package = arguments[-1]
            extras = package.partition("[")[2].rstrip("]").split(",") if "[" in package else []
            assert package.partition("[")[0] in (".", "trl-diffusion"), f"pip installs {package}"
            assert {*extras} <= {*metadata("trl-diffusion").get_all("Provides-Extra")}, f"unknown extra in {package}"
            return []
    raise AssertionError(f"no test knows what {program} does: {command}")


def run_script(script: str, arguments: list[str], monkeypatch) -> None:
    arguments = [STAND_INS.get(argument, argument) for argument in arguments]
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    # Errors come out as they were raised, and not as two lines.
    monkeypatch.setattr("trl_diffusion.cli.app.run_reporting_errors", lambda command, debug: command() or 0)
    try:
        if script.startswith("-m "):
            runpy.run_module(script.removeprefix("-m "), run_name="__main__", alter_sys=True)
        else:
            monkeypatch.syspath_prepend(str((ROOT / script).parent))
            runpy.run_path(script, run_name="__main__")
    except SystemExit as stopped:  # `--help` stops so
        assert stopped.code in (None, 0), f"{script} {arguments}: {stopped.code}"


def read_arguments(script: str, arguments: list[str], monkeypatch) -> None:
    """Let the recipe parse its arguments, and stop there."""
    if "lm_eval" in script and find_spec("lm_eval") is None:
        pytest.skip("lm-eval is not installed")
    with monkeypatch.context() as context:
        stop_after_parsing(context)
        context.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda: True)  # not run, so no GPU
        try:
            run_script(script, arguments, context)
        except Parsed:
            return
    assert {"-h", "--help"} & {*arguments}, f"{script} never parsed {arguments}"


def run_commands(block: Block, monkeypatch) -> None:
    """Let the recipes of a block of bash read their arguments, then run them unless it is skipped."""
    assert block.marker is not None, (
        "Put a marker on the line before this block, `<!-- run: … -->` with arguments that shorten its recipes or "
        "`<!-- skip: … -->` with the reason."
    )
    starts = [start for command in commands(block.code) for start in launched(command)]
    for script, arguments in starts:
        read_arguments(script, arguments, monkeypatch)
    if block.marker == "run":
        assert starts, "Nothing in this block can run: say why it is skipped."
        for script, arguments in starts:
            run_script(script, [*arguments, *block.note.split()], monkeypatch)


@pytest.mark.thorough
@pytest.mark.parametrize("block", CODE, ids=lambda block: block.place)
def test_blocks_run(block, enter, monkeypatch):
    enter(block.page)
    if block.language == "diff":
        Path(block.title).write_text(patched(Path(block.title).read_text(), block.code))
    elif block.language == "python":
        run_python(block)
    else:
        run_commands(block, monkeypatch)


@pytest.mark.parametrize(("page", "command"), SENTENCES)
def test_commands_in_sentences_are_understood(page, command, enter, monkeypatch):
    enter(page)
    name, *words = command.split()
    if name == "trl-diffusion" and len(words) == 1:  # the name of a command, not a whole one
        assert words[0] in COMMANDS
        return
    for script, arguments in [start for words in commands(command) for start in launched(words)]:
        read_arguments(script, arguments, monkeypatch)


# ---------------------------------------------------------------- nothing is left out


def test_every_block_is_of_a_known_language_and_every_marker_belongs_to_one():
    others = [block.place for block in BLOCKS if block.language not in ("python", "bash", "diff", "text")]
    assert not others, f"{others}: write them as python, bash, diff or text, or say here how they are checked"
    parts = {block.page for block in BLOCKS if block.title and block.language == "python"}
    assert parts == {"docs/pages/adding_a_method.md"}
    for page in PAGES:
        text, blocks = page.read_text(), blocks_of(page)
        assert text.count("```") == 2 * len(blocks), f"{page}: a fence is not at the start of a line, or not closed"
        assert len(MARKER.findall(text)) == sum(block.marker is not None for block in blocks), page
        assert all(block.note for block in blocks if block.marker == "skip"), f"{page}: a skip has no reason"


@pytest.mark.parametrize(
    ("command", "problem"),
    [
        ("accelerate launch recipes/train.py --method dmpo --alpho 0.1", ValueError),
        ("accelerate launch --num_procesess 2 recipes/train.py --method dmpo", SystemExit),
        (
            "accelerate launch --config_file trl_diffusion/accelerate_configs/zero9.yaml recipes/train.py",
            AssertionError,
        ),
        ("accelerate launch recipes/gsm8k_agrpo.py --config llada_8b/none", FileNotFoundError),
        ("trl-diffusion train agrpo --alpho 0.1", ValueError),
        ("trl-diffusion train agrpo --accelerate_config zero9", FileNotFoundError),
        ("trl-diffusion trian agrpo", ValueError),
        ("python recipes/none.py", FileNotFoundError),
        ("python recipes/benchmarks/scoring.py --shapes huge", AssertionError),
        ("make everything", AssertionError),
        ('pip install -e ".[everything]"', AssertionError),
        ("torchrun recipes/gsm8k_agrpo.py", AssertionError),
    ],
)
def test_a_wrong_command_is_found(command, problem, enter, monkeypatch):
    enter("README.md")
    with pytest.raises(problem):
        for words in commands(command):
            for script, arguments in launched(words):
                read_arguments(script, arguments, monkeypatch)
