"""A job that is interrupted in any way continues by itself and ends with the loss curve of an uninterrupted job.

A test does nothing to a job after interrupting it, except to skip the two minutes that Slurm would wait.
"""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path

import pytest

from tests.cluster.faults import Faults
from tests.cluster.rig import SELDOM, Host, Rig, settled, wait
from tests.cluster.runs import ENVIRONMENT, FINISHED, Job, losses, well_trained, write_job, write_run
from tests.integration.launching import free_port, metrics

STEPS = 24
# Rank 1 sleeps from here on: nine seconds in which to interrupt the job, without taking CPU time from other tests.
SLOW_FROM = 6
SLOW = Faults(f"slow:1:{SLOW_FROM}", Path())
LONGER = (f"train.steps={STEPS}", "train.lr=5e-3", "output.save_every=4")
SAVED = re.compile(r"stopped by (.+) at step (\d+) of \d+: checkpoint saved ([\d.]+) s after the signal")
# Prints this host's ranks: the number among the step's tasks, then the process id.
LIST_RANKS = """
for pid in $(pgrep -f "^$0 .*launch/train.py"); do
    number=$(grep -z '^SLURM_PROCID=' "/proc/$pid/environ" | tr '\\0' ' ' | sed 's/.*=//')
    [ -z "$number" ] || echo "$number $pid"  # a rank may end in between
done
"""


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("preemption"))


@pytest.fixture(scope="module")
def undisturbed(rig: Rig, config: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[float]]:
    """The loss curves of an uninterrupted job."""
    job, run = submit(rig, config, tmp_path_factory.mktemp("undisturbed"), environment=ENVIRONMENT)
    submitted = time.monotonic()
    reach(job, run, 1)
    print(f"{time.monotonic() - submitted:.1f} s from sbatch to the first step")
    assert job.finished() == "COMPLETED", job.said()
    curves = losses(run)
    assert well_trained(curves, STEPS), curves
    return curves


