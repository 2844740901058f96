"""The yardstick of the speed benchmarks, what they measure with, and that they run."""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import chi2_contingency
from tiny import A, tiny_model

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "recipes" / "benchmarks"))

import adapters  # noqa: E402
import before_and_after  # noqa: E402
import compiled as compiled_benchmark  # noqa: E402
import fused as fused_benchmark  # noqa: E402
import gpu  # noqa: E402
import growth  # noqa: E402
import measure  # noqa: E402
import published  # noqa: E402
import rollout  # noqa: E402
import scoring  # noqa: E402
import update  # noqa: E402
import where  # noqa: E402
from measure import Measured, Mode, Part, Work  # noqa: E402
from networks import SHAPES, Shape, make_network  # noqa: E402

from trl_diffusion.likelihood import Views, score_views  # noqa: E402
from trl_diffusion.models.compiled_windows import window_states  # noqa: E402
from trl_diffusion.runtime.cost import network_shape  # noqa: E402
from trl_diffusion.sampling import SamplingConfig, row_generators, sample  # noqa: E402

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
ROWS = 20_000
KEPT, REJECTED = 1e-3, 1e-6  # p-values: of equal distributions above the first, of different ones below the second
SMALL = SamplingConfig(canvas_length=4, denoising_steps=4, block_length=2, temperature=0.8)


# ---------------------------------------------------------------- the published schedule


@cache
def four_words():
    """Nothing ends a text, so that both programs fill every canvas."""
    return tiny_model(vocab_size=7, end_token_ids=[6], eos_token_id=6, pad_token_id=6, num_tokens=4).eval()


@cache
def completions(config: SamplingConfig, program: str, seed: int = 0) -> Counter:
    prompts = torch.full((ROWS, 3), A)
    if program == "library":
        canvas = sample(four_words(), prompts, None, config, row_generators(seed, rows=range(ROWS))).completion_ids
    else:
        generator = torch.Generator().manual_seed(seed)
        mask = torch.ones_like(prompts)
        canvas = published.rollout(four_words(), prompts, mask, config, generator, lean=program == "lean")
    return Counter(map(tuple, canvas.tolist()))


def p_value(first: Counter, second: Counter) -> float:
    """Chi-square test that two samples have one distribution; completions seen less than 20 times share a cell."""
    cells = [[], []]
    rare = [0, 0]
    for completion in first | second:
        counts = first[completion], second[completion]
        for side in range(2):
            if sum(counts) < 20:
                rare[side] += counts[side]
            else:
                cells[side].append(counts[side])
    if sum(rare):
        cells = [[*side, count] for side, count in zip(cells, rare, strict=True)]
    return chi2_contingency(np.array(cells)).pvalue


@pytest.mark.thorough
@pytest.mark.parametrize("unmasking", ["low_confidence", "random"])
def test_published_rollouts_have_the_distribution_of_the_library(unmasking):
    config = replace(SMALL, unmasking=unmasking)
    ours = completions(config, "library")
    for program in ("LLaDA/d1", "lean"):
        assert p_value(ours, completions(config, program)) > KEPT, program
    assert p_value(ours, completions(replace(config, temperature=0.9), "lean")) < REJECTED
    other = {"low_confidence": "random", "random": "low_confidence"}[unmasking]
    assert p_value(ours, completions(replace(config, unmasking=other), "lean")) < REJECTED


@pytest.mark.parametrize("block_causal", [False, True])
def test_published_greedy_tokens_are_the_library_s(block_causal):
    shape = Shape(2000, hidden=64, layers=2, heads=4, key_heads=4, block_causal=block_causal)
    model = make_network(shape, CPU, block=4).eval()
    config = SamplingConfig(16, 8, 4, temperature=0.0, unmasking="low_confidence")
    prompts = torch.randint(1998, (6, 9), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(9) >= torch.tensor([[0], [0], [2], [4], [5], [8]])).long()

    def ours(steps: int, cache: str = "auto") -> torch.Tensor:
        settings = replace(config, denoising_steps=steps, cache=cache)
        return sample(model, prompts, mask, settings, row_generators(0, rows=range(6))).completion_ids

    for lean in (False, True):
        plain = published.rollout(model, prompts, mask, config, torch.Generator(), lean)
        assert plain.equal(ours(8))
        assert not plain.equal(ours(4))
        assert block_causal or not plain.equal(ours(8, "dual"))
    assert len(plain.unique()) > 10  # it depends on the context what the network says


