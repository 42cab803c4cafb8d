"""launch/train.py over two hosts, under every supported launcher: the losses of one host."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.cluster.rig import Rig
from tests.cluster.runs import ENVIRONMENT, losses, on_each, well_trained
from tests.integration.launching import Outcome, free_port

TRAIN = "launch/train.py"
SRUN = ["srun", "--nodes=2", "--ntasks-per-node=2", "--kill-on-bad-exit=1", sys.executable, TRAIN]


@pytest.fixture
def hostfile(tmp_path: Path) -> Path:
    path = tmp_path / "hosts"
    path.write_text("h1 slots=2\nh2 slots=2\n")
    return path


def check(outcomes: list[Outcome], run: Path, expected: dict[str, list[float]]) -> None:
    assert [done.code for done in outcomes] == [0] * len(outcomes), [done.stderr[-3000:] for done in outcomes]
    assert losses(run) == expected


def test_deepspeed_over_pdsh(
    quiet_rig: Rig, config: Path, expected: dict[str, list[float]], hostfile: Path, tmp_path: Path
) -> None:
    # pdsh passes no environment on; deepspeed exports these variables to the hosts.
    forwarded = tmp_path / "environment"
    forwarded.write_text("".join(f"{name}={value}\n" for name, value in ENVIRONMENT.items()))
    launcher = ["deepspeed", "--hostfile", hostfile, "--master_port", free_port()]
    done = quiet_rig.hosts[0].run(
        [*launcher, TRAIN, config, f"output.dir={tmp_path / 'run'}"],
        environment={**ENVIRONMENT, "DS_ENV_FILE": str(forwarded)},
    )
    check([done], tmp_path / "run", expected)
    assert "h2: " in done.stdout, "nothing came from the second host"


def test_deepspeed_on_each_host(
    quiet_rig: Rig, config: Path, expected: dict[str, list[float]], hostfile: Path, tmp_path: Path
) -> None:
    shared = ["--hostfile", hostfile, "--master_addr", "h1", "--master_port", free_port()]
    commands = [
        ["deepspeed", "--no_ssh", "--node_rank", rank, *shared, TRAIN, config, f"output.dir={tmp_path / 'run'}"]
        for rank in range(2)
    ]
    check(on_each(quiet_rig.hosts, commands), tmp_path / "run", expected)


def test_missing_hostfile_is_an_error(quiet_rig: Rig, config: Path, tmp_path: Path) -> None:
    """deepspeed itself only warns, and starts its ranks on the one host."""
    launcher = ["deepspeed", "--hostfile", tmp_path / "nowhere", "--num_gpus", 1]
    done = quiet_rig.hosts[0].run(
        [*launcher, TRAIN, config, "parallel.tensor=1", f"output.dir={tmp_path / 'run'}"], environment=ENVIRONMENT
    )
    assert done.code == 2 and not (tmp_path / "run").exists()
    assert f"deepspeed --hostfile: {tmp_path / 'nowhere'} is not a file" in done.stderr


def test_torchrun(quiet_rig: Rig, config: Path, expected: dict[str, list[float]], tmp_path: Path) -> None:
    shared = ["--nnodes", 2, "--nproc-per-node", 2, "--master-addr", "h1", "--master-port", free_port()]
    torchrun = [sys.executable, "-m", "torch.distributed.run"]
    commands = [
        [*torchrun, "--node-rank", rank, *shared, TRAIN, config, f"output.dir={tmp_path / 'run'}"] for rank in range(2)
    ]
    check(on_each(quiet_rig.hosts, commands), tmp_path / "run", expected)


def test_srun(quiet_rig: Rig, config: Path, expected: dict[str, list[float]], tmp_path: Path) -> None:
    """With no variables set: Slurm gives each rank its number and the place to meet."""
    command = [*SRUN, config, f"output.dir={tmp_path / 'run'}"]
    check([quiet_rig.hosts[0].run(command, environment=ENVIRONMENT)], tmp_path / "run", expected)


def test_two_steps_of_one_job_at_the_same_time(quiet_rig: Rig, config: Path, tmp_path: Path) -> None:
    """Each step meets its own ranks. They once shared the job's port: one failed, or the two mixed."""
    step = ["srun", "--overlap", "--nodes=2", "--ntasks-per-node=1", sys.executable, TRAIN, config]
    words = [[*step, "parallel.tensor=1", f"train.seed={n}", f"output.dir={tmp_path / str(n)}"] for n in (1, 2)]
    steps = [f"{shlex.join(str(word) for word in each)} & pids+=($!)" for each in words]
    script = tmp_path / "steps.sh"
    ending = ["code=0", "for pid in ${pids[@]}; do wait $pid || code=$?; done", "exit $code"]
    script.write_text("\n".join([*steps, *ending]))
    job = ["salloc", "--nodes=2", "--ntasks-per-node=2", "bash", script]
    done = quiet_rig.hosts[0].run(job, environment=ENVIRONMENT)
    assert done.code == 0, done.stderr
    curves = [losses(tmp_path / str(n)) for n in (1, 2)]
    assert all(well_trained(curve) for curve in curves) and curves[0]["loss"] != curves[1]["loss"]


def test_a_tensor_parallel_group_across_hosts(
    quiet_rig: Rig, config: Path, expected: dict[str, list[float]], tmp_path: Path
) -> None:
    """Refused by default. Where it is allowed, the layout changes only the last bits of the losses."""
    command = [*SRUN, config, "parallel.tensor=4", f"output.dir={tmp_path / 'run'}"]
    refused = quiet_rig.hosts[0].run(command, environment=ENVIRONMENT)
    assert refused.code == 2 and not (tmp_path / "run").exists()
    said = "parallel.tensor: with 4, ranks 0 to 3 of one tensor-parallel group are on h1 and h2"
    assert said in refused.stderr and "set it to 1, 2, or set parallel.across_nodes=true" in refused.stderr
    assert "Traceback" not in refused.stderr
    done = quiet_rig.hosts[0].run([*command, "parallel.across_nodes=true"], environment=ENVIRONMENT)
    assert done.code == 0, done.stderr
    found = losses(tmp_path / "run")
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, rtol=1e-4, err_msg=name)
