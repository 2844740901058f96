r"""Watch a diffusion language model denoise its answer to a prompt, or chat with it.

One answer of the bundled model, and of one that was trained from it:

    trl-diffusion sample "Tom has 7 pens and gets 5 more. How many pens now?"
    trl-diffusion sample outputs/gsm8k_agrpo "Tom has 7 pens and gets 5 more. How many pens now?"

A conversation with LLaDA-8B and a trained adapter:

    trl-diffusion sample GSAI-ML/LLaDA-8B-Instruct --adapter outputs/llada_8b_gsm8k_agrpo

An answer coloured by confidence, kept as an animation and as a page with a slider:

    trl-diffusion sample "Make 13 from 2, 3, 5." --color confidence \
        --save answer.gif --save answer.html

Where the output is no terminal, it is the text alone; the number of steps goes to the error stream.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from rich.console import Console

from trl_diffusion.cli.evaluate import canvas_that_fits
from trl_diffusion.cli.loading import LoadingArguments
from trl_diffusion.cli.names import check_model_name
from trl_diffusion.cli.parsing import HELP, HELP_ALL, Parser
from trl_diffusion.evaluation.decoding import decode_completions
from trl_diffusion.evaluation.loading import merge_for_decoding
from trl_diffusion.evaluation.results import describe_decoding
from trl_diffusion.family import family_of
from trl_diffusion.models.embedded import BLOCKS_AND_STEPS, EMBEDDED_MODELS, embedded_arguments, names_model
from trl_diffusion.runtime.recorded_decoding import recorded_decoding
from trl_diffusion.runtime.text import plural
from trl_diffusion.sampling import CanvasState, SamplingConfig, row_generators, sample
from trl_diffusion.sampling.arguments import GreedyArguments
from trl_diffusion.sampling.generation import canvas_plan
from trl_diffusion.tokenization import encode_prompt, left_pad
from trl_diffusion.validation import at_least, one_of
from trl_diffusion.viewing import COLOURINGS, Denoising, LiveView, write_gif, write_page

WRITERS = {".gif": write_gif, ".html": write_page}
COMMANDS = {"/exit": "ends", "/clear": "begins a new conversation", "/save FILE": "keeps the last answer"}
SHOWN = (
    "adapter",
    "system",
    "canvas_length",
    "block_length",
    "denoising_steps",
    "temperature",
    "unmasking",
    "confidence_threshold",
    "color",
    "delay",
    "save",
    "seed",
    "dtype",
)
TRUTH_VALUES = ("yes", "true", "t", "y", "1", "no", "false", "f", "n", "0")  # those of transformers' parser
OPTIONS = {"canvas": "--canvas_length"} | BLOCKS_AND_STEPS
BUNDLED_CANVAS = ("--canvas_length", "32")  # what the bundled models were trained on


@dataclass
class SampleArguments(LoadingArguments, GreedyArguments):
    """The model and its prompt, how the answer is decoded, and how it is shown."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Model on the Hub or folder, in place of the first word."}
    )
    prompt: str | None = field(
        default=None, metadata={"help": "The prompt, in place of the second word; without one, a conversation begins."}
    )
    allow_other_base: bool = field(
        default=False, metadata={"help": "Accept an adapter whose config names another base, because it has moved."}
    )

    system: str | None = field(default=None, metadata={"help": "System message before the conversation."})
    canvas_length: int | None = field(
        default=None,
        metadata={"help": "Positions to write. If not given, those of training, or up to 256 as the model has room."},
    )
    # None, where other commands have a number, because they depend on the model and its canvas.
    block_length: int | None = field(  # type: ignore[assignment]
        default=None, metadata={"help": "Positions per block. If not given, as in training, or up to 32."}
    )
    denoising_steps: int | None = field(  # type: ignore[assignment]
        default=None, metadata={"help": "Denoising steps. If not given, as in training, or two tokens a step."}
    )
    seed: int = field(default=0, metadata={"help": "Seed of sampling."})

    color: str = field(default="step", metadata={"help": f"Colour tokens by {' or '.join(COLOURINGS)}."})
    delay: float = field(default=0.1, metadata={"help": "Least seconds per step, on the screen and in saved files."})
    save: list[str] = field(
        default_factory=list, metadata={"help": f"Files to keep the answer in, {' or '.join(WRITERS)}."}
    )

    def __post_init__(self) -> None:
        one_of("color", self.color, COLOURINGS)
        at_least("delay", self.delay, 0.0)
        for name in ("canvas_length", "block_length", "denoising_steps"):
            if (value := vars(self)[name]) is not None:
                at_least(name, value, 1)
        for name in self.save:
            checked_file(name)
        if self.save and self.prompt is None:
            raise ValueError("--save keeps one answer, so it needs a prompt. In a conversation, enter /save FILE.")

    @property
    def name(self) -> str:
        """The model and its adapter, for captions and messages."""
        return " + ".join(part for part in (self.model_name_or_path, self.adapter) if part is not None)

    @cached_property
    def trained(self) -> dict[str, int] | None:
        """The canvas that the model or the adapter was trained on, where it is recorded; see `recorded_decoding`."""
        name = str(self.adapter or self.model_name_or_path)
        return recorded_decoding(EMBEDDED_MODELS.get(name, name))

    def plan(self, model: Any, prompt_length: int) -> tuple[int, SamplingConfig]:
        """Return the length of the canvas, which may end inside the last block, and the settings of the sampler.

        Args:
            model: a native diffusion language model, possibly inside PEFT.
            prompt_length: tokens of the prompt.

        Raises:
            ValueError: if the prompt leaves no position, a setting is out of its range, or one rules out another.
        """
        attention_block = family_of(model).attention_block
        length, block, steps = self.canvas_length, self.block_length, self.denoising_steps
        if length is None:
            found = self.trained or canvas_that_fits(
                model.config.max_position_embeddings, prompt_length, attention_block
            )
            length, block = found["canvas_length"], block or found["block_length"]
            if (block, steps) == (found["block_length"], None):
                steps = found["denoising_steps"]
        canvas, steps, block = canvas_plan(length, block, steps, attention_block)
        return length, self.sampling_on(canvas, denoising_steps=steps, block_length=block, record_support=False)


