"""Scores published or own completions: `trl-diffusion rescore` as a script.

The text at the top of `trl_diffusion/cli/rescore.py` has examples.
"""

import sys

from trl_diffusion.cli.app import main

if __name__ == "__main__":
    sys.exit(main(["rescore", *sys.argv[1:]]))
