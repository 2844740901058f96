"""Registers the model families with transformers without loading their classes.

Model cards promise that after `import trl_diffusion` transformers' Auto classes load our checkpoints. Importing the
model classes loads torch's model code and PEFT, and took half of the time of `import trl_diffusion.tasks`. But
whatever the Auto classes load, they read its config first. So a family is registered by a stand-in for its config
class alone: when a config of the family is read, the stand-in imports `trl_diffusion.models`, which registers the real
classes in its place. This uses only `AutoConfig.register`; nothing of transformers is replaced. torch itself cannot be
avoided: it is imported with the base class of all configs.

One thing comes later than the rest: `AutoTokenizer` knows Dream's tokenizer in a folder without a `config.json` only
once `trl_diffusion.models` is imported, as loading any model of this library does.
"""

from __future__ import annotations

from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

STAND_INS = (  # model types
    *("llada", "Dream", "sdar", "a2d-qwen3", "a2d-qwen2", "lladamoe", "sdar_moe", "llada2_moe", "Fast_dLLM_Qwen"),
)


def _native_config(model_type: str) -> type[PreTrainedConfig]:
    """Import the families, which replaces the stand-ins, and return a family's own config class."""
    from trl_diffusion import models as models

    return CONFIG_MAPPING[model_type]


def register_families() -> None:
    """Register a stand-in for the config of every family."""
    for model_type in STAND_INS:
        AutoConfig.register(model_type, _stand_in(model_type))


def _stand_in(name: str) -> type[PreTrainedConfig]:
    """Return a config class that makes configs of the family's own class in all the ways that `AutoConfig` asks."""

    class StandInConfig(PreTrainedConfig):
        model_type = name

        def __new__(cls, *args: Any, **kwargs: Any) -> Any:
            return _native_config(name)(*args, **kwargs)

        @classmethod
        def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
            return _native_config(name).from_dict(config_dict, **kwargs)

    return StandInConfig
