"""DDP, ZeRO-1, 2 and 3, ZeRO with CPU offload and FSDP2, two real processes each, against one process.

Every backend is launched once, with `accelerate launch` and the package's accelerate configs, and runs the cases of
`distributed_worker.py`. The loss proves nothing here: with advantages centred on their group it is 0 on policy. So
completions, drawn steps, prompt masks, selected steps and process rewards are compared, row by row, and
then the parameters after the update.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed_worker import BACKENDS, EVERY, cases
from launching import accelerate_launch, run

# The files for GPUs run where the CPU needs nothing else.
CONFIGS = {
    "single": "single_gpu",
    "ddp": "cpu_ddp",
    "zero1": "zero1",
    "zero2": "cpu_zero2",
    "zero2_offload": "cpu_zero2_offload",
    "zero3": "cpu_zero3",
    "zero3_methods": "cpu_zero3",
    "zero3_offload": "cpu_zero3_offload",
    "fsdp2": "fsdp2",
}

CASES = cases()
SOUND = [name for name, case in CASES.items() if case.fault is None]
SEVERAL = [backend for backend in BACKENDS if backend != "single"]
SHARDED = [backend for backend in EVERY if BACKENDS[backend].stage == 3 or backend == "fsdp2"]
# `make test` leaves these out: they differ from ZeRO-3 or DDP in where state lies, or run more methods.
THOROUGH = ("zero1", "zero2", "zero2_offload", "zero3_methods", "zero3_offload", "fsdp2")
RELEASE = ("zero1", "zero2_offload", "zero3_methods", "zero3_offload")  # and CI these of them
EQUAL = (
    *("completion_ids", "completion_mask", "unmask_step", "view_steps"),
    *("masked", "targets", "prompt_masked", "global_row"),
)
CLOSE = ("advantages", "weights", "view_weights", "old_per_token_logps", "ref_per_token_logps")

pytestmark = pytest.mark.slow


def run_of(backend: str, *case: str) -> Any:
    """Parameters of a test on a backend."""
    marks = [pytest.mark.thorough] * (backend in THOROUGH) + [pytest.mark.release] * (backend in RELEASE)
    return pytest.param(backend, *case, marks=marks)


def on(backends: Iterable[str]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("backend", [run_of(backend) for backend in backends])


def where(cases: list[str], backends: Iterable[str] = SEVERAL) -> pytest.MarkDecorator:
    """Every backend with every one of the cases that it runs."""
    runs = [run_of(backend, case) for backend in backends for case in cases if backend in CASES[case].backends]
    return pytest.mark.parametrize(("backend", "case"), runs)


@dataclass(frozen=True)
class Launch:
    """What a finished `accelerate launch` left."""

    code: int
    output: str
    folder: Path

    def ranks(self, case: str) -> list[dict[str, Any]]:
        """The records of every process, in the order of rank."""
        files = sorted(file for file in self.folder.glob("*.pt") if file.stem.rpartition("-")[0] == case)
        if not files:
            pytest.fail(f"The case {case!r} did not finish. End of the output:\n{self.output[-8000:]}")
        return [torch.load(file, weights_only=True) for file in files]


@pytest.fixture(scope="module")
def launched(tmp_path_factory) -> Callable[[str], Launch]:
    """Runs a backend's processes when a test first asks for it."""
    checkpoints = tmp_path_factory.mktemp("models")
    for network in {case.method.network for case in CASES.values()}:
        network().save_pretrained(checkpoints / network.__name__)
    return cache(lambda backend: launch(backend, checkpoints, tmp_path_factory.mktemp(backend)))


def launch(backend: str, checkpoints: Path, folder: Path) -> Launch:
    command = accelerate_launch(
        CONFIGS[backend],
        *("--num_processes", str(BACKENDS[backend].processes), "tests/distributed_worker.py"),
        *("--backend", backend, "--models", str(checkpoints), "--out", str(folder)),
    )
    returncode, output = run(command, folder)
    return Launch(returncode, output, folder)


def all_rows(ranks: list[dict[str, Any]], rollout: int) -> dict[str, torch.Tensor]:
    """The rows of all processes, in the order of rank."""
    parts = [rank["rollouts"][rollout]["rows"] for rank in ranks]
    return {key: torch.cat([part[key] for part in parts]) for key in (*EQUAL, *CLOSE) if key in parts[0]}


