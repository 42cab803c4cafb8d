"""How launch/slurm/job.sh reacts to the exit codes of ranks, with a stand-in for the interpreter instead of training.

The stand-in runs the Python text in $STAND_IN; `run` is the run folder and `rank` this rank's number.
"""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

import pytest

from lowrank_dist.slurm.script import fill, with_directives
from tests.cluster.rig import Rig, settled
from tests.cluster.runs import Job
from tests.integration.launching import ROOT

FOLDER = ROOT / "launch" / "slurm"
STAND_IN = """#!{python}
import os, pathlib, signal, sys, time
run = pathlib.Path(next(word for word in sys.argv if word.startswith("output.dir=")).partition("=")[2])
rank = int(os.environ["RANK"])
exec(os.environ["STAND_IN"])
"""
# Each rank stops after a time of its own when it is told to; it prints when its signal handler is ready.
OBEDIENT = """
def stop(number, _):
    if number == signal.SIGUSR1:  # it is ending, and listens no more
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    time.sleep(0.3 * rank)
    os._exit(85)
signal.signal(signal.SIGUSR1, stop)
signal.signal(signal.SIGTERM, stop)
print(f"rank {rank} listens", flush=True)
time.sleep(100)
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    """Write train.sbatch for four stand-in ranks on two hosts, with a run folder whose name bash must not expand."""
    return write_script(tmp_path, "train.sbatch", {"nodes": "2"}, {"RUN": str(tmp_path / "run $(touch made) 'x")})


def write_script(place: Path, name: str, directives: dict[str, str], variables: dict[str, str | list[str]]) -> Path:
    stand_in, config = place / "stand-in", place / "config.yaml"
    stand_in.write_text(STAND_IN.format(python=sys.executable))
    stand_in.chmod(0o755)
    config.write_text("model: {}\n")
    common = {"ntasks-per-node": "2", "gpus-per-node": None, "cpus-per-task": "1", "time": "30"}
    places = {"PROJECT": str(ROOT), "PYTHON": str(stand_in), "WORKDIR": str(place), "CONFIG": "config.yaml"}
    text = fill((FOLDER / name).read_text(), {**common, **directives}, {**places, "MAX_STALLED": "1", **variables})
    path = place / "job.sbatch"
    path.write_text(text)
    return path


def submit(rig: Rig, script: Path, behaviour: str) -> Job:
    return Job.submit(rig, script, {"STAND_IN": behaviour})


def folder(script: Path) -> Path:
    return script.parent / "run $(touch made) 'x"


def listening(job: Job, start: int = 1) -> bool:
    """Return whether all four ranks listen in the job's start of this number."""
    return settled(lambda: job.said().count("listens"), 4 * start) == 4 * start


def test_ranks_know_who_they_are(quiet_rig: Rig, script: Path) -> None:
    names = "RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT OMP_NUM_THREADS".split()
    job = submit(quiet_rig, script, f"print('is', os.uname().nodename, *(os.environ[name] for name in {names}))")
    assert job.finished() == "COMPLETED", job.said()
    port = 10000 + job.number % 20000
    told = re.findall(r"^is (.*)$", job.said(), re.MULTILINE)
    assert sorted(told) == [f"h{1 + rank // 2} {rank} {rank % 2} 4 2 h1 {port} 1" for rank in range(4)]
    assert folder(script).is_dir() and not (script.parent / "made").exists()


def test_nodes_of_unequal_size(quiet_rig: Rig, tmp_path: Path) -> None:
    """With --ntasks and without --ntasks-per-node Slurm fills one node after the other."""
    script = write_script(tmp_path, "train.sbatch", {"nodes": "2", "ntasks-per-node": None}, {"RUN": "run"})
    script.write_text(with_directives(script.read_text(), {"ntasks": "5", "gpus-per-task": "1"}))
    names = "RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE MASTER_ADDR".split()
    job = submit(quiet_rig, script, f"print('is', os.uname().nodename, *(os.environ[name] for name in {names}))")
    assert job.finished() == "COMPLETED", job.said()
    told = re.findall(r"^is (.*)$", job.said(), re.MULTILINE)
    assert sorted(told) == [*(f"h1 {rank} {rank} 5 4 h1" for rank in range(4)), "h2 4 0 5 1 h1"]


@pytest.mark.parametrize("way", ["option", "environment", "some variables"])
def test_a_site_that_exports_nothing(quiet_rig: Rig, script: Path, way: str) -> None:
    """srun repeats what sbatch was told: its tasks would have no PATH. They have what the script has, and its setup."""
    options = {"option": {"export": "NONE"}, "environment": {}, "some variables": {"export": "FOO=1"}}[way]
    behaviour = "print('is', os.environ['MODULE'])"
    setup = f"export STAND_IN={shlex.quote(behaviour)} MODULE=loaded"
    text = script.read_text().replace("# ==== SETUP: end", f"{setup}\n# ==== SETUP: end")
    script.write_text(with_directives(text, options))
    job = Job.submit(quiet_rig, script, {"SBATCH_EXPORT": "NONE"} if way == "environment" else None)
    assert job.finished() == "COMPLETED", job.said()
    assert job.said().count("is loaded\n") == 4


