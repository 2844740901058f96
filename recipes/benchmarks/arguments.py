"""Command-line arguments that the speed benchmarks share."""

from __future__ import annotations

from argparse import ArgumentParser
from pathlib import Path

import torch
from networks import SHAPES


def parser(description: str, name: str) -> ArgumentParser:
    """Return a parser with the shape, rounds and output of the benchmark `name`."""
    made = ArgumentParser(description=description)
    made.add_argument("--shapes", nargs="+", choices=SHAPES, default=["head-heavy", "backbone-heavy"])
    made.add_argument("--rows", type=int, default=4, help="completions")
    made.add_argument("--prompt", type=int, default=200, help="tokens of every prompt")
    made.add_argument("--canvas", type=int, default=256)
    made.add_argument("--rounds", type=int, default=3)
    made.add_argument("--seed", type=int, default=0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    made.add_argument("--device", type=torch.device, default=device)
    made.add_argument("--output_dir", type=Path, default=Path("outputs/benchmarks") / name)
    return made


def add_compile(to: ArgumentParser) -> None:
    """Add the option to compile scored passes; rollouts never are compiled."""
    to.add_argument("--compile", action="store_true", help="run the layers of scored passes through torch.compile")


def add_sampling(to: ArgumentParser) -> None:
    """Add the options that say how a canvas is written."""
    to.add_argument("--steps", type=int, default=128, help="denoising steps")
    to.add_argument("--block", type=int, default=32, help="positions per block")
    to.add_argument("--published_steps", type=int, default=2, help="denoising steps timed of the published schedule")


def add_updates(to: ArgumentParser) -> None:
    """Add the options that say what is learnt from a rollout."""
    to.add_argument("--views", type=int, default=24, help="views per completion, AGRPO")
    to.add_argument("--iterations", type=int, default=12, help="inner updates, diffu-GRPO")
    to.add_argument("--full", action="store_true", help="train all weights instead of LoRA's")
    add_compile(to)
