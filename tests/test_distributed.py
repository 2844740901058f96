"""DDP, ZeRO-2 and ZeRO-3, two real processes each, against one process.

Every backend is launched once, with `accelerate launch` and the files of `recipes/accelerate_configs`, and runs the
cases of `distributed_worker.py`. The loss proves nothing here: with advantages centred on their group it is 0 on
policy. So completions, drawn steps, prompt masks, selected steps and process rewards are compared, row by row, and
then the parameters after the update.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed_worker import BACKENDS, cases
from tiny import tiny_model

REPOSITORY = Path(__file__).parents[1]
CONFIGS = {"single": "single_gpu", "ddp": "cpu_ddp", "zero2": "cpu_zero2", "zero3": "cpu_zero3"}
TIMEOUT = 600  # seconds for a backend: about 30 on two free cores, and a minute to compile DeepSpeed's operator

CASES = cases()
SOUND = [name for name, case in CASES.items() if case.fault is None]
COUNTED = [name for name in SOUND if "three updates" in name]
SEVERAL = [backend for backend in BACKENDS if backend != "single"]
EQUAL = (
    *("completion_ids", "completion_mask", "unmask_step", "view_steps"),
    *("hidden", "targets", "prompt_hidden", "global_row"),
)
CLOSE = ("advantages", "weights", "view_weights", "old_per_token_logps", "ref_per_token_logps")

pytestmark = pytest.mark.slow
several_backends = pytest.mark.parametrize("backend", SEVERAL)


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
    checkpoint = tmp_path_factory.mktemp("model")
    tiny_model(seed=3).save_pretrained(checkpoint)
    return cache(lambda backend: launch(backend, checkpoint, tmp_path_factory.mktemp(backend)))


def launch(backend: str, checkpoint: Path, folder: Path) -> Launch:
    programs = Path(sys.executable).parent  # DeepSpeed looks for ninja on the PATH
    environment = os.environ | {
        "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
        "CUDA_VISIBLE_DEVICES": "",
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "PYTHONWARNINGS": "ignore",
        "HF_HUB_OFFLINE": "1",
    }
    command = [
        *(str(programs / "accelerate"), "launch", "--main_process_port", str(free_port())),
        *("--config_file", f"recipes/accelerate_configs/{CONFIGS[backend]}.yaml", "tests/distributed_worker.py"),
        *("--backend", backend, "--model", str(checkpoint), "--out", str(folder), "--timeout", str(TIMEOUT - 20)),
    ]
    with (folder / "output.txt").open("w") as output:
        process = subprocess.Popen(
            command, cwd=REPOSITORY, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            process.wait(TIMEOUT)
        except subprocess.TimeoutExpired:
            pass  # the tests fail and show the output
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGTERM)  # the launcher stops its processes
                process.wait(60)
    return Launch(process.returncode, (folder / "output.txt").read_text(), folder)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def all_rows(ranks: list[dict[str, Any]], rollout: int) -> dict[str, torch.Tensor]:
    """The rows of all processes, in the order of rank."""
    parts = [rank["rollouts"][rollout]["rows"] for rank in ranks]
    return {key: torch.cat([part[key] for part in parts]) for key in (*EQUAL, *CLOSE) if key in parts[0]}


def update_error(ranks: list[dict[str, Any]], single: dict[str, Any]) -> float:
    """Largest error of a tensor's change, less its float32 rounding, relative to the change in one process."""
    errors = []
    for name, before in single["before"].items():
        change, expected = ranks[0]["after"][name] - ranks[0]["before"][name], single["after"][name] - before
        if expected.any():
            rounding = torch.finfo(torch.float32).eps * before.norm()
            errors.append((((change - expected).norm() - rounding) / expected.norm()).item())
        else:
            assert not change.any(), name
    return max(errors)


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_case_ran_on_the_processes_asked_for(backend, launched):
    # the worker asserts distributed type, process count, ZeRO stage and, for ZeRO-3, that every tensor is cut
    result = launched(backend)
    assert result.code == 0, result.output[-8000:]
    for name, case in CASES.items():
        if backend in case.backends:
            assert len(result.ranks(name)) == BACKENDS[backend][1]


