"""LoRA adapters: which layers they go on, what they cover, the names they have on the Hub, and their precision."""

from trl_diffusion.adapters.renaming import export_adapter, import_adapter

__all__ = ["export_adapter", "import_adapter"]