def test_published_schedule_stops_after_some_steps():
    canvas = published.rollout(
        four_words(),
        torch.full((2, 3), A),
        torch.ones(2, 3),
        replace(SMALL, unmasking="random"),
        torch.Generator(),
        steps=3,
    )
    assert (canvas != four_words().config.mask_token_id).sum(1).tolist() == [3, 3]
    assert (canvas[:, :2] != four_words().config.mask_token_id).all()


def test_the_published_schedule_refuses_what_it_does_not_do():
    with pytest.raises(ValueError, match="unmasking='max_prob'"):
        published.rollout(
            four_words(), torch.full((1, 3), A), torch.ones(1, 3), replace(SMALL, unmasking="max_prob"), None
        )


def test_published_scores_are_the_library_s():
    model, generator = four_words(), torch.Generator().manual_seed(0)
    prompts, tokens = torch.randint(4, (5, 3), generator=generator), torch.randint(4, (5, 8), generator=generator)
    mask, targets = torch.ones_like(prompts), torch.rand(5, 8, generator=generator) < 0.5
    canvas = tokens.masked_fill(targets, model.config.mask_token_id)
    plain = published.score(model, prompts, mask, canvas, tokens)
    ours = score_views(model, prompts, mask, tokens, Views(canvas, targets)).logps
    # the published code keeps ids that are never sampled in the softmax
    logits = model(input_ids=torch.cat([prompts, canvas], 1)).logits[:, 3:]
    kept = (logits.logsumexp(-1) - logits[..., :4].logsumexp(-1)) * targets
    torch.testing.assert_close(plain * targets + kept, ours)
    assert (kept[targets] > 1e-4).all()


def test_published_loss_by_hand():
    ratio = torch.tensor([[2.0, 0.9, 5.0], [0.5, 0.9, 5.0]])
    targets = torch.tensor([[True, True, False], [True, True, False]])
    advantages, old = torch.tensor([1.0, -1.0]), torch.zeros(2, 3)
    # min(ρ, 1.2) + 0.9 for the first row; −max(ρ, 0.8) − 0.9 for the second
    expected = -(1.2 + 0.9 - 0.8 - 0.9) / 4
    assert published.loss(ratio.log(), targets, advantages, 0.2, old).item() == pytest.approx(expected, abs=1e-6)
    # k3 of ρ_ref = 1/ρ: 1/ρ − log(1/ρ) − 1
    k3 = sum(1 / r + np.log(r) - 1 for r in (2.0, 0.9, 0.5, 0.9)) / 4
    loss = published.loss(ratio.log(), targets, advantages, 0.2, old, torch.zeros(2, 3), beta=0.5)
    assert loss.item() == pytest.approx(expected + 0.5 * k3, abs=1e-6)


# ---------------------------------------------------------------- measurements


def test_operations_are_those_of_the_shapes():
    model = make_network(SHAPES["tiny"], CPU, block=4)
    ids, positions = torch.zeros(3, 20, dtype=torch.long), torch.arange(5).expand(3, -1)
    mask = torch.ones_like(ids)
    output, forward = measure.count_flop(lambda: model(input_ids=ids, attention_mask=mask, positions=positions))
    shape = network_shape(model)
    assert forward == 3 * shape.forward_flop(tokens=20, read=5)
    _, backward = measure.count_flop(output.logits.clamp(min=-1e9).sum().backward)
    # the attention kernel forms one of its products again, which `backward_flop` does not count
    assert backward == 3 * (shape.backward_flop(tokens=20, read=5) + 2 * shape.last_attention * 20 * 5)


def test_peak_memory_is_that_of_the_run():
    block = 16 * measure.MIB  # float32 numbers: 64 MiB
    torch.zeros(4 * block)  # freed, so that malloc might keep it
    held = torch.zeros(block)
    for count in (1, 2):
        _, peak = measure.time_and_peak(lambda n=count: [torch.zeros(block) for _ in range(n)], CPU)
        assert abs(peak - 64 * count) < 1
    assert len(held) == block


def test_parts_add_up_and_modes_alternate(monkeypatch):
    order: list[str] = []

    def run(name: str, forwards: float):
        order.append(name)
        return Work(forwards, tokens=2 * forwards)

    clock = {"a": 1.0, "b": 10.0, "c": 100.0}
    monkeypatch.setattr(measure, "time_and_peak", lambda part, device: (part() and clock[order[-1]], len(order)))
    modes = [
        Mode("ab", [Part(lambda: run("a", 1)), Part(lambda: run("b", 2), 3.0)]),
        Mode("c", [Part(lambda: run("c", 4))]),
    ]
    both, single = measure.compare(modes, rounds=2, device=CPU)
    assert "".join(order) == "abc" + "abc" + "cab"
    assert (both.seconds, both.forwards, both.tokens, both.extrapolated) == ([31.0, 31.0], 7.0, 14.0, True)
    order.clear()
    measure.compare(modes, rounds=1, device=CPU, compiles=True)
    assert "".join(order) == "aabbcc" + "abc"
    assert (single.seconds, single.peak_mib, single.extrapolated) == ([100.0, 100.0], 7, False)


