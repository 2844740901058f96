r"""Write an answer with a diffusion language model, and watch the canvas while it is denoised.

One answer, then a conversation (end it with /exit); MODEL is a folder, a name on the Hub, `embedded` or
`embedded_sdar`, and the bundled `embedded` if none is given:

    trl-diffusion sample "Tom has 7 pens and gets 5 more. How many pens now?"
    trl-diffusion sample GSAI-ML/LLaDA-8B-Instruct

A trained adapter, coloured by confidence, kept as an animation and as a page with a slider:

    trl-diffusion sample GSAI-ML/LLaDA-8B-Instruct --adapter outputs/llada_8b_gsm8k_agrpo "What is 17 * 23?" \
        --color confidence --save answer.gif --save answer.html

Where the output is no terminal, the text alone is printed, and the number of steps to the error stream.
"""

from __future__ import annotations

import os
import re
import sys
from argparse import RawDescriptionHelpFormatter
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from trl import TrlParser

from trl_diffusion.evaluation import load_model
from trl_diffusion.evaluation.decoding import decode_completions
from trl_diffusion.evaluation.results import describe_decoding
from trl_diffusion.family import family_of
from trl_diffusion.models.embedded import EMBEDDED_MODELS
from trl_diffusion.sampling import CanvasState, SamplingConfig, row_generators, sample
from trl_diffusion.sampling.arguments import GreedyArguments
from trl_diffusion.sampling.generation import DEFAULT_LENGTH, canvas_plan
from trl_diffusion.tokenization import encode_prompt, left_pad
from trl_diffusion.validation import at_least, one_of
from trl_diffusion.viewing import COLOURINGS, Denoising, LiveView, write_gif, write_page

WRITERS = {".gif": write_gif, ".html": write_page}
COMMANDS = {"/exit": "ends", "/clear": "begins a new conversation", "/save FILE": "keeps the last answer"}


