"""Mutants: faults put into the code one at a time, each of which some test must find.

    python tests/mutants.py                # all of them, about fifteen minutes on one core
    python tests/mutants.py reference      # those whose name contains a word

A mutant replaces one passage of a file and runs the tests named with it. It is killed if they fail. The command ends
with an error if one survives, or if the passage is no longer there. It works on a copy of the repository.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Mutant:
    """A fault.

    Args:
        name: what goes wrong.
        file: path below the package.
        right: the passage, which occurs once.
        wrong: what stands there instead.
        tests: arguments of pytest that select the tests to run.
    """

    name: str
    file: str
    right: str
    wrong: str
    tests: str


LOSSES, COMPOSED, EXACT = "tests/test_losses.py", "tests/test_composition.py", "tests/test_exact_gradient.py"
MUTANTS = [
    Mutant(
        "block origin: an end token of the prompt ends the text",
        "sampling/sampler.py",
        "ends &= self.at.positions >= self.begin[self.at.column]",
        "pass",
        "tests/test_block_origin.py -k end_token_of_the_prompt",
    ),
    Mutant(
        "block origin: exact steps are counted from the completion",
        "credit/step_draws.py",
        "return (prompt_tail + length + block_length - 1)",
        "return (0 * prompt_tail + length + block_length - 1)",
        "tests/test_block_origin.py -k exact_scope",
    ),
    Mutant(
        "block origin: blocks are counted from the padding",
        "models/diffusion_lm.py",
        "attention_mask.long().argmax(1)  # the first",
        "attention_mask.long().argmax(1) * 0  # the first",
        "tests/test_block_origin.py -k counted_from_the_first",
    ),
    Mutant(
        "block origin: the noised copy lacks the end of the prompt",
        "models/block_attention.py",
        "tail = min(block_size - 1, prompt)",
        "tail = min(0, prompt)",
        "tests/test_block_origin.py -k two_streams",
    ),
    Mutant(
        "block origin: the first token of a block is read next to noised tokens",
        "models/diffusion_lm.py",
        "if not (noisy_copy and self.logit_shift):",
        "if True:",
        "tests/test_block_origin.py -k two_streams",
    ),
    Mutant(
        "block origin: a window in two blocks has no mask",
        "models/block_attention.py",
        "return (first - start) // block_size == (visible - 1 - start) // block_size",
        "return True",
        "tests/test_block_origin.py -k window",
    ),
    Mutant(
        "likelihood: DiFFPO shows the tokens of the step that it scores",
        "likelihood/plans.py",
        "written = (unmask_step >= 0) & (unmask_step < steps)",
        "written = (unmask_step >= 0) & (unmask_step <= steps)",
        "tests/test_diffpo.py -k enumerated",
    ),
    Mutant(
        "likelihood: DiFFPO's weights have no cap",
        "likelihood/split_views.py",
        "self.importance_cap, self.weighs_tokens = self.cap,",
        "self.importance_cap, self.weighs_tokens = self.cap and 1e9,",
        "tests/test_diffpo.py -k enumerated",
    ),
    Mutant(
        "learnt bound: a completion's own reward is in its baseline",
        "trainers/base/learnt_bound.py",
        "leave_one_out(groups - groups.nanmean(1, keepdim=True))",
        "(groups - groups.nanmean(1, keepdim=True))",
        "tests/test_learnt_bound.py -k private_streams",
    ),
    Mutant(
        "learnt bound: every row gets the bound of the config",
        "sampling/sampler.py",
        "bound=self.config.parallel_bound if self.bounds is None else self.bounds[self.at.column]",
        "bound=self.config.parallel_bound",
        "tests/test_learnt_bound.py -k bounds_of_their_own",
    ),
    Mutant(
        "credit: weights over the group are left out",
        "credit/group_credit.py",
        "group.advantages if self.weighing is None else self.weighing(group.advantages)",
        "group.advantages",
        "tests/test_properties.py -k test_6 and wd1",
    ),
    Mutant(
        "credit: DMPO's baseline has the wrong sign of the policy's change",
        "credit/target_weights.py",
        "softmax(group.now - group.current)",
        "softmax(group.current - group.now)",
        f"{LOSSES} -k baselines_by_hand",
    ),
    Mutant(
        "credit: WDDO counts completions without a reward",
        "credit/target_weights.py",
        "GroupWeights(values * scored, _metrics(values))",
        "GroupWeights(values * size, _metrics(values))",
        f"{LOSSES} -k left_out_of_its_group",
    ),
    Mutant(
        "credit: weights of completions are clipped above alone",
        "credit/stable_weights.py",
        ".clamp(1 - low, 1 + high)",
        ".clamp(max=1 + high)",
        "tests/test_stable_drl.py -k weights_by_hand",
    ),
    Mutant(
        "credit: one step too many may learn",
        "credit/step_choice.py",
        "steps < self.count.unsqueeze(1)",
        "steps <= self.count.unsqueeze(1)",
        "tests/test_properties.py -k test_2",
    ),
    Mutant(
        "credit: every inner update draws the same steps",
        "credit/step_choice.py",
        "rollout.view_noise(update).uniform(self.count)",
        "rollout.view_noise(0).uniform(self.count)",
        "tests/test_properties.py -k test_1 or test_7_views",
    ),
    Mutant(
        "credit: the selector's noise is the same for every inner update",
        "credit/step_choice.py",
        "rollout.shared_noise(Purpose.SELECTION, update, sets)",
        "rollout.shared_noise(Purpose.SELECTION, 0, sets)",
        "tests/test_properties.py -k test_2",
    ),
    Mutant(
        "likelihood: truncated completions learn on their own steps",
        "likelihood/trajectory_views.py",
        'views.targets &= rows["completion_mask"].bool()',
        "pass",
        "tests/test_trainer.py -k truncated",
    ),
    Mutant(
        "likelihood: the estimate from drawn steps is a sum over draws",
        "likelihood/trajectory_views.py",
        "(views.weights * logps.sum(-1)).mean(1)",
        "(views.weights * logps.sum(-1)).sum(1)",
        f"{COMPOSED} -k own_steps_is_its_formula",
    ),
    Mutant(
        "likelihood: truncated completions learn under masks",
        "likelihood/masked_views.py",
        "return tokens & rollout.trainable.unsqueeze(1)",
        "return tokens",
        "tests/test_dmpo.py -k truncated",
    ),
    Mutant(
        "likelihood: given text may be masked",
        "likelihood/masked_views.py",
        "masked=plan.masked & ~given",
        "masked=plan.masked",
        f"{COMPOSED} -k given_text",
    ),
    Mutant(
        "likelihood: a size of a subset is never drawn",
        "likelihood/noises.py",
        "(shared * (length + 1)).long()",
        "(shared * length).long()",
        "tests/test_likelihood_enumeration.py -k every_noise",
    ),
    Mutant(
        "likelihood: sizes of a quadrature's subsets are rounded down",
        "likelihood/plans.py",
        "(times * length + 0.5 + noise)",
        "(times * length + 0.0 * noise)",
        "tests/test_gdpo.py -k rounding",
    ),
    Mutant(
        "likelihood: informed masks hide the tokens that shifted most",
        "likelihood/informed.py",
        "scaled = (high - parts)",
        "scaled = (parts - low)",
        "tests/test_informed_masking.py -k by_hand",
    ),
    Mutant(
        "likelihood: the second mask of an informed pair is the complement",
        "likelihood/plans.py",
        "masked = _in_pairs(first.masked, second.masked)",
        "masked = _in_pairs(first.masked, ~first.masked)",
        "tests/test_informed_masking.py -k biased_alike",
    ),
    Mutant(
        "likelihood: SPG scores the other set of tokens",
        "likelihood/noises.py",
        "plan.masked if self.all_masked else plan.targets",
        "plan.targets if self.all_masked else plan.masked",
        "tests/test_likelihood_enumeration.py -k block_random",
    ),
    Mutant(
        "likelihood: views of a replay weigh by tokens, not by views",
        "likelihood/replay_views.py",
        "self.num_views / (filled * count).clamp(min=1)",
        "self.num_views / count.clamp(min=1)",
        f"{LOSSES} -k written_out_one and tracerl",
    ),
    Mutant(
        "likelihood: grouped steps take the rollout's log-probabilities for old",
        "likelihood/replay_views.py",
        "self.records_old = self.shrink == 1 and",
        "self.records_old =",
        "tests/test_properties.py -k test_1 and tracerl",
    ),
    Mutant(
        "loss: the policy term is a sum where the KL is",
        "losses/token_ratio.py",
        "advantages, weights = advantages / count, weights * count",
        "weights = weights * count",
        f"{LOSSES} -k written_out_one and tracerl",
    ),
    Mutant(
        "loss: rollouts of another policy are not weighted",
        "losses/token_ratio.py",
        "advantages = advantages * inputs.importance[:, 0]",
        "pass",
        "tests/test_rollout_correction.py -k policy_gradient or of_trl",
    ),
    Mutant(
        "loss: the ratio of a completion without its root",
        "losses/sequence_ratio.py",
        "((elbo - old) / length).exp()",
        "(elbo - old).exp()",
        f"{COMPOSED} -k own_steps_is_its_formula",
    ),
    Mutant(
        "loss: the log-ratio that is fitted is that of the whole completion",
        "losses/log_ratio_regression.py",
        " / inputs.logps.size(-1)",
        "",
        "tests/test_gdsd.py -k per_token",
    ),
    Mutant(
        "loss: clipped to the wrong side",
        "losses/sequence_ratio.py",
        "-torch.min(ratio * advantages",
        "-torch.max(ratio * advantages",
        f"{LOSSES} -k espo",
    ),
    Mutant(
        "loss: weights of views do not reach the weighted likelihood",
        "losses/weighted_likelihood.py",
        "values = inputs.views.weights * values",
        "pass",
        f"{COMPOSED} -k reinforce",
    ),
    Mutant(
        "loss: the upper bound for good completions",
        "losses/bounds.py",
        "torch.where(advantages < 0,",
        "torch.where(advantages > 0,",
        f"{LOSSES} -k spg_bounds",
    ),
    Mutant(
        "loss: WDDO takes one half of the views twice",
        "losses/contrast.py",
        "inputs.part(slice(half, None))",
        "inputs.part(slice(None, half))",
        f"{LOSSES} -k written_out_one and wddo",
    ),
    Mutant(
        "runtime: weights are estimated on the views of the first update",
        "runtime/credit_assignment.py",
        "updates=range(after, after + 1)",
        "updates=range(1)",
        "tests/test_dmpo.py -k compare_the_policy",
    ),
    Mutant(
        "runtime: a group is made of rows that TRL shuffled",
        "runtime/credit_assignment.py",
        "self.gather(values)[order].view",
        "self.gather(values).view",
        f"{LOSSES} -k order_of_rows",
    ),
    Mutant(
        "runtime: old log-probabilities with dropout",
        "runtime/scoring.py",
        "        model.eval()\n",
        "        pass\n",
        "tests/test_properties.py -k test_8",
    ),
    Mutant(
        "runtime: the reference model is the policy itself",
        "runtime/reference.py",
        "copy.deepcopy(model)",
        "model",
        "tests/test_trainer.py -k unsaved_model",
    ),
    Mutant(
        "runtime: weights of tokens are not capped",
        "runtime/loss_inputs.py",
        "(old - drawn).exp().clamp(max=likelihood.importance_cap)",
        "(old - drawn).exp()",
        "tests/test_rollout_correction.py -k cut_weights or may_be_recomputed",
    ),
    Mutant(
        "runtime: means over processes are sums",
        "runtime/meter.py",
        "total / max(count, 1.0)",
        "total",
        "tests/test_rollout_correction.py -k are_the_networks",
    ),
    Mutant(
        "trainer: weights are not renewed before later updates",
        "trainers/base/trainer.py",
        "if self.choices.credit.refreshes and trained and",
        "if self.choices.credit.refreshes and False and",
        f"{LOSSES} -k own_change_before_each_update",
    ),
    Mutant(
        "trainer: `dapo` divides by the tokens that TRL counts",
        "trainers/base/trainer.py",
        'rows["num_items_in_batch"] = self.accelerator.gather(rows["completion_mask"].sum()).sum()',
        "pass",
        f"{LOSSES} -k written_out_one and trajectory_grpo",
    ),
    Mutant(
        "trainer: an evaluation scores the first view as often as there are views",
        "trainers/base/trainer.py",
        "self._view_loss(model, inputs, 0, view)",
        "self._view_loss(model, inputs, 0, 0)",
        f"{LOSSES} -k evaluation_loss",
    ),
    Mutant(
        "trainer: an inner update ends with the optimizer's step",
        "trainers/base/trainer.py",
        "divmod(self._step, int(self.args.steps_per_generation or 1))",
        "divmod(self._step, int(self.args.gradient_accumulation_steps))",
        "tests/test_resume.py -k inner_update",
    ),
    Mutant(
        "runtime: every epoch has the same order of prompts",
        "runtime/rollout_checkpoints.py",
        "self.generator.manual_seed(self.seed + epoch)",
        "self.generator.manual_seed(self.seed)",
        "tests/test_resume.py -k every_epoch",
    ),
    Mutant(
        "credit: the weights of negated rewards are those of the rewards",
        "credit/target_weights.py",
        "baseline = weights(-group.advantages)",
        "baseline = weights(group.advantages)",
        f"{LOSSES} -k baselines_by_hand",
    ),
    Mutant(
        "sampling: tokens just written count among those that a shift is seen at",
        "sampling/shifts.py",
        "(confidence - before).abs() * masked",
        "(confidence - before).abs()",
        "tests/test_informed_masking.py -k stored_canvases",
    ),
    Mutant(
        "sampling: positions of lowest probability are committed first",
        "sampling/unmasking.py",
        "certainty.topk(int(candidates.min_commits.max()), dim=1)",
        "certainty.topk(int(candidates.min_commits.max()), dim=1, largest=False)",
        "tests/test_sampling.py -k max_prob or margin",
    ),
    Mutant(
        "evaluation: completions of a batch share a stream",
        "evaluation/measurement.py",
        "row_generators(self.seed, rows=indices)",
        "row_generators(self.seed, rows=range(len(indices)))",
        "tests/test_evaluation.py -k batch_size",
    ),
    Mutant(
        "device: the sampler's index of positions stays on the CPU",
        "sampling/active_blocks.py",
        "self.first + torch.arange(block_length, device=device).unsqueeze(0)",
        "self.first + torch.arange(block_length).unsqueeze(0)",
        "tests/test_device.py -k sampling",
    ),
    Mutant(
        "device: the positions of steps stay on the CPU",
        "credit/step_draws.py",
        "points = (torch.arange(num_draws, device=uniform.device) + uniform) / num_draws",
        "points = (torch.arange(num_draws) + uniform) / num_draws",
        "tests/test_device.py -k update_of_every_method",
    ),
    Mutant(
        "device: the groups of replayed steps stay on the CPU",
        "likelihood/plans.py",
        "first = (torch.arange(views, device=unmask_step.device) * shrink).view(1, -1, 1)",
        "first = (torch.arange(views) * shrink).view(1, -1, 1)",
        "tests/test_device.py -k update_of_every_method",
    ),
    Mutant(
        "device: the flags of a bad update are sent to the others from the CPU",
        "runtime/update_guard.py",
        "dtype=torch.long, device=self.accelerator.device)",
        "dtype=torch.long)",
        "tests/test_device.py -k update_of_every_method",
    ),
    Mutant(
        "masked SFT: an unscored token is masked like the others",
        "trainers/sft.py",
        "masked = masked & scored",
        "pass",
        "tests/test_sft.py -k by_hand",
    ),
    Mutant(
        "masked SFT: unscored tokens stay in the divisor",
        "trainers/sft.py",
        ".sum(1) / scored.sum(1)).mean()",
        ".mean(1)).mean()",
        "tests/test_sft.py -k by_hand",
    ),
    Mutant(
        "masked SFT: a token that a span only touches counts as unscored",
        "trainers/base/sft_data.py",
        "if any(start < span_end and span_start < end",
        "if any(start <= span_end and span_start <= end",
        "tests/test_chained_sums.py -k begin_anew",
    ),
    Mutant(
        "confusion zones: completions of different prompts are compared",
        "evaluation/confusion_zones.py",
        "for _, own in values[signal].groupby(group):",
        "for own in [values[signal]]:",
        "tests/test_premises.py -k within_prompts_by_hand",
    ),
    Mutant(
        "compiled steps: the first rows stay, whichever have ended",
        "sampling/static_windows.py",
        "self._fill(store, layer, tensor[rows])",
        "self._fill(store, layer, tensor[: len(rows)])",
        "tests/test_rollout_compile.py -k rollouts_are_the_same",
    ),
    Mutant(
        "compiled steps: columns that cannot be seen are attended to",
        "sampling/static_windows.py",
        "made[..., : self.visible] = True",
        "made[...] = True",
        "tests/test_rollout_compile.py -k rollouts_are_the_same",
    ),
]


def is_killed(mutant: Mutant, copy: Path) -> bool:
    """Put a mutant into the copy, run its tests, and take it out again."""
    path = copy / "trl_diffusion" / mutant.file
    source = path.read_text()
    if source.count(mutant.right) != 1:
        raise ValueError(f"{mutant.name}: {mutant.file} has the passage {source.count(mutant.right)} times, not once.")
    files, _, selection = mutant.tests.partition(" -k ")
    selected = ["-k", selection] if selection else []
    command = [sys.executable, "-m", "pytest", "-o", "addopts=", "-q", "-x", "-m", "not thorough", *selected, files]
    path.write_text(source.replace(mutant.right, mutant.wrong))
    try:
        found = subprocess.run(command, cwd=copy, env=os.environ | {"PYTHONPATH": str(copy)}, capture_output=True)
    finally:
        path.write_text(source)
    if found.returncode not in (0, 1):
        raise RuntimeError(f"{mutant.name}: no test ran.\n{found.stdout.decode()[-2000:]}")
    return found.returncode == 1


def main() -> None:
    word = sys.argv[1] if len(sys.argv) > 1 else ""
    chosen = [mutant for mutant in MUTANTS if word in mutant.name]
    survivors = []
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy"
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".*", "outputs", "site", "__pycache__"))
        for mutant in chosen:
            killed = is_killed(mutant, copy)
            survivors += [] if killed else [mutant.name]
            print("killed  " if killed else "SURVIVES", mutant.name, flush=True)
    print(f"{len(chosen) - len(survivors)} of {len(chosen)} killed")
    sys.exit(bool(survivors))


if __name__ == "__main__":
    main()