def test_summary_by_hand():
    plain = Measured("plain", [8.0, 9.0, 40.0], peak_mib=200.0, flop=4e12, forwards=10, tokens=20, extrapolated=True)
    ours = Measured("ours", [2.0, 3.0, 4.0], peak_mib=50.0, flop=3e12, forwards=10, tokens=20, extrapolated=False)
    row = measure.summary([plain, ours], ["plain"], peak=2e12)[1]
    assert (row["median_seconds"], row["tflop"], row["peak_share"]) == (3.0, 3.0, 0.5)
    # the median of the rounds' ratios 4, 3 and 10, not the ratio of the medians
    assert row["speedup"]["plain"] == {"median": 4.0, "smallest": 3.0, "largest": 10.0}
    assert row["memory_share"]["plain"] == 0.25


def test_a_straight_line_is_told_from_a_curve():
    line = growth.linear_fit([1, 2, 4], [5.0, 7.0, 11.0])
    assert line == pytest.approx({"slope": 2, "intercept": 3, "r_squared": 1, "largest_deviation": 0}, abs=1e-9)
    curve = growth.linear_fit([1, 2, 4], [1.0, 4.0, 16.0])
    assert curve["r_squared"] < 0.98 and curve["largest_deviation"] > 0.3


# ---------------------------------------------------------------- the scripts


SIZES = ["--shapes", "tiny", "--rows", "2", "--prompt", "12", "--canvas", "32", "--rounds", "1"]
SAMPLING = ["--steps", "16", "--block", "8", "--published_steps", "4"]


def run(script, monkeypatch, folder: Path, *arguments: str) -> dict[str, dict]:
    monkeypatch.setattr(measure, "matmul_peak", lambda device, dtype: 1e11)
    monkeypatch.setattr(sys, "argv", [script.__name__, *SIZES, *arguments, "--output_dir", str(folder)])
    script.main()
    written = {path.stem: json.loads(path.read_text()) for path in folder.glob("*.json")}
    assert all(folder.joinpath(f"{name}.png").stat().st_size > 5_000 for name in written)
    return written


@pytest.mark.thorough
def test_rollout_benchmark(monkeypatch, tmp_path):
    result = run(rollout, monkeypatch, tmp_path, *SAMPLING)["tiny_low_confidence"]
    modes = {mode["name"]: mode for mode in result["modes"]}
    assert list(modes) == ["LLaDA/d1", "lean", "exact", "prefix", "dual", "block-causal"]
    for mode in modes.values():
        assert (mode["forwards"], mode["tokens"]) == (2 * 16, 2 * 32), mode["name"]
    assert {name for name, mode in modes.items() if mode["extrapolated"]} == {"LLaDA/d1", "lean"}
    assert modes["LLaDA/d1"]["flop"] > modes["lean"]["flop"] > modes["exact"]["flop"] > modes["prefix"]["flop"]
    assert modes["prefix"]["flop"] > modes["dual"]["flop"] > modes["block-causal"]["flop"]
    equal = result["equal_greedy_tokens"]
    assert all(equal[f"{mode}, {y}"] == "32 of 32" for mode in ("exact", "block-causal") for y in rollout.YARDSTICKS)
    # texts that end after 2 and 4 of 4 blocks, whose last token is given
    uneven = {mode["name"]: mode for mode in result["uneven"]}
    assert (uneven["exact, uneven texts"]["forwards"], uneven["exact, uneven texts"]["tokens"]) == (8 + 16, 46)


def test_adapters_benchmark(monkeypatch, tmp_path, capsys):
    result = run(adapters, monkeypatch, tmp_path, "--steps", "8", "--block", "16", "--autocast")["adapters_tiny"]
    modes = {mode["name"]: mode for mode in result["modes"]}
    assert list(modes) == ["no adapter", "LoRA", "LoRA, merged", "LoRA, cast once"]
    assert all((mode["forwards"], mode["tokens"]) == (2 * 8, 2 * 32) for mode in modes.values())
    merging = modes["LoRA, merged"]["flop"] - modes["no adapter"]["flop"]
    assert 0 < merging < modes["LoRA"]["flop"] - modes["no adapter"]["flop"]
    assert modes["LoRA, cast once"]["flop"] == modes["LoRA"]["flop"] and result["merge_seconds"] > 0
    assert "64 of 64" in capsys.readouterr().out


