"""Measures what the claims of methods presuppose, on a model and a task: the premises.

Every function measures one premise on a batch of completions, G of each prompt, sampled as in training.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from trl_diffusion.credit.step_aware_states import probe_state
from trl_diffusion.credit.step_selection import SELECTORS, step_signals
from trl_diffusion.evaluation.confusion_zones import SIGNALS, failure_auc, failure_auc_within, signal_frame
from trl_diffusion.evaluation.decoding import decode_completions
from trl_diffusion.family import family_of
from trl_diffusion.likelihood import noised_views, score_views, trajectory_views
from trl_diffusion.likelihood.views import Views
from trl_diffusion.sampling import SamplingConfig, Trajectory, row_generators, sample
from trl_diffusion.sampling.trajectory import taken_steps
from trl_diffusion.streams import uniforms
from trl_diffusion.tasks import Task
from trl_diffusion.tokenization import encode_prompt, left_pad

# First elements of the keys of random streams.
ROLLOUT, CONTINUATION, MASKS = range(3)


@dataclass
class Batch:
    """Completions of a model, B = prompts · G.

    Args:
        model: the model that wrote them.
        tokenizer: its tokenizer.
        task: the task whose first score says whether they are right.
        rows: the row of each completion, B of them.
        prompt_ids: long [B, P].
        prompt_mask: [B, P].
        trajectory: the record of their denoising steps.
        success: bool [B], whether each is right.
        size: G, completions per prompt.
        sampling: the settings of the sampler.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    task: Task
    rows: list[dict[str, Any]]
    prompt_ids: torch.Tensor
    prompt_mask: torch.Tensor
    trajectory: Trajectory
    success: torch.Tensor
    size: int
    sampling: SamplingConfig

    @property
    def prompt(self) -> torch.Tensor:
        """The number of each completion's prompt, long [B]."""
        return torch.arange(len(self.rows)) // self.size

    @property
    def taken(self) -> torch.Tensor:
        """The steps of each completion, bool [B, S]."""
        return taken_steps(self.trajectory.unmask_step, self.sampling.denoising_steps)

    @property
    def advantages(self) -> torch.Tensor:
        """Success minus the mean of the group, float [B]."""
        groups = self.success.float().view(-1, self.size)
        return (groups - groups.mean(1, keepdim=True)).flatten()

    def scored(self, rows: torch.Tensor, views: Views) -> torch.Tensor:
        """Score views of some completions (long [R]); log-probabilities [R, L]."""
        ids = self.trajectory.completion_ids[rows]
        return score_views(self.model, self.prompt_ids[rows], self.prompt_mask[rows], ids, views).logps


def roll_out(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    problems: Dataset,
    size: int,
    sampling: SamplingConfig,
    seed: int,
) -> Batch:
    """Sample G completions of every problem, with a private random stream each."""
    rows = [row for row in problems for _ in range(size)]
    prompts = [encode_prompt(row["prompt"], tokenizer) for row in rows]
    ids, mask = left_pad(prompts, family_of(model).tail_token_id)
    trajectory = sample(model, ids, mask, sampling, row_generators(seed, ROLLOUT, rows=range(len(rows))))
    success = _right(trajectory, model, tokenizer, task, rows)
    return Batch(model, tokenizer, task, rows, ids, mask, trajectory, success, size, sampling)


def _right(trajectory: Trajectory, model, tokenizer, task: Task, rows: Sequence[dict[str, Any]]) -> torch.Tensor:
    texts = decode_completions(trajectory.completion_ids, model, tokenizer)
    return torch.tensor([task.is_correct(text, row) for text, row in zip(texts, rows, strict=True)])


def outcomes(batch: Batch) -> dict[str, float]:
    """Measure accuracy, and the share of groups with right and wrong completions, without which nothing learns."""
    groups = batch.success.view(-1, batch.size)
    mixed = groups.any(1) & ~groups.all(1)
    lengths = family_of(batch.model).effective_length(batch.trajectory.completion_ids)
    return {
        "completions": len(batch.rows),
        "accuracy": batch.success.float().mean().item(),
        "mixed_groups": mixed.float().mean().item(),
        "tokens": lengths.float().mean().item(),
    }


def uncertain_postponed(batch: Batch, entropy: float = 0.3) -> float:
    """Return the share of uncertain tokens that were written after a token to their right.

    That is what the order of certainty does to forks (2601.15165): they are decided last, when the text after them is
    there. Uncertain is a token drawn with at least this entropy, in nats.
    """
    steps, entropies = batch.trajectory.unmask_step, batch.trajectory.entropies
    earliest_after = steps.masked_fill(steps < 0, steps.max() + 1).flip(1).cummin(1).values.flip(1)
    uncertain = (entropies[:, :-1] >= entropy) & (steps[:, :-1] >= 0)
    return (earliest_after[:, 1:] < steps[:, :-1])[uncertain].float().mean().item()


