"""Ranks and launchers killed, stopped and hung, and links cut, on two hosts: what ends, how soon, what it reports.

Afterwards the run can be resumed. Faults are planted from outside the code (tests/cluster/faulty). Every test fails
where a process is left behind (quiet_rig).
"""

from __future__ import annotations

import re
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.cluster.faults import (
    BEYOND,
    CURVES,
    OVERRIDES,
    TIMEOUT,
    Faults,
    Stopwatch,
    culprit,
    last_words,
    small_cgroup,
    submit,
)
from tests.cluster.rig import Rig, wait
from tests.cluster.runs import ENVIRONMENT, Job, losses, on_each
from tests.integration.launching import free_port

TRAIN = "launch/train.py"
# Fault of one rank of two → the pattern of FAILED, and of the log after that.
ONE_RANK = {
    "raise": (r"RuntimeError: planted", "in fail\n"),
    "sleep": (r"it made no progress for \d+ s, and was killed by its watchdog", "faulty/sitecustomize.py"),
    "hold": (r"it made no progress for \d+ s, and was killed by its watchdog", "faulty/sitecustomize.py"),
    "exit": (r"it ended (with code 3|without a message)", ""),
    "segfault": (r"it (crashed|ended with signal 11)", "Segmentation fault"),
    "allocate": (r"MemoryError", "in eat\n"),
    "bloat": (r"it ended .*out-of-memory killer", ""),
}


def goes_on(rig: Rig, config: Path, run: Path, expected: CURVES) -> None:
    """Submit the same script again; it must complete the run as if no fault had happened."""
    job = submit(rig, config, run, ENVIRONMENT)
    assert job.finished() == "COMPLETED", job.said()
    assert "resumed from" in job.said()
    assert losses(run) == expected
    assert not (run / "FAILED").exists()


def failed(job: Job, watch: Stopwatch) -> str:
    """Return the state in which a Slurm job without processes ended, and the seconds it took."""
    seconds = watch.all_ended()
    assert job.finished() == "FAILED", job.said()
    return f"sbatch {job.field('ExitCode')} after {seconds:.1f} s"


def test_a_killed_rank(quiet_rig: Rig, config: Path, expected: CURVES, tmp_path: Path, folder: Path) -> None:
    run, faults = tmp_path / "run", Faults("gate:2:4,kill:2:4", folder)
    job = submit(quiet_rig, config, run, faults.environment)
    faults.await_gate(4, job.said)
    watch = Stopwatch(quiet_rig)
    faults.open_gate(4)
    print(failed(job, watch), "|", culprit(run))
    assert re.match(
        "rank 2 on h2 failed first, at step 4 in data: it ended (with signal 9|without a message)", culprit(run)
    )
    assert last_words(job.said()).startswith(culprit(run))
    goes_on(quiet_rig, config, run, expected)


def test_a_stopped_rank(quiet_rig: Rig, config: Path, tmp_path: Path, folder: Path) -> None:
    run, faults = tmp_path / "run", Faults("gate:2:4,stop:2:4", folder)
    job = submit(quiet_rig, config, run, faults.environment)
    faults.await_gate(4, job.said)
    watch = Stopwatch(quiet_rig)
    faults.open_gate(4)
    print(failed(job, watch), "|", culprit(run))
    assert re.match(r"rank 2 on h2 failed first, at step 4 in data: it was stopped \(SIGSTOP\)", culprit(run))
    said = last_words(job.said())
    assert said.startswith(culprit(run)) and "faulty/sitecustomize.py" in said, "its stack is missing"


def test_a_killed_srun(quiet_rig: Rig, config: Path, expected: CURVES, tmp_path: Path, folder: Path) -> None:
    """Slurm itself kills the ranks when their step ends; the job's log names what was killed."""
    run, faults = tmp_path / "run", Faults("gate:2:2", folder)
    job = submit(quiet_rig, config, run, faults.environment)
    faults.await_gate(2, job.said)
    watch = Stopwatch(quiet_rig)
    quiet_rig.hosts[0].kill("srun --export=ALL")
    faults.open_gate(2)
    print(failed(job, watch), "| srun killed")
    assert re.search(r"Killed +\( trap", job.said()) and "the step ended with code 137" in job.said()
    goes_on(quiet_rig, config, run, expected)


def test_a_killed_slurmstepd(quiet_rig: Rig, config: Path, tmp_path: Path, folder: Path) -> None:
    """The ranks save and stop at once. srun alone is not told that they ended, and waits as long as --wait says."""
    run, faults = tmp_path / "run", Faults("gate:2:2", folder)
    job = submit(quiet_rig, config, run, faults.environment)
    faults.await_gate(2, job.said)
    watch = Stopwatch(quiet_rig)
    quiet_rig.hosts[1].kill(r"slurmstepd: \[[0-9]*\.0")
    faults.open_gate(2, once=run / "FAILED")
    seconds = watch.ranks_ended()
    assert job.finished(seconds=60 + BEYOND) == "FAILED", job.said()
    print(f"sbatch {job.field('ExitCode')}, ranks ended after {seconds:.1f} s |", culprit(run))
    assert re.match(
        r"rank [23] on h2 failed first, at step [23] in [a-z]+: its launcher \(slurmstepd\) is gone", culprit(run)
    )
    assert last_words(job.said()).startswith(culprit(run)) and "train.resume=auto continues from it" in job.said()


