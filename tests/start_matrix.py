"""Starts the recipes as a user does, with progress bar and report, over kinds of training and backends.

Every cell is one `accelerate launch` with a file of `trl_diffusion/accelerate_configs` and no other flag for the
launch: once to train for an update, once as a dry run.

    python tests/start_matrix.py                                     # every cell, about an hour on two cores
    python tests/start_matrix.py --weights lora --backends cpu_zero3

`test_recipes.py` runs a few of the cells.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

from launching import accelerate_launch, run

LORA = ["--use_peft", "true", "--lora_r", "4", "--lora_target_modules", "all-linear"]
FOUR_BIT = ["--load_in_4bit", "true", "--bnb_4bit_quant_type", "nf4", "--use_bnb_nested_quant", "true"]
WEIGHTS = {"full": [], "lora": LORA, "qlora": [*LORA, *FOUR_BIT]}
BACKENDS = ["single_gpu", "cpu_ddp", "cpu_zero2", "cpu_zero2_offload", "cpu_zero3", "cpu_zero3_offload"]
RECIPES: dict[str, list[str]] = {
    "gsm8k_agrpo": [],
    "gsm8k_atpo": [],
    "gsm8k_diffu_grpo": ["--num_iterations", "1"],  # with a reference model
    "countdown_sapo": ["--num_iterations", "1", "--num_rollouts", "1"],
}
TINY = {
    "max_steps": "1",
    "logging_steps": "1",
    "save_steps": "1",
    "eval_size": "4",
    "per_device_train_batch_size": "8",
    "num_generations": "4",
    "max_completion_length": "16",
    "denoising_steps": "8",
    "num_mc_samples": "1",
}


def start(
    recipe: str, weights: str, backend: str, folder: Path, dry_run: bool = False, extra: tuple[str, ...] = ()
) -> str | None:
    """Run a cell.

    Returns:
        What went wrong, or `None`.
    """
    settings = [text for name, value in TINY.items() for text in (f"--{name}", value)]
    command = [*accelerate_launch(backend), f"recipes/{recipe}.py", *settings, *RECIPES[recipe], *WEIGHTS[weights]]
    command += ["--output_dir", str(folder), *["--dry_run"] * dry_run, *extra]
    code, output = run(command, folder.parent, COLUMNS="200")
    if code != 0:
        return output
    written = [path.name for path in folder.iterdir()] if folder.exists() else []
    wanted = [] if dry_run else ["model.safetensors" if weights == "full" else "adapter_model.safetensors"]
    if output.count("forward units") != 1 or (written if dry_run else not set(wanted) <= set(written)):
        return f"{output}\nwritten: {written}"
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=["gsm8k_agrpo", "gsm8k_diffu_grpo"])
    parser.add_argument("--weights", nargs="+", choices=WEIGHTS, default=[*WEIGHTS])
    parser.add_argument("--backends", nargs="+", choices=BACKENDS, default=BACKENDS)
    args = parser.parse_args()
    failed = 0
    for recipe in args.recipes:
        for weights in args.weights:
            for backend in args.backends:
                for dry_run in (True, False):
                    begin = time.perf_counter()
                    with tempfile.TemporaryDirectory() as folder:
                        problem = start(recipe, weights, backend, Path(folder) / "out", dry_run)
                    name = f"{recipe} {weights} {backend}{' --dry_run' * dry_run}"
                    verdict = "started" if problem is None else "FAILED"
                    print(f"{verdict:8}{name}, {time.perf_counter() - begin:.0f} s", flush=True)
                    if problem is not None:
                        failed += 1
                        print(problem[-3000:], flush=True)
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
