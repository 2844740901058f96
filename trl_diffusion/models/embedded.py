"""The tiny models that ship with the package, for the demo, the tests and comparisons of methods, offline.

A LLaDA-architecture checkpoint, and an SDAR one for methods that need block-causal attention. Both are trained by
`recipes/make_embedded.py` on synthetic word problems, Countdown and 4×4 Sudoku. Many of their training solutions are
wrong on purpose, so that reinforcement learning has something to repair; they say nothing about large models.

    model = AutoModelForCausalLM.from_pretrained(EMBEDDED_MODEL)
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED_MODEL)
"""

from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path

EMBEDDED_MODEL = str(Path(__file__).with_suffix(""))
EMBEDDED_SDAR_MODEL = f"{EMBEDDED_MODEL}_sdar"
EMBEDDED_MODELS = {"embedded": EMBEDDED_MODEL, "embedded_sdar": EMBEDDED_SDAR_MODEL}  # by their names in recipes
_BLOCK_LENGTHS = {"embedded_sdar": 4}  # where block-causal attention prescribes them


def embedded_arguments(
    arguments: Sequence[str], defaults: Sequence[str], block_option: str, *sources: str
) -> list[str] | None:
    """Return command-line arguments for an embedded model, if a command names one of them or no model at all.

    Args:
        arguments: of the command line.
        defaults: arguments for the embedded models, put first, so that the given ones override them.
        block_option: the option for the block length, which the attention of `embedded_sdar` prescribes.
        sources: options that name another model, in addition to `--model_name_or_path` and `--config`.

    Returns:
        The arguments, or `None` if the command means another model.
    """
    parser = ArgumentParser(add_help=False, allow_abbrev=False)
    for option in ("--model_name_or_path", "--config", *sources):
        parser.add_argument(option, nargs="?")
    given = vars(parser.parse_known_args(arguments)[0])
    name = given.pop("model_name_or_path") or "embedded"
    if name not in EMBEDDED_MODELS or any(given.values()):
        return None
    block = [block_option, str(_BLOCK_LENGTHS[name])] if name in _BLOCK_LENGTHS else []
    return [*defaults, *block, *arguments]
