"""Trains a model by any method on any task: `trl-diffusion train` as a script.

The text at the top of `trl_diffusion/cli/train.py` has examples.
"""

from trl_diffusion.cli.train import main

if __name__ == "__main__":
    main()
