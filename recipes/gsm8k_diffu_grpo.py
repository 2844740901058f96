"""diffu-GRPO on GSM8K, from prompts to a trained model or adapter.

The embedded model on synthetic word problems (a few minutes on two CPU cores):

    accelerate launch recipes/gsm8k_diffu_grpo.py

LLaDA-8B on GSM8K:

    accelerate launch --config_file recipes/accelerate_configs/zero2.yaml recipes/gsm8k_diffu_grpo.py \
        --config recipes/configs/llada_8b/gsm8k_diffu_grpo.yaml

Everything in a config can be overridden on the command line, for example `--seed 1 --max_steps 20`.
"""

from gsm8k import train

from trl_diffusion.trainers import DiffuGRPOConfig, DiffuGRPOTrainer

if __name__ == "__main__":
    train(DiffuGRPOTrainer, DiffuGRPOConfig, "embedded/gsm8k_diffu_grpo.yaml")
