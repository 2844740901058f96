"""diffu-GRPO on GSM8K: `recipes/train.py --method diffu_grpo`."""

import sys

from trl_diffusion.cli.app import main

if __name__ == "__main__":
    sys.exit(main(["train", "diffu_grpo", *sys.argv[1:]]))
