"""Diffusion language models as native transformers classes; importing this package registers them.

A family is one file here and one import below.
"""

from typing import Any

from trl_diffusion.distribution import score_targets
from trl_diffusion.family import DiffusionFamily, family_of
from trl_diffusion.models.a2d import A2DQwen2Config as A2DQwen2Config
from trl_diffusion.models.a2d import A2DQwen2LMHeadModel as A2DQwen2LMHeadModel
from trl_diffusion.models.a2d import A2DQwen3Config as A2DQwen3Config
from trl_diffusion.models.a2d import A2DQwen3LMHeadModel as A2DQwen3LMHeadModel
from trl_diffusion.models.diffusion_lm import DiffusionLM, DiffusionLMOutput
from trl_diffusion.models.dream import DreamConfig as DreamConfig
from trl_diffusion.models.dream import DreamModel as DreamModel
from trl_diffusion.models.families import FAMILIES
from trl_diffusion.models.fast_dllm import Fast_dLLM_QwenForCausalLM as Fast_dLLM_QwenForCausalLM
from trl_diffusion.models.fast_dllm import FastDLLMConfig as FastDLLMConfig
from trl_diffusion.models.llada import LLaDAConfig as LLaDAConfig
from trl_diffusion.models.llada import LLaDAModelLM as LLaDAModelLM
from trl_diffusion.models.llada2 import LLaDA2MoeConfig as LLaDA2MoeConfig
from trl_diffusion.models.llada2 import LLaDA2MoeModelLM as LLaDA2MoeModelLM
from trl_diffusion.models.llada_moe import LLaDAMoEConfig as LLaDAMoEConfig
from trl_diffusion.models.llada_moe import LLaDAMoEModelLM as LLaDAMoEModelLM
from trl_diffusion.models.sdar import SDARConfig as SDARConfig
from trl_diffusion.models.sdar import SDARForCausalLM as SDARForCausalLM
from trl_diffusion.models.sdar_moe import SDARMoeConfig as SDARMoeConfig
from trl_diffusion.models.sdar_moe import SDARMoeForCausalLM as SDARMoeForCausalLM
from trl_diffusion.sampling.window_cache import WindowCache

__all__ = [
    "DiffusionFamily",
    "DiffusionLM",
    "DiffusionLMOutput",
    "WindowCache",
    "export_adapter",
    "family_of",
    "import_adapter",
    "score_targets",
    *(known.__name__ for family in FAMILIES.items() for known in family),
]


def __getattr__(name: str) -> Any:
    # Adapters import the models, so they are imported only when somebody asks for their old path here.
    if name in ("export_adapter", "import_adapter"):
        from trl_diffusion import adapters

        return getattr(adapters, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