def signal_auc(batch: Batch) -> dict[str, Any]:
    """Measure how well the signals of a completion's steps predict its failure: among all, and within prompts."""
    trajectory = batch.trajectory
    assert trajectory.step_entropy is not None and trajectory.step_margin is not None
    frame = signal_frame(
        trajectory.step_entropy,
        trajectory.step_margin,
        trajectory.steps_taken,
        batch.success,
        batch.sampling.steps_per_block,
        batch.taken,
    )
    among, within = failure_auc(frame)["auc"], failure_auc_within(frame, batch.prompt)["auc"]
    return {name: {"among_all": float(among[name]), "within_prompts": float(within[name])} for name in SIGNALS}


def gradient_norms(batch: Batch, rows: torch.Tensor) -> torch.Tensor:
    """Return the norm of ∇ log p of every step's tokens, float [R, S]; 0 for steps that were not taken."""
    parameters = [parameter for parameter in batch.model.parameters() if parameter.requires_grad]
    norms = torch.zeros(len(rows), batch.sampling.denoising_steps)
    for number, row in enumerate(rows):
        for step in batch.taken[row].nonzero().flatten():
            logps = batch.scored(row.view(1), step_views(batch, row.view(1), step.view(1)))
            gradients = torch.autograd.grad(logps.sum(), parameters, allow_unused=True)
            squares = [gradient.square().sum() for gradient in gradients if gradient is not None]
            norms[number, step] = torch.stack(squares).sum().sqrt()
    return norms


def step_views(batch: Batch, rows: torch.Tensor, steps: torch.Tensor) -> Views:
    """Build the canvas before a step of each completion."""
    trajectory = batch.trajectory
    mask_token = family_of(batch.model).mask_token_id
    return trajectory_views(trajectory.completion_ids[rows], trajectory.unmask_step[rows], steps, mask_token)


def gradient_shares(batch: Batch, norms: torch.Tensor, rows: torch.Tensor, count: int) -> dict[str, float]:
    """Measure how much of the completions' gradient norm lies in K steps, chosen in several ways.

    Args:
        batch: the completions.
        norms: see `gradient_norms`.
        rows: long [R], the completions whose norms these are.
        count: K.

    Returns:
        Means over completions: `own` the K largest of each; `shared` the same K for all that hold most; `uniform` K
        drawn uniformly, in expectation; and the K that each signal chooses from its mean over these completions, or
        (`…_own`) from each completion's.
    """
    trajectory = batch.trajectory
    assert trajectory.step_entropy is not None and trajectory.step_margin is not None
    shares = norms / norms.sum(1, keepdim=True)
    taken = batch.taken[rows]
    result = {
        "own": shares.topk(count, dim=1).values.sum(1).mean().item(),
        "shared": shares.mean(0).topk(count).values.sum().item(),
        "uniform": (count / taken.sum(1)).mean().item(),
    }
    own = (trajectory.step_entropy[rows], trajectory.step_margin[rows], taken, batch.sampling.steps_per_block)
    for name in ("entropy", "confidence_margin", "roec", "roec_cm"):
        for suffix, sets in (("", 1), ("_own", len(rows))):
            steps = SELECTORS[name](step_signals(*own, sets=sets), count, torch.zeros(sets, norms.size(1))).steps
            chosen = shares.gather(1, steps.expand(len(rows), -1).clamp(min=0)).masked_fill(steps < 0, 0.0)
            result[name + suffix] = chosen.sum(1).mean().item()
    return result