def update_error(run: dict[str, Any], single: dict[str, Any], update: int = -1) -> float:
    """Largest error of a tensor's change up to an update (the last), less its float32 rounding, relative to the change
    in one process."""
    errors = []
    for name, before in single["before"].items():
        change = run["updates"][update][name] - run["before"][name]
        expected = single["updates"][update][name] - before
        if expected.any():
            rounding = torch.finfo(torch.float32).eps * before.norm()
            errors.append((((change - expected).norm() - rounding) / expected.norm()).item())
        else:
            assert not change.any(), name
    return max(errors)


@on(BACKENDS)
def test_every_case_ran_on_the_processes_asked_for(backend, launched):
    # the worker asserts distributed type, process count, ZeRO stage and, for ZeRO-3, that every tensor is cut
    result = launched(backend)
    assert result.code == 0, result.output[-8000:]
    for name, case in CASES.items():
        if backend in case.backends:
            assert len(result.ranks(name)) == BACKENDS[backend].processes


@where(SOUND)
def test_rollouts_are_those_of_one_process(backend, case, launched):
    ranks, (single,) = launched(backend).ranks(case), launched("single").ranks(case)
    assert len(single["rollouts"]) >= 1
    for rollout in range(len(single["rollouts"])):
        whole = single["rollouts"][rollout]
        rows, expected = all_rows(ranks, rollout), whole["rows"]
        assert rows["global_row"].tolist() == list(range(len(rows["global_row"])))
        assert rows.keys() == expected.keys() & {*EQUAL, *CLOSE}
        for key in rows.keys() & {*EQUAL}:
            assert torch.equal(rows[key], expected[key]), key
        for key in rows.keys() & {*CLOSE}:
            torch.testing.assert_close(rows[key], expected[key], rtol=1e-4, atol=1e-4, msg=lambda m, k=key: k + m)
        assert (expected["advantages"] != 0).sum() > len(expected["advantages"]) / 2
        for rank in ranks:
            assert rank["rollouts"][rollout]["selection"] == whole["selection"]
            assert rank["rollouts"][rollout]["process_reward"] == whole["process_reward"]


@where(SOUND)
def test_updates_are_those_of_one_process(backend, case, launched):
    ranks, (single,) = launched(backend).ranks(case), launched("single").ranks(case)
    for name, value in single["before"].items():
        for rank in ranks:
            assert torch.equal(rank["after"][name], ranks[0]["after"][name]), name
        torch.testing.assert_close(ranks[0]["after"][name], single["after"][name], rtol=1e-4, atol=5e-6)
        if CASES[case].lora:
            assert torch.equal(single["after"][name], value) == ("lora_" not in name), name
    for update in range(len(single["updates"])):
        assert update_error(ranks[0], single, update) <= 1e-4


@where([name for name in SOUND if "updates" in name], BACKENDS)
def test_one_optimizer_step_per_update(backend, case, launched):
    updates = CASES[case].settings["max_steps"]
    for rank in launched(backend).ranks(case):
        assert rank["trainer_steps"] == len(rank["updates"]) == rank["changes"] == updates
        assert rank["engine_steps"] == (updates if BACKENDS[backend].stage else None)
        assert rank["backward_passes_and_updates"] == updates * 2 * rank["passes"] + updates  # two micro-batches


@on(SHARDED)
def test_with_sharded_weights_processes_sample_in_step(backend, launched):
    def forwards(backend):
        return [[rollout["forwards"] for rollout in rank["rollouts"]] for rank in launched(backend).ranks(name)]

    name = "sharded sampling"
    alone = forwards("ddp")
    assert alone[0] != alone[1]  # one process is done before the other …
    most = [max(pair) for pair in zip(*alone, strict=True)]
    assert forwards(backend) == [most, most]  # … and goes on with it where weights are sharded
    for case, whole in ((name, False), ("agrpo, one update", BACKENDS[backend].stage == 3)):
        for rank in launched(backend).ranks(case):
            assert all(rollout["whole"] == whole for rollout in rank["rollouts"])


