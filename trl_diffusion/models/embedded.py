"""The tiny models that ship with the package, for the demo, the tests and comparisons of methods, offline.

A LLaDA-architecture checkpoint, and an SDAR one for methods that need block-causal attention. Both are trained by
`recipes/make_embedded.py` on synthetic word problems, Countdown and 4×4 Sudoku. Two more, LLaDA's again, write longer
texts with a middle: chained sums, on which methods differ, and puzzles that are solved step by step. Many of their
training solutions are wrong on purpose, so that reinforcement learning has something to repair; they say nothing about
large models.

    model = AutoModelForCausalLM.from_pretrained(EMBEDDED_MODEL)
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED_MODEL)
"""

from argparse import ArgumentParser
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path

EMBEDDED_MODEL = str(Path(__file__).with_suffix(""))
EMBEDDED_SDAR_MODEL = f"{EMBEDDED_MODEL}_sdar"
EMBEDDED_CHAINS_MODEL = f"{EMBEDDED_MODEL}_chains"
EMBEDDED_PUZZLES_MODEL = f"{EMBEDDED_MODEL}_puzzles"
# By their names in recipes.
EMBEDDED_MODELS = {
    "embedded": EMBEDDED_MODEL,
    "embedded_sdar": EMBEDDED_SDAR_MODEL,
    "embedded_chains": EMBEDDED_CHAINS_MODEL,
    "embedded_puzzles": EMBEDDED_PUZZLES_MODEL,
}
# Settings that a bundled model needs, other than those of `embedded`: the block length of block-causal attention, and
# the task, the canvas and the order of another training.
_SETTINGS: dict[str, dict[str, str]] = {
    "embedded_sdar": {"block_length": "4"},
    "embedded_chains": {
        "task": "chained_sums",
        "canvas": "45",
        "block_length": "5",
        "denoising_steps": "27",
        "unmasking": "max_prob",  # in random order it writes results before the numbers they are computed from
    },
    "embedded_puzzles": {
        "task": "sudoku_sweeps",
        "canvas": "60",
        "block_length": "10",
        "denoising_steps": "30",
        "unmasking": "max_prob",
    },
}
# The names of two options that are the same in most commands.
BLOCKS_AND_STEPS = {name: f"--{name}" for name in ("block_length", "denoising_steps")}


# Tasks that another model than `embedded` knows.
MODEL_OF_TASK = {
    "chained_sums": "embedded_chains",
    "chained_sums_fixed": "embedded_chains",
    "sudoku_sweeps": "embedded_puzzles",
    "countdown_search": "embedded_puzzles",
}


def embedded_arguments(
    arguments: Sequence[str],
    defaults: Sequence[str],
    options: Mapping[str, str],
    *sources: str,
    default: str = "embedded",
) -> list[str] | None:
    """Return command-line arguments for an embedded model, if a command names one of them or no model at all.

    Without a name it is the one that knows the tasks of the command line.

    Args:
        arguments: of the command line.
        defaults: arguments for the embedded models, put first, so that the given ones override them.
        options: the command's options for `task`, `canvas`, `block_length`, `denoising_steps` and `unmasking`, as far
            as it has them and its own default may not do, which some embedded models prescribe.
        *sources: options that name another model, in addition to `--model_name_or_path` and `--config`.
        default: the embedded model that is meant where no model is named, and no task that another one knows.

    Returns:
        The arguments, or `None` if the command means another model.

    Raises:
        ValueError: if no model is named and no embedded one knows all the tasks.
    """
    parser = ArgumentParser(add_help=False, allow_abbrev=False)
    for option in ("--model_name_or_path", "--config", *sources):
        parser.add_argument(option, nargs="?")
    if "task" in options:
        parser.add_argument(options["task"], dest="tasks", nargs="*")
    given = vars(parser.parse_known_args(arguments)[0])
    named, tasks = given.pop("model_name_or_path"), given.pop("tasks", None)
    if named not in (None, *EMBEDDED_MODELS) or any(given.values()):
        return None
    name = named or _model_of(tasks or [], default)
    prescribed = [
        (options[setting], value) for setting, value in _SETTINGS.get(name, {}).items() if setting in options
    ]
    if named is None and name != "embedded":
        prescribed.append(("--model_name_or_path", name))
    return [*defaults, *chain.from_iterable(prescribed), *arguments]


def names_model(arguments: Sequence[str]) -> bool:
    """Return whether a command line names a model with `--model_name_or_path`."""
    return any(word.partition("=")[0] == "--model_name_or_path" for word in arguments)


def _model_of(tasks: Sequence[str], default: str) -> str:
    """Return the embedded model that knows all of these tasks, each NAME or NAME=SOURCE."""
    models = {name: MODEL_OF_TASK.get(name, default) for name in (task.partition("=")[0] for task in tasks)}
    if len({*models.values()}) > 1:
        known = ", ".join(f"{model} is for {name}" for name, model in models.items())
        raise ValueError(f"no bundled model knows all of these tasks: {known}. Name a model, or take one at a time.")
    return next(iter(models.values()), default)
