"""Measures how far the first |log ratio| after a rollout is from 0, by dtype and by what is done about it.

    python recipes/benchmarks/log_ratios.py

AGRPO on the embedded model at learning rate 0: every ratio would be 1 if an update's passes rounded as the rollout's
do. One rollout batch of prompts of different lengths is scored once, in three ways: as the trainer does, without the
rollout's prompt columns, and with `rollout_correction="recompute"`.
"""

from __future__ import annotations

import argparse
import tempfile

import torch
from datasets import Dataset
from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer, PrinterCallback
from transformers.utils import logging

from trl_diffusion.models.embedded import EMBEDDED_MODEL
from trl_diffusion.trainers import AGRPOConfig, AGRPOTrainer

WAYS = ("as trained", "without the rollout's columns", "recompute")


class Recorder(AGRPOTrainer):
    """Keeps |log ratio| of every scored token.

    Args:
        with_columns: whether scoring knows the prompt columns of the rollout's passes.
    """

    def __init__(self, *args, with_columns: bool, **kwargs):
        super().__init__(*args, **kwargs)
        self.with_columns = with_columns
        self.differences: list[torch.Tensor] = []

    def _generate_and_score_completions(self, inputs):
        rows = super()._generate_and_score_completions(inputs)
        if not self.with_columns:
            rows.pop("prompt_columns", None)  # there are none with "recompute"
        return rows

    def _log_distances(self, inputs):
        targets = inputs.views.targets.view_as(inputs.logps)
        self.differences.append((inputs.logps.detach() - inputs.old).abs()[targets].float().cpu())
        super()._log_distances(inputs)


def rewards(completions, **kwargs) -> list[float]:
    """Never tie, so that every completion learns."""
    return [float(row) for row in range(len(completions))]


def measure(
    way: str, dtype: str, args: argparse.Namespace, folder: str, model: str = str(EMBEDDED_MODEL)
) -> torch.Tensor:
    """Return |log ratio| of all tokens scored in one update of a model with the embedded model's tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED_MODEL, padding_side="left")
    texts = [" ".join(["Tom has 3 apples. He buys 4 more."] * n) + " How many apples?" for n in range(1, 9)]
    config = AGRPOConfig(
        folder,
        seed=args.seed,
        shuffle_dataset=False,
        per_device_train_batch_size=args.rows,
        gradient_accumulation_steps=4 * len(texts) // args.rows,
        num_generations=4,
        max_completion_length=64,
        block_length=16,
        denoising_steps=32,
        num_mc_samples=8,
        step_draws="uniform",
        temperature=1.0,
        learning_rate=0.0,
        max_steps=1,
        rollout_correction="recompute" if way == "recompute" else None,
        model_init_kwargs={"dtype": dtype},
        bf16=False,
        gradient_checkpointing=False,
        use_cpu=not torch.cuda.is_available(),
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )
    data = Dataset.from_dict({"prompt": [[{"role": "user", "content": text}] for text in texts]})
    trainer = Recorder(
        model,
        rewards,
        config,
        data,
        processing_class=tokenizer,
        with_columns=way == "as trained",
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return torch.cat(trainer.differences)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--rows", type=int, default=4, help="per_device_train_batch_size, a divisor of 32")
    parser.add_argument("--seed", type=int, default=42)
    args = parser.parse_args()

    logging.set_verbosity_error()
    table = Table("dtype", "scored", "mean", "largest", title=f"|log ratio| of 32 completions, {args.rows} at a time")
    with tempfile.TemporaryDirectory() as folder:
        for dtype in args.dtypes:
            for way in WAYS:
                found = measure(way, dtype, args, folder)
                table.add_row(dtype, way, f"{found.mean():.2g}", f"{found.max():.2g}")
    Console().print(table)


if __name__ == "__main__":
    main()
