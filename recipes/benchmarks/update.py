"""Whole AGRPO and diffu-GRPO updates against the published schedule, and where their time goes.

    python recipes/benchmarks/update.py                                 # two shapes for a CPU
    python recipes/benchmarks/update.py --shapes llada-8b               # on CUDA

The library runs its trainers: a rollout, all inner updates and their optimizer steps. The published schedule repeats a
few kinds of passes, each always at the same cost, so each is timed once and counted as often as the update needs it
(its times carry a tilde): denoising steps, old and reference log-probabilities (diffu-GRPO; AGRPO is on policy without
a KL and is granted an update without either), views with gradient, optimizer steps. Both draw from the full
vocabulary, with the unmasking of the method's paper.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import get_peft_model
from rich.console import Console
from transformers import AutoTokenizer, PrinterCallback
from transformers.utils import logging

sys.path.insert(0, str(Path(__file__).parent))
import arguments
import measure
import published
from breakdown import breakdown
from measure import Mode, Part, Work
from networks import SHAPES, Shape, lora, make_network

from trl_diffusion.models.embedded import EMBEDDED_MODEL
from trl_diffusion.trainers import (
    AGRPOConfig,
    AGRPOTrainer,
    DiffuGRPOConfig,
    DiffuGRPOTrainer,
    DiffusionGRPOConfig,
    DiffusionGRPOTrainer,
)

METHODS: dict[str, tuple[type[DiffusionGRPOTrainer], type[DiffusionGRPOConfig]]] = {
    "AGRPO": (AGRPOTrainer, AGRPOConfig),
    "diffu-GRPO": (DiffuGRPOTrainer, DiffuGRPOConfig),
}
YARDSTICKS = ("LLaDA/d1", "lean")


class Trainers:
    """Makes trainers of one shape.

    Args:
        shape: of the network.
        args: of the command line.
        folder: for what a trainer writes.
    """

    def __init__(self, shape: Shape, args: argparse.Namespace, folder: str):
        self.shape, self.args, self.folder = shape, args, folder
        self.tokenizer = AutoTokenizer.from_pretrained(EMBEDDED_MODEL, padding_side="left")

    def network(self):
        """Random weights whose mask token is the tokenizer's."""
        args = self.args
        model = make_network(self.shape, args.device, args.block, args.seed, self.tokenizer.mask_token_id)
        if args.compile:
            model.model.compile()
        return model

    def config(self, method: str, **settings: Any) -> DiffusionGRPOConfig:
        """Return the command line's settings, for one rollout and all its inner updates.

        Args:
            method: one of `METHODS`.
            **settings: what is different.
        """
        args = self.args
        common = dict(
            max_completion_length=args.canvas,
            denoising_steps=args.steps,
            block_length=args.block,
            per_device_train_batch_size=args.rows,
            num_generations=args.rows,
            top_k=0,
            top_p=1.0,
            seed=args.seed,
            use_cpu=args.device.type == "cpu",
            bf16=False,
            gradient_checkpointing=False,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
        )
        own = dict(num_mc_samples=args.views) if method == "AGRPO" else dict(num_iterations=args.iterations)
        config = METHODS[method][1](self.folder, **common | own | settings)
        config.max_steps = config.num_iterations
        return config

    def make(self, method: str, **settings: Any) -> DiffusionGRPOTrainer:
        """Make a trainer with that config, whose `train` does one rollout and all its inner updates."""
        config = self.config(method, **settings)
        trainer = METHODS[method][0](
            self.network(),
            lambda completions, **kwargs: [float(row) for row in range(len(completions))],
            config,
            Dataset.from_dict({"prompt": ["a" + " a" * (self.args.prompt - 1)] * config.per_device_train_batch_size}),
            processing_class=self.tokenizer,
            peft_config=None if self.args.full else lora(),
        )
        trainer.remove_callback(PrinterCallback)
        return trainer


def work_of(trainer: DiffusionGRPOTrainer) -> Work:
    """The work of one rollout and all its inner updates."""
    rows, cost = trainer.args.per_device_train_batch_size, trainer.completion_cost()
    passes = trainer.args.denoising_steps + cost.old + cost.reference + cost.training
    return Work(rows * passes, rows * trainer.args.max_completion_length)


def train(trainer: DiffusionGRPOTrainer, work: Work) -> Work:
    """One rollout and all its inner updates."""
    trainer.train()
    return work


