"""Load what the commands that train need besides the model: its tokenizer, and the config of a new adapter."""

from __future__ import annotations

from peft import PeftConfig
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from trl import ModelConfig, get_peft_config

from trl_diffusion.adapters.renaming import base_of, is_adapter


def load_tokenizer(model_args: ModelConfig) -> PreTrainedTokenizerBase:
    """Load the model's tokenizer; for an adapter its base's, as in evaluation."""
    name = str(model_args.model_name_or_path)
    return AutoTokenizer.from_pretrained((is_adapter(name) and base_of(name)) or name, padding_side="left")


def new_adapter(model_args: ModelConfig) -> PeftConfig | None:
    """Return the adapter that `--use_peft` asks for; none for a model that is an adapter, which is trained further."""
    name = str(model_args.model_name_or_path)
    if not is_adapter(name):
        return get_peft_config(model_args)
    print(f"{name} is an adapter of {base_of(name)}: it is trained further as it is, whatever `lora_*` settings say.")
    return None
