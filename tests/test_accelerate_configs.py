"""The files of `accelerate_configs` give the backend that they promise; launches that lose it are refused."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from accelerate import DeepSpeedPlugin, FullyShardedDataParallelPlugin
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from launching import HANG, free_port
from methods import method_named
from tiny import tiny_model

from trl_diffusion.runtime.launch import check_backend, check_reference_loading, fit_to_cpu
from trl_diffusion.trainers import AGRPOConfig

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "trl_diffusion" / "accelerate_configs"
AGRPO = method_named("agrpo")

# stage, device of the optimizer state, device of the parameters
ZERO = {
    "zero1": (1, "none", "none"),
    "zero2": (2, "none", "none"),
    "zero2_offload": (2, "cpu", "none"),
    "zero3": (3, "none", "none"),
    "zero3_offload": (3, "cpu", "cpu"),
    "multi_node": (3, "none", "none"),
    "multi_node_hostfile": (3, "none", "none"),
    "cpu_zero2": (2, "none", "none"),
    "cpu_zero2_offload": (2, "cpu", "none"),
    "cpu_zero3": (3, "none", "none"),
    "cpu_zero3_offload": (3, "cpu", "cpu"),
}
OTHERS = {
    "single_gpu": DistributedType.NO,
    "multi_gpu": DistributedType.MULTI_GPU,
    "cpu_ddp": DistributedType.MULTI_GPU,
    "fsdp2": DistributedType.FSDP,
}


@pytest.fixture(autouse=True)
def repository(monkeypatch):
    monkeypatch.chdir(ROOT)  # DeepSpeed's files are named from there


def launch_of(name: str, *arguments: str) -> tuple[list[str], dict[str, str]]:
    """The command and the environment in which `accelerate launch` would start the processes."""
    # accelerate refuses a port that is in use, also where nothing is launched
    command = ["--config_file", str(CONFIGS / f"{name}.yaml"), "--main_process_port", str(free_port())]
    command += [*arguments, "recipes/gsm8k_agrpo.py"]
    parsed, defaults, _ = _validate_launch_command(launch_command_parser().parse_args(command))
    if parsed.use_deepspeed:
        parsed.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
        return prepare_deepspeed_cmd_env(parsed)
    return [], prepare_multi_gpu_env(parsed)


def use(environment: dict[str, str], monkeypatch) -> None:
    for key, value in environment.items():
        if key.startswith(("ACCELERATE_", "FSDP_")):
            monkeypatch.setenv(key, value)


def test_every_file_is_tested():
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == {*ZERO, *OTHERS}


@pytest.mark.parametrize("name", [*ZERO, *OTHERS])
def test_accelerate_reads_the_file(name):
    config = load_config_from_file(str(CONFIGS / f"{name}.yaml"))
    assert config.distributed_type == OTHERS.get(name, DistributedType.DEEPSPEED)
    written = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    assert {key: getattr(config, key) for key in written if key != "distributed_type"} == {
        key: value for key, value in written.items() if key != "distributed_type"
    }


@pytest.mark.parametrize("name", ZERO)
def test_deepspeed_plugins(name, monkeypatch):
    use(launch_of(name, "--machine_rank", "0")[1], monkeypatch)
    zero = DeepSpeedPlugin().deepspeed_config["zero_optimization"]
    devices = [zero.get(f"offload_{what}", {}).get("device", "none") for what in ("optimizer", "param")]
    assert (zero["stage"], *devices) == ZERO[name]
    if zero["stage"] == 3:
        assert zero["stage3_gather_16bit_weights_on_model_save"] is True


def test_the_fsdp_plugin(monkeypatch):
    use(launch_of("fsdp2")[1], monkeypatch)
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2 and plugin.reshard_after_forward is True
    assert plugin.cpu_ram_efficient_loading is False  # a reference model needs the weights in every process
    plugin.set_auto_wrap_policy(tiny_model())
    assert plugin.auto_wrap_policy is not None and "FULL" in str(plugin.state_dict_type)


def test_several_machines():
    _, environment = launch_of("multi_node", "--machine_rank", "1", "--main_process_ip", "10.0.0.1")
    assert environment["ACCELERATE_USE_DEEPSPEED"] == "true"
    command, _ = launch_of("multi_node_hostfile")
    assert "--hostfile" in command and command[command.index("--launcher") + 1] == "pdsh"
    hosts = Path(command[command.index("--hostfile") + 1]).read_text().split("\n")[:2]
    assert hosts == ["node-1 slots=8", "node-2 slots=8"]


def run_slurm_script(folder: Path, srun: str, **environment: str) -> subprocess.CompletedProcess:
    """Run the script with stand-ins for Slurm's programs, on two machines, and for `accelerate`.

    Args:
        folder: for what the stand-ins write: the arguments of `accelerate` and those of `scontrol requeue`.
        srun: what `srun` does on each machine.
        **environment: what Slurm says.
    """
    programs = {
        # more than a pipe holds: a reader that stops at the first line would kill it
        "scontrol": f'if [ "$1" = show ]; then echo "first-host"; seq -f "host-%g" 2 20000; else echo "$@" '
        f">> {folder}/asked; fi",
        # what srun does: the same command on every machine
        "srun": f"shift; for node in 0 1; do {srun}; done",
        "accelerate": f'printf "%s\\n" "$@" > {folder}/machine-$SLURM_NODEID',
    }
    for name, text in programs.items():
        (folder / name).write_text(f"#!/bin/bash\n{text}\n")
        (folder / name).chmod(0o755)
    slurm = {"SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "4", "SLURM_JOB_NODELIST": "some[1-2]", "SLURM_JOB_ID": "42"}
    return subprocess.run(
        ["bash", "recipes/slurm/train.sbatch", "recipes/gsm8k_agrpo.py", "--run_name", "two words"],
        env=os.environ | slurm | environment | {"PATH": f"{folder}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=HANG,
    )


ON_EACH = 'SLURM_NODEID=$node "$@"'


@pytest.mark.parametrize("restarts", [None, "0", "1"])
def test_the_slurm_script_launches_every_machine(restarts, tmp_path):
    again = {} if restarts is None else {"SLURM_RESTART_COUNT": restarts}
    assert run_slurm_script(tmp_path, ON_EACH, **again).returncode == 0
    resume = ["--resume_from_checkpoint"] if restarts == "1" else []
    for node in range(2):
        written = (tmp_path / f"machine-{node}").read_text().splitlines()
        arguments = ["recipes/gsm8k_agrpo.py", "--run_name", "two words", *resume]
        assert written[0] == "launch" and written[-len(arguments) :] == arguments
        parsed, _, _ = _validate_launch_command(launch_command_parser().parse_args(written[1:]))
        assert (parsed.num_machines, parsed.num_processes, int(parsed.machine_rank)) == (2, 8, node)
        assert parsed.main_process_ip == "first-host" and parsed.use_deepspeed
    assert not (tmp_path / "asked").exists()


def test_the_slurm_script_asks_to_be_started_again_before_its_time_is_up(tmp_path):
    """The signal comes while the processes run; the script waits for them, and does not ask twice."""
    result = run_slurm_script(tmp_path, f"{ON_EACH}; if [ $node = 0 ]; then kill -USR1 $PPID; sleep 1; fi")
    assert (tmp_path / "asked").read_text() == "requeue 42\n"
    assert result.returncode == 0 and "Time is almost up" in result.stdout
    assert (tmp_path / "machine-1").is_file()  # written after the signal


def test_the_slurm_script_fails_as_its_processes_do(tmp_path):
    assert run_slurm_script(tmp_path, f"{ON_EACH}; exit 3").returncode == 3


# ---------------------------------------------------------------- launches that lose the backend


def config(tmp_path, **settings: Any) -> AGRPOConfig:
    return AGRPOConfig(str(tmp_path), bf16=False, report_to=[], **settings)


def test_deepspeed_without_deepspeed_is_refused(tmp_path, monkeypatch):
    args = config(tmp_path, use_cpu=True)
    check_backend(args)
    monkeypatch.setenv("LOCAL_RANK", "0")
    check_backend(args)
    args.deepspeed_plugin = DeepSpeedPlugin(zero_stage=3)
    with pytest.raises(RuntimeError, match="ACCELERATE_USE_CPU"):
        check_backend(args)
    monkeypatch.delenv("LOCAL_RANK")
    check_backend(args)  # not launched: nothing was asked for


def test_fsdp_without_fsdp_is_refused(tmp_path, monkeypatch):
    args = config(tmp_path, use_cpu=True)
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RuntimeError, match="2 processes were launched, but each believes to be one of 1"):
        check_backend(args)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(RuntimeError, match="FSDP was launched, but accelerate started"):
        check_backend(args)


LAUNCHED = {"LOCAL_RANK": "0"}
DEEPSPEED = {"ACCELERATE_USE_DEEPSPEED": "true"} | LAUNCHED
FSDP = {"ACCELERATE_USE_FSDP": "true"}


@pytest.mark.parametrize(
    ("environment", "fields", "expected"),
    [
        ({}, {}, {"use_cpu": True, "bf16": None}),
        (LAUNCHED, {}, {"use_cpu": True, "bf16": None}),
        (FSDP, {}, {"use_cpu": True, "bf16": None}),  # one process, not launched
        (DEEPSPEED, {}, {"use_cpu": False, "ddp_backend": "gloo", "bf16": False}),
        (DEEPSPEED, {"ddp_backend": "mpi", "bf16": True}, {"ddp_backend": "mpi", "bf16": True}),
        (FSDP | LAUNCHED, {}, {"use_cpu": False, "ddp_backend": "gloo", "bf16": False}),
        (LAUNCHED, {"deepspeed": "file.json"}, {"use_cpu": False, "ddp_backend": "gloo", "bf16": False}),
        ({}, {"deepspeed": "file.json"}, {}),
    ],
)
@pytest.mark.parametrize("accelerator", [False, True])
def test_where_there_is_no_accelerator_a_launch_needs_no_flag(accelerator, environment, fields, expected, monkeypatch):
    monkeypatch.setattr("torch.accelerator.is_available", lambda: accelerator)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    given = {"use_cpu": False, "ddp_backend": None, "bf16": None, "deepspeed": None} | fields
    args = SimpleNamespace(**given)
    fit_to_cpu(args)
    assert vars(args) == (given if accelerator else given | expected)


def test_an_optimizer_that_offload_would_replace_is_refused(tmp_path):
    plugin = DeepSpeedPlugin(zero_stage=2, offload_optimizer_device="cpu")
    for optimizer, refused in (("adamw_torch", False), ("sgd", True)):
        args = config(tmp_path, use_cpu=True, optim=optimizer)
        args.deepspeed_plugin = plugin
        if refused:
            with pytest.raises(ValueError, match="optim='sgd' would silently become DeepSpeed's Adam"):
                check_backend(args)
            plugin.deepspeed_config["zero_force_ds_cpu_optimizer"] = False
        check_backend(args)


def test_a_reference_of_empty_weights_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "true")
    with pytest.raises(ValueError, match="fsdp_cpu_ram_efficient_loading"):
        AGRPO.make(tmp_path, beta=0.1, loss_type="dr_grpo")
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "false")
    check_reference_loading()
