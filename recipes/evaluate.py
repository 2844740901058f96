"""Evaluates a model or an adapter: `trl-diffusion evaluate` as a script.

The text at the top of `trl_diffusion/cli/evaluate.py` has examples.
"""

import sys

from trl_diffusion.cli.app import main

if __name__ == "__main__":
    sys.exit(main(["evaluate", *sys.argv[1:]]))
