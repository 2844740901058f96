r"""AGRPO on GSM8K, from prompts to a trained model or adapter.

The bundled model on synthetic word problems (a few minutes on two CPU cores):

    accelerate launch recipes/gsm8k_agrpo.py

LLaDA-8B on GSM8K:

    accelerate launch --config_file trl_diffusion/accelerate_configs/zero2.yaml recipes/gsm8k_agrpo.py \
        --config trl_diffusion/configs/llada_8b/gsm8k_agrpo.yaml

Everything in a config can be overridden on the command line, for example `--seed 1 --max_steps 20`.
`recipes/train.py` has other tasks and methods.
"""

import sys

from trl_diffusion.cli.app import main

if __name__ == "__main__":
    sys.exit(main(["train", "agrpo", *sys.argv[1:]]))
