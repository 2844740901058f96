"""Finds where a model hesitates while it denoises: `trl-diffusion analyze` as a script.

The text at the top of `trl_diffusion/cli/analyze.py` has examples.
"""

import sys

from trl_diffusion.cli.app import main

if __name__ == "__main__":
    sys.exit(main(["analyze", *sys.argv[1:]]))
