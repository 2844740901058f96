"""Any method on GSM8K: the same as `recipes/train.py`, which has more tasks.

accelerate launch recipes/gsm8k.py --method dmpo
"""

import sys

from trl_diffusion.cli.app import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