@pytest.mark.parametrize("case", SOUND)
@several_backends
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


@pytest.mark.parametrize("case", SOUND)
@several_backends
def test_updates_are_those_of_one_process(backend, case, launched):
    ranks, (single,) = launched(backend).ranks(case), launched("single").ranks(case)
    for name, value in single["before"].items():
        for rank in ranks:
            assert torch.equal(rank["after"][name], ranks[0]["after"][name]), name
        torch.testing.assert_close(ranks[0]["after"][name], single["after"][name], rtol=1e-4, atol=1e-6)
        if CASES[case].lora:
            assert torch.equal(single["after"][name], value) == ("lora_" not in name), name
    assert update_error(ranks, single) <= 1e-4


@pytest.mark.parametrize("case", COUNTED)
@pytest.mark.parametrize("backend", BACKENDS)
def test_one_optimizer_step_per_update(backend, case, launched):
    for rank in launched(backend).ranks(case):
        passes = 3 * 2 * rank["views"]  # updates × micro-batches × views
        assert rank["trainer_steps"] == 3
        assert rank["engine_steps"] == (3 if backend.startswith("zero") else None)
        assert rank["backward_passes_and_updates"] == passes + 3
        assert rank["changes"] == 3


def test_with_sharded_weights_processes_sample_in_step(launched):
    def forwards(backend):
        return [[rollout["forwards"] for rollout in rank["rollouts"]] for rank in launched(backend).ranks(name)]

    name = "sharded sampling"
    alone = forwards("ddp")
    assert alone[0] != alone[1]  # one process is done before the other …
    most = [max(pair) for pair in zip(*alone, strict=True)]
    assert forwards("zero3") == [most, most]  # … and goes on with it where weights are sharded
    for case, whole in ((name, False), ("one micro-batch", True)):
        for rank in launched("zero3").ranks(case):
            assert all(rollout["whole"] == whole for rollout in rank["rollouts"])


def test_with_sharded_weights_processes_probe_in_step(launched):
    def probing(backend):
        return [rank["rollouts"][0]["probing"] for rank in launched(backend).ranks("sharded probing")]

    (alone,), apart, together = probing("single"), probing("ddp"), probing("zero3")
    assert alone["sync_forwards"] == 0 and all(rank.get("sync_forwards", 0) == 0 for rank in apart)
    own = [rank.get("forwards", 0) for rank in apart]
    assert own[0] > 0 == own[1]  # one process has nothing to continue …
    assert together[0]["forwards"] == together[1]["forwards"] >= max(own)  # … and runs as many forwards
    assert [rank["forwards"] - rank["sync_forwards"] for rank in together] == own
    rewards = launched("single").ranks("sharded probing")[0]["rollouts"][0]["process_reward"]
    assert 0 < sum(reward is not None for reward in rewards) < 8 and any(rewards)


@several_backends
def test_the_reference_stays_where_the_policy_started(backend, launched):
    ranks = launched(backend).ranks("reference")
    drift = []
    for rollout in range(3):  # of the first update, the second, and the evaluation
        rows = all_rows(ranks, rollout)
        reference = rows["ref_per_token_logps"][:, 0]  # of every view
        old = rows["old_per_token_logps"].unsqueeze(1).expand_as(reference)
        scored = reference != 0
        drift.append((reference - old)[scored].abs().max())
    assert drift[0] < 1e-4 and drift[1] > 0.1 and drift[2] > 0.1


def test_negative_control_noise_keyed_by_the_local_row(launched):
    name = "fault: local rows"
    ranks, (single,) = launched("ddp").ranks(name), launched("single").ranks(name)
    ids, expected = all_rows(ranks, 0)["completion_ids"], single["rollouts"][0]["rows"]["completion_ids"]
    assert torch.equal(ids[:8], expected[:8]) and not torch.equal(ids[8:], expected[8:])
    assert update_error(ranks, single) > 1e-2


def test_negative_control_an_optimizer_step_per_view(launched):
    for rank in launched("zero2").ranks("fault: step per view"):
        assert rank["trainer_steps"] == 3  # the trainer does not notice
        assert rank["engine_steps"] == rank["changes"] == 3 * 2 * 3