class Session:
    """A model that answers, in the terminal or as plain text.

    Args:
        model: a native diffusion language model, possibly inside PEFT.
        tokenizer: its tokenizer.
        args: how answers are decoded and shown.
        console: where answers are shown, if it is a terminal. If not, they go to stdout as plain text, and what else
            there is to say to stderr.

    Raises:
        ValueError: for a system message without a chat template.
    """

    def __init__(self, model: Any, tokenizer: Any, args: SampleArguments, console: Console):
        self.model, self.tokenizer, self.args, self.console = model, tokenizer, args, console
        self.live = console.is_terminal and not console.is_dumb_terminal
        self.notes = console if self.live else Console(stderr=True)
        self.beginning = [] if args.system is None else [{"role": "system", "content": args.system}]
        if self.beginning and tokenizer.chat_template is None:
            raise ValueError(f"{args.name} has no chat template, so it takes no --system message. Leave it out.")

    def answer(self, messages: list[dict[str, str]], number: int = 0) -> tuple[str, Denoising]:
        """Answer the last message of a conversation, and show the answer.

        Args:
            messages: the conversation; without a chat template, its last message is continued as a text.
            number: answers before it. Each has its own random stream; the first one's is that of an evaluation's
                first row.

        Returns:
            The text and the steps that wrote it.
        """
        prompt = messages if self.tokenizer.chat_template else messages[-1]["content"]
        ids, mask = left_pad([encode_prompt(prompt, self.tokenizer)], family_of(self.model).tail_token_id)
        ids, mask = ids.to(self.model.device), mask.to(self.model.device)
        length, config = self.args.plan(self.model, ids.size(1))
        denoising = self._blank(messages, mask.sum(1), length, config)
        state = CanvasState.empty(1, config.canvas_length, denoising.family.mask_token_id, ids.device)
        state.length.fill_(length)  # the last block ends where the canvas ends
        inputs = (self.model, ids, mask, config, row_generators(self.args.seed, rows=[number]))
        if self.live:
            with LiveView(denoising, self.console, self.args.color, self.args.delay) as view:
                trajectory = sample(*inputs, state=state, observer=view).cut(length)
                view.finish(trajectory)
        else:
            trajectory = sample(*inputs, state=state).cut(length)
            denoising.read(trajectory)
        (text,) = decode_completions(trajectory.completion_ids, self.model, self.tokenizer)
        if not self.live:
            print(text)
            print(plural(len(denoising.steps), "denoising step"), file=sys.stderr)
        return text, denoising

    def _blank(
        self, messages: list[dict[str, str]], prompt_lengths: torch.Tensor, length: int, config: SamplingConfig
    ) -> Denoising:
        family = family_of(self.model)
        turns = [f"{message['role']}: {message['content']}" for message in messages]
        decoding = describe_decoding(asdict(config) | {"canvas_length": length})
        return Denoising(
            "\n".join(turns) if len(turns) > 1 else messages[0]["content"],
            family,
            self.tokenizer,
            length,
            config.block_length,
            config.on_grid(family).denoising_steps,
            f"{self.args.name}, {decoding}",
            prompt_tail=int(family.prompt_tail(prompt_lengths)),
        )

    def chat(self) -> None:
        """Answer line after line of the input, each with the conversation before it; ends with /exit or the input.

        Raises:
            ValueError: if the model has no chat template.
        """
        if self.tokenizer.chat_template is None:
            raise ValueError(
                f"{self.args.name} has no chat template, so it holds no conversation. Give a text to continue."
            )
        self.notes.print("; ".join(f"{name} {what}" for name, what in COMMANDS.items()), style="dim")
        messages, number, last = [*self.beginning], 0, None
        while (line := self._read_line()) is not None:
            command, _, file = line.partition(" ")
            if command == "/exit":
                return
            if command == "/clear":
                messages, last = [*self.beginning], None
            elif command == "/save":
                self._save(last, file.strip())
            elif command.startswith("/"):
                self.notes.print(f"There is no {command}; there are {', '.join(COMMANDS)}.", markup=False)
            elif line:
                asked = [*messages, {"role": "user", "content": line}]
                try:
                    text, last = self.answer(asked, number)
                except (ValueError, KeyboardInterrupt) as stopped:
                    self.notes.print(str(stopped) or "Stopped.", markup=False)
                    continue
                messages, number = [*asked, {"role": "assistant", "content": text}], number + 1

    def _read_line(self) -> str | None:
        """Return the next line of the input, or `None` at its end; people get a prompt, files do not."""
        try:
            return input("> " if sys.stdin.isatty() else "").strip()
        except (EOFError, KeyboardInterrupt):
            return None

    def _save(self, last: Denoising | None, file: str) -> None:
        try:
            if last is None:
                raise ValueError("There is no answer to keep yet.")
            save(checked_file(file), last, self.args)
        except (ValueError, OSError) as problem:
            self.notes.print(str(problem), markup=False)


