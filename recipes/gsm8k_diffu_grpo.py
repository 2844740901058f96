"""diffu-GRPO on GSM8K: `recipes/train.py --method diffu_grpo`."""

from trl_diffusion.cli.train import main

if __name__ == "__main__":
    main(method="diffu_grpo")
