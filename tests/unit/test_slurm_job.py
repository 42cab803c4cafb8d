"""The job script, run by bash with stand-ins for srun, scontrol and the interpreter: one node, one rank.

tests/cluster runs the same scripts in a real Slurm.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from lowrank_dist.slurm.script import fill
from lowrank_dist.slurm.setup import with_setup
from lowrank_dist.supervision.rank import PREEMPTED

ROOT = Path(__file__).parents[2]
TEMPLATE = (ROOT / "launch" / "slurm" / "train.sbatch").read_text()
# The stand-in drops srun's own options. $BEHAVIOUR is the code of the rank.
STAND_INS = {
    "srun": """while [[ $1 == -* ]]; do shift; done
export SLURM_PROCID=0 SLURM_LOCALID=0 SLURM_NODEID=0 SLURM_STEP_ID=0
export SLURM_STEP_NUM_TASKS=1 SLURM_STEP_TASKS_PER_NODE=1 SLURM_STEP_NODELIST=h1
exec "$@"
""",
    # Knows job 7, and another one by any other name.
    "scontrol": """job=7; [ "$4" = 7 ] || job=3
case "$1 $2" in
    "show job") echo "JobId=$job JobState=RUNNING Requeue=${MAY_REQUEUE:-1} Restarts=${RESTARTED-0} x" ;;
    "requeue 7") echo "slurm has requeued" ;;
esac
""",
    "python": """eval "$BEHAVIOUR"
""",
}
SAVES_AND_STOPS = f'mkdir -p "$RUN_FOLDER/checkpoints/step-8"; exit {PREEMPTED}'


@dataclass(frozen=True)
class Ended:
    code: int
    said: str


@dataclass(frozen=True)
class Place:
    """A folder with the stand-ins, a config and the run folder of a job."""

    root: Path

    @property
    def run(self) -> Path:
        return self.root / "run"

    @property
    def variables(self) -> dict[str, str]:
        places = {"PROJECT": ROOT, "PYTHON": self.root / "python", "WORKDIR": self.root, "RUN": self.run}
        return {name: str(path) for name, path in places.items()} | {"CONFIG": "config.yaml"}

    def start(self, script: str, behaviour: str, *, restarts: int = 0, **environment: str | None) -> Ended:
        """Run one start of a job script; its rank runs `behaviour` in bash. environment: None unsets a variable."""
        job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "h1", "SLURM_TASKS_PER_NODE": "1"}
        job |= {"SLURM_RESTART_COUNT": str(restarts), "RESTARTED": str(restarts)} if restarts else {}
        path = f"{self.root}:{os.environ['PATH']}"
        own = {"PATH": path, "BEHAVIOUR": behaviour, "RUN_FOLDER": str(self.run)}
        given = {**os.environ, **job, **own, **environment}
        done = subprocess.run(
            ["/bin/bash", "-c", script],
            env={name: value for name, value in given.items() if value is not None},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=60,
        )
        return Ended(done.returncode, done.stdout)


@pytest.fixture
def place(tmp_path: Path) -> Place:
    for name, text in STAND_INS.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}")
        (tmp_path / name).chmod(0o755)
    (tmp_path / "config.yaml").write_text("model: {}\n")
    return Place(tmp_path)


def script(place: Place, variables: Mapping[str, str] | None = None) -> str:
    return fill(TEMPLATE, {}, {**place.variables, **(variables or {})})


def test_it_requeues_itself(place: Place) -> None:
    done = place.start(script(place), SAVES_AND_STOPS, restarts=2)
    assert done.code == 0 and "slurm has requeued" in done.said, done.said
    assert "start 3:" in done.said and "requeued 2 times, of at most MAX_REQUEUES=20" in done.said
    assert "requeued as 7, 3 of at most 20 times" in done.said


def test_a_job_has_a_cap_on_its_requeues(place: Place) -> None:
    capped = script(place, {"MAX_REQUEUES": "2"})
    assert place.start(capped, SAVES_AND_STOPS, restarts=1).code == 0
    done = place.start(capped, SAVES_AND_STOPS, restarts=2)
    assert done.code == 1 and "slurm has requeued" not in done.said
    assert "error: requeued MAX_REQUEUES=2 times; submit it again to go on" in done.said
    # Slurm itself also requeues a job, after a lost node: a start beyond the cap does no work.
    done = place.start(capped, "echo trains", restarts=3)
    assert done.code == 1 and "requeued more than MAX_REQUEUES=2 times" in done.said and "\ntrains" not in done.said


def test_without_requeue_it_says_so(place: Place) -> None:
    done = place.start(script(place, {"REQUEUE": "no"}), SAVES_AND_STOPS)
    assert done.code == PREEMPTED and "slurm has requeued" not in done.said
    assert "REQUEUE=no: told to stop, the job saves and ends; to go on, submit it again" in done.said
    assert "REQUEUE=no: saved step 8 and not requeued; to go on, submit it again" in done.said
    done = place.start(script(place), SAVES_AND_STOPS, MAY_REQUEUE="0")
    assert done.code == PREEMPTED and "slurm has requeued" not in done.said
    assert "Slurm lists the job with Requeue=0" in done.said
    done = place.start(script(place, {"REQUEUE": "No"}), "echo trains")
    assert done.code == 1 and "REQUEUE: 'No' is neither yes nor no" in done.said and "\ntrains" not in done.said


def test_ranks_run_the_code_of_the_script(place: Place) -> None:
    """The script's own copy comes first, whatever copy the interpreter has; the rest of PYTHONPATH follows."""
    done = place.start(script(place), 'echo "from $PYTHONPATH $*"', PYTHONPATH="/a:/b")
    assert done.code == 0 and f"from {ROOT}:/a:/b -u {ROOT}/launch/train.py config.yaml" in done.said, done.said


