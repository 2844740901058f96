"""The example in a model card, which loads the model and samples from it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from trl_diffusion.models.embedded import EMBEDDED_MODELS

_QUESTION = "Tom has 7 pens and gets 5 more. How many pens now?"


def bundled_name(base: str) -> str | None:
    """Return the name of a bundled model, given its path; `None` for another model."""
    return {Path(path): name for name, path in EMBEDDED_MODELS.items()}.get(Path(base))


def example(trained: str, base: str | None, generation: Mapping[str, int], remark: str = "") -> str:
    """Return the example as Markdown. It needs `pip install trl-diffusion`, and runs from any folder.

    Args:
        trained: the model, by its id on the Hub or its folder.
        base: the base of an adapter, by its id on the Hub, its folder or the path of a bundled model; `None` for a
            whole model.
        generation: arguments of `generate` that the model was trained with.
        remark: comment on the base.
    """
    bundled = None if base is None else bundled_name(base)
    whole = f'"{trained}"' if base is None else f'EMBEDDED_MODELS["{bundled}"]' if bundled else f'"{base}"'
    lines = [
        "import trl_diffusion  # registers the model's class",
        *(["from peft import PeftModel"] if base is not None else []),
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        *(["from trl_diffusion.models.embedded import EMBEDDED_MODELS"] if bundled else []),
        "",
        *([f"base = {whole}{remark}"] if base is not None else []),
        f'model = AutoModelForCausalLM.from_pretrained({whole if base is None else "base"}, dtype="auto")',
        *([f'model = PeftModel.from_pretrained(model, "{trained}")'] if base is not None else []),
        f'tokenizer = AutoTokenizer.from_pretrained("{trained}", padding_side="left")',
        f'messages = [{{"role": "user", "content": "{_QUESTION}"}}]',
        "prompt = tokenizer.apply_chat_template(",
        '    messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"',
        ")",
        "canvas = model.generate(",
        f'    input_ids=prompt["input_ids"], {_arguments(generation)}',
        ")",
        'print(tokenizer.decode(canvas[0, prompt["input_ids"].size(1) :], skip_special_tokens=True))',
    ]
    return "\n".join(["With `pip install trl-diffusion`:", "", "```python", *lines, "```"])


def _arguments(values: Mapping[str, int]) -> str:
    return ", ".join(f"{name}={value}" for name, value in values.items())
