"""A user's script that pushes, in a process of its own: `huggingface_hub` reads its endpoint when it is imported.

    python tests/hub_worker.py BASE ADAPTER FOLDER

pushes the four-word model and its tokenizer to BASE, trains LoRA over BASE for three updates in FOLDER, pushes it to
ADAPTER, and leaves the trained model's logits in `FOLDER/../logits.pt`.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from datasets import Dataset
from methods import PROMPTS, method_named, text_reward
from peft import LoraConfig
from tiny import tiny_model, tiny_tokenizer

IDS = torch.tensor([[2, 3, 4, 4], [3, 3, 2, 4]])


def logits_of(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def main(base: str, adapter: str, folder: str) -> None:
    tiny_model(seed=3).push_to_hub(base)
    tiny_tokenizer().push_to_hub(base)
    method = method_named("agrpo")
    settings = method.make(
        folder,
        max_steps=3,
        learning_rate=0.5,
        save_strategy="steps",
        save_steps=2,
        push_to_hub=True,
        hub_model_id=adapter,
        hub_always_push=True,
    ).args
    trainer = method.trainer(
        base,
        text_reward,
        settings,
        Dataset.from_dict({"prompt": PROMPTS}),
        peft_config=LoraConfig(r=4, target_modules=["attn_out", "ff_out", "q_proj"]),
    )
    trainer.train()
    trainer.push_to_hub(dataset_name="tester/words")
    torch.save(logits_of(trainer.model), Path(folder).parent / "logits.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])