@dataclass
class SampleArguments(GreedyArguments):
    """The model, how its answers are decoded, and how they are shown."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "The model, in place of the first word of the command."}
    )
    adapter: str | None = field(
        default=None, metadata={"help": "PEFT adapter; its own base is loaded if no model is given."}
    )
    allow_other_base: bool = field(
        default=False, metadata={"help": "Accept an adapter whose config names another base, because it has moved."}
    )
    model_revision: str | None = field(default=None, metadata={"help": "Revision of the model on the Hub."})
    dtype: str = field(default="auto", metadata={"help": "Type of the weights; `auto` for the checkpoint's."})
    attn_implementation: str | None = field(default=None, metadata={"help": "As in transformers."})
    use_cpu: bool = field(default=False, metadata={"help": "Stay on the CPU although there is a GPU."})

    system: str | None = field(default=None, metadata={"help": "System message before the conversation."})
    canvas_length: int | None = field(
        default=None,
        metadata={
            "help": "Positions to write. If not given, `max_new_tokens` of the checkpoint's generation config, 256 at "
            "most, or what the prompt leaves."
        },
    )
    # None, where other commands have a number, because the plan depends on model and canvas.
    denoising_steps: int | None = field(  # type: ignore[assignment]
        default=None, metadata={"help": "Denoising steps; two tokens a step if not given."}
    )
    block_length: int | None = field(  # type: ignore[assignment]
        default=None, metadata={"help": "Positions per block; 32, or those of the model's attention, if not given."}
    )
    seed: int = field(default=0, metadata={"help": "Seed of sampling."})

    color: str = field(default="step", metadata={"help": f"Colour tokens by {' or '.join(COLOURINGS)}."})
    delay: float = field(default=0.1, metadata={"help": "Least seconds per step, on the screen and in saved files."})

    def __post_init__(self) -> None:
        one_of("color", self.color, COLOURINGS)
        at_least("delay", self.delay, 0.0)
        for name in ("canvas_length", "denoising_steps", "block_length"):
            if (value := vars(self)[name]) is not None:
                at_least(name, value, 1)

    def plan(self, model: Any, prompt_length: int) -> tuple[int, SamplingConfig]:
        """Return the length of the canvas and the settings of the sampler.

        Raises:
            ValueError: if the prompt leaves no position, a setting is out of its range, or one rules out another.
        """
        block = family_of(model).attention_block
        length = self.canvas_length or default_canvas(model, prompt_length, block)
        canvas, steps, block = canvas_plan(length, self.block_length, self.denoising_steps, block)
        return length, self.sampling_on(canvas, denoising_steps=steps, block_length=block, record_support=False)


def default_canvas(model: Any, prompt_length: int, attention_block: int | None) -> int:
    """Return the positions to write after a prompt where the user does not say how many.

    Args:
        model: a native diffusion language model, possibly inside PEFT.
        prompt_length: tokens of the prompt.
        attention_block: as in `DiffusionFamily`; the canvas then is a multiple of it, if there is room.

    Raises:
        ValueError: if the prompt leaves no position.
    """
    room = model.config.max_position_embeddings - prompt_length
    if room < 1:
        raise ValueError(
            f"The prompt has {prompt_length} tokens and the model {model.config.max_position_embeddings} positions, "
            "so no position is left to write. Shorten the prompt; in a conversation, /clear begins a new one."
        )
    length = min(model.generation_config.max_new_tokens or DEFAULT_LENGTH, DEFAULT_LENGTH, room)
    return max(length - length % attention_block, 1) if attention_block else length


class Session:
    """A model that answers, in the terminal or as plain text.

    Args:
        model: a native diffusion language model, possibly inside PEFT.
        tokenizer: its tokenizer.
        args: how answers are decoded and shown.
        name: of the model, for captions.
        console: where answers are shown.

    Raises:
        ValueError: for a system message without a chat template.
    """

    def __init__(self, model: Any, tokenizer: Any, args: SampleArguments, name: str, console: Console):
        self.model, self.tokenizer, self.args, self.name, self.console = model, tokenizer, args, name, console
        self.live = console.is_terminal and not console.is_dumb_terminal
        self.beginning = [] if args.system is None else [{"role": "system", "content": args.system}]
        if self.beginning and tokenizer.chat_template is None:
            raise ValueError(f"{name} has no chat template, so it takes no --system message. Leave it out.")

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
        denoising = self._blank(messages, length, config)
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
            print(f"{len(denoising.steps)} denoising steps", file=sys.stderr)
        return text, denoising

    def _blank(self, messages: list[dict[str, str]], length: int, config: SamplingConfig) -> Denoising:
        turns = [f"{message['role']}: {message['content']}" for message in messages]
        decoding = describe_decoding(asdict(config) | {"canvas_length": length})
        return Denoising(
            "\n".join(turns) if len(turns) > 1 else messages[0]["content"],
            family_of(self.model),
            self.tokenizer,
            length,
            config.block_length,
            config.denoising_steps,
            f"{self.name}, {decoding}",
        )

    def chat(self) -> None:
        """Answer line after line of the input, each with the conversation before it; ends with /exit or the input.

        Raises:
            ValueError: if the model has no chat template.
        """
        if self.tokenizer.chat_template is None:
            raise ValueError(
                f"{self.name} has no chat template, so it holds no conversation. Give a text to continue."
            )
        self.console.print(f"[dim]{'; '.join(f'{name} {what}' for name, what in COMMANDS.items())}.[/]")
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
                self.console.print(f"There is no {command}; there are {', '.join(COMMANDS)}.", markup=False)
            elif line:
                asked = [*messages, {"role": "user", "content": line}]
                try:
                    text, last = self.answer(asked, number)
                except (ValueError, KeyboardInterrupt) as stopped:
                    self.console.print(str(stopped) or "Stopped.", markup=False)
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
            self.console.print(str(problem), markup=False)


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


@dataclass
class Request:
    """The parsed command line.

    Args:
        args: the options.
        prompt: `None` for a conversation.
        files: where the answer is saved.
    """

    args: SampleArguments
    prompt: str | None
    files: list[Path]


def parse(arguments: list[str]) -> Request:
    """Parse the command line; words that belong to no option are the model and the prompt."""
    parser = TrlParser(
        SampleArguments,  # type: ignore[arg-type]  # the parser's annotation asks for an instance
        prog="trl-diffusion sample",
        usage="%(prog)s [MODEL] [PROMPT] [options]",
        description=__doc__,
        formatter_class=RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--save",
        action="append",
        default=[],
        metavar="FILE",
        help=f"Keep the answer as {' or '.join(WRITERS)}; repeatable.",
    )
    options, words = _before_separator(arguments)
    args, more, rest = parser.parse_args_and_config(_explicit_switches(options), return_remaining_strings=True)
    if unknown := [word for word in rest if re.match(r"--?[A-Za-z]", word)]:
        parser.error(f"there is no option {unknown[0]}. A prompt that begins so comes last, after --.")
    words = [*rest, *words]
    if len(words) > (1 if args.model_name_or_path else 2):
        parser.error(f"expected a model and a prompt at most, got {words}. Put the prompt in quotes.")
    if len(words) == 2 or (words and args.model_name_or_path is None and _names_model(words[0])):
        args.model_name_or_path = words.pop(0)
    if more.save and not words:
        parser.error("--save keeps one answer, so it needs a prompt. In a conversation, enter /save FILE.")
    return Request(args, words[0] if words else None, [checked_file(name) for name in more.save])


def _before_separator(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Split the command line at `--`, after which everything is a word."""
    at = arguments.index("--") if "--" in arguments else len(arguments)
    return arguments[:at], arguments[at + 1 :]


