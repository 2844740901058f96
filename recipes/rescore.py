"""Scores published or own completions: `trl-diffusion rescore` as a script.

The text at the top of `trl_diffusion/cli/rescore.py` has examples.
"""

from trl_diffusion.cli.rescore import main

if __name__ == "__main__":
    main()
