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
SLURM_PROCID=0 SLURM_LOCALID=0 SLURM_STEP_ID=0 exec "$@"
""",
    "scontrol": """case "$1 $2" in
    "show hostnames") echo h1 ;;
    "show job") echo "JobId=7 JobState=RUNNING Requeue=${MAY_REQUEUE:-1} Restarts=${SLURM_RESTART_COUNT:-0} x" ;;
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

    def start(self, script: str, behaviour: str, *, restarts: int = 0, **environment: str) -> Ended:
        """Run one start of a job script; its rank runs `behaviour` in bash."""
        job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "1", "SLURM_JOB_NODELIST": "h1"}
        job |= {"SLURM_NTASKS": "1", "SLURM_NTASKS_PER_NODE": "1"}
        job |= {"SLURM_RESTART_COUNT": str(restarts)} if restarts else {}
        path = f"{self.root}:{os.environ['PATH']}"
        own = {"PATH": path, "BEHAVIOUR": behaviour, "RUN_FOLDER": str(self.run)}
        done = subprocess.run(
            ["bash", "-c", script],
            env={**os.environ, **job, **own, **environment},
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
