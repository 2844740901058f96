"""SAPO on Countdown: `trl-diffusion train diffu_grpo --task countdown --num_rollouts 3` as a script.

`--num_rollouts 0` trains the baseline, plain diffu-GRPO, with the same settings.
"""

import sys

from trl_diffusion.cli.app import main

if __name__ == "__main__":
    # A configuration names all three itself.
    preset = [] if "--config" in sys.argv else ["diffu_grpo", "--task", "countdown", "--num_rollouts", "3"]
    sys.exit(main(["train", *preset, *sys.argv[1:]]))
