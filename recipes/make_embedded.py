r"""Make the embedded models: tiny LLaDA and SDAR checkpoints, trained with the masked SFT of this library.

    OMP_NUM_THREADS=1 python recipes/make_embedded.py --output_dir trl_diffusion/models/embedded
    OMP_NUM_THREADS=1 python recipes/make_embedded.py --family sdar --clean_steps 2000 --slip_steps 500 \
        --output_dir trl_diffusion/models/embedded_sdar
    OMP_NUM_THREADS=1 python recipes/make_embedded.py --config recipes/embedded_chains.yaml
    OMP_NUM_THREADS=1 python recipes/make_embedded.py --config recipes/embedded_puzzles.yaml

First it learns from right solutions, then from solutions of which many slip on purpose. So the network can compute the
right answer and often prefers a wrong one, which reinforcement learning can repair. On one machine the same command
gives the same files, bit for bit.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, concatenate_datasets
from rich.console import Console
from rich.table import Table
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast, set_seed
from trl import TrlParser

from trl_diffusion.evaluation import evaluate_accuracy
from trl_diffusion.models import DiffusionLM, LLaDAModelLM, SDARForCausalLM
from trl_diffusion.sampling import SamplingConfig
from trl_diffusion.tasks import TASKS
from trl_diffusion.trainers.sft import SFTConfig, SFTTrainer

SPECIAL_TOKENS = [
    "<|startoftext|>",
    "<|endoftext|>",
    "<|eot_id|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|mask|>",
]
# Words with their space, single digits, runs of signs with the space around them, line ends.
PIECES = r" ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+ ?|\s+"
ADDED_DIGIT = r"\+\p{N}"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ (bos_token if loop.first else '') + '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' "
    "+ message['content'] | trim + '<|eot_id|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
FAMILIES: dict[str, type[DiffusionLM]] = {"llada": LLaDAModelLM, "sdar": SDARForCausalLM}
# Tasks of which lines can begin anew, and the share that do while right solutions are learned.
RESTARTING, RESTARTS = ("chained_sums", "chained_sums_fixed"), 0.3
# Numbers of blanks while right solutions are learned: few first, as what is forced there is forced elsewhere.
BLANKS = (1, 2, 3, 3, 4, 4, 5, 5, 6, 7, 8, 9)
# The bundled model counts blocks from the completion, so that the first block is a whole one for every prompt.
OWN_SETTINGS = {"llada": {}, "sdar": {"block_origin": "completion"}}


@dataclass
class EmbeddedArguments:
    """The network, its training and its data."""

    output_dir: str = field(default="outputs/embedded", metadata={"help": "Where the checkpoint goes."})
    family: str = field(default="llada", metadata={"help": f"Kind of network: {', '.join(FAMILIES)}."})
    practice_steps: int = field(default=0, metadata={"help": "Updates before, on chained sums without a chain."})
    clean_steps: int = field(default=4000, metadata={"help": "Updates on right solutions."})
    slip_steps: int = field(default=800, metadata={"help": "Updates on solutions of which many slip; 0 for none."})
    batch_size: int = field(default=32, metadata={"help": "Rows per update."})
    learning_rate: float = field(default=2e-3, metadata={"help": "Peak learning rate; a fifth of it with slips."})
    hidden_size: int = field(default=96, metadata={"help": "Width of the network."})
    intermediate_size: int = field(default=256, metadata={"help": "Width of its MLPs."})
    layers: int = field(default=4, metadata={"help": "Depth."})
    heads: int = field(default=4, metadata={"help": "Attention heads."})
    added_digits: bool = field(default=False, metadata={"help": "A plus and the digit after it are one token."})
    initial_std: float = field(default=0.02, metadata={"help": "Standard deviation of the initial weights."})
    tasks: list[str] = field(
        default_factory=lambda: ["word_problems=40000", "countdown=12000", "sudoku=12000"],
        metadata={"help": "NAME=SIZE: what it learns, and how many problems of it to generate, in this order."},
    )
    canvas: int = field(default=32, metadata={"help": "Canvas length."})
    block_length: int = field(
        default=8, metadata={"help": "Block length in the table, without block-causal attention."}
    )
    denoising_steps: int = field(default=16, metadata={"help": "Denoising steps in the table."})
    sampled_unmasking: str = field(default="random", metadata={"help": "Unmasking of the table's sampled accuracy."})
    held_out: int = field(default=256, metadata={"help": "Held-out rows per task for the table."})
    seed: int = field(default=0, metadata={"help": "Seed of data, initialisation and noise."})


def make_tokenizer(texts: Iterable[str], pieces: str = PIECES) -> PreTrainedTokenizerFast:
    """Train byte-complete BPE of at most 512 ids with LLaDA's special tokens and chat template.

    Args:
        texts: to train it on.
        pieces: regular expression of the parts of a text that tokens do not cross.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pieces), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=[AddedToken(token, special=True) for token in SPECIAL_TOKENS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|startoftext|>",
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        mask_token="<|mask|>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=256,
        chat_template=CHAT_TEMPLATE,
    )


def make_model(args: EmbeddedArguments, tokenizer: PreTrainedTokenizerBase):
    """Make the untrained network."""
    end, turn_end = (tokenizer.convert_tokens_to_ids(token) for token in ("<|endoftext|>", "<|eot_id|>"))
    family = FAMILIES[args.family]
    config = family.config_class(
        vocab_size=len(tokenizer),
        hidden_size=args.hidden_size,
        intermediate_size=args.intermediate_size,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.heads,
        head_dim=args.hidden_size // args.heads,
        max_position_embeddings=256,
        initializer_range=args.initial_std,
        mask_token_id=tokenizer.mask_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=end,
        pad_token_id=end,
        end_token_ids=[end, turn_end],
        **OWN_SETTINGS[args.family],
    )
    model = family(config)
    model.generation_config.max_new_tokens = 128  # the default, 256, leaves no position for a prompt
    return model


