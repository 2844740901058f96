"""`python -m trl_diffusion` is the command `trl-diffusion`."""

import sys

from trl_diffusion.cli.app import main

if __name__ == "__main__":
    sys.exit(main())