def test_a_job_that_another_job_submits(quiet_rig: Rig, script: Path) -> None:
    """sbatch passes its environment on: variables of that other job are not those of this one."""
    inherited = {"SLURM_ARRAY_JOB_ID": "1", "SLURM_ARRAY_TASK_ID": "4", "SLURM_RESTART_COUNT": "3"}
    script.write_text(with_directives(script.read_text().replace("#SBATCH --ntasks-per-node", "##"), {"ntasks": "4"}))
    stops_once = "print('of', os.environ['LOCAL_WORLD_SIZE'])\nsys.exit(0 if (run / 'restarts').exists() else 85)"
    environment = {"STAND_IN": stops_once, **inherited, "SLURM_NTASKS_PER_NODE": "9", "SLURM_CPUS_PER_TASK": "3"}
    job = Job.submit(quiet_rig, script, environment)
    job.start_now(2)
    assert job.finished() == "COMPLETED", job.said()
    assert f"requeued as {job.number}, 1 of at most 20 times" in job.said() and job.field("Restarts") == "1"
    assert set(re.findall(r"^of (\d)$", job.said(), re.MULTILINE)) <= {"1", "2", "3"}


def test_interface_is_passed_on(quiet_rig: Rig, tmp_path: Path) -> None:
    script = write_script(tmp_path, "train.sbatch", {"nodes": "2"}, {"RUN": "run", "INTERFACE": "eth0"})
    show = "print('is', os.environ['NCCL_SOCKET_IFNAME'], os.environ['GLOO_SOCKET_IFNAME'])"
    job = Job.submit(quiet_rig, script, {"STAND_IN": show, "GLOO_SOCKET_IFNAME": "lo"})
    assert job.finished() == "COMPLETED", job.said()
    assert job.said().count("is eth0 lo\n") == 4


def test_a_rank_that_fails_ends_the_job(quiet_rig: Rig, script: Path) -> None:
    job = submit(quiet_rig, script, "sys.exit(3) if rank == 1 else time.sleep(100)")
    assert job.finished() == "FAILED", job.said()
    assert job.field("Restarts") == "0" and "requeued as" not in job.said()


def test_a_failed_record_fails_the_job(quiet_rig: Rig, script: Path) -> None:
    job = submit(quiet_rig, script, "(run / 'FAILED').write_text('rank 2 on h2 failed first\\n')")
    assert job.finished() == "FAILED"
    assert "rank 2 on h2 failed first" in job.said()
    again = submit(quiet_rig, script, "")
    assert again.finished() == "COMPLETED", "a record of an earlier job failed this one"
    assert (folder(script) / f"FAILED.{again.number}.0").exists()


def test_the_kill_switch(quiet_rig: Rig, script: Path) -> None:
    folder(script).mkdir()
    (folder(script) / "STOP").touch()
    job = submit(quiet_rig, script, "print('listens')")
    assert job.finished() == "FAILED"
    assert "STOP exists" in job.said() and "listens" not in job.said()


def test_told_to_stop_it_requeues_itself(quiet_rig: Rig, script: Path) -> None:
    """USR1 twice to the batch shell: the ranks end with 85 one after the other, and none is killed."""
    job = submit(quiet_rig, script, OBEDIENT)
    assert listening(job), job.said()
    job.signal("USR1", "--batch")
    job.signal("USR1", "--batch")
    job.start_now(2)
    assert listening(job, start=2), job.said()
    assert (folder(script) / "restarts").read_text() == "0 1\n"
    # On a loaded machine Slurm sometimes breaks the end of a task itself (BROKEN in job.sh) and kills the others.
    assert "Terminated" not in job.said() or "Exited with exit code 255" in job.said()
    assert job.field("Restarts") == "1"
    # The second time there is no newer checkpoint: MAX_STALLED is 1.
    job.signal("USR1", "--batch")
    assert job.finished() == "FAILED"
    assert "requeued 1 times without progress: still at step 0" in job.said()
    assert [path.name for path in folder(script).iterdir()] == ["restarts"]


