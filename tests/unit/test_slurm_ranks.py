"""A rank's variables, derived from those that Slurm 22.05 sets for a step."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from typer.testing import CliRunner

from launch.train import start
from lowrank_dist.backend.launchers import first_host, set_rank_variables
from lowrank_dist.cli.main import app
from lowrank_dist.errors import UserError

ROOT = Path(__file__).parents[2]
NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# A batch script has these with or without a step: it is one task itself.
BATCH = {
    "SLURM_JOB_ID": "41234",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0",
    "SLURM_NTASKS": "5",
    "SLURM_JOB_NODELIST": "a[07-09]",
}


def step(rank: int, local_rank: int, node: int) -> dict[str, str]:
    """Return the variables of a task in a step of five tasks on three nodes."""
    place = {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(local_rank), "SLURM_NODEID": str(node)}
    size = {"SLURM_STEP_NUM_TASKS": "5", "SLURM_STEP_TASKS_PER_NODE": "2(x2),1", "SLURM_STEP_NODELIST": "a[07-09]"}
    return {**BATCH, **place, **size}


@pytest.mark.parametrize(
    ("rank", "local_rank", "node", "local_size"), [(0, 0, 0, 2), (1, 1, 0, 2), (3, 1, 1, 2), (4, 0, 2, 1)]
)
def test_a_task_of_a_step(rank: int, local_rank: int, node: int, local_size: int) -> None:
    environment = step(rank, local_rank, node)
    set_rank_variables(environment)
    expected = [str(rank), "5", str(local_rank), str(local_size), "a07", str(10000 + 41234 % 20000)]
    assert [environment[name] for name in NAMES] == expected


def test_jobs_meet_at_ports_of_their_own() -> None:
    """Ports are below Linux's range for outgoing connections (32768) and above those that need root."""
    ports = set()
    for number in (1, 2, 19999, 20000, 4_000_000_001):
        environment = {**step(0, 0, 0), "SLURM_JOB_ID": str(number)}
        set_rank_variables(environment)
        ports.add(int(environment["MASTER_PORT"]))
    assert len(ports) == 4 and min(ports) >= 1024 and max(ports) < 32768  # 1 and 4,000,000,001 share a port


def test_steps_meet_at_ports_of_their_own() -> None:
    """Steps of one job differ, and so do those of the following jobs, which may share the node."""
    ports = []
    for job in (41234, 41235, 41236):
        for number in range(50):
            environment = {**step(0, 0, 0), "SLURM_JOB_ID": str(job), "SLURM_STEP_ID": str(number)}
            set_rank_variables(environment)
            ports.append(int(environment["MASTER_PORT"]))
    assert len(set(ports)) == len(ports) and min(ports) >= 10000 and max(ports) < 30000


def task(environment: dict[str, str], mark: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """Run a command under launch/slurm/task.sh, as srun does."""
    words = ["bash", ROOT / "launch/slurm/task.sh", mark, *command]
    return subprocess.run(words, env={"PATH": os.environ["PATH"], **environment}, capture_output=True, text=True)


# Variables of the batch script that srun passes on, by what a job was submitted with and by which Slurm.
SUBMITTED = {
    "--ntasks-per-node": {"SLURM_NTASKS_PER_NODE": "2", "SLURM_NTASKS": "5"},
    "--ntasks": {"SLURM_NTASKS": "5"},
    "neither": {"SLURM_GPUS_PER_TASK": "1", "SLURM_GPUS": "5"},
    "from inside another job": {"SLURM_NTASKS_PER_NODE": "8", "SLURM_TASKS_PER_NODE": "8", "SLURM_NNODES": "7"},
    "Slurm 23.11": {"SLURM_TRES_PER_TASK": "cpu=8", "SLURM_CPUS_PER_TASK": "8", "SLURM_NTASKS": "5"},
    "container whose hook sets them": {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "b1"},
}


@pytest.mark.parametrize("submitted", SUBMITTED.values(), ids=SUBMITTED)
def test_a_job_script_says_what_bare_steps_do(submitted: dict[str, str], tmp_path: Path) -> None:
    """launch/slurm/task.sh derives each rank's variables like `set_rank_variables`, from those of the step alone."""
    for number, place in ((0, (0, 0, 0)), (1, (3, 1, 1)), (7, (4, 0, 2))):
        environment = {**step(*place), "SLURM_STEP_ID": str(number)}
        del environment["SLURM_NTASKS"], environment["SLURM_JOB_NODELIST"]
        done = task({**environment, **submitted}, tmp_path / "mark", "printenv", *NAMES)
        set_rank_variables(environment)
        assert done.stdout.split() == [environment[name] for name in NAMES], done.stderr


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        *(({"SLURM_STEP_NODELIST": nodes}, "SLURM_STEP_NODELIST: ") for nodes in ("", "[1-2]", "a[", "a[x-y]", ",a")),
        *(({"SLURM_STEP_TASKS_PER_NODE": text}, f"'{text}' has no tasks for node 1") for text in ("5", "x", "2(x2")),
    ],
    ids=str,
)
def test_a_job_script_refuses_what_it_cannot_read(wrong: dict[str, str], said: str, tmp_path: Path) -> None:
    done = task({**step(3, 1, 1), "SLURM_STEP_ID": "0", **wrong}, tmp_path / "mark", "echo", "trains")
    assert (done.returncode, done.stdout) == (1, "") and said in done.stderr


