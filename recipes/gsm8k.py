"""Any method on GSM8K: the same as `recipes/train.py`, which has more tasks.

accelerate launch recipes/gsm8k.py --method dmpo
"""

from trl_diffusion.cli.train import main

if __name__ == "__main__":
    main()
