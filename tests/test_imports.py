"""Imports run one way: a part of the package imports parts earlier in `FLOORS`, or on the same floor without a
circle."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from launching import HANG
from transformers import CONFIG_MAPPING

import trl_diffusion
import trl_diffusion.models
from trl_diffusion.registration import STAND_INS

PACKAGE = Path(trl_diffusion.__file__).parent
FLOORS = [
    {"family", "distribution", "papers", "streams", "tokenization", "validation", "tasks"},
    {"sampling"},
    {"models"},
    {"adapters", "credit", "registration"},
    {"likelihood"},
    {"losses"},
    {"runtime"},
    {"evaluation", "viewing"},
    {"trainers"},
    {"cli"},
]
FLOOR = {part: number for number, parts in enumerate(FLOORS) for part in parts}
# Import paths from before a part moved up: read when somebody asks for them.
KEPT = {("evaluation", "trainers"), ("models", "adapters")}


def module_name(path: Path) -> str:
    return ".".join((PACKAGE.name, *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__")


def imports() -> Iterator[tuple[str, str]]:
    """(module, what it imports of the package), wherever in the file the import stands."""
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{path}: imports of the package are absolute"
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            else:
                continue
            yield from ((module_name(path), name) for name in names if name.startswith(f"{PACKAGE.name}."))


def part(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def test_parts_import_only_what_is_above_them():
    found = set()
    for module, imported in imports():
        mine, theirs = part(module), part(imported)
        if {mine, theirs} & {"", "__main__"} or mine == theirs or theirs.startswith("__"):
            continue
        assert mine in FLOOR and theirs in FLOOR, f"{module} imports {imported}: give both a floor"
        if FLOOR[theirs] > FLOOR[mine]:
            found.add((mine, theirs))
            assert (mine, theirs) in KEPT, f"{module} imports {imported}, which stands on it"
    assert found == KEPT


def test_no_circle_on_a_floor():
    same_floor = {}
    for module, imported in imports():
        mine, theirs = part(module), part(imported)
        if mine != theirs and FLOOR.get(mine, -1) == FLOOR.get(theirs, -2):
            same_floor.setdefault(mine, set()).add(theirs)
    while same_floor:
        free = [name for name in same_floor if not same_floor[name] & same_floor.keys()]
        assert free, f"a circle among {sorted(same_floor)}"
        for name in free:
            del same_floor[name]


def test_no_import_for_annotations_hides_a_circle():
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
                hidden = [ast.unparse(line) for line in node.body if PACKAGE.name in ast.unparse(line)]
                assert not hidden, f"{module_name(path)}: {hidden}"


OPTIONAL = ("deepspeed", "bitsandbytes", "lm_eval", "wandb", "trackio", "liger_kernel", "vllm")
# Modules that are loaded where their package is there.
NEED_ONE = ("trl_diffusion.models.quantised_linear", "trl_diffusion.evaluation.lm_eval.model")
WALK = f"""
import importlib, pkgutil, sys
sys.modules.update(dict.fromkeys({OPTIONAL}))  # as if they were not installed
import trl_diffusion
for module in pkgutil.walk_packages(trl_diffusion.__path__, "trl_diffusion."):
    if not module.name.startswith({NEED_ONE}) and not module.name.endswith("__main__"):
        importlib.import_module(module.name)
"""


@pytest.mark.slow
def test_extras_are_not_needed():
    found = subprocess.run([sys.executable, "-c", WALK], capture_output=True, text=True, timeout=HANG)
    assert found.returncode == 0, found.stderr[-2000:]


def run_python(code: str, *arguments: str) -> str:
    found = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=HANG)
    assert found.returncode == 0, found.stderr[-2000:]
    return found.stdout


@pytest.mark.slow
def test_importing_the_package_and_its_tasks_loads_no_model_code_and_no_trainer():
    loaded = run_python("import trl_diffusion, trl_diffusion.tasks, sys; print(*sys.modules)").split()
    assert "trl_diffusion.tasks.gsm8k" in loaded and "trl_diffusion.registration" in loaded
    packages = ("peft", "trl", "accelerate", "trl_diffusion.models", "trl_diffusion.trainers")
    heavy = [name for name in loaded if any(name == part or name.startswith(f"{part}.") for part in packages)]
    modelling = [name for name in loaded if re.search(r"^transformers\.models\.(?!auto\.).*\.modeling_", name)]
    assert not heavy and not modelling and "transformers.modeling_utils" not in loaded


CHECKPOINT, SDAR = (str(PACKAGE / "models" / name) for name in ("embedded", "embedded_sdar"))
# Each in a copy of a process that has loaded nothing of the package but itself, so that none helps the next.
IN_COPIES = """
import os, sys
import trl_diffusion
from transformers import AutoConfig, AutoModelForCausalLM
assert "trl_diffusion.models" not in sys.modules
for code in sys.argv[1:]:
    if (pid := os.fork()) == 0:
        exec(code)
        sys.stdout.flush()
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0, code
"""


@pytest.mark.slow
def test_after_it_the_auto_classes_load_our_checkpoints():
    expected = {
        f"print(AutoModelForCausalLM.from_pretrained({CHECKPOINT!r}))": "LLaDAModelLM(",
        f"print(AutoModelForCausalLM.from_pretrained({SDAR!r}))": "SDARForCausalLM(",
        f"print(AutoConfig.from_pretrained({CHECKPOINT!r}))": "LLaDAConfig {",
        "print(AutoConfig.for_model('Dream', hidden_size=8))": '"hidden_size": 8',
        "print(trl_diffusion.models.LLaDAConfig)": "trl_diffusion.models.llada",
    }
    found = run_python(IN_COPIES, *expected)
    for words in expected.values():
        assert words in found


@pytest.mark.slow
def test_every_family_has_its_stand_in_and_replaces_it():
    ours = {kind for kind in CONFIG_MAPPING if CONFIG_MAPPING[kind].__module__.startswith("trl_diffusion.")}
    assert ours == set(STAND_INS)
    assert all(CONFIG_MAPPING[kind].__module__.startswith("trl_diffusion.models.") for kind in ours)
