"""The tiny models that ship with the package, for the demo, the tests and comparisons of methods, offline.

A LLaDA-architecture checkpoint, and an SDAR one for methods that need block-causal attention. Both are trained by
`recipes/make_embedded.py` on synthetic word problems, Countdown and 4×4 Sudoku. A third one, LLaDA's again, knows
chained sums, on which methods differ. Many of their training solutions are wrong on purpose, so that reinforcement
learning has something to repair; they say nothing about large models.

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
# By their names in recipes.
EMBEDDED_MODELS = {
    "embedded": EMBEDDED_MODEL,
    "embedded_sdar": EMBEDDED_SDAR_MODEL,
    "embedded_chains": EMBEDDED_CHAINS_MODEL,
}
# Settings that a bundled model needs, other than those of `embedded`: the block length of block-causal attention, and
# the task and the canvas of another training.
_SETTINGS: dict[str, dict[str, str]] = {
    "embedded_sdar": {"block_length": "4"},
    "embedded_chains": {"task": "chained_sums", "canvas": "45", "block_length": "5", "denoising_steps": "27"},
}
# The names of two options that are the same in most commands.
BLOCKS_AND_STEPS = {name: f"--{name}" for name in ("block_length", "denoising_steps")}


# Tasks that another model than `embedded` knows.
MODEL_OF_TASK = {"chained_sums": "embedded_chains", "chained_sums_fixed": "embedded_chains"}


def embedded_arguments(
    arguments: Sequence[str],
    defaults: Sequence[str],
    options: Mapping[str, str],
    *sources: str,
    default: str = "embedded",
) -> list[str] | None:
    """Return command-line arguments for an embedded model, if a command names one of them or no model at all.

    Args:
        arguments: of the command line.
        defaults: arguments for the embedded models, put first, so that the given ones override them.
        options: the command's options for `task`, `canvas`, `block_length` and `denoising_steps`, as far as it has
            them, which some embedded models prescribe.
        *sources: options that name another model, in addition to `--model_name_or_path` and `--config`.
        default: the embedded model that is meant where no model is named.

    Returns:
        The arguments, or `None` if the command means another model.
    """
    parser = ArgumentParser(add_help=False, allow_abbrev=False)
    for option in ("--model_name_or_path", "--config", *sources):
        parser.add_argument(option, nargs="?")
    given = vars(parser.parse_known_args(arguments)[0])
    named = given.pop("model_name_or_path")
    name = named or default
    if name not in EMBEDDED_MODELS or any(given.values()):
        return None
    prescribed = [
        (options[setting], value) for setting, value in _SETTINGS.get(name, {}).items() if setting in options
    ]
    if named is None and name != "embedded":
        prescribed.append(("--model_name_or_path", name))
    return [*defaults, *chain.from_iterable(prescribed), *arguments]