def _explicit_switches(arguments: list[str]) -> list[str]:
    """Give a value to each switch without one, because the parser would take the prompt after it for its value."""
    switches = {f"--{option.name}" for option in fields(SampleArguments) if isinstance(option.default, bool)}
    explicit = []
    for argument, following in zip(arguments, [*arguments, ""][1:], strict=True):
        bare = argument.replace("-", "_").replace("__", "--", 1) in switches and not _is_truth_value(following)
        explicit.append(f"{argument}=true" if bare else argument)
    return explicit


def _is_truth_value(word: str) -> bool:
    return word.lower() in ("yes", "true", "t", "y", "1", "no", "false", "f", "n", "0")


def _names_model(word: str) -> bool:
    """Return whether a single word is a model and no prompt: a bundled one, a folder, or a name with a slash."""
    return word in EMBEDDED_MODELS or os.path.isdir(word) or ("/" in word and not re.search(r"\s", word))


def main(arguments: list[str] | None = None) -> None:
    """Answer the prompt of the command line, or hold a conversation.

    Args:
        arguments: of the command line; those of the process if not given.
    """
    request = parse(sys.argv[1:] if arguments is None else arguments)
    args = request.args
    if args.model_name_or_path is None and args.adapter is None:
        args.model_name_or_path = "embedded"
    use_cpu = args.use_cpu or not torch.accelerator.is_available()
    model, tokenizer = load_model(
        args.model_name_or_path,
        args.adapter,
        revision=args.model_revision,
        dtype=args.dtype,
        attn_implementation=args.attn_implementation,
        device="cpu" if use_cpu else torch.accelerator.current_accelerator() or "cpu",
        allow_other_base=args.allow_other_base,
    )
    name = " + ".join(part for part in (args.model_name_or_path, args.adapter) if part is not None)
    session = Session(model, tokenizer, args, name, Console())
    if request.prompt is None:
        session.chat()
        return
    _, denoising = session.answer([*session.beginning, {"role": "user", "content": request.prompt}])
    for path in request.files:
        save(path, denoising, args)


if __name__ == "__main__":
    main()
