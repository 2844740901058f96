"""TRL's parser of dataclasses and YAML files, with errors of one or two lines and a help that fits on a screen."""

from __future__ import annotations

import shutil
from argparse import SUPPRESS
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, NoReturn

import yaml
from trl import TrlParser

from trl_diffusion.cli.names import check_model_name, config_file
from trl_diffusion.validation import near

HELP, HELP_ALL = ("-h", "--help"), "--help-all"
_WIDTH = 100  # columns of the short help where the terminal has more


class Parser(TrlParser):
    """Parses the arguments of a command into dataclasses, as `TrlParser` does.

    `--config` may name a file that ships with the package. Options are not abbreviated, because what an abbreviation
    means changes with every new option. Errors are `ValueError`s that suggest the option that was probably meant.

    Args:
        dataclasses: the dataclasses to fill.
        command: the words that start the command, for messages and help.
        description: the text at the top of the help.
        shown: for the short help, the options of each section by its title.
    """

    def __init__(
        self,
        dataclasses: Sequence[Any],
        command: str,
        description: str = "",
        shown: Mapping[str, Sequence[str]] | None = None,
    ):
        self.command, self.shown = command, shown or {}
        super().__init__(
            dataclasses, prog=command, description=description.strip(), allow_abbrev=False, add_help=False
        )
        self.add_argument(*HELP, action="store_true", default=SUPPRESS, help="Show the options used most.")
        self.add_argument(HELP_ALL, action="store_true", default=SUPPRESS, help="Show all options.")

    def parse(self, arguments: Sequence[str]) -> tuple[Any, ...]:
        """Return the filled dataclasses.

        Args:
            arguments: of the command line.

        Raises:
            ValueError: for an option or a setting of the YAML file that does not exist or has a value of a wrong kind,
                and for a file that is no YAML.
            FileNotFoundError: if there is no such configuration.
            SystemExit: after printing the help.
        """
        self._help(arguments)
        arguments = with_config_path(arguments)
        if arguments[:1] == ["--config"]:
            read_yaml(arguments[1])  # `TrlParser` reads it again, with errors of another kind
        *parsed, from_file, from_line = self.parse_args_and_config(
            arguments, return_remaining_strings=True, separate_remaining_strings=True
        )
        if from_file:
            self._refuse_unknown(from_file, f"the file {arguments[1]}", "")  # `--config` comes first
        self._refuse_unknown(from_line, self.command, "--")
        return tuple(parsed)

    def error(self, message: str) -> NoReturn:
        """Raise argparse's message as an error, in place of a usage of two hundred options and an exit."""
        raise ValueError(f"{self.command}: {message}. `{self.command} --help` shows the options.")

    def _refuse_unknown(self, words: Sequence[str], owner: str, prefix: str) -> None:
        if not words:
            return
        options = [word for word in words if word.startswith("--")]
        if not options:
            raise ValueError(f"{owner} does not know what {words[0]!r} is: options begin with `--`.")
        known = [name for name in self._options() if "-" not in name.removeprefix("--")]
        name = options[0].partition("=")[0]
        hint = near(name.replace("-", "_").replace("__", "--", 1), known).replace("--", prefix)
        kind = "option" if prefix else "setting"
        raise ValueError(
            f"{owner} has no {kind} {prefix}{name.removeprefix('--')}.{hint} "
            f"`{self.command} {HELP_ALL}` shows them all."
        )

    def _options(self) -> list[str]:
        return [name for action in self._actions for name in action.option_strings]

    # ---------------------------------------------------------------- help

    def _help(self, arguments: Sequence[str]) -> None:
        if HELP_ALL in arguments:
            self.print_help()
        elif {*HELP} & {*arguments}:
            self._print_short_help()
        else:
            return
        raise SystemExit(0)

    def _print_short_help(self) -> None:
        width = min(_WIDTH, shutil.get_terminal_size((_WIDTH, 0)).columns)
        print(self.description)
        declared = {field.name: field for each in self.dataclass_types for field in fields(each)}
        actions = {action.dest: action for action in self._actions}
        longest = max(len(name) for names in self.shown.values() for name in names)
        for title, names in self.shown.items():
            if names:
                print(f"\n{title}, with defaults:")
            for name in names:
                text = (actions[name].help or "").partition(". ")[0].rstrip(".").replace("\n", " ")
                print(cut(f"  --{name:<{longest}}  {cut(_default(declared[name]), 11):<11}  {text}", width))
        print(f"\n{len(actions)} options in all: {self.command} {HELP_ALL}")


def cut(text: str, width: int) -> str:
    """Return a text that is not wider than `width`, with an ellipsis where it was cut."""
    return text if len(text) <= width else text[: width - 1] + "…"


def _default(field: Any) -> str:
    if field.default is MISSING or field.default in (None, "") or field.default is False:
        return ""
    return str(field.default)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Return the settings of a YAML file.

    Raises:
        ValueError: if it is no YAML, or no mapping of settings to values.
    """
    try:
        settings = yaml.safe_load(Path(path).read_text()) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"The file {path} is no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"The file {path} must map settings to values, a line `setting: value` each.")
    return settings


def with_config_path(arguments: Sequence[str]) -> list[str]:
    """Return arguments in which `--config` is followed by the path of the file that was named.

    Args:
        arguments: of the command line; of several files the last one given counts, as for other options.

    Raises:
        ValueError: if no name follows the option.
        FileNotFoundError: if there is no such configuration.
    """
    words, name = [], None
    rest = iter(arguments)
    for word in rest:
        if word == "--config" or word.startswith("--config="):
            name = word.partition("=")[2] or next(rest, None)
            if name is None:
                raise ValueError("--config needs the name of a configuration or the path of a YAML file.")
        else:
            words.append(word)
    return words if name is None else ["--config", str(config_file(name)), *words]


def model_first(arguments: Sequence[str]) -> list[str]:
    """Return arguments in which a first word that is no option has become the value of `--model_name_or_path`."""
    words = list(arguments)
    if words and not words[0].startswith("-"):
        check_model_name(words[0])
        return ["--model_name_or_path", *words]
    return words