@where(["lora", "reference, lora"], BACKENDS)
def test_adapters_are_merged_for_rollouts_where_weights_are_not_divided(backend, case, launched):
    for rank in launched(backend).ranks(case):
        assert all(rollout["merged"] == (backend not in SHARDED) for rollout in rank["rollouts"])


@on(["zero3", "fsdp2"])
def test_with_sharded_weights_processes_probe_in_step(backend, launched):
    def probing(backend):
        return [rank["rollouts"][0]["probing"] for rank in launched(backend).ranks("sharded probing")]

    (alone,), apart, together = probing("single"), probing("ddp"), probing(backend)
    assert alone["sync_forwards"] == 0 and all(rank.get("sync_forwards", 0) == 0 for rank in apart)
    own = [rank.get("forwards", 0) for rank in apart]
    assert own[0] > 0 == own[1]  # one process has nothing to continue …
    assert together[0]["forwards"] == together[1]["forwards"] >= max(own)  # … and runs as many forwards
    assert [rank["forwards"] - rank["sync_forwards"] for rank in together] == own
    rewards = launched("single").ranks("sharded probing")[0]["rollouts"][0]["process_reward"]
    assert 0 < sum(reward is not None for reward in rewards) < 8 and any(rewards)


@on(backend for backend in SEVERAL if backend in CASES["probing on one process"].backends)
def test_a_process_with_nothing_to_probe_waits_for_nobody(backend, launched):
    ranks = launched(backend).ranks("probing on one process")
    assert ranks[0]["rollouts"][0]["probing"]["forwards"] > 0
    if backend != "fsdp2":  # where processes run the same forwards
        assert ranks[1]["rollouts"][0]["probing"].get("forwards", 0) == 0


@on(CASES["accuracy on one process"].backends)
def test_a_process_without_held_out_rows_waits_for_nobody(backend, launched):
    first, *others = launched(backend).ranks("accuracy on one process")
    for rank in (first, *others):
        assert rank["accuracy"] == [(0, 1, 1), (1, 1, 1), (2, 1, 1)]
    assert first["held-out samples"] == [(0, 0), (1, 0), (2, 0)]
    assert all(rank["held-out samples"] == [] for rank in others)


def reference_drift(ranks: list[dict[str, Any]], rollout: int) -> float:
    """Largest difference of the log-probabilities of the reference model and of the policy in a rollout."""
    rows = all_rows(ranks, rollout)
    reference = rows["ref_per_token_logps"][:, 0]  # of every view
    old = rows["old_per_token_logps"].unsqueeze(1).expand_as(reference)
    return (reference - old)[reference != 0].abs().max().item()


@where(["reference", "reference, unsaved model", "reference, lora"], BACKENDS)
def test_the_reference_stays_where_the_policy_started(backend, case, launched):
    first, second, evaluation = (reference_drift(launched(backend).ranks(case), rollout) for rollout in range(3))
    assert first < 1e-4 and second > 0.1 and evaluation > 0.1


@on(EVERY)
def test_a_synchronised_reference_follows(backend, launched):
    # that it is the reference of one process is among what rollouts are compared for
    ranks, apart = (launched(backend).ranks(case) for case in ("reference, synchronised", "reference"))
    assert reference_drift(ranks, 0) < 1e-4
    for rollout in (1, 2):
        assert 1e-4 < reference_drift(ranks, rollout) < 0.1 * reference_drift(apart, rollout)


def test_negative_control_noise_keyed_by_the_local_row(launched):
    name = "fault: local rows"
    ranks, (single,) = launched("ddp").ranks(name), launched("single").ranks(name)
    ids, expected = all_rows(ranks, 0)["completion_ids"], single["rollouts"][0]["rows"]["completion_ids"]
    assert torch.equal(ids[:8], expected[:8]) and not torch.equal(ids[8:], expected[8:])
    assert update_error(ranks[0], single) > 1e-2


@pytest.mark.thorough
def test_negative_control_an_optimizer_step_per_view(launched):
    for rank in launched("zero2").ranks("fault: step per view"):
        assert rank["trainer_steps"] == 3  # the trainer does not notice
        assert rank["engine_steps"] == rank["changes"] == 3 * 2 * 3
