"""The command `lm_eval` with the model `trl_diffusion`:

    python -m trl_diffusion.evaluation.lm_eval --model trl_diffusion \
        --model_args pretrained=GSAI-ML/LLaDA-8B-Instruct,canvas_length=256 --tasks gsm8k --apply_chat_template

It takes every argument of `lm_eval`. Over processes: `accelerate launch -m trl_diffusion.evaluation.lm_eval …`.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec


def main() -> None:
    """Run the harness's command line with our model registered."""
    if find_spec("lm_eval") is None:
        sys.exit("The lm-evaluation-harness is not installed. Install it with `pip install 'trl-diffusion[lm-eval]'`.")
    from lm_eval.__main__ import cli_evaluate

    from trl_diffusion.evaluation.lm_eval import model as model  # registers it

    cli_evaluate()


if __name__ == "__main__":
    main()
