"""Keep the canvas of training beside the weights, in transformers' `generation_config.json`.

`generate()` reads it from a full model, and `trl-diffusion evaluate` and `sample` from an adapter too, so that a
trained model is decoded on the canvas it was trained on unless another one is asked for.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import GenerationConfig

DECODING = ("max_new_tokens", "block_length", "denoising_steps")


def record_decoding(folder: str | Path, decoding: dict[str, Any]) -> None:
    """Write the settings of decoding into a folder's generation config, keeping what is there.

    Args:
        folder: of a model or an adapter.
        decoding: values of `DECODING`.
    """
    path = Path(folder) / "generation_config.json"
    config = GenerationConfig.from_pretrained(folder) if path.is_file() else GenerationConfig()
    config.update(**decoding)
    for name in DECODING:  # what transformers has no field for, `update` returns instead of setting
        setattr(config, name, decoding[name])
    config._from_model_config = False  # or transformers would make it anew from the model's config
    config.save_pretrained(folder)


def recorded_decoding(name: str) -> dict[str, int] | None:
    """Return the canvas that a model or an adapter was trained on, or `None` where it is not recorded.

    Args:
        name: model or adapter, on the Hub or in a folder.

    Returns:
        `canvas_length`, `block_length` and `denoising_steps`.
    """
    try:
        config = GenerationConfig.from_pretrained(name)
    except OSError:  # it has none
        return None
    found = {key: value for key, value in vars(config).items() if key in DECODING}
    if any(found.get(key) is None for key in DECODING):
        return None
    return {"canvas_length": found.pop("max_new_tokens"), **found}