@pytest.mark.parametrize("host, launcher", [(0, "bin/deepspeed --hostfile"), (1, "deepspeed.launcher.launch")])
def test_a_killed_launcher_of_deepspeed(
    quiet_rig: Rig, config: Path, expected: CURVES, tmp_path: Path, folder: Path, host: int, launcher: str
) -> None:
    run, faults = tmp_path / "run", Faults("gate:2:2", folder)
    hostfile, forwarded = tmp_path / "hosts", tmp_path / "environment"
    hostfile.write_text("h1 slots=2\nh2 slots=2\n")
    forwarded.write_text("".join(f"{name}={value}\n" for name, value in faults.environment.items()))
    command = ["deepspeed", "--hostfile", hostfile, "--master_port", free_port(), TRAIN, config, f"output.dir={run}"]
    environment = {**faults.environment, "DS_ENV_FILE": str(forwarded)}
    process = quiet_rig.hosts[0].start([*command, *OVERRIDES], seconds=400, environment=environment)
    faults.await_gate(2, quiet_rig.running)
    watch = Stopwatch(quiet_rig)
    quiet_rig.hosts[host].kill(launcher)
    faults.open_gate(2, once=run / "FAILED")
    seconds, done = watch.all_ended(), wait(process)
    print(f"deepspeed {done.code} after {seconds:.1f} s |", culprit(run))
    assert re.match(r"rank \d on h\d failed first, at step [23] in [a-z]+: its launcher \(.*\) is gone", culprit(run))
    assert done.code != 0
    assert "return code = 85" in done.stdout + done.stderr, "the ranks were to save and stop"
    forwarded.write_text("".join(f"{name}={value}\n" for name, value in ENVIRONMENT.items()))
    environment = {**ENVIRONMENT, "DS_ENV_FILE": str(forwarded)}
    done = quiet_rig.hosts[0].run([*command, *OVERRIDES, "train.resume=auto"], environment=environment)
    assert (done.code, losses(run)) == (0, expected), done.stderr
    assert not (run / "FAILED").exists()


def test_a_killed_launcher_of_torchrun(
    quiet_rig: Rig, config: Path, expected: CURVES, tmp_path: Path, folder: Path
) -> None:
    run, faults = tmp_path / "run", Faults("gate:2:2", folder)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes", 2, "--nproc-per-node", 2]

    def commands(*more: str) -> list[list[object]]:
        meeting = ["--master-addr", "h1", "--master-port", free_port()]
        ending = [*meeting, TRAIN, config, f"output.dir={run}", *OVERRIDES, *more]
        return [[*torchrun, "--node-rank", rank, *ending] for rank in range(2)]

    processes = [
        host.start(command, seconds=400, environment=faults.environment)
        for host, command in zip(quiet_rig.hosts, commands(), strict=True)
    ]
    faults.await_gate(2, quiet_rig.running)
    watch = Stopwatch(quiet_rig)
    quiet_rig.hosts[1].kill(r"bin/python.* -m torch.distributed.run")
    faults.open_gate(2, once=run / "FAILED")
    seconds, outcomes = watch.all_ended(), [wait(process) for process in processes]
    print(f"torchrun {[done.code for done in outcomes]} after {seconds:.1f} s |", culprit(run))
    assert re.match(
        r"rank [23] on h2 failed first, at step [23] in [a-z]+: its launcher \(torchrun\) is gone", culprit(run)
    )
    assert outcomes[0].code not in (0, 124)
    done = on_each(quiet_rig.hosts, commands("train.resume=auto"))
    assert ([d.code for d in done], losses(run)) == ([0, 0], expected), done[0].stderr


def test_what_befalls_one_rank(quiet_rig: Rig, config: Path, tmp_path: Path) -> None:
    """Each fault in a job of its own, as many jobs at a time as Slurm has slots for."""

    def befall(kind: str) -> tuple[int, float, str, str]:
        place = tmp_path / kind
        place.mkdir()
        run, faults = place / "run", Faults(f"gate:1:3,{kind}:1:3", place)
        srun = ["srun", "--nodes=2", "--ntasks-per-node=1", "--kill-on-bad-exit=1", sys.executable, "-u", TRAIN, config]
        process = quiet_rig.hosts[0].start(
            [*srun, f"output.dir={run}", "parallel.tensor=1", *OVERRIDES], seconds=400, environment=faults.environment
        )
        with small_cgroup(place):
            faults.await_gate(3, quiet_rig.running)
            watch = Stopwatch(quiet_rig)
            faults.open_gate(3)
            done = wait(process)
        return done.code, watch.seconds(), culprit(run), last_words(done.stdout + done.stderr)

    with ThreadPoolExecutor(len(ONE_RANK)) as pool:
        found = dict(zip(ONE_RANK, pool.map(befall, ONE_RANK), strict=True))
    for kind, (code, seconds, record, _) in found.items():
        print(f"{kind}, srun {code} after {seconds:.1f} s |", record)
    for kind, (code, seconds, record, said) in found.items():
        reason, trace = ONE_RANK[kind]
        assert re.match(f"rank 1 on h2 failed first, at step 3 in data: {reason}", record), (kind, record)
        assert said.startswith(record) and trace in said, (kind, said)
        assert code not in (0, 124) and seconds < TIMEOUT + 30, kind