def make_dataset(args: EmbeddedArguments, slips: bool = False, restarts: float = 0.0) -> Dataset:
    """Return the training rows of all the tasks.

    Args:
        args: tasks and seed.
        slips: let solutions slip.
        restarts: share of lines that begin anew, in tasks that have such lines.
    """
    parts = []
    for task, size in sizes(args).items():
        asked: dict[str, Any] = {"restart_share": restarts} if task in RESTARTING else {}
        asked |= {"blanks": BLANKS} if task == "sudoku_sweeps" and not slips else {}
        parts.append(generator(task)("train", size, seed=args.seed + slips, slips=slips, **asked))
    read = [column for column in ("prompt", "completion", "unscored") if column in parts[0].column_names]
    return concatenate_datasets([part.select_columns(read) for part in parts])


def sizes(args: EmbeddedArguments) -> dict[str, int]:
    """Return the number of problems of every task."""
    named = (each.partition("=") for each in args.tasks)
    return {name: int(size) for name, _, size in named}


def generator(task: str) -> Callable[..., Dataset]:
    """Return the generator of a task.

    Raises:
        ValueError: if it has none.
    """
    found = TASKS.get(task)
    if found is None or found.generate is None:
        names = [name for name, known in TASKS.items() if known.generate is not None]
        raise ValueError(f"{task!r} is no task with a generator; there are {', '.join(names)}.")
    return found.generate


def train(
    model,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Dataset,
    steps: int,
    learning_rate: float,
    args: EmbeddedArguments,
    **settings: Any,
) -> None:
    """Train all the weights by masked SFT, in place, with these settings of its config in addition."""
    with tempfile.TemporaryDirectory() as scratch:
        config = SFTConfig(
            **{"lr_scheduler_type": "cosine"} | settings,
            output_dir=scratch,
            max_steps=steps,
            per_device_train_batch_size=args.batch_size,
            gradient_accumulation_steps=1,
            learning_rate=learning_rate,
            warmup_steps=min(100, steps // 10),
            weight_decay=0.01,
            adam_beta2=0.99,
            max_completion_length=args.canvas,
            bf16=False,
            gradient_checkpointing=False,
            use_cpu=True,
            logging_steps=100,
            save_strategy="no",
            report_to="none",
            seed=args.seed,
        )
        SFTTrainer(model, config, dataset, processing_class=tokenizer).train()


def report(model, tokenizer: PreTrainedTokenizerBase, args: EmbeddedArguments) -> Table:
    """Measure held-out accuracy of every task, greedy and sampled."""
    table = Table(title="Held-out accuracy (95 % interval)")
    for column in ("task", "greedy", "temperature 1, 8 samples"):
        table.add_column(column)
    model.eval()
    for task in sizes(args):
        rows = generator(task)("test", args.held_out, seed=args.seed)
        block_length = model.family.attention_block or args.block_length
        decoding = SamplingConfig(
            args.canvas, args.denoising_steps, block_length, temperature=0.0, unmasking="max_prob"
        )
        correct = TASKS[task].is_correct
        greedy = evaluate_accuracy(model, tokenizer, rows, correct, decoding=decoding, batch_size=128)
        sampled = evaluate_accuracy(
            model,
            tokenizer,
            rows.select(range(min(64, len(rows)))),
            correct,
            decoding=replace(decoding, temperature=1.0, unmasking=args.sampled_unmasking),
            batch_size=128,
            completions_per_prompt=8,
            seed=args.seed,
        )
        table.add_row(task, *(f"{estimate} of {estimate.total}" for estimate in (greedy, sampled)))
    return table


def main(args: EmbeddedArguments) -> None:
    # Sums over several threads depend on their number.
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    set_seed(args.seed)
    console, start = Console(), time.perf_counter()
    clean, slipped = make_dataset(args, restarts=RESTARTS), make_dataset(args, slips=True)
    texts = (row[column][0]["content"] for row in slipped for column in ("prompt", "completion"))
    pieces = f"{ADDED_DIGIT}|{PIECES}" if args.added_digits else PIECES
    tokenizer = make_tokenizer([*texts, "user\n\n", "assistant\n\n"], pieces)
    model = make_model(args, tokenizer)
    if args.practice_steps:
        # Next to a line that continues with the result, the network would learn to copy it instead of computing it.
        practice = make_dataset(args, restarts=1.0)
        steady = {"lr_scheduler_type": "constant_with_warmup", "min_noise_level": 0.2}
        train(model, tokenizer, practice, args.practice_steps, args.learning_rate, args, **steady)
    train(model, tokenizer, clean, args.clean_steps, args.learning_rate, args)
    if args.slip_steps:
        console.print(report(model, tokenizer, args), "before the slips")
        train(model, tokenizer, slipped, args.slip_steps, args.learning_rate / 5, args)
    model.save_pretrained(args.output_dir)
    tokenizer.save_pretrained(args.output_dir)
    size = sum(path.stat().st_size for path in Path(args.output_dir).iterdir())
    console.print(report(model, tokenizer, args))
    console.print(
        f"{model.num_parameters():,} parameters, {size / 1e6:.2f} MB in {args.output_dir}, "
        f"{time.perf_counter() - start:.0f} s"
    )


if __name__ == "__main__":
    (arguments,) = TrlParser(EmbeddedArguments).parse_args_and_config()
    main(arguments)
