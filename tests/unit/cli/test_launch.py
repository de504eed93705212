"""Which world a verb joins: torchrun's, Slurm's, or none."""

from __future__ import annotations

import signal

import pytest

from galvatron.cli import _signals_exit
from galvatron.cli.launch import Processes, first_host, run_name, slurm_world
from galvatron.core.errors import ConfigError

STEP = {
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_NODELIST": "gpu[003-004]",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
    "SLURM_JOB_ID": "1234567",
    "SLURM_STEP_ID": "0",
}


@pytest.mark.parametrize(
    ("nodes", "host"),
    [
        ("gpu[003-007,9],login1", "gpu003"),
        ("gpu7", "gpu7"),
        ("a1,a2", "a1"),
        ("rack-2-node[11,12]", "rack-2-node11"),
    ],
)
def test_the_first_host_of_a_node_list(nodes: str, host: str) -> None:
    assert first_host(nodes) == host


def test_a_job_step_is_a_world() -> None:
    assert slurm_world(STEP) == {
        "RANK": "5",
        "WORLD_SIZE": "8",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "4",
        "MASTER_ADDR": "gpu003",
        "MASTER_PORT": "23343",
    }


def test_steps_of_a_job_and_its_requeues_meet_apart() -> None:
    others = [{"SLURM_STEP_ID": "1"}, {"SLURM_RESTART_COUNT": "1"}, {"SLURM_JOB_ID": "1234568"}]
    ports = {slurm_world({**STEP, **other})["MASTER_PORT"] for other in ({}, *others)}
    names = {run_name({**STEP, **other}, ["train", "job.toml"]) for other in ({}, *others)}
    assert len(ports) == len(names) == 4
    assert all(12000 <= int(port) < 32768 for port in ports), "Linux hands out the ports above to anyone"


def test_a_run_s_name_is_its_launcher_s_and_its_command_s() -> None:
    assert run_name(STEP, ["train", "a.toml"]) == "'galvatron train a.toml' (Slurm job 1234567 step 0 start 0)"
    assert run_name({"TORCHELASTIC_RUN_ID": "x"}, ["run"]) == "'galvatron run' (torchrun x)"
    assert run_name({}, ["run", "b.toml"]) == "'galvatron run b.toml'"


def test_signals_are_the_launcher_s_in_a_joined_world(monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with _signals_exit():
        assert signal.getsignal(signal.SIGTERM) is not before
    for name, value in STEP.items():
        monkeypatch.setenv(name, value)
    with _signals_exit():
        assert signal.getsignal(signal.SIGTERM) is before


def test_a_batch_script_is_no_world() -> None:
    assert slurm_world({"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}) == {}


def test_torchrun_inside_a_job_step_comes_first() -> None:
    assert slurm_world({**STEP, "RANK": "0", "WORLD_SIZE": "2"}) == {}


def test_a_joined_world_has_its_own_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert Processes(None, default=4).world_size == 8, "a job's number of processes is for local starts"
    with pytest.raises(ConfigError, match="4 processes are asked for but the launcher started 8"):
        Processes(4)


def test_without_a_world_processes_are_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    assert Processes(None, default=4).world_size == 4
    group = Processes(3, default=4)
    assert (group.joined, group.world_size, group.on_main(lambda: 7)) == (False, 3, 7)
