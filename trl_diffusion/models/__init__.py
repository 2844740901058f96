"""Diffusion language models as native transformers classes; importing this package registers them."""

from trl_diffusion.models.adapters import export_adapter, import_adapter
from trl_diffusion.models.diffusion_lm import DiffusionLM, DiffusionLMOutput
from trl_diffusion.models.dream import DreamConfig, DreamModel
from trl_diffusion.models.family import DiffusionFamily, family_of
from trl_diffusion.models.llada import LLaDAConfig, LLaDAModelLM
from trl_diffusion.models.scoring_head import score_targets
from trl_diffusion.models.sdar import SDARConfig, SDARForCausalLM
from trl_diffusion.models.window_cache import WindowCache

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