def test_a_setup_reaches_the_ranks(place: Place) -> None:
    (place.root / "setup.sh").write_text('export MODULE=x$UNKNOWN\nPYTHON=$PWD/python\nexport PATH="$PATH:/module"\n')
    text = with_setup(script(place, {"PYTHON": "/no/python"}), place.root / "setup.sh")
    done = place.start(text.replace("$PWD", str(place.root)), 'echo "rank has $MODULE ${PATH##*:}"')
    assert done.code == 0 and "rank has x /module" in done.said, done.said
    (place.root / "setup.sh").write_text("false\n")
    failed = place.start(with_setup(script(place), place.root / "setup.sh"), "echo trains")
    assert failed.code == 1 and "\ntrains" not in failed.said


def with_setup_line(text: str, line: str) -> str:
    return text.replace("\n# ==== SETUP: end", f"\n{line}\n# ==== SETUP: end")


# Variables of Slurm that only some versions or some ways to submit a job set, and the threads and CPUs of its ranks.
ENVIRONMENTS = {
    "--cpus-per-task": ({"SLURM_CPUS_PER_TASK": "8"}, "8 8"),
    "--cpus-per-task, Slurm 23.11": ({"SLURM_CPUS_PER_TASK": "8", "SLURM_TRES_PER_TASK": "cpu=8"}, "8 8"),
    "--cpus-per-gpu": ({"SLURM_CPUS_PER_GPU": "6"}, "6 none"),
    "neither": ({}, "1 none"),
    "threads of the user": ({"OMP_NUM_THREADS": "3", "SLURM_CPUS_PER_TASK": "8"}, "3 8"),
}


@pytest.mark.parametrize(("given", "expected"), ENVIRONMENTS.values(), ids=ENVIRONMENTS)
def test_threads_and_cpus_of_a_rank(place: Place, given: dict[str, str], expected: str) -> None:
    """Where a job asks for CPUs by GPU, srun must not get a number by task as well: Slurm takes one of them."""
    cleared = dict.fromkeys(("OMP_NUM_THREADS", "SRUN_CPUS_PER_TASK"))
    done = place.start(script(place), 'echo "has $OMP_NUM_THREADS ${SRUN_CPUS_PER_TASK:-none}"', **{**cleared, **given})
    assert done.code == 0 and f"has {expected}\n" in done.said, done.said


