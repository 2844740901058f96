"""The chunked scoring head against log-softmax of the whole logits."""

from __future__ import annotations

import copy
from itertools import product

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import MASK, forwards_of, tiny_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from trl_diffusion.models import DiffusionFamily, scoring_head
from trl_diffusion.models.scoring_head import ScoringHead

WIDTH, IDS, ROWS = 8, 29, 21
FAMILY = DiffusionFamily("test", mask_token_id=3, num_tokens=26, end_token_ids=(0,), tail_token_id=0)
DRAWABLE = [token for token in range(26) if token != 3]


def head(dtype: torch.dtype = torch.float32) -> ScoringHead:
    torch.manual_seed(0)
    return ScoringHead(WIDTH, IDS, bias=False, dtype=dtype)


def inputs(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states [N, H], targets [N] and a support [N, 5] that holds all but the last of them, with padding."""
    torch.manual_seed(1)
    hidden = (4 * torch.randn(ROWS, WIDTH)).to(dtype).requires_grad_()
    order = torch.stack([torch.randperm(len(DRAWABLE)) for _ in range(ROWS)])
    ids = torch.tensor(DRAWABLE)[order]
    support = ids[:, :5].int()
    support[::3, 3:] = -1
    targets = ids[torch.arange(ROWS), torch.arange(ROWS) % 3]
    targets[-1] = ids[-1, 7]
    return hidden, targets, support


def in_chunks_of(rows: int, monkeypatch) -> None:
    monkeypatch.setattr(scoring_head, "_CPU_CHUNK", rows * IDS + 3)


def plain(hidden, weight, targets, support, temperature) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities and entropies by definition: softmax over the ids that may be drawn."""
    allowed = torch.zeros(len(hidden), IDS, dtype=torch.bool)
    allowed[:, DRAWABLE] = True
    if support is not None:
        allowed &= (support.unsqueeze(-1) == torch.arange(IDS)).any(1)
    logits = (hidden @ weight.T).float() / temperature
    log_probs = logits.masked_fill(~allowed, -torch.inf).log_softmax(-1)
    probabilities = log_probs.exp()
    entropy = -(probabilities * log_probs.masked_fill(~allowed, 0.0)).sum(-1)
    return log_probs.gather(-1, targets.unsqueeze(-1)).squeeze(-1), entropy


def loss_of(log_probs: torch.Tensor, entropy: torch.Tensor, entropy_share: float) -> torch.Tensor:
    weight = torch.linspace(-1.0, 2.0, ROWS)
    drawn = log_probs != -torch.inf
    loss = (weight * log_probs)[drawn].sum()
    return loss + entropy_share * (weight.flip(0) * entropy).sum() if entropy_share else loss


CASES = list(product((1, 4, 7, ROWS), (False, True), (1.0, 0.7), (0.0, 0.3)))


@pytest.mark.parametrize(("rows", "supported", "temperature", "entropy_share"), CASES)
def test_scores_and_gradients_are_those_of_whole_logits(rows, supported, temperature, entropy_share, monkeypatch):
    in_chunks_of(rows, monkeypatch)
    module, (hidden, targets, support) = head(), inputs()
    support = support if supported else None
    found = module(hidden, targets, support, temperature, FAMILY)
    expected = plain(hidden, module.weight, targets, support, temperature)
    assert (found[0][-1] == -torch.inf) == supported
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)

    def gradients(scores, share=entropy_share):
        return torch.autograd.grad(loss_of(*scores, share), (hidden, module.weight), retain_graph=True)

    wrong = gradients(expected, entropy_share + 0.01)
    for one, other, another in zip(gradients(found), gradients(expected), wrong, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5 * float(other.abs().max()))
        assert (one - another).abs().max() > 1e-4 * other.abs().max()  # 1 % of the entropies' gradient is seen


