"""Evaluates a model or an adapter: `trl-diffusion evaluate` as a script.

The text at the top of `trl_diffusion/cli/evaluate.py` has examples.
"""

from trl_diffusion.cli.evaluate import main

if __name__ == "__main__":
    main()
