"""Masked supervised fine-tuning as in d1 (2504.12216): `trl-diffusion train sft` as a script.

The text at the top of `trl_diffusion/cli/sft.py` has examples.
"""

import sys

from trl_diffusion.cli.app import main

if __name__ == "__main__":
    sys.exit(main(["train", "sft", *sys.argv[1:]]))
