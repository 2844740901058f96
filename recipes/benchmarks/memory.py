"""Peak memory of a training run against the number of Monte-Carlo views per update.

    python recipes/benchmarks/memory.py --views 1 4 16

Every number of views runs in a separate process, on a LLaDA-architecture network with random weights. Peak memory is
the resident set on a CPU and the allocator's peak on CUDA. Views are scored one after the other and their gradients
added, so memory should not grow with them. With `--full` all weights are trained instead of LoRA's: then the gradient
of the largest weight exists twice while it is added, from the second view on.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import AutoTokenizer

from trl_diffusion.models import LLaDAConfig, LLaDAModelLM
from trl_diffusion.models.embedded import EMBEDDED_MODEL
from trl_diffusion.trainers import AGRPOConfig, AGRPOTrainer


def peak_memory(views: int, args: argparse.Namespace) -> float:
    """Peak memory in MiB of `args.updates` AGRPO updates in this process."""
    torch.manual_seed(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED_MODEL, padding_side="left")
    config = LLaDAConfig(
        vocab_size=args.vocabulary,
        hidden_size=args.hidden,
        intermediate_size=3 * args.hidden,
        num_hidden_layers=args.layers,
        num_attention_heads=8,
        mask_token_id=tokenizer.mask_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with tempfile.TemporaryDirectory() as folder:
        trainer = AGRPOTrainer(
            LLaDAModelLM(config),
            lambda completions, **kwargs: [float(row) for row in range(len(completions))],
            AGRPOConfig(
                folder,
                num_mc_samples=views,
                per_device_train_batch_size=8,
                max_completion_length=args.canvas,
                block_length=16,
                denoising_steps=args.canvas // 2,
                max_steps=args.updates,
                seed=args.seed,
                use_cpu=not torch.cuda.is_available(),
                bf16=False,
                report_to="none",
                save_strategy="no",
                disable_tqdm=True,
            ),
            Dataset.from_dict({"prompt": ["How many apples are left? " * 4] * 8}),
            processing_class=tokenizer,
            peft_config=None if args.full else LoraConfig(r=64, lora_alpha=64, target_modules="all-linear"),
        )
        trainer.train()
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def measure(views: int, args: argparse.Namespace) -> float:
    """The same in a fresh process."""
    settings = [
        f"--{name}={getattr(args, name)}" for name in ("updates", "vocabulary", "hidden", "layers", "canvas", "seed")
    ]
    command = [
        sys.executable,
        __file__,
        "--child",
        "--views",
        str(views),
        *settings,
        *(["--full"] if args.full else []),
    ]
    # Freed blocks go back to the system at once, so that the resident set is what lives and not what malloc keeps.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    output = subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout
    return float(output.strip().splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--views", type=int, nargs="+", default=[1, 4, 16], help="numbers of views to compare")
    parser.add_argument("--updates", type=int, default=3)
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--canvas", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--full", action="store_true", help="train all weights instead of LoRA's")
    parser.add_argument("--output", type=Path, help="write the numbers as JSON")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(peak_memory(args.views[0], args))
        return
    peaks = {views: measure(views, args) for views in track(args.views, description="views")}
    first = peaks[args.views[0]]
    table = Table("views M", "peak memory in MiB", f"against M = {args.views[0]}", title="Memory of an AGRPO update")
    for views, peak in peaks.items():
        table.add_row(str(views), f"{peak:.0f}", f"{100 * (peak / first - 1):+.1f} %")
    Console().print(table)
    if args.output:
        args.output.write_text(json.dumps({"setting": vars(args) | {"output": None}, "peak_mib": peaks}, indent=2))


if __name__ == "__main__":
    main()
