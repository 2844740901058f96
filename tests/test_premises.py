"""The premises of the claims: how they are measured, and that they hold on the bundled model of chained sums."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from itertools import combinations, product
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_diffusion.evaluation.confusion_zones import failure_auc, failure_auc_within
from trl_diffusion.models.embedded import EMBEDDED_CHAINS_MODEL
from trl_diffusion.sampling import SamplingConfig
from trl_diffusion.tasks import TASKS
from trl_diffusion.tasks.chained_sums import FIXED_LINES

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "recipes" / "benchmarks"))

import claims  # noqa: E402
from comparison import premises  # noqa: E402
from comparison.claims import CLAIMS, claims_table  # noqa: E402
from comparison.core import CORE, FEWER_STEPS, PUZZLES  # noqa: E402
from comparison.core import TASKS as CORE_TASKS  # noqa: E402
from comparison.core_summary import Runs, mean_and_error  # noqa: E402
from comparison.settings import setting_of  # noqa: E402
from statistics_of_runs import standard_error  # noqa: E402

RESULTS = ROOT / "recipes" / "benchmarks" / "results"
ROLLOUTS = SamplingConfig(45, 27, 5, unmasking="max_prob", record_signals=True)
PROBLEMS, SIZE, STEPS = 10, 8, 4


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(EMBEDDED_CHAINS_MODEL).eval()


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(EMBEDDED_CHAINS_MODEL)


@pytest.fixture(scope="module")
def batches(model, tokenizer):
    def batch_of(name: str) -> premises.Batch:
        rows = TASKS[name].generate("test", PROBLEMS, 0)
        return premises.roll_out(model, tokenizer, TASKS[name], rows, SIZE, ROLLOUTS, 0)

    return {name: batch_of(name) for name in CORE_TASKS}


def test_auc_within_prompts_by_hand():
    """Two prompts: in the first the failed completion is the more uncertain, in the second one of two is."""
    signal = [0.9, 0.1, 5.0, 6.0, 5.5]
    success = [False, True, False, True, False]
    frame = pd.DataFrame(
        {
            "completion": range(5),
            "step": 0,
            "entropy": signal,
            "confidence_margin": signal[::-1],
            "roec": np.nan,
            "success": pd.array(success, dtype="boolean"),
        }
    )
    within = failure_auc_within(frame, [0, 0, 1, 1, 1])
    # pairs of one prompt: 0.9 > 0.1, 5.0 < 6.0, 5.5 < 6.0
    assert within.loc["entropy"].tolist() == [pytest.approx(1 / 3), 3]
    assert np.isnan(within.loc["roec", "auc"]) and within.loc["roec", "pairs"] == 0
    # among all, the pairs between prompts count too: 5.0 and 5.5 > 0.1, and 0.9 < 6.0
    assert failure_auc(frame).loc["entropy", "auc"] == pytest.approx(3 / 6)


def test_right_and_failed_completions_are_of_the_same_prompts():
    success = torch.tensor([[0, 0, 0], [0, 1, 1], [1, 1, 1], [1, 0, 0], [1, 1, 0]], dtype=torch.bool)
    batch = SimpleNamespace(success=success.flatten(), size=3)
    right, failed = premises.right_and_failed(batch, 2)
    assert (right.tolist(), failed.tolist()) == ([4, 9], [3, 10])  # the first two prompts with both
    right, failed = premises.right_and_failed(batch, 9)
    assert (right.tolist(), failed.tolist()) == ([4, 9, 12], [3, 10, 14])


def test_postponed_tokens_by_hand():
    steps = torch.tensor([[1, 0, 2], [0, 1, 2], [0, -1, -1]])
    entropies = torch.tensor([[0.5, 0.5, 0.5], [0.5, 0.1, 0.5], [0.5, 0.0, 0.0]])
    batch = SimpleNamespace(trajectory=SimpleNamespace(unmask_step=steps, entropies=entropies))
    # uncertain, with a neighbour: (0, 0) after its neighbour, (0, 1), (1, 0) and (2, 0) before theirs
    assert premises.uncertain_postponed(batch) == pytest.approx(1 / 4)


def test_gradient_norms_add_up_to_the_gradient_of_a_step(batches):
    batch = batches["chained_sums"]
    row = torch.tensor([3])
    norms = premises.gradient_norms(batch, row)
    assert ((norms > 0) == batch.taken[row]).all()
    step = norms[0].argmax()
    logps = batch.scored(row, premises.step_views(batch, row, step.view(1)))
    batch.model.zero_grad()
    logps.sum().backward()
    parts = [parameter.grad.norm() for parameter in batch.model.parameters() if parameter.grad is not None]
    batch.model.zero_grad()
    assert norms[0, step] == pytest.approx(torch.stack(parts).norm().item(), rel=1e-5)
    # scored at the sampler's own state, the tokens have the log-probabilities that the rollout recorded
    recorded = batch.trajectory.logps[row] * (batch.trajectory.unmask_step[row] == step)
    torch.testing.assert_close(logps, recorded, rtol=1e-5, atol=1e-5)


def test_shares_of_the_gradient_by_hand(batches):
    batch = batches["chained_sums"]
    rows, norms = torch.tensor([0, 1]), torch.zeros(2, 27)
    norms[0, [0, 1, 2]], norms[1, [0, 5, 6]] = torch.tensor([2.0, 1.0, 1.0]), torch.tensor([1.0, 1.0, 2.0])
    shares = premises.gradient_shares(batch, norms, rows, 2)
    assert shares["own"] == pytest.approx(0.75)  # 3 of 4 in each
    assert shares["shared"] == pytest.approx((0.5 + 0.25 + 0.5) / 2)  # steps 0 and 6
    assert shares["uniform"] == pytest.approx((2 / batch.taken[rows].sum(1)).mean().item())


def test_premises_hold_on_chained_sums(batches):
    """Without these premises the core table could show nothing; `results/premises.json` has the exact numbers."""
    some = torch.arange(0, PROBLEMS * SIZE, 12)
    shares = {}
    for name, batch in batches.items():
        found = premises.outcomes(batch)
        assert 0.1 < found["accuracy"] < 0.35 and found["mixed_groups"] >= 0.5 and found["tokens"] == 43.0
        shares[name] = premises.gradient_shares(batch, premises.gradient_norms(batch, some), some, STEPS)
        assert shares[name]["own"] > 0.85 and shares[name]["uniform"] < 0.17
        assert premises.uncertain_postponed(batch) > 0.9
        ends = [premises.continuation_success(batch, rows, 8, 0) for rows in premises.right_and_failed(batch, 8)]
        # before the first line, a right completion is as good as any of its prompt; from the last on, nothing is open
        assert ends[0][0] == ends[1][0]  # the same canvas of the same prompts, and the same random streams
        assert ends[0][-1] > 0.9 and ends[1][-1] < 0.1 and ends[0][-3] > ends[1][-3] + 0.2
    # four drawn steps are nearer to the policy gradient than all tokens under the full mask
    cosine = premises.surrogate_cosines(batches["chained_sums_fixed"], 1, 0)
    assert cosine["drawn_steps_4"] > cosine["one_step"] + 0.1
    # where the hard lines are fixed, one choice of steps serves all completions; where they move, none does
    assert shares["chained_sums_fixed"]["shared"] > 0.85
    assert shares["chained_sums"]["shared"] < 0.65
    assert shares["chained_sums_fixed"]["roec_cm"] > 0.85 and shares["chained_sums"]["roec_cm_own"] > 0.5


@pytest.mark.slow
@pytest.mark.parametrize("unmasking", ["max_prob", "random"])
def test_premises_hold_on_sudoku_in_any_order(unmasking):
    """Chained sums need the order of certainty; here the middle of a text decides in random order too."""
    setting, task = setting_of("sudoku_sweeps"), TASKS["sudoku_sweeps"]
    network = AutoModelForCausalLM.from_pretrained(setting.model).eval()
    its_tokenizer = AutoTokenizer.from_pretrained(setting.model)
    rollouts = SamplingConfig(60, 30, 10, unmasking=unmasking, record_signals=True)
    rows = task.generate("test", PROBLEMS, 0)
    batch = premises.roll_out(network, its_tokenizer, task, rows, SIZE, rollouts, 0)
    found = premises.outcomes(batch)
    assert 0.2 < found["accuracy"] < 0.5 and found["mixed_groups"] >= 0.5
    assert premises.signal_auc(batch)["entropy"]["within_prompts"] > 0.55
    pairs = premises.right_and_failed(batch, 8)
    ends = [premises.continuation_success(batch, some, 3, 0)[3] for some in pairs]
    assert ends[0] > ends[1] + 0.25


def test_slips_are_where_the_task_puts_them(batches):
    batch = batches["chained_sums_fixed"]
    entropy = batch.trajectory.entropies.mean(0)
    results = entropy[torch.arange(8) * 5 + 3]
    hard = torch.zeros(8, dtype=torch.bool)
    hard[list(FIXED_LINES)] = True
    assert results[hard].min() > 0.4 and results[~hard].max() < 0.2


def test_the_elbo_of_one_mask_has_no_deviation_and_of_few_positions_much(batches):
    batch = batches["chained_sums"]
    deviations = premises.elbo_deviation(batch, torch.arange(8), (0.125, 1.0), 8, 0)
    assert deviations["1"] == pytest.approx(0.0, abs=1e-4) and deviations["0.125"] > 1.0


def test_the_last_denoising_state_continues_to_the_completion_itself(batches):
    """With one block left and temperature 0, continuations of greedy completions are those completions."""
    batch = batches["chained_sums"]
    greedy = replace(ROLLOUTS, temperature=0.0)
    rows = TASKS["chained_sums"].generate("test", PROBLEMS, 0)
    found = premises.roll_out(batch.model, batch.tokenizer, batch.task, rows, 1, greedy, 0)
    success = premises.continuation_success(found, torch.arange(PROBLEMS), 2, 0)
    assert success == pytest.approx([found.success.float().mean().item()] * 9)


def test_every_claim_has_arms_and_a_premise():
    stored = json.loads((RESULTS / "premises.json").read_text())
    for claim in CLAIMS:
        assert {claim.arm, claim.baseline} <= CORE.keys()
        assert claim.baseline in CORE[claim.arm].baselines or claim.arm in CORE[claim.baseline].baselines
        for task in CORE_TASKS:
            assert np.isfinite(claim.value(stored[f"{task}, max_prob"]))


def test_a_claim_without_its_premise_gets_no_verdict():
    claim = next(claim for claim in CLAIMS if claim.arm == "roec_cm")
    shares = {"gradient_share": {"uniform": 0.2, "roec_cm": 0.2}}
    more, equal = SimpleNamespace(verdict="more"), SimpleNamespace(verdict="equal")
    assert claim.verdict(shares, more, 0.01) == "premise fails"
    shares["gradient_share"]["roec_cm"] = 0.9
    assert claim.verdict(shares, more, 0.01) == "seen"
    assert claim.verdict(shares, more, 0.06) == "open" and claim.verdict(shares, equal, 0.9) == "not seen"


def test_claims_are_corrected_for_the_number_of_those_that_are_tested():
    """Three arms of five seeds, each two points above its baseline: p is 1/16, times the number of tested claims."""
    accuracy = {"diffu_grpo": 0.2, "agrpo": 0.22, "agrpo_sapo_1": 0.24, "espo": 0.22, "gdpo": 0.24}
    runs = [
        dict(task="chained_sums", arm=arm, seed=seed, sampled_accuracy=value + 0.001 * seed)
        for arm, value in accuracy.items()
        for seed in range(5)
    ]
    stored = json.loads((RESULTS / "premises.json").read_text())["chained_sums, max_prob"]
    stored["elbo_deviation"] = {"0.5": 1.0, "0.25": 1.0}  # the premise of GDPO, which fails
    head, lines = claims_table(stored, Runs(runs), "chained_sums")
    shown = {line[head.index("test")]: (line[head.index("Holm")], line[-1]) for line in lines}
    assert shown == {
        "`agrpo` − `diffu_grpo`, methods": ("0.1875", "open"),
        "`agrpo_sapo_1` − `agrpo`": ("0.1875", "open"),
        "`espo` − `diffu_grpo`, methods": ("0.1875", "open"),
        "`gdpo` − `espo`, methods": ("", "premise fails"),
    }


def test_the_pages_show_the_stored_results():
    found = claims.tables()
    for name in claims.WRITTEN:
        page = (claims.PAGES / name).read_text()
        assert page == claims.filled(page, found), f"run recipes/benchmarks/claims.py: {name} shows other results"
    # the stored runs are compact, and those of one task and arm have different seeds
    runs = json.loads((RESULTS / "core_table.json").read_text())
    assert all("curve" not in run and run["task"] in (*CORE_TASKS, *PUZZLES) for run in runs)
    assert len({(run["task"], run["arm"], run["seed"]) for run in runs}) == len(runs)


# Figures that a page quotes from earlier tables, which had other learning rates or fewer seeds.
EARLIER = {"22.4 ± 0.3", "56.0 ± 2.2", "0.9 ± 0.5"}


def figures(runs: Runs) -> set[str]:
    """Collect every mean ± error of an arm and every difference ± interval of two arms of a task, without signs.

    Each is computed from the first ten, twenty and thirty seeds, and from all.
    """
    found = set()

    def add_difference(one: dict[int, float], other: dict[int, float]) -> None:
        less = [one[seed] - other[seed] for seed in one.keys() & other.keys()]
        width = stats.t.ppf(0.975, len(less) - 1) * standard_error(less)
        found.add(f"{abs(np.mean(less)):.1f} ± {width:.1f}")

    for most, task in product((10, 20, 30, 60), runs.tasks):
        sampled = {}
        for arm in runs.arms(task):
            some = [run for run in runs.of(task, arm) if run["seed"] < most]
            sampled[arm] = {run["seed"]: 100 * run["sampled_accuracy"] for run in some}
            measures = [{run["seed"]: 100 * run["accuracy"][steps] for run in some} for steps in some[0]["accuracy"]]
            if arm in FEWER_STEPS:
                measures.append({run["seed"]: 100 * run["parallel"]["accuracy"] for run in some})
                at_most = str(setting_of(task).fewer_steps[0])
                add_difference(measures[-1], {run["seed"]: 100 * run["accuracy"][at_most] for run in some})
            found |= {mean_and_error(np.array([*each.values()])) for each in (sampled[arm], *measures)}
        for one, other in combinations(sampled, 2):
            add_difference(sampled[one], sampled[other])
    return found


@pytest.mark.parametrize("name", claims.WRITTEN)
def test_the_text_of_the_pages_names_figures_of_the_stored_results(name):
    page = re.sub(r"<!-- table: .*?<!-- end of table -->", "", (claims.PAGES / name).read_text(), flags=re.DOTALL)
    named = re.findall(r"\d+\.\d ± \d+\.\d", " ".join(page.split()))
    known = figures(Runs(json.loads((RESULTS / "core_table.json").read_text()))) | EARLIER
    assert len(named) > 5 and [each for each in named if each not in known] == []
