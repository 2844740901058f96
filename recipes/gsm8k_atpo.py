"""ATPO on GSM8K: `recipes/train.py --method atpo`; `--plot_every 20` shows the rollouts' confusion zones."""

from trl_diffusion.cli.train import main

if __name__ == "__main__":
    main(method="atpo")
