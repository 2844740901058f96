"""Names that users type: the files that ship with the package, and what a misspelt name was probably meant to be."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from trl_diffusion.models.embedded import EMBEDDED_MODELS
from trl_diffusion.tasks.rows import is_file
from trl_diffusion.validation import near

PACKAGE = Path(__file__).parents[1]
CONFIGS = PACKAGE / "configs"
ACCELERATE_CONFIGS = PACKAGE / "accelerate_configs"


def packaged(folder: Path) -> list[str]:
    """Return the names of the YAML files of a folder of the package, without their ending."""
    return sorted(path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.yaml"))


def config_file(name: str, folder: Path = CONFIGS) -> Path:
    """Return the YAML file that a name means: a file of the user's, or one that ships with the package.

    Args:
        name: a path, or for example `llada_8b/gsm8k_agrpo`, with or without `.yaml`.
        folder: the folder of the package to look in.

    Raises:
        FileNotFoundError: if it is neither; the message suggests a name.
    """
    if Path(name).is_file():
        return Path(name)
    shipped = (folder / name).with_suffix(".yaml")
    if shipped.is_file():
        return shipped
    names = packaged(folder)
    short = name.removesuffix(".yaml")
    # `gsm8k_agrpo` alone, or a path into a clone, ends like the name in the package.
    inner = [each for each in names if short.endswith(each) or each.endswith(f"/{short}")]
    hint = f" Did you mean {inner[0]!r}?" if inner else near(short, names)
    known = f"There are {', '.join(names)}." if folder == ACCELERATE_CONFIGS else "`trl-diffusion methods` lists them."
    raise FileNotFoundError(
        f"There is no file {name}, and no configuration of this name comes with trl_diffusion.{hint or ' ' + known}"
    )


def check_model_name(name: str) -> None:
    """Check that a model's name without an owner is a folder or a bundled model, before anything asks the Hub for it.

    Raises:
        FileNotFoundError: if it is neither; the message suggests a bundled model.
    """
    if "/" in name or Path(name).exists() or name in EMBEDDED_MODELS:
        return
    raise FileNotFoundError(
        f"There is no model {name!r}: no such folder.{near(name, EMBEDDED_MODELS)} Give a folder, a model of the "
        f"Hub with its owner (GSAI-ML/LLaDA-8B-Instruct), or a bundled one ({', '.join(EMBEDDED_MODELS)})."
    )


@contextmanager
def suggesting(name: str, choices: Iterable[str]) -> Iterator[None]:
    """Add to an error of loading data the choice that was probably meant by their name."""
    try:
        yield
    except OSError as error:
        if not is_file(name) and name not in (choices := list(choices)) and (hint := near(name, choices)):
            raise FileNotFoundError(f"{error}{hint}") from error
        raise
