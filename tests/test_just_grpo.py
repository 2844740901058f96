"""JustGRPO: the policy gradient of left-to-right text, its faster forms, and the steps that rules choose."""

from __future__ import annotations

import pytest
import torch
from enumeration import enumerate_paths, trajectory_of
from methods import block_causal, method_named
from test_exact_gradient import LENGTH, PROMPT, gradient, reward_of
from tiny import tiny_model
from trainer_helpers import loss_of_update, plan_of

from trl_diffusion.credit import ChosenSteps, among_untied, chosen_draws, draw_steps, largest
from trl_diffusion.credit.step_draws import step_probabilities
from trl_diffusion.trainers import JustGRPOConfig, TrajectoryGRPOConfig

METHOD = method_named("just_grpo")


@pytest.fixture(scope="module")
def model():
    return tiny_model(seed=3).double().eval()  # float64, so that differences are the formula's


@pytest.fixture(scope="module")
def paths(model):
    """Every text that can be written from left to right, rows leaving behind their end."""
    found = enumerate_paths(model, PROMPT, LENGTH, block=1, steps_per_block=1)
    assert float(sum(path.probability for path in found).detach()) == pytest.approx(1.0, abs=1e-9)
    assert all(u in (i, -1) for path in found for i, u in enumerate(path.steps)) and len(found) == 2 + 4 + 8 + 32
    return found


def made(model, paths, folder, **settings):
    """A trainer on these texts, and its rows with the advantages that make its loss −E[r] / L."""
    sizes = {"max_completion_length": LENGTH, "denoising_steps": LENGTH, "temperature": 1.0}
    trainer = METHOD.make(folder, model=model, **sizes | {"num_iterations": 1} | settings)
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()
    trajectory = trajectory_of(paths, 1.0)
    rows = {"completion_ids": trajectory.completion_ids, "global_row": torch.arange(len(paths))}
    rows["prompt_ids"] = torch.tensor([PROMPT] * len(paths))
    rows["prompt_mask"] = torch.ones_like(rows["prompt_ids"])
    rows |= plan_of(trainer, trajectory, rows)
    rows["num_items_in_batch"] = rows["completion_mask"].sum()
    probability = torch.stack([path.probability for path in paths]).detach()
    rows["advantages"] = probability * rewards(paths) * len(paths)
    return trainer, rows


def rewards(paths) -> torch.Tensor:
    return torch.tensor([reward_of(path.tokens) for path in paths]).double()


def policy_gradient(model, paths) -> torch.Tensor:
    return gradient(model, (torch.stack([path.probability for path in paths]) * rewards(paths)).sum())


def test_every_step_gives_the_policy_gradient(model, paths, tmp_path):
    trainer, rows = made(model, paths, tmp_path)
    assert trainer.args.num_mc_samples == LENGTH
    exact = policy_gradient(model, paths)
    found = -gradient(model, loss_of_update(trainer, rows)) * LENGTH
    torch.testing.assert_close(found, exact, atol=1e-6, rtol=1e-5)
    assert exact.norm() > 0.1
    # negative control: the published faster form leaves out the surer half of the steps
    fast, rows = made(model, paths, tmp_path, step_draws="top_entropy", step_share=0.5)
    assert fast.args.num_mc_samples == LENGTH // 2
    assert (-gradient(model, loss_of_update(fast, rows)) * LENGTH - exact).norm() > 0.1 * exact.norm()


def test_entropy_draws_have_its_gradient_in_expectation(model, paths, tmp_path):
    """One draw per completion: every step that can be drawn, with its probability and the weight it is given."""
    trainer, rows = made(model, paths, tmp_path, step_draws="entropy", num_mc_samples=1)
    entropies = torch.tensor([path.entropies for path in paths])
    eligible = torch.arange(LENGTH) < rows["completion_mask"].sum(1, keepdim=True)
    q = step_probabilities(entropies, rows["unmask_step"], eligible, "entropy")
    assert (q.max(1).values - q.masked_fill(~eligible, 1.0).min(1).values > 0.1).any()
    expected, as_if_uniform = 0.0, 0.0
    for step in range(LENGTH):
        # the point in the middle of the step's share of the unit interval; of a step that cannot be drawn, any
        drawn = draw_steps(q, q.cumsum(1)[:, [step]] - q[:, [step]] / 2, "sum")
        assert torch.equal(drawn.steps[eligible[:, step]], torch.full_like(drawn.steps[eligible[:, step]], step))
        rows |= {"view_steps": drawn.steps.unsqueeze(1), "view_weights": drawn.weights.unsqueeze(1)}
        here = rows | {"advantages": rows["advantages"] * q[:, step]}
        expected = expected - gradient(model, loss_of_update(trainer, here)) * LENGTH
        here["view_weights"] = eligible.sum(1).float().view(-1, 1, 1)
        as_if_uniform = as_if_uniform - gradient(model, loss_of_update(trainer, here)) * LENGTH
    exact = policy_gradient(model, paths)
    torch.testing.assert_close(expected, exact, atol=1e-6, rtol=1e-5)
    assert (as_if_uniform - exact).norm() > 1e-2 * exact.norm()  # negative control


# ------------------------------------------- steps that a rule chooses


