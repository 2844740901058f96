"""Measures what step selection and SAPO's bookkeeping add to an update, without continuations.

    python recipes/benchmarks/credit_overhead.py

Pairs of trainers alternate, update by update, in one process, on a LLaDA-architecture network with random weights:
Monte-Carlo draws against ATPO's selection (which records signals while sampling), and diffu-GRPO against the same with
a `StepAwareReward` that no completion passes, so that nothing is continued. The ratio is the median over rounds of the
two neighbours' times.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch
from datasets import Dataset
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import AutoTokenizer, PrinterCallback, TrainerCallback
from transformers.utils import logging

from trl_diffusion.credit import StepAwareReward
from trl_diffusion.models import LLaDAConfig, LLaDAModelLM
from trl_diffusion.models.embedded import EMBEDDED_MODEL
from trl_diffusion.trainers import (
    DiffuGRPOConfig,
    DiffuGRPOTrainer,
    DiffusionGRPOTrainer,
    TrajectoryGRPOConfig,
    TrajectoryGRPOTrainer,
)

PAIRS = {
    "step selection": ("Monte-Carlo draws", "roec_cm"),
    "step-aware reward": ("diffu-GRPO", "with StepAwareReward"),
}


class Stopwatch(TrainerCallback):
    """Return the seconds of every update, rollout included."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, args, state, control, **kwargs):
        self.start = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        self.seconds.append(time.perf_counter() - self.start)


def rewards(completions, **kwargs) -> list[float]:
    """Never tie, so that every completion learns."""
    return [float(row) for row in range(len(completions))]


def make_trainers(args: argparse.Namespace, folder: str) -> dict[str, DiffusionGRPOTrainer]:
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED_MODEL, padding_side="left")
    common = dict(
        per_device_train_batch_size=16,
        num_generations=8,
        max_completion_length=args.canvas,
        block_length=16,
        denoising_steps=args.canvas // 2,
        unmasking=args.unmasking,
        temperature=1.0,
        num_iterations=1,
        max_steps=1,
        seed=args.seed,
        use_cpu=not torch.cuda.is_available(),
        bf16=False,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        gradient_checkpointing=False,
    )
    drawn = dict(num_mc_samples=args.views, step_reduction="mean", loss_type="grpo")

    def trainer(trainer_class, config, reward, **settings):
        torch.manual_seed(args.seed)
        model = LLaDAModelLM(
            LLaDAConfig(
                vocab_size=args.vocabulary,
                hidden_size=args.hidden,
                intermediate_size=3 * args.hidden,
                num_hidden_layers=args.layers,
                num_attention_heads=8,
                mask_token_id=tokenizer.mask_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
                num_tokens=len(tokenizer),
            )
        )
        rows = Dataset.from_dict({"prompt": ["How many apples are left? " * 2] * 8})
        made = trainer_class(model, reward, config(folder, **common | settings), rows, processing_class=tokenizer)
        made.remove_callback(PrinterCallback)
        return made

    never = StepAwareReward(rewards, success_threshold=1e9)
    return {
        "Monte-Carlo draws": trainer(TrajectoryGRPOTrainer, TrajectoryGRPOConfig, rewards, **drawn),
        "roec_cm": trainer(TrajectoryGRPOTrainer, TrajectoryGRPOConfig, rewards, step_selector="roec_cm", **drawn),
        "diffu-GRPO": trainer(DiffuGRPOTrainer, DiffuGRPOConfig, rewards),
        "with StepAwareReward": trainer(DiffuGRPOTrainer, DiffuGRPOConfig, never),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--views", type=int, default=8, help="views per completion, M and K")
    # As in LLaDA-8B, the head has a small share of the weights.
    parser.add_argument("--vocabulary", type=int, default=1024)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--canvas", type=int, default=64)
    parser.add_argument("--unmasking", default="max_prob")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="write the numbers as JSON")
    args = parser.parse_args()

    logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as folder:
        trainers = make_trainers(args, folder)
        watches = {name: Stopwatch() for name in trainers}
        for name, trainer in trainers.items():
            trainer.add_callback(watches[name])
            trainer.train()
            watches[name].seconds.clear()  # warm-up
        for turn in track(range(args.rounds), description="rounds"):
            # The order changes, so that neither neighbour is always the first.
            for name in list(trainers)[:: 1 if turn % 2 else -1]:
                trainers[name].train()
    table = Table("", "without", "with", "ratio", title=f"Seconds per update, median of {args.rounds} rounds")
    results = {}
    for title, (without, with_) in PAIRS.items():
        a, b = watches[without].seconds, watches[with_].seconds
        ratio = statistics.median(y / x for x, y in zip(a, b, strict=True))
        results[title] = {"without": statistics.median(a), "with": statistics.median(b), "ratio": ratio}
        table.add_row(title, f"{statistics.median(a):.3f}", f"{statistics.median(b):.3f}", f"{ratio:.3f}")
    Console().print(table)
    if args.output:
        args.output.write_text(json.dumps({"setting": vars(args) | {"output": None}, "results": results}, indent=2))


if __name__ == "__main__":
    main()
