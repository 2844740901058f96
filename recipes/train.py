"""Trains a model by any method on any task: `trl-diffusion train` as a script.

The text at the top of `trl_diffusion/cli/train.py` has examples.
"""

import sys

from trl_diffusion.cli.app import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