def test_the_share_with_the_most_entropy_is_rounded_up_and_ties_go_to_the_earlier_step():
    values = torch.tensor([[1.0, 3.0, 3.0, 3.0, 9.0], [2.0, 2.0, 2.0, 2.0, 2.0], [0.0, 5.0, 4.0, 3.0, 2.0]])
    among = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 1, 1], [0, 1, 0, 1, 1]]).bool()

    def chosen(most: int | float) -> list[list[int]]:
        return [row.nonzero().flatten().tolist() for row in largest(values, among, most)]

    assert chosen(0.25) == [[1], [0, 1], [1]]
    assert chosen(0.5) == [[1, 2], [0, 1, 2], [1, 3]]
    assert chosen(1.0) == [[0, 1, 2, 3], [0, 1, 2, 3, 4], [1, 3, 4]]
    assert chosen(2) == [[1, 2], [0, 1], [1, 3]] and chosen(9) == chosen(1.0)
    many = torch.ones(1, 100, dtype=torch.bool)
    for share in (0.07, 0.25, 0.29, 0.57):  # 0.07 · 100 and others are whole numbers but for rounding
        assert largest(torch.zeros(1, 100), many, share).sum() == round(100 * share)


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("count", [1, 3, 4, 7])
def test_more_steps_than_views_are_drawn_evenly(reduction, count):
    """Over all noise, a weighted mean over the views is the sum or the mean over the chosen steps of anything."""
    chosen = torch.tensor([[1, 0, 1, 1, 1, 0], [0, 0, 0, 1, 0, 0], [0, 0, 0, 0, 0, 0]]).bool()
    values = torch.tensor([3.0, -1.0, 4.0, 1.0, -5.0, 9.0])
    grid, total = 120, torch.zeros(3)  # steps change at multiples of 1/12
    for tick in range(grid):
        noise = torch.full((3, 1), (tick + 0.5) / grid, dtype=torch.float64)
        drawn = chosen_draws(chosen, count, noise, reduction)
        assert drawn.steps.shape == (3, count)
        kept = [row[row >= 0].tolist() for row in drawn.steps]
        assert [len(set(row)) for row in kept] == [min(count, 4), 1, 0]
        assert torch.equal(drawn.weights == 0, drawn.steps < 0)
        total += (drawn.weights * values[drawn.steps.clamp(min=0)]).mean(1)
    expected = torch.tensor([3.0, 1.0, 0.0]) / (torch.tensor([4.0, 1.0, 1.0]) if reduction == "mean" else 1.0)
    torch.testing.assert_close(total / grid, expected, atol=1e-5, rtol=0)


def test_only_a_sum_over_all_steps_is_an_estimate_of_the_likelihood():
    assert ChosenSteps(4, "all").sums
    assert not ChosenSteps(4, "all", reduction="mean").sums and not ChosenSteps(4, "forced").sums


def test_groups_with_equal_rewards_are_left_out_of_the_mean():
    nan = torch.nan
    advantages = torch.tensor([[1.0, -1.0], [0.3, 0.3], [nan, nan], [nan, 0.5], [0.5, -0.5]])
    expected = advantages * 5 / 2
    torch.testing.assert_close(among_untied(advantages), expected, equal_nan=True)
    assert torch.equal(among_untied(torch.zeros(2, 3)), torch.zeros(2, 3))


# ------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"block_length": 4}, "from left to right, which needs block_length=1; got 4"),
        ({"denoising_steps": 4, "block_length": 2}, "needs block_length=1; got 2"),
        ({"confidence_threshold": 0.9, "unmasking": "max_prob"}, "needs confidence_threshold=None; got 0.9"),
        ({"entropy_bound": 0.1, "unmasking": "entropy"}, "needs entropy_bound=None; got 0.1"),
        ({"step_share": 0.5}, r"step_share=0.5 belongs to step_draws='top_entropy'; got step_draws='all'"),
        ({"step_draws": "top_entropy", "step_share": 1.5}, r"step_share must lie in \(0, 1\], got 1.5"),
        ({"step_draws": "forced"}, "there is none. Set confidence_threshold, or another step_draws"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        METHOD.make(tmp_path, **settings)


def test_views_follow_from_the_steps_that_learn(tmp_path):
    def views(**settings) -> int:
        return JustGRPOConfig(str(tmp_path), use_cpu=True, bf16=False, **settings).num_mc_samples

    assert views() == 256 and views(max_completion_length=30) == 30
    assert views(step_draws="top_entropy", max_completion_length=30) == 8
    assert views(step_draws="top_entropy", step_share=0.5) == 128
    assert views(step_draws="entropy") == 64 and views(num_mc_samples=5) == 5


def test_a_block_causal_model_is_refused_with_the_reason(tmp_path):
    with pytest.raises(ValueError, match=r"sdar was trained to write blocks of 4 tokens at once.*damages the model"):
        METHOD.make(tmp_path, model=block_causal())


def test_a_rule_does_not_go_with_a_loss_that_divides_by_the_tokens_of_a_view(tmp_path):
    with pytest.raises(ValueError, match=r"loss_type='bnpo' takes a statistic .* which step_draws='all' skews"):
        TrajectoryGRPOConfig(
            str(tmp_path), use_cpu=True, bf16=False, step_draws="all", step_reduction="mean", loss_type="bnpo"
        )
