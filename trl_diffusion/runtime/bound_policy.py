"""A policy for the entropy bound of parallel unmasking: how much uncertainty a denoising step may commit at once.

DiFFPO (2510.02212) learns a bound γ for each prompt together with the network. How it is parameterised and paid is not
published; everything here is ours.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from peft import PeftModel

from trl_diffusion.distribution import draw

# The bounds to choose from, in nats.
BOUNDS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)


class BoundPolicy(torch.nn.Linear):
    """A softmax over `BOUNDS`, linear in the state of the prompt: states float32 [B, H] → logits [B, K].

    The prompt's state is not trained through it: only the linear layer learns.

    Args:
        hidden_size: H, size of a state.
        start: the bound that has half of the probability at first, the same for all prompts; the others share the
            rest equally.
        device: of the weights.
    """

    def __init__(self, hidden_size: int, start: float, device: torch.device | str = "cpu"):
        super().__init__(hidden_size, len(BOUNDS), device=device)
        with torch.no_grad():
            self.bias[BOUNDS.index(start)] = math.log(len(BOUNDS) - 1)

    def reset_parameters(self) -> None:
        """Begin at zero, and draw nothing from PyTorch's global generator."""
        torch.nn.init.zeros_(self.weight)
        torch.nn.init.zeros_(self.bias)

    @torch.no_grad()
    def choose(self, states: torch.Tensor, noise: torch.Tensor | None) -> torch.Tensor:
        """Choose a bound for each row.

        Args:
            states: float32 [B, H].
            noise: float64 [B], uniform; `None` for the likeliest bounds.

        Returns:
            Indices of `BOUNDS`, long [B].
        """
        logits = self(states)
        return logits.argmax(-1) if noise is None else draw(logits.softmax(-1), noise)

    @torch.enable_grad()
    def learn(self, states: torch.Tensor, choices: torch.Tensor, advantages: torch.Tensor, rate: float) -> None:
        """Take one step of gradient descent on `reinforce_loss`, with a learning rate."""
        optimizer = torch.optim.SGD(self.parameters(), lr=rate)
        reinforce_loss(self(states), choices, advantages).backward()
        optimizer.step()
        optimizer.zero_grad()


def reinforce_loss(logits: torch.Tensor, choices: torch.Tensor, advantages: torch.Tensor) -> torch.Tensor:
    """Return −mean of A · log π(choice), whose gradient is that of −E[reward] for choices drawn from π.

    Args:
        logits: [B, K].
        choices: long [B].
        advantages: [B], rewards less what does not depend on the row's own choice.
    """
    chosen = logits.log_softmax(-1).gather(1, choices.unsqueeze(1)).squeeze(1)
    return -(advantages * chosen).mean()


def speed_rewards(rewards: torch.Tensor, steps: torch.Tensor, most: int, exponent: float) -> torch.Tensor:
    """Return max(r, 0) · ((S − steps + 1) / S)^exponent: a correct completion is worth more, the fewer its steps.

    A reward below 0 counts as 0, or a failure would be the cheaper, the more steps it took. NaN stays NaN.

    Args:
        rewards: [B], r.
        steps: [B], denoising steps taken.
        most: S.
        exponent: 0 pays for correctness alone.
    """
    return rewards.clamp(min=0) * ((most - steps + 1) / most) ** exponent


@torch.no_grad()
def prompt_states(model: Any, prompt_ids: torch.Tensor, prompt_mask: torch.Tensor) -> torch.Tensor:
    """Return the mean last hidden state of each prompt, scaled to length 1: float32 [B, H].

    Of length 1, so that a learning rate means the same for networks of any size.

    Args:
        model: the policy, possibly inside PEFT; its weights must not be sharded.
        prompt_ids: long [B, P], left-padded.
        prompt_mask: [B, P].
    """
    model = extract_model_from_parallel(model, keep_torch_compile=False)
    native: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    was_training = model.training
    model.eval()
    try:
        hidden = native.model(input_ids=prompt_ids, attention_mask=prompt_mask, use_cache=False).last_hidden_state
    finally:
        model.train(was_training)
    mean = (hidden.float() * prompt_mask.unsqueeze(-1)).sum(1)
    return torch.nn.functional.normalize(mean, dim=-1)