def test_without_targets_the_most_likely_ids_are_scored(monkeypatch):
    in_chunks_of(4, monkeypatch)
    module, (hidden, targets, _) = head(), inputs()
    found, _ = module(hidden, None, None, 1.0, FAMILY)
    logits = FAMILY.exclude_never_sampled(torch.nn.functional.linear(hidden, module.weight))
    expected = logits.log_softmax(-1).amax(-1)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    assert (found - module(hidden, targets, None, 1.0, FAMILY)[0]).max() > 0.1
    weight = torch.arange(len(found), dtype=torch.float32)
    for one, other in zip(
        *(torch.autograd.grad((weight * values).sum(), (hidden, module.weight)) for values in (found, expected)),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5 * float(other.abs().max()))


@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16_is_that_of_whole_logits(autocast, monkeypatch):
    in_chunks_of(2, monkeypatch)
    dtype = torch.float32 if autocast else torch.bfloat16
    module, (hidden, targets, _) = head(dtype), inputs(dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = module(hidden, targets, None, 0.7, FAMILY)
        expected = plain(hidden, module.weight, targets, None, 0.7)
    exact = plain(hidden.double(), module.weight.double(), targets, None, 0.7)
    for one, other, third in zip(found, expected, exact, strict=True):
        assert one.dtype == torch.float32
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)
        assert (one - third).abs().max() > 1e-3  # the product was not computed in float32
    for parameter in (hidden, module.weight):
        exactly, ours, theirs = (
            torch.autograd.grad(loss_of(*scores, 0.3), parameter, retain_graph=True)[0]
            for scores in (exact, found, expected)
        )
        assert ours.dtype == dtype
        error, usual = (float((x - exactly).float().norm() / exactly.float().norm()) for x in (ours, theirs))
        assert error < 1.1 * usual < 0.02