class PublishedUpdate:
    """Count the passes of an update of the published schedule, with the numbers of a trainer's config.

    Args:
        trainers: make the network.
        trainer: whose config counts.
        lean: see `published.rollout`.
    """

    def __init__(self, trainers: Trainers, trainer: DiffusionGRPOTrainer, lean: bool):
        args, network = trainers.args, trainers.network()
        self.config, self.sampling, self.cost = trainer.args, trainer.args.sampling_config(), trainer.completion_cost()
        self.lean, self.steps = lean, args.published_steps
        self.reference = deepcopy(network) if args.full and self.cost.reference else None
        self.model: Any = network if args.full else get_peft_model(network, lora())
        self.optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad])
        self.family = trainer.family
        generator = torch.Generator().manual_seed(args.seed)
        ids = torch.randint(self.family.num_tokens, (args.rows, args.prompt + args.canvas), generator=generator)
        self.prompts, self.completions = ids.to(args.device).split([args.prompt, args.canvas], dim=1)
        self.mask = torch.ones_like(self.prompts)
        # the whole canvas hidden, and as many targets as a view of the method has
        self.canvas = torch.full_like(self.completions, self.family.mask_token_id)
        self.targets = torch.arange(args.canvas, device=args.device) < torch.full(
            (args.rows, 1), round(self.cost.targets), device=args.device
        )

    def denoise(self) -> Work:
        generator = torch.Generator(self.prompts.device).manual_seed(0)
        self.model.eval()
        canvas = published.rollout(
            self.model, self.prompts, self.mask, self.sampling, generator, self.lean, self.steps
        )
        return Work(self.steps * len(canvas), int((canvas != self.family.mask_token_id).sum()))

    def score(self, model) -> torch.Tensor:
        return published.score(model, self.prompts, self.mask, self.canvas, self.completions)

    @torch.no_grad()
    def old(self) -> Work:
        return Work(len(self.score(self.model)))

    @torch.no_grad()
    def compared(self) -> Work:
        if self.reference is not None:
            return Work(len(self.score(self.reference)))
        with self.model.disable_adapter():
            return Work(len(self.score(self.model)))

    def learn(self) -> Work:
        self.model.train()
        logps = self.score(self.model)
        before = logps.detach()
        advantages = torch.arange(len(logps), device=logps.device) - (len(logps) - 1) / 2
        epsilon, beta = self.config.epsilon, self.config.beta
        published.loss(logps, self.targets, advantages, epsilon, before, before if beta else None, beta).backward()
        return Work(len(logps))

    def step(self) -> Work:
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=False)
        return Work()

    def parts(self) -> list[Part]:
        """Yield every kind of pass, and how often an update needs it."""
        counted = [
            Part(self.denoise, self.sampling.denoising_steps / self.steps),
            Part(self.old, self.cost.old),
            Part(self.compared, self.cost.reference),
            Part(self.learn, self.cost.training),
            Part(self.step, self.config.num_iterations),
        ]
        return [part for part in counted if part.times > 0]


def compare_updates(name: str, method: str, trainers: Trainers, peak: float) -> None:
    args = trainers.args
    caches = {"block-causal": "block"} if trainers.shape.block_causal else {"exact": "none", "dual": "dual"}
    ours = {mode: trainers.make(method, cache=cache) for mode, cache in caches.items()}
    first = next(iter(ours))
    plain = {yardstick: PublishedUpdate(trainers, ours[first], yardstick == "lean") for yardstick in YARDSTICKS}
    modes = [Mode(yardstick, update.parts()) for yardstick, update in plain.items()]
    modes += [Mode(mode, [Part(partial(train, trainer, work_of(trainer)))]) for mode, trainer in ours.items()]
    results = measure.compare(modes, args.rounds, args.device, args.compile)
    shares = breakdown(ours[first], args.rounds)
    measure.report(f"{name}_{method}", f"{method} update, {name}", results, YARDSTICKS, peak, args, breakdown=shares)
    text = ", ".join(f"{part} {100 * share:.1f} %" for part, share in shares.items())
    Console().print(f"{method}, {name}, share of the time of an update, {first}: {text}")


def main() -> None:
    logging.set_verbosity_error()
    parser = arguments.parser(__doc__.splitlines()[0], "update")
    arguments.add_sampling(parser)
    arguments.add_updates(parser)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    args = parser.parse_args()

    for name in args.shapes:
        peak = measure.matmul_peak(args.device, SHAPES[name].dtype)
        with tempfile.TemporaryDirectory() as folder:
            trainers = Trainers(SHAPES[name], args, folder)
            for method in args.methods:
                compare_updates(name, method, trainers, peak)


if __name__ == "__main__":
    main()