def test_bfloat16_weights_keep_little_of_a_young_adapter(monkeypatch, tmp_path, capsys):
    run(adapters, monkeypatch, tmp_path, "--kept")
    rows = [line.split("│")[1:4] for line in capsys.readouterr().out.splitlines() if "%" in line]
    shares = {int(updates): [float(share.strip(" %")) for share in pair] for updates, *pair in rows}
    assert shares[1][0] < 20 and shares[1000][0] > 90
    assert all(abs(in_float32 - 100) < 0.1 for _, in_float32 in shares.values())


def test_scoring_benchmark(monkeypatch, tmp_path):
    results = run(scoring, monkeypatch, tmp_path, "--targets", "0.25")
    assert set(results) == {"tiny_0.25_with_gradient", "tiny_0.25_without_gradient"}
    full, gathered = results["tiny_0.25_with_gradient"]["modes"]
    assert full["tokens"] == gathered["tokens"] == 2 * 8 and full["flop"] > gathered["flop"]
    assert full["flop"] > 2 * results["tiny_0.25_without_gradient"]["modes"][0]["flop"]


@pytest.mark.thorough
@pytest.mark.release
def test_update_benchmark(monkeypatch, tmp_path):
    # all weights: LoRA of rank 64 is most of what so narrow a network computes, and rollouts merge it
    results = run(update, monkeypatch, tmp_path, *SAMPLING, "--views", "3", "--iterations", "2", "--full")
    agrpo, diffu = results["tiny_AGRPO"], results["tiny_diffu-GRPO"]
    # steps and views; steps, and old, reference and training passes of two inner updates
    for result, passes in ((agrpo, 16 + 3), (diffu, 16 + 3 * 2)):
        modes = {mode["name"]: mode for mode in result["modes"]}
        assert {name: mode["forwards"] for name, mode in modes.items() if name != "dual"} == dict.fromkeys(
            ("LLaDA/d1", "lean", "exact"), 2 * passes
        )
        assert modes["lean"]["flop"] > modes["exact"]["flop"] > modes["dual"]["flop"]
        shares = result["breakdown"]
        assert shares["overhead"] == pytest.approx(1 - shares["forward"] - shares["backward"])
        assert 0 < shares["optimizer"] < shares["overhead"] < 1 and shares["backward"] > 0


def test_benchmark_of_fused_layers(monkeypatch, tmp_path):
    monkeypatch.setattr("trl_diffusion.models.fused.compiled", lambda function: function)
    results = run(fused_benchmark, monkeypatch, tmp_path, *SAMPLING)
    assert set(results) == {"fused_rollouts_tiny", "fused_passes_tiny"}
    for result in results.values():
        stock, fused = result["modes"]
        assert (stock["name"], fused["name"]) == ("stock layers", "fused")
        assert stock["flop"] == fused["flop"] > 0 and stock["tokens"] == fused["tokens"] > 0