@pytest.mark.parametrize(
    "wrong",
    [
        {"SLURM_PROCID": "x"},
        {"SLURM_STEP_NUM_TASKS": ""},
        {"SLURM_LOCALID": "-1"},
        {"SLURM_NODEID": "7"},
        {"SLURM_STEP_TASKS_PER_NODE": "many"},
        {"SLURM_STEP_TASKS_PER_NODE": "2(x2"},
        {"SLURM_STEP_TASKS_PER_NODE": "x2,2,1"},
        {"SLURM_STEP_TASKS_PER_NODE": "2(x9999999)"},
        {"SLURM_STEP_TASKS_PER_NODE": "2(x2),2"},
        {"SLURM_STEP_TASKS_PER_NODE": "2" * 5000},
        {"RANK": "", "WORLD_SIZE": "2"},
        {"RANK": "one"},
        {"RANK": "5", "WORLD_SIZE": "5"},
        {"MASTER_PORT": "٤٢"},
        {"LOCAL_RANK": "0x1", "RANK": "1"},
        {"LOCAL_WORLD_SIZE": "2.0", "RANK": "1"},
        {"SLURM_JOB_ID": "9" * 5000},
        {"SLURM_STEP_ID": "batch"},
        {"SLURM_STEP_NODELIST": "["},
    ],
    ids=lambda wrong: " ".join(f"{name}={value[:20]}" for name, value in wrong.items()),
)
def test_variables_that_slurm_does_not_set_so(wrong: dict[str, str]) -> None:
    with pytest.raises(UserError, match=next(iter(wrong))):
        set_rank_variables({**step(3, 1, 1), **wrong})


def test_what_a_launcher_set_stays() -> None:
    launched = {**step(3, 1, 1), "RANK": "7", "WORLD_SIZE": "8", "LOCAL_RANK": "3", "MASTER_ADDR": "b1"}
    environment = dict(launched)
    set_rank_variables(environment)
    assert environment == launched


def test_ranks_that_a_script_numbers_know_their_node() -> None:
    """As `RANK=$SLURM_PROCID …` in a script does, and Enroot's hook for images of PyTorch."""
    numbered = {"RANK": "3", "WORLD_SIZE": "5", "LOCAL_RANK": "1", "MASTER_ADDR": "a07", "MASTER_PORT": "61000"}
    environment = {**step(3, 1, 1), "SLURM_STEP_ID": "0", **numbered}
    set_rank_variables(environment)
    assert [environment[name] for name in NAMES] == ["3", "5", "1", "2", "a07", "61000"]
    # One rank on each node, which some other launcher has started in the tasks of a step.
    for own in ({"LOCAL_WORLD_SIZE": "1"}, {"LOCAL_SIZE": "1"}, {"WORLD_SIZE": "40"}):
        launched = {**step(3, 1, 1), "SLURM_STEP_ID": "0", **numbered, "LOCAL_RANK": "0", **own}
        environment = dict(launched)
        set_rank_variables(environment)
        assert environment == launched


def test_where_to_meet_can_be_said() -> None:
    environment = {**step(3, 1, 1), "MASTER_ADDR": "10.0.0.7", "MASTER_PORT": "29500"}
    set_rank_variables(environment)
    assert [environment[name] for name in NAMES] == ["3", "5", "1", "2", "10.0.0.7", "29500"]


@pytest.mark.parametrize("environment", [{}, BATCH, {"SLURM_STEP_ID": "0"}], ids=["no Slurm", "batch script", "a part"])
def test_nothing_outside_a_step(environment: dict[str, str]) -> None:
    before = dict(environment)
    set_rank_variables(environment)
    assert environment == before


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("a1", "a1"),
        ("a1,b2", "a1"),
        ("a[07-09,12],b1", "a07"),
        ("a[3,5]", "a3"),
        ("rack-2-node[001-128].cluster.org", "rack-2-node001.cluster.org"),
        ("rack[1-2]n[03-04,7],a1", "rack1n03"),
        ("gpu-1.x,gpu[2-3]", "gpu-1.x"),
    ],
)
def test_first_of_a_host_list(nodes: str, first: str, tmp_path: Path) -> None:
    """The expected host is the first line of `scontrol show hostnames`. The job script knows it too."""
    assert first_host(nodes) == first
    environment = {**step(3, 1, 1), "SLURM_STEP_ID": "0", "SLURM_STEP_NODELIST": nodes}
    assert task(environment, tmp_path / "mark", "printenv", "MASTER_ADDR").stdout == f"{first}\n"


@pytest.mark.parametrize("nodes", ["", "[1-2]", "a[", "a[x-y]", ",a"])
def test_what_is_no_host_list(nodes: str) -> None:
    with pytest.raises(UserError, match="set MASTER_ADDR"):
        first_host(nodes)


@pytest.mark.parametrize("local", ["-1", "", "x", "3"])
def test_a_rank_without_a_place_says_so_itself(
    local: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """No other rank of its node finds this error."""
    job = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": local, "LOCAL_WORLD_SIZE": "2"}
    for name, value in {**job, "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    assert start([]) == 2
    assert "lowrank_dist: LOCAL_RANK: " in capsys.readouterr().err
    found = CliRunner().invoke(app, ["doctor"])
    assert found.exit_code == 2 and "error: LOCAL_RANK: " in found.stderr