def checked_file(name: str) -> Path:
    """Return the path of a file to save.

    Raises:
        ValueError: if its ending is not known.
    """
    path = Path(name)
    if path.suffix.lower() not in WRITERS:
        raise ValueError(f"A denoising is saved as {' or '.join(WRITERS)}, by the file's ending; got {name!r}.")
    return path


def save(path: Path, denoising: Denoising, args: SampleArguments) -> None:
    """Write a denoising to a file of the kind that its ending says, and say so."""
    path.parent.mkdir(parents=True, exist_ok=True)
    WRITERS[path.suffix.lower()](path, denoising, args.color, args.delay)
    print(f"Saved: {path}", file=sys.stderr)


def parse(arguments: Sequence[str]) -> SampleArguments:
    """Parse the command line, whose words that belong to no option are the model and the prompt.

    Raises:
        ValueError: for more words, and as `Parser.parse`.
    """
    options, words = split_words(arguments)
    named = names_model(options)
    if len(words) > 2 - named:
        raise ValueError(f"Expected a model and a prompt at most, got the words {words}. Put the prompt in quotes.")
    if len(words) == 2 or (words and not named and _names_model(words[0])):
        check_model_name(words[0])
        options = ["--model_name_or_path", words.pop(0), *options]
    options += [f"--prompt={word}" for word in words]
    for_bundled = embedded_arguments(options, BUNDLED_CANVAS, OPTIONS, "--adapter")
    parser = Parser([SampleArguments], "trl-diffusion sample", __doc__, {"Options used most": SHOWN})
    (args,) = parser.parse(options if for_bundled is None else for_bundled)
    if args.model_name_or_path is None and args.adapter is None:
        args.model_name_or_path = "embedded"
    return args


def split_words(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split the command line into options and words; the parser would take a word after a switch for its value.

    Every option has one value, a switch may have one, and after `--` there are words alone. The files of several
    `--save` become the values of one.
    """
    switches = {f"--{option.name}" for option in fields(SampleArguments) if isinstance(option.default, bool)}
    alone = {*HELP, HELP_ALL}
    options: list[str] = []
    words: list[str] = []
    files: list[str] = []
    rest = list(arguments)
    while rest:
        word = rest.pop(0)
        if word == "--":
            words, rest = words + rest, []
        elif not _is_option(word):
            words.append(word)
        else:
            name, equals, value = word.partition("=")
            if rest and not equals and name not in alone and not _is_option(rest[0]):
                is_switch = name.replace("-", "_").replace("__", "--", 1) in switches
                if not is_switch or rest[0].lower() in TRUTH_VALUES:
                    value = rest.pop(0)
                    word = f"{name}={value}"
            if name == "--save":
                files.append(value)
            else:
                options.append(word)
    return [*options, *(["--save", *files] if files else [])], words


def _is_option(word: str) -> bool:
    return re.match(r"--?[A-Za-z]", word) is not None


def _names_model(word: str) -> bool:
    """Return whether a single word is a model and no prompt: a bundled one, a folder, or a name with a slash."""
    return word in EMBEDDED_MODELS or os.path.isdir(word) or ("/" in word and not re.search(r"\s", word))


def main(arguments: Sequence[str] | None = None) -> None:
    """Answer the prompt of the command line, or hold a conversation.

    Args:
        arguments: of the command line, after `sample`; those of the process if not given.
    """
    args = parse(sys.argv[1:] if arguments is None else arguments)
    accelerator = None if args.use_cpu else torch.accelerator.current_accelerator(check_available=True)
    model, tokenizer = args.load(accelerator or "cpu", args.allow_other_base)
    model, _ = merge_for_decoding(model, args.merge_adapter)
    # The first time that a model is unwrapped, accelerate imports DeepSpeed where it is installed, and that writes to
    # stdout, which is for answers alone.
    with redirect_stdout(sys.stderr):
        extract_model_from_parallel(model)
    session = Session(model, tokenizer, args, Console())
    if args.prompt is None:
        session.chat()
        return
    _, denoising = session.answer([*session.beginning, {"role": "user", "content": args.prompt}])
    for name in args.save:
        save(checked_file(name), denoising, args)


if __name__ == "__main__":
    main()