def right_and_failed(batch: Batch, pairs: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose a right and a failed completion of each prompt that has both, in the order of prompts.

    Prompts differ in difficulty, so right completions of some compared with failed ones of others would differ before
    anything is written.

    Returns:
        Two rows of numbers, long [≤ `pairs`] each: of the first right completion of a prompt, and of the first failed.
    """
    groups = batch.success.view(-1, batch.size)
    mixed = (groups.any(1) & ~groups.all(1)).nonzero().flatten()[:pairs]
    # argmax does not say which of several equal values it finds; with these weights the first is the largest.
    earlier = torch.arange(batch.size, 0, -1)
    right, failed = ((outcome[mixed] * earlier).argmax(1) for outcome in (groups, ~groups))
    return mixed * batch.size + right, mixed * batch.size + failed


def continuation_success(batch: Batch, rows: torch.Tensor, count: int, seed: int) -> list[float]:
    """Return the share of right continuations, N of each completion, after each number of finished blocks, 0 first."""
    family, sampling = family_of(batch.model), batch.sampling
    copies = rows.repeat_interleave(count)
    problems = [batch.rows[row] for row in copies]
    found = []
    for blocks in range(sampling.num_blocks):
        points = torch.full((len(batch.rows),), blocks)
        states = probe_state(
            batch.trajectory, family, "block", sampling.block_length, points, masks=sampling.canvas_length
        )
        streams = row_generators(seed, CONTINUATION, blocks, rows=range(len(copies)))
        ids, mask = batch.prompt_ids[copies], batch.prompt_mask[copies]
        continued = sample(batch.model, ids, mask, sampling, streams, state=states.rows(copies))
        found.append(_right(continued, batch.model, batch.tokenizer, batch.task, problems).float().mean().item())
    return found


def elbo_deviation(
    batch: Batch, rows: torch.Tensor, shares: Sequence[float], draws: int, seed: int
) -> dict[str, float]:
    """Measure the standard deviation of the ELBO's estimates from one mask, in nats, by the share it masks.

    An estimate from l of n positions is n/l · Σ log p over them. The deviation is that between masks of the same
    completion, and is averaged over completions; a share of 1 has one mask, and so none.
    """
    family = family_of(batch.model)
    ids = batch.trajectory.completion_ids[rows]
    lengths = family.effective_length(ids)
    result = {}
    for share in shares:
        estimates = []
        for draw in range(draws):
            streams = row_generators(seed, MASKS, draw, rows=range(len(rows)))
            noise = uniforms(streams, ids.size(1))
            text = torch.arange(ids.size(1)) < lengths.unsqueeze(1)
            masked_count = (share * lengths).round().clamp(min=1).unsqueeze(1)
            rank = noise.masked_fill(~text, 2.0).argsort(1).argsort(1)
            masked = (rank < masked_count) & text
            with torch.no_grad():
                logps = batch.scored(rows, noised_views(ids, masked, masked, family.mask_token_id))
            estimates.append(logps.sum(1) * lengths / masked_count.squeeze(1))
        result[f"{share:g}"] = torch.stack(estimates).std(0).mean().item()
    return result


def surrogate_cosines(batch: Batch, draws: int, seed: int) -> dict[str, float]:
    """Measure the cosine between the policy gradient of these completions and the gradients of surrogates.

    The policy gradient is that of Σ A · log p over all steps of the rollouts. Surrogates replace the log-probability
    of a completion: `one_step`, all tokens under the full mask (diffu-GRPO, without noise on the prompt);
    `random_mask`, the masked tokens of uniformly noised views, weighted as the ELBO weights them; `drawn_steps_4`,
    four steps drawn uniformly from each completion (AGRPO), which is unbiased.
    """
    family, model = family_of(batch.model), batch.model
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    advantages = batch.advantages
    rows = (advantages != 0).nonzero().flatten()
    weight, ids = advantages[rows].unsqueeze(1), batch.trajectory.completion_ids[rows]
    lengths = family.effective_length(ids)
    text = torch.arange(ids.size(1)) < lengths.unsqueeze(1)

    def gradient(objectives) -> torch.Tensor:
        total = [torch.zeros_like(parameter) for parameter in parameters]
        for objective in objectives:
            for sums, part in zip(total, torch.autograd.grad(objective, parameters, allow_unused=True), strict=True):
                if part is not None:
                    sums += part
        return torch.cat([part.flatten() for part in total])

    def of_steps(drawn: torch.Tensor):
        for step in drawn.any(0).nonzero().flatten():
            views = step_views(batch, rows, torch.full_like(rows, int(step)))
            yield (weight * drawn[:, step].unsqueeze(1) * batch.scored(rows, views)).sum()

    def of_masks():
        for draw in range(draws):
            streams = row_generators(seed, MASKS, draws + draw, rows=range(len(rows)))
            levels = uniforms(streams, 1).float().clamp(min=0.02)
            noise = uniforms(streams, ids.size(1))
            masked = (noise < levels) & text
            logps = batch.scored(rows, noised_views(ids, masked, masked, family.mask_token_id))
            yield (weight * logps / levels).sum()

    streams = row_generators(seed, MASKS, 2 * draws, rows=range(len(rows)))
    taken = batch.taken[rows]
    drawn = torch.zeros_like(taken)
    for number, stream in enumerate(streams):
        own = taken[number].nonzero().flatten()
        drawn[number, own[torch.from_numpy(stream.permutation(len(own))[:4])]] = True
    exact = gradient(of_steps(taken))
    views = noised_views(ids, text, text, family.mask_token_id)
    found = {
        "one_step": gradient([(weight * batch.scored(rows, views)).sum()]),
        "random_mask": gradient(of_masks()),
        "drawn_steps_4": gradient(of_steps(drawn)),
    }
    return {name: torch.cosine_similarity(exact, value, dim=0).item() for name, value in found.items()}