def test_bfloat16_gradients_of_many_chunks_do_not_lose_the_small_ones(monkeypatch):
    """The weight's gradient is summed in float32: 512 equal rows, of which bfloat16 would stop counting at 256."""
    in_chunks_of(1, monkeypatch)
    module, one = head(torch.bfloat16), inputs(torch.bfloat16)[0][:1].detach()

    def gradient(rows: int) -> torch.Tensor:
        targets = torch.ones(rows, dtype=torch.long)
        log_probs = module(one.expand(rows, -1), targets, None, 1.0, FAMILY)[0]
        return torch.autograd.grad(log_probs.sum(), module.weight)[0].float()

    torch.testing.assert_close(gradient(512), 512 * gradient(1), rtol=2**-8, atol=0)


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that an operation returned."""

    largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor)]
        self.largest = max(self.largest, *sizes, 0)
        return output


def test_memory_does_not_grow_with_the_targets(monkeypatch):
    in_chunks_of(9, monkeypatch)
    module = head()

    def largest(rows: int, chunked: bool) -> int:
        hidden, targets = torch.randn(rows, WIDTH, requires_grad=True), torch.ones(rows, dtype=torch.long)
        with LargestTensor() as mode:
            scores = (
                module(hidden, targets, None, 1.0, FAMILY)
                if chunked
                else plain(hidden, module.weight, targets, None, 1.0)
            )
            (scores[0].sum() + scores[1].sum()).backward()
        return mode.largest

    assert largest(18, chunked=True) == largest(27, chunked=True) == 9 * IDS
    assert largest(27, chunked=False) == 27 * IDS


def test_without_gradient_the_numbers_are_the_same(monkeypatch):
    in_chunks_of(4, monkeypatch)
    module, (hidden, targets, support) = head(), inputs()
    with torch.no_grad():
        found = module(hidden, targets, support, 0.7, FAMILY)
    for one, other in zip(found, module(hidden, targets, support, 0.7, FAMILY), strict=True):
        assert torch.equal(one, other) and other.requires_grad and not one.requires_grad


def test_only_what_needs_a_gradient_gets_one(monkeypatch):
    in_chunks_of(4, monkeypatch)
    module, (hidden, targets, _) = head(), inputs()
    module(hidden.detach(), targets, None, 1.0, FAMILY)[1].sum().backward()
    assert module.weight.grad.abs().max() > 0
    frozen = head().requires_grad_(False)
    log_probs = frozen(hidden, targets, None, 1.0, FAMILY)[0]
    log_probs.sum().backward()
    assert frozen.weight.grad is None and hidden.grad.abs().max() > 0
    log_probs = frozen(hidden, targets, None, 1.0, FAMILY)[0]
    (first,) = torch.autograd.grad(log_probs.square().sum(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def test_ids_that_are_never_sampled_learn_nothing():
    module, (hidden, targets, _) = head(), inputs()
    targets[0] = FAMILY.mask_token_id
    log_probs, entropy = module(hidden, targets, None, 1.0, FAMILY)
    assert log_probs[0] == -torch.inf and entropy.isfinite().all()
    log_probs.sum().backward()
    assert not hidden.grad[0].any() and hidden.grad[1:].any(1).all()
    learning = module.weight.grad.any(1).nonzero().flatten().tolist()
    assert learning == DRAWABLE


# In a model


def scores_of(model, targets: torch.Tensor):
    ids = torch.full((2, 6), MASK)
    return model(input_ids=ids, positions=torch.arange(3).expand(2, -1), targets=targets)


TARGETS = torch.tensor([[2, 3, 0], [1, 1, 2]])


def test_the_head_is_called_once_however_many_targets_there_are(monkeypatch):
    monkeypatch.setattr(scoring_head, "_CPU_CHUNK", 1)
    model = tiny_model()
    with forwards_of(model.lm_head) as calls:
        scores_of(model, TARGETS)
        model(input_ids=TARGETS, positions=TARGETS * 0 - 1, targets=TARGETS)
    assert [len(call["args"][0]) for call in calls] == [6, 0]


def test_without_targets_it_is_a_linear_layer():
    module, hidden = head(), torch.randn(2, 3, WIDTH)
    assert torch.equal(module(hidden), torch.nn.functional.linear(hidden, module.weight))
    assert isinstance(copy.deepcopy(module), ScoringHead)


def test_a_tied_head_and_its_embedding_share_the_gradient(monkeypatch):
    monkeypatch.setattr(scoring_head, "_CPU_CHUNK", 10)
    model = tiny_model(tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    output = scores_of(model, TARGETS)
    (found,) = torch.autograd.grad(output.log_probs.sum(), model.lm_head.weight)
    logits = model(input_ids=torch.full((2, 6), MASK), positions=torch.arange(3).expand(2, -1)).logits
    expected = logits.log_softmax(-1).gather(-1, TARGETS.unsqueeze(-1)).sum()
    (expected,) = torch.autograd.grad(expected, model.lm_head.weight)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("adapted", [{"target_modules": ["lm_head"]}, {"modules_to_save": ["lm_head"]}], ids=str)
def test_an_adapted_head_scores_as_its_merged_weight(adapted):
    torch.manual_seed(0)
    model = get_peft_model(
        tiny_model(), LoraConfig(r=2, init_lora_weights=False, **({"target_modules": ["q_proj"]} | adapted))
    )
    trained = [parameter for name, parameter in model.named_parameters() if "lm_head" in name]
    with torch.no_grad():
        for parameter in trained:
            parameter.requires_grad and parameter.add_(torch.randn_like(parameter))
    output = scores_of(model, TARGETS)
    (gradient, *_) = torch.autograd.grad(output.log_probs.sum(), [p for p in trained if p.requires_grad])
    merged = copy.deepcopy(model).merge_and_unload()
    assert type(merged.lm_head) is ScoringHead
    torch.testing.assert_close(output.log_probs, scores_of(merged, TARGETS).log_probs, rtol=1e-5, atol=1e-5)
    assert (output.log_probs - scores_of(tiny_model(), TARGETS).log_probs).abs().max() > 1e-2
    assert gradient.abs().max() > 1e-2