def test_progress_allows_another_restart(quiet_rig: Rig, script: Path) -> None:
    """Every start saves one more step and stops; the third has nothing left to do."""
    saving = """
restarts = int(os.environ.get("SLURM_RESTART_COUNT", 0))
if restarts == 2:
    sys.exit(0)
(run / f"checkpoints/step-{restarts + 8}").mkdir(parents=True, exist_ok=True)
sys.exit(85)
"""
    job = submit(quiet_rig, script, saving)
    job.start_now(2)
    job.start_now(3)
    assert job.finished() == "COMPLETED", job.said()
    assert (job.field("Restarts"), (folder(script) / "restarts").read_text()) == ("2", "9 1\n")


@pytest.mark.parametrize(("name", "options"), [("TERM", []), ("USR2", ["--batch"])], ids=["ranks", "batch shell"])
def test_a_signal_before_the_ranks_listen(quiet_rig: Rig, script: Path, name: str, options: list[str]) -> None:
    """The ranks ignore signals while they load, and learn of the stop afterwards."""
    loading = """
if 'SLURM_RESTART_COUNT' in os.environ:
    sys.exit(0)
assert {signal.getsignal(number) for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM)} == {signal.SIG_IGN}
print("loads", flush=True)
time.sleep(3)
"""
    job = submit(quiet_rig, script, f"{loading}\n{OBEDIENT}")
    assert settled(lambda: job.said().count("loads"), 4) == 4, job.said()
    job.signal(name, *options)
    job.start_now(2)
    assert job.finished() == "COMPLETED", job.said()
    assert job.said().count("listens") == 4 and "requeued as" in job.said()


def test_a_container_that_lets_a_signal_through(quiet_rig: Rig, script: Path) -> None:
    """The signal kills the ranks before they have anything to save: the job starts again."""
    deaf = "signal.signal(signal.SIGUSR1, signal.SIG_DFL); print('deaf', flush=True); time.sleep(100)"
    ends = "if 'SLURM_RESTART_COUNT' in os.environ: sys.exit(0)"
    job = submit(quiet_rig, script, f"{ends}\n{deaf}")
    assert settled(lambda: job.said().count("deaf"), 4) == 4
    job.signal("USR1", "--batch")
    job.start_now(2)
    assert job.finished() == "COMPLETED", job.said()


def test_a_start_that_slurm_gave_up_requeues_nothing(quiet_rig: Rig, script: Path) -> None:
    """The lost node lives on, and a later start already runs under the job's number."""
    script.write_text(script.read_text().replace("\nannounce ", "\nRESTARTS=7\nannounce "))
    job = submit(quiet_rig, script, "sys.exit(85)")
    assert (job.finished(), job.field("ExitCode"), job.field("Restarts")) == ("FAILED", "85:0", "0")
    assert "start 8:" in job.said() and "not requeued by itself" in job.said()


def test_cancelled_it_is_not_requeued(quiet_rig: Rig, script: Path) -> None:
    job = submit(quiet_rig, script, OBEDIENT)
    assert listening(job), job.said()
    assert quiet_rig.hosts[0].run(["scancel", job.number]).code == 0
    assert job.finished() == "CANCELLED"
    assert quiet_rig.idle() == []
    assert job.finished() == "CANCELLED" and job.field("Restarts") == "0"


def test_a_task_of_a_sweep_requeues_itself_alone(quiet_rig: Rig, tmp_path: Path) -> None:
    """The last task's own job number is that of the whole array."""
    script = write_script(tmp_path, "train_array.sbatch", {"array": "0-1"}, {"RUNS": str(tmp_path / "runs")})
    entries = 'SWEEP=(\n    "train.lr=1e-3 lora.rank=4"\n    "train.lr=2e-3 lora.rank=4"\n)\n'
    script.write_text(re.sub(r"^SWEEP=\(\n.*?^\)\n", entries, script.read_text(), flags=re.MULTILINE | re.DOTALL))
    last_stops_once = """
(run / f"seen-{os.environ.get('SLURM_RESTART_COUNT', 0)}-{sys.argv[4]}").touch()
time.sleep(1)
sys.exit(85 if run.name == "1" and "SLURM_RESTART_COUNT" not in os.environ else 0)
"""
    job = submit(quiet_rig, script, last_stops_once)
    second = Job(job.rig, f"{job.number}_1", tmp_path / f"lowrank-sweep-{job.number}_1.out")
    second.start_now(2)
    assert second.finished() == "COMPLETED", second.said()
    first = Job(job.rig, f"{job.number}_0", tmp_path / f"lowrank-sweep-{job.number}_0.out")
    assert (first.finished(), first.field("Restarts"), second.field("Restarts")) == ("COMPLETED", "0", "1")
    seen = {run: sorted(path.name for path in (tmp_path / "runs" / run).glob("seen-*")) for run in "01"}
    assert seen == {"0": ["seen-0-train.lr=1e-3"], "1": ["seen-0-train.lr=2e-3", "seen-1-train.lr=2e-3"]}
