"""Load what commands need: a model to decode with; or, to train, a tokenizer and the config of a new adapter."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from peft import PeftConfig
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from trl import ModelConfig, get_peft_config

from trl_diffusion.adapters.renaming import base_of, is_adapter
from trl_diffusion.evaluation.loading import load_model
from trl_diffusion.models.fused import fuse_elementwise


@dataclass
class LoadingArguments:
    """Options of the commands that decode with a model."""

    model_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "Model on the Hub or folder, or `embedded_sdar`; the embedded one if there is no model or adapter."
        },
    )
    adapter: str | None = field(
        default=None, metadata={"help": "PEFT adapter; its own base is loaded if none is given."}
    )
    model_revision: str | None = field(default=None, metadata={"help": "Revision of the model on the Hub."})
    dtype: str = field(default="auto", metadata={"help": "Type of the weights; `auto` for the checkpoint's."})
    attn_implementation: str | None = field(default=None, metadata={"help": "As in transformers."})
    block_size: int | None = field(
        default=None,
        metadata={"help": "Attention block of a checkpoint whose config.json leaves it out; 0 for full attention."},
    )
    block_origin: str | None = field(
        default=None,
        metadata={
            "help": "Where the first attention block begins, `sequence` or `completion`; else as the checkpoint says."
        },
    )
    fuse_elementwise: bool = field(
        default=False,
        metadata={"help": "Compute rotations, norms and gates in single kernels, which are compiled."},
    )
    merge_adapter: bool | None = field(
        default=None,
        metadata={
            "help": "Merge the adapter into its base. If not given, where only the rounding of float32 changes; in "
            "bfloat16 merging rounds away what is small in the adapter."
        },
    )
    use_cpu: bool = field(default=False, metadata={"help": "Stay on the CPU although there is a GPU."})

    def load(
        self, device: torch.device | str, allow_other_base: bool = False
    ) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """Load the model, with its adapter, and the tokenizer; see `load_model`."""
        model, tokenizer = load_model(
            self.model_name_or_path,
            self.adapter,
            revision=self.model_revision,
            dtype=self.dtype,
            attn_implementation=self.attn_implementation,
            block_size=self.block_size,
            block_origin=self.block_origin,
            device=device,
            allow_other_base=allow_other_base,
        )
        if self.fuse_elementwise:
            fuse_elementwise(model)
        return model, tokenizer


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
