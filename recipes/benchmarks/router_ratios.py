"""Measures how far the first |log ratio| after a rollout is from 0 for a mixture of experts, by the dtype of routers.

    python recipes/benchmarks/router_ratios.py

As `log_ratios.py`, for a random network of Qwen3-MoE's kind. A token whose hidden state is rounded otherwise in the
update than in the rollout may go to other experts. The dense network has the same attention, and MLPs as wide as the
experts that a token is sent to.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from log_ratios import measure
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig, AutoTokenizer
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter
from transformers.utils import logging

from trl_diffusion.models import LLaDAMoEConfig, LLaDAMoEModelLM
from trl_diffusion.models.embedded import EMBEDDED_MODEL
from trl_diffusion.models.qwen_layers import Qwen3MoeRouter


def save_network(folder: Path, dense: bool, seed: int) -> str:
    """Write a random network with the embedded model's tokenizer."""
    layers, experts, used, width = 3, 16, 4, 32
    small = AutoConfig.from_pretrained(EMBEDDED_MODEL)
    torch.manual_seed(seed)
    config = LLaDAMoEConfig(
        vocab_size=small.vocab_size,
        num_tokens=small.num_tokens,
        mask_token_id=small.mask_token_id,
        eos_token_id=small.eos_token_id,
        end_token_ids=small.end_token_ids,
        max_position_embeddings=1024,
        hidden_size=64,
        intermediate_size=used * width,
        moe_intermediate_size=width,
        num_experts=experts,
        num_experts_per_tok=used,
        norm_topk_prob=True,
        num_hidden_layers=layers,
        mlp_only_layers=list(range(layers)) if dense else [],
        num_attention_heads=4,
        num_key_value_heads=4,
        initializer_range=0.1,
        hub_model_type="lladamoe",
    )
    LLaDAMoEModelLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(EMBEDDED_MODEL).save_pretrained(folder)
    return str(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=4, help="per_device_train_batch_size, a divisor of 32")
    parser.add_argument("--seed", type=int, default=42)
    args = parser.parse_args()

    logging.set_verbosity_error()
    title = f"|log ratio| of 32 completions, {args.rows} at a time"
    table = Table("network", "routers", "mean", "largest", title=title)
    with tempfile.TemporaryDirectory() as folder:
        dense, mixture = (save_network(Path(folder) / name, name == "dense", args.seed) for name in ("dense", "moe"))
        for dtype, model, router in [
            ("bfloat16", dense, Qwen3MoeRouter),
            ("bfloat16", mixture, Qwen3MoeTopKRouter),  # computes in the dtype of the network
            ("bfloat16", mixture, Qwen3MoeRouter),
            ("float32", mixture, Qwen3MoeRouter),
        ]:
            LLaDAMoEModelLM.router_class = router
            own = "none" if model == dense else dtype if router is Qwen3MoeTopKRouter else "float32"
            found = measure("as trained", dtype, args, str(Path(folder) / "run"), model)
            table.add_row(dtype, own, f"{found.mean():.2g}", f"{found.max():.2g}")
    Console().print(table)


if __name__ == "__main__":
    main()