@pytest.mark.parametrize("name", ["HOME", "USER", "TMPDIR", "LANG", "SHELL", "SLURM_NTASKS", "SLURM_NTASKS_PER_NODE"])
def test_a_variable_that_a_site_does_not_set(place: Place, name: str) -> None:
    done = place.start(script(place), SAVES_AND_STOPS, **{name: None})
    assert done.code == 0 and "requeued as 7, 1 of at most 20 times" in done.said, done.said


def test_ranks_have_the_path_of_the_script(place: Place) -> None:
    """Without an environment (sbatch --export=NONE) bash has a PATH of its own, which it does not pass on."""
    text = with_setup_line(script(place), f"PATH={place.root}:/usr/local/bin:/usr/bin:/bin")
    done = place.start(text, "printenv PATH", PATH=None)
    assert done.code == 0 and f"\n{place.root}:/usr/local/bin:" in done.said, done.said


def test_srun_is_told_to_pass_the_environment_on(place: Place) -> None:
    (place.root / "srun").write_text('#!/bin/bash\necho "srun $*"\n')
    done = place.start(script(place), "", SLURM_EXPORT_ENV="NONE")
    assert "srun --export=ALL " in done.said and " /bin/bash " in done.said, done.said
    merge = fill((ROOT / "launch" / "slurm" / "merge.sbatch").read_text(), {}, {"PYTHON": "/p", "OUT": "/o"})
    assert "srun --export=ALL " in place.start(merge, "").said


def test_a_node_whose_scontrol_does_not_answer(place: Place) -> None:
    """The job trains and saves; it says at its start and at its end that it cannot requeue itself."""
    for code in (1, 127):  # of a controller that is away, and of bash without the program
        (place.root / "scontrol").write_text(f"#!/bin/bash\nexit {code}\n")
        done = place.start(script(place), SAVES_AND_STOPS)
        assert done.code == PREEMPTED, done.said
        said = "`scontrol show job 7` does not answer on "
        assert f"warning: {said}" in done.said and f"not requeued: {said}" in done.said
        assert "saved step 8; to go on, submit it again" in done.said
        assert place.start(script(place), "echo trains").code == 0


def test_what_another_job_passes_on(place: Place) -> None:
    """A job that an array's task submits has the task's variables: it must not requeue that array."""
    inherited = {"SLURM_ARRAY_JOB_ID": "1", "SLURM_ARRAY_TASK_ID": "4", "SLURM_RESTART_COUNT": "3"}
    done = place.start(script(place), SAVES_AND_STOPS, **inherited)
    assert done.code == 0 and "job 7, start 1:" in done.said, done.said
    assert "requeued as 7, 1 of at most 20 times" in done.said and "slurm has requeued" in done.said


def test_what_is_no_job_of_slurm(place: Place) -> None:
    done = place.start(script(place), "echo trains", SLURM_JOB_ID=None)
    assert (
        done.code == 1 and "SLURM_JOB_ID is not set, so this is not a job: submit the script with sbatch" in done.said
    )
    done = place.start(with_setup_line(script(place), "PATH=/nowhere"), "echo trains")
    assert done.code == 1 and "srun is not in PATH=/nowhere: add the folder of Slurm's programs" in done.said
    places = {name: value for name, value in place.variables.items() if name != "RUN"}
    sweep = fill((ROOT / "launch" / "slurm" / "train_array.sbatch").read_text(), {}, {**places, "RUNS": str(place.run)})
    done = place.start(sweep, "echo trains")
    assert done.code == 1 and "SLURM_ARRAY_TASK_ID is not set: submit the script with --array" in done.said
    assert "\ntrains" not in done.said


def test_a_heterogeneous_job_is_told_what_runs(place: Place) -> None:
    done = place.start(script(place), "echo trains", SLURM_HET_SIZE="2")
    assert done.code == 0 and "warning: a heterogeneous job: its ranks run on component 0 alone" in done.said
    assert "component 0" not in place.start(script(place), "").said
