"""A dLLM and a tokenizer small enough to enumerate: four words, two of which end a text."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from trl_diffusion.models import (
    DiffusionLM,
    LLaDA2MoeModelLM,
    LLaDAModelLM,
    LLaDAMoEModelLM,
    SDARForCausalLM,
    SDARMoeForCausalLM,
)

TAIL, END, A, B, MASK = range(5)
WORDS = ["<tail>", "<end>", "a", "b", "<mask>"]
CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] + ' ' }}{% endfor %}"


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Words `a` and `b`; `<tail>` and `<end>` end a text."""
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<tail>",
        eos_token="<tail>",
        mask_token="<mask>",
        additional_special_tokens=["<end>"],
        padding_side="left",
        chat_template=CHAT_TEMPLATE,
    )


def tiny_model(seed: int = 0, scale: float = 6.0, model_class: type[DiffusionLM] = LLaDAModelLM, **overrides):
    """A random network over the four words, sharpened by `scale` so that its probabilities differ clearly."""
    settings = dict(
        vocab_size=5,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        intermediate_size=24,
        max_position_embeddings=64,
        mask_token_id=MASK,
        eos_token_id=TAIL,
        pad_token_id=TAIL,
        end_token_ids=[TAIL, END],
    )
    torch.manual_seed(seed)
    model = model_class(model_class.config_class(**settings | overrides))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=scale * 0.02 * (5 if parameter is model.lm_head.weight else 1))
    return model


def tiny_sdar(seed: int = 0, scale: float = 6.0, block_size: int = 4, **overrides) -> SDARForCausalLM:
    """The same with block-causal attention; blocks begin with the completion."""
    blocks = {"block_size": block_size, "block_origin": "completion"}
    return tiny_model(seed, scale, SDARForCausalLM, head_dim=8, **blocks | overrides)


MIXTURES = {"lladamoe": LLaDAMoEModelLM, "sdar_moe": SDARMoeForCausalLM, "llada2_moe": LLaDA2MoeModelLM}


def tiny_mixture(family: str, seed: int = 5, scale: float = 10.0, **overrides):
    """The same with four experts, of which a token takes two."""
    sizes = {"head_dim": 8, "moe_intermediate_size": 8, "num_experts": 4, "num_experts_per_tok": 2}
    if family != "lladamoe":
        sizes |= {"block_origin": "completion"}
    if family == "llada2_moe":
        sizes |= {"block_size": 4, "first_k_dense_replace": 0, "n_group": 2, "topk_group": 1, "num_shared_experts": 1}
    return tiny_model(seed, scale, MIXTURES[family], **sizes | overrides)


def coded_prompts(rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Left-padded prompts of 5 to 8 words, (ids [rows, 8], mask); the last 5 words are the row's number in base 2."""
    ids = torch.full((rows, 8), A)
    ids[:, 3:] = A + (torch.arange(rows).unsqueeze(1) >> torch.arange(4, -1, -1)) % 2
    mask = (torch.arange(8) >= torch.arange(rows).unsqueeze(1) % 4).long()
    return ids.masked_fill(mask == 0, TAIL), mask


def coded_row(prompt: torch.Tensor) -> int:
    """The row number in a prompt made by `coded_prompts`."""
    return int("".join(str(word - A) for word in prompt[3:8].tolist()), 2)


def canvas_logits(model, prompt_ids: torch.Tensor, prompt_mask: torch.Tensor, canvas: torch.Tensor) -> torch.Tensor:
    """Float32 [R, L, V] logits of the canvas by the ordinary forward pass, those of the mask token at -inf."""
    ids = torch.cat([prompt_ids, canvas], dim=1)
    mask = torch.cat([prompt_mask, torch.ones_like(canvas)], dim=1)
    logits = model(input_ids=ids, attention_mask=mask).logits
    first = prompt_ids.size(1) - (model.config.model_type == "Dream")
    return logits[:, first : first + canvas.size(1)].masked_fill(torch.arange(logits.size(-1)) == MASK, -torch.inf)


def set_bias(model, bias: torch.Tensor):
    """Give the LM head a bias [V]: the first hidden feature becomes 1, and the head's column of it the bias."""
    model.model.norm.register_forward_hook(lambda _, __, hidden: hidden.index_fill(-1, torch.tensor([0]), 1.0))
    with torch.no_grad():
        model.lm_head.weight[:, 0] = bias
    return model


def without_ends(model):
    """A network that never ends a text, so that every completion takes all steps."""
    return set_bias(model, torch.tensor([-1e4, -1e4, 0.0, 0.0, 0.0]))


@contextmanager
def forwards_of(module: torch.nn.Module) -> Iterator[list[dict]]:
    """The arguments of every call of `module` (positional ones under "args"), collected while the context lasts."""
    calls: list[dict] = []

    def record(_, args, kwargs) -> None:
        calls.append({"args": args, **kwargs})

    handle = module.register_forward_pre_hook(record, with_kwargs=True)
    try:
        yield calls
    finally:
        handle.remove()
