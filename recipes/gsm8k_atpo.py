"""ATPO on GSM8K: `recipes/train.py --method atpo`; `--plot_every 20` shows the rollouts' confusion zones."""

import sys

from trl_diffusion.cli.app import main

if __name__ == "__main__":
    sys.exit(main(["train", "atpo", *sys.argv[1:]]))
