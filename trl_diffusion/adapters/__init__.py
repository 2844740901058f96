"""LoRA adapters: the layers they adapt, the names they have on the Hub, and the precision of their weights."""

from trl_diffusion.adapters.renaming import export_adapter, import_adapter

__all__ = ["export_adapter", "import_adapter"]
