"""Diffusion language models as native transformers classes; importing this package registers them."""

from typing import Any

from trl_diffusion.distribution import score_targets
from trl_diffusion.family import DiffusionFamily, family_of
from trl_diffusion.models.diffusion_lm import DiffusionLM, DiffusionLMOutput
from trl_diffusion.models.dream import DreamConfig, DreamModel
from trl_diffusion.models.llada import LLaDAConfig, LLaDAModelLM
from trl_diffusion.models.sdar import SDARConfig, SDARForCausalLM
from trl_diffusion.sampling.window_cache import WindowCache

__all__ = [
    "DiffusionFamily",
    "DiffusionLM",
    "DiffusionLMOutput",
    "DreamConfig",
    "DreamModel",
    "LLaDAConfig",
    "LLaDAModelLM",
    "SDARConfig",
    "SDARForCausalLM",
    "WindowCache",
    "export_adapter",
    "family_of",
    "import_adapter",
    "score_targets",
]


def __getattr__(name: str) -> Any:
    # Adapters stand above the models and keep this import path too.
    if name in ("export_adapter", "import_adapter"):
        from trl_diffusion import adapters

        return getattr(adapters, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