@pytest.fixture
def job(quiet_rig: Rig, config: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Job:
    """Return a job in mid-run. Options of `lowrank-dist slurm` come from `with_options`."""
    options = getattr(request, "param", ())
    started, run = submit(quiet_rig, config, tmp_path, *options, environment=SLOW.environment)
    reach(started, run, SLOW_FROM)
    return started


def with_options(*options: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("job", [options], indirect=True, ids=[" ".join(options)])


def submit(rig: Rig, config: Path, place: Path, *options: object, environment: Mapping[str, str]) -> tuple[Job, Path]:
    """Submit the job; return it and its run folder."""
    run = place / "run"
    script = write_job(config, place / "job.sbatch", *options, f"output.dir={run}", *LONGER)
    return Job.submit(rig, script, environment), run


def reach(job: Job, run: Path, step: int) -> None:
    """Wait until a step of the job's run has ended."""

    def reached() -> bool:
        return (run / "metrics.jsonl").exists() and len(metrics(run, "loss")) >= step

    settled(lambda: reached() or job.field("JobState") in FINISHED, True, every=SELDOM)
    assert reached(), f"{run} does not get to step {step}: {job.said()}"


def process_ended(process: subprocess.Popen[str]) -> str | None:
    return None if process.poll() is None else wait(process).stderr


def went_on(job: Job, undisturbed: dict[str, list[float]], *, saves: int = 1) -> None:
    """Check that the job succeeds with the right curves, after this many saves upon a signal."""
    assert job.finished() == "COMPLETED", job.said()
    assert losses(job.log.parent / "run") == undisturbed
    stops = SAVED.findall(job.said())
    print(f"{job.field('Restarts')} restarts, saved {stops}")
    assert job.field("Restarts") == "1" and len(stops) == saves, job.said()
    assert all(SLOW_FROM <= int(step) < STEPS and float(seconds) < 10 for _, step, seconds in stops), stops


def node_state(host: Host) -> str:
    return host.run(["sinfo", "-hN", "-p", "main", "-n", host.name, "-o", "%T"], seconds=20).stdout.strip()


def ranks_on(host: Host) -> dict[int, int]:
    """Return task number in the step → process id, of the ranks on a host."""
    done = host.run(["bash", "-c", LIST_RANKS, sys.executable], seconds=20)
    words = [int(word) for word in done.stdout.split()]
    return dict(zip(words[::2], words[1::2], strict=True))


def exit_codes(said: str) -> dict[int, int]:
    """Return task → exit code, parsed from srun's lines: "srun: error: h1: tasks 0-1,3: Exited with exit code 85"."""
    codes = {}
    for tasks, code in re.findall(r"srun: error: \w+: tasks? ([\d,-]+): Exited with exit code (\d+)", said):
        for part in tasks.split(","):
            first, _, last = part.partition("-")
            codes |= {task: int(code) for task in range(int(first), int(last or first) + 1)}
    return codes


def tell(host: Host, rank: int, *signals: str) -> None:
    """Send signals to one rank only."""
    for name in signals:
        done = host.run(["kill", f"-{name}", ranks_on(host)[rank]], seconds=20)
        assert done.code == 0, done.stderr


@pytest.fixture
def held(rig: Rig, job: Job) -> Iterator[Job]:
    """A job with rank 1 stopped, so that it is in mid-run when Slurm acts. Slurm or the test continues the rank."""
    tell(rig.hosts[0], 1, "STOP")
    yield job


def test_requeued_by_a_person(rig: Rig, job: Job, undisturbed: dict[str, list[float]]) -> None:
    """Slurm leaves the ranks KillWait seconds, in which they save."""
    assert rig.hosts[0].run(["scontrol", "requeue", job.number]).code == 0
    went_on(job, undisturbed)
    assert "not requeued by itself" in job.said()


def test_signal_to_the_ranks(job: Job, undisturbed: dict[str, list[float]]) -> None:
    job.signal("USR1")
    went_on(job, undisturbed)


def test_signal_to_the_batch_shell(job: Job, undisturbed: dict[str, list[float]]) -> None:
    job.signal("USR1", "--batch")
    went_on(job, undisturbed)
    assert "told to stop: USR1 to every rank" in job.said()


@pytest.mark.parametrize(
    ("job", "requeued_by"),
    [(("--partition", "main"), "requeued as"), (("--partition", "abrupt"), "not requeued by itself")],
    indirect=["job"],
    ids=["20 s of grace", "none"],
)
def test_preempted(rig: Rig, job: Job, undisturbed: dict[str, list[float]], requeued_by: str) -> None:
    """With a grace time the job saves and makes room within it; without one, within KillWait seconds."""
    urgent = ["sbatch", "--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=true"]
    assert rig.hosts[0].run(urgent).code == 0
    went_on(job, undisturbed)
    assert requeued_by in job.said()


@with_options("--time", "2")
def test_time_runs_out(rig: Rig, held: Job, undisturbed: dict[str, list[float]]) -> None:
    """Slurm signals the batch shell, 15 to 45 s before the end of the second minute."""
    assert settled(lambda: "told to stop" in held.said(), True), held.said()
    # A start takes up to a minute on a machine that runs other tests, so the next start gets the time it needs.
    assert rig.hosts[0].run(["scontrol", "update", f"JobId={held.number}", "TimeLimit=10"]).code == 0
    tell(rig.hosts[0], 1, "CONT")
    went_on(held, undisturbed)


def test_node_is_lost(rig: Rig, held: Job, undisturbed: dict[str, list[float]]) -> None:
    """slurmd dies on the second host, but its ranks live on: Slurm gives up the node and signals the first's."""
    lost = rig.hosts[1]
    assert lost.run(["pkill", "-KILL", "-x", "slurmd"]).code == 0
    try:
        assert settled(lambda: held.field("JobState") != "RUNNING", True, every=SELDOM), held.said()
        assert settled(lambda: ranks_on(lost), {}, every=SELDOM) == {}, "ranks outlive their job"
    finally:
        assert lost.run(["slurmd"]).code == 0
    # The node first kills everything with the job's number: a start in the same seconds would be killed too.
    assert settled(lambda: node_state(lost), "idle", every=SELDOM) == "idle"
    time.sleep(10)
    went_on(held, undisturbed)
    assert "NODE FAILURE" in held.said()


def test_a_signal_to_any_rank_stops_all(
    quiet_rig: Rig, config: Path, undisturbed: dict[str, list[float]], tmp_path: Path, folder: Path
) -> None:
    """Under a bare srun, whose exit code is the ranks'; the same command resumes. Further signals are harmless."""
    run = tmp_path / "run"
    launcher = ["srun", "--nodes=2", "--ntasks-per-node=2", sys.executable, "launch/train.py"]
    options = [config, f"output.dir={run}", "train.resume=auto", *LONGER]

    def start(environment: Mapping[str, str]) -> subprocess.Popen[str]:
        environment = {**environment, "MASTER_PORT": str(free_port())}
        return quiet_rig.hosts[0].start([*launcher, *options], seconds=400, environment=environment)

    told = [(0, 1, ["USR1"]), (1, 2, ["USR2"]), (1, 3, ["TERM", "USR1", "TERM", "USR2", "TERM"])]
    done_before = 0
    for host, rank, signals in told:
        # Rank 0 waits in the third step of this start, and the others for it, until one rank gets a signal.
        faults = Faults(f"gate:0:{done_before + 3}", folder)
        process = start(faults.environment)
        faults.await_gate(done_before + 3, partial(process_ended, process))
        tell(quiet_rig.hosts[host], rank, *signals)
        faults.open_gate(done_before + 3)
        done = wait(process)
        assert done.code == 85, done.stderr
        assert exit_codes(done.stderr) == {rank: 85 for rank in range(4)}, done.stderr
        (saved,) = SAVED.findall(done.stdout)
        print(f"{signals} to rank {rank}: {saved}")
        done_before = int(saved[1])
        assert (run / f"checkpoints/step-{done_before}/manifest.json").exists()
        assert not (run / "FAILED").exists()
    assert wait(start(ENVIRONMENT)).code == 0
    assert losses(run) == undisturbed