def test_benchmark_of_compiled_steps(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("trl_diffusion.models.compiled_windows.compiled", lambda device_type: window_states)
    run(compiled_benchmark, monkeypatch, tmp_path, *SAMPLING)
    assert capsys.readouterr().out.count("64 of 64") == 2


def test_benchmark_of_where_time_goes(monkeypatch, tmp_path, capsys):
    run(where, monkeypatch, tmp_path, *SAMPLING)
    printed = capsys.readouterr().out
    assert "products of matrices" in printed and "100 % (100–100)" in printed
    shares = [float(share) for share in re.findall(r"([\d.]+) % +│", printed)]
    assert sum(shares) == pytest.approx(100, abs=1)


def test_two_checkouts_are_compared_mode_by_mode(monkeypatch, tmp_path, capsys):
    """Every other round backwards; what only one of them has is left out."""
    ran = []

    def seconds_of(checkout, benchmark, more):
        ran.append(checkout.name)
        return {"shared": 3.0 if checkout.name == "old" else 2.0, checkout.name: 1.0}

    monkeypatch.setattr(before_and_after, "seconds_of", seconds_of)
    command = ["x", str(tmp_path / "old"), str(tmp_path / "new"), "--rounds", "2", "--benchmarks", "rollout"]
    monkeypatch.setattr(sys, "argv", [*command, "--output", str(tmp_path / "found.json")])
    before_and_after.main()
    assert ran == ["old", "new", "new", "old"]
    assert json.loads((tmp_path / "found.json").read_text()) == {"shared": [[3.0, 2.0]] * 2}
    assert "1.50 (1.50–1.50)" in capsys.readouterr().out


def test_growth_benchmark(monkeypatch, tmp_path):
    seen = {}

    def seconds_of(trainers, points):
        seen.update(points)
        for settings in points.values():
            trainers.config("AGRPO", **settings)
        return {size: 1.0 + 2.0 * size for size in points}

    monkeypatch.setattr(growth, "seconds_of", seconds_of)
    results = run(growth, monkeypatch, tmp_path, *SAMPLING, "--views", "1")["tiny"]["results"]
    sizes = {name: list(map(int, result["seconds"])) for name, result in results.items()}
    assert sizes == {
        "completions": [2, 4, 6, 8, 10],
        "denoising steps": [4, 8, 12, 16, 20],
        "canvas blocks": [2, 3, 4, 6, 12],
    }
    assert all(result["line"]["slope"] == pytest.approx(2) for result in results.values())


# ---------------------------------------------------------------- the prepared run for a GPU


def gpu_run(monkeypatch, folder: Path, *arguments: str) -> dict:
    monkeypatch.setattr(measure, "matmul_peak", lambda device, dtype: 1e11)
    command = ["gpu.py", "--device", "cpu", "--shapes", "tiny", "--output_dir", str(folder), *arguments]
    monkeypatch.setattr(sys, "argv", command)
    gpu.main()
    return json.loads((folder / "gpu.json").read_text())


@pytest.mark.thorough
@pytest.mark.release
def test_gpu_benchmark(monkeypatch, tmp_path):
    monkeypatch.setattr("trl_diffusion.models.compiled_windows.compiled", lambda device_type: window_states)
    found = gpu_run(monkeypatch, tmp_path, "--compiled")
    assert found["correctness"]["passed"] > 10 and not found["correctness"]["failed"] and not found["skipped"]
    modes = {mode["name"]: mode for mode in found["modes"]}
    assert list(modes) == ["exact", "prefix", "dual", "block-causal"]
    for mode in modes.values():
        assert mode["forwards"] == 2 * 8 and mode["update"]["seconds"] > 0 and len(mode["kernels"]) == 10
        shares = [kernel["share"] for kernel in mode["kernels"]]
        assert shares == sorted(shares, reverse=True) and 0.1 < sum(shares) <= 1 and mode["kernel_ms"] > 0
        assert mode["tokens_per_second"] == pytest.approx(2 * 16 / mode["seconds"])
        assert mode["peak_share"] == pytest.approx(mode["tflop"] / mode["seconds"] / 0.1)
    assert {name for name, mode in modes.items() if "compiled" in mode} == {"dual", "block-causal"}
    assert modes["exact"]["tflop"] > modes["prefix"]["tflop"] > modes["dual"]["tflop"]
    without, with_gradient = found["scoring"]
    assert not without["gradient"] and with_gradient["gradient"]
    table = (tmp_path / "gpu.md").read_text()
    assert "| tiny, exact |" in table and "| tiny-sdar, block-causal |" in table
    assert "With `rollout_compile`, tiny, dual: " in table
    assert f"torch {torch.__version__}" in table and "0 failed" in table


def test_a_gpu_run_without_time_names_what_it_skipped(monkeypatch, tmp_path):
    found = gpu_run(monkeypatch, tmp_path, "--minutes", "0")
    assert not found["modes"] and "correctness" not in found
    skipped = ["correctness tests", "rollout, tiny, exact", "scoring, tiny", "rollout, tiny-sdar, block-causal"]
    assert set(skipped) <= {reason.split(":")[0] for reason in found["skipped"]}
    assert "Skipped rollout, tiny, exact: needs about" in (tmp_path / "gpu.md").read_text()


def test_failed_tests_are_named(tmp_path):
    report = tmp_path / "report.xml"
    report.write_text(
        '<testsuites><testsuite><testcase name="good"/><testcase name="left out"><skipped/></testcase>'
        '<testcase name="bad"><failure message="assert 1 == 2">trace</failure></testcase></testsuite></testsuites>'
    )
    assert gpu.outcomes(report) == {"passed": 1, "skipped": 1, "failed": {"bad": ["assert 1 == 2"]}}
