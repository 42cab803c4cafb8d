"""The run that every launcher must reproduce, a job script for it, and jobs of the rig's Slurm."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tests.cluster.rig import SELDOM, Host, Rig, settled
from tests.integration.launching import Outcome, metrics, program, samples, write_config, write_jsonl
from tests.tiny_models import make_tiny

STEPS = 5
TENSOR = 2
NAMES = ("loss", "grad_norm", "eval_loss")
# Environment of a launcher's ranks that leaves any GPUs of the machine alone.
ENVIRONMENT = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
FINISHED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY"}


def write_run(place: Path) -> Path:
    """Write a configuration with tiny model and data; four ranks train it as TP 2 × DP 2, with dropout."""
    rows = samples(24)
    sections = {
        "model": {"path": make_tiny("llama", place / "base"), "dtype": "fp32", "device": "cpu"},
        "lora": {"rank": 4, "alpha": 8, "dropout": 0.1},
        "parallel": {"tensor": TENSOR},
        "data": {
            "train": write_jsonl(place / "train.jsonl", rows),
            "eval": write_jsonl(place / "eval.jsonl", rows[:9]),
            "max_length": 48,
        },
        "engine": {"timeout_seconds": 600},
        "train": {"steps": STEPS, "global_batch": 8, "micro_batch": 2, "lr": 1e-2},
        "output": {"dir": place / "run", "tensorboard": False, "plot": False},
    }
    return write_config(place / "config.yaml", sections)


def write_job(config: Path, script: Path, *options: object) -> Path:
    """Write the script of `lowrank-dist slurm` for two hosts of two ranks; the job is signalled 15 s before its end.

    It lasts at most 30 minutes where `options` have no --time.
    """
    size = ["--nodes", 2, "--gpus-per-node", 2, "--cpus-per-task", 1, "--lead", 15]
    size += [] if "--time" in options else ["--time", 30]
    done = program(["lowrank-dist", "slurm", config, *size, "--out", script, *options])
    assert done.code == 0, done.stderr
    return script


def losses(run: Path) -> dict[str, list[float]]:
    """Return all values of metrics.jsonl that do not depend on time."""
    return {name: metrics(run, name).tolist() for name in NAMES}


def well_trained(curves: dict[str, list[float]], steps: int = STEPS) -> bool:
    """Return whether the curves are of a complete run that learned: two runs that did nothing would be equal too."""
    return len(curves["loss"]) == steps and bool(np.isfinite(curves["loss"]).all()) and _falls(curves["eval_loss"])


def _falls(values: list[float]) -> bool:
    return values[-1] < 0.95 * values[0]


def on_each(hosts: Sequence[Host], commands: Sequence[Sequence[object]]) -> list[Outcome]:
    """Run a command on each host at the same time."""
    with ThreadPoolExecutor(len(hosts)) as pool:
        return list(pool.map(lambda host, command: host.run(command, environment=ENVIRONMENT), hosts, commands))


@dataclass(frozen=True)
class Job:
    """A job of the rig's Slurm, submitted on its first host."""

    rig: Rig
    number: int | str
    log: Path

    @classmethod
    def submit(cls, rig: Rig, script: Path, environment: Mapping[str, str] | None = None) -> Job:
        """Submit with sbatch. The log lies beside the script, where the template's --output puts it."""
        command = ["sbatch", "--parsable", f"--chdir={script.parent}", script]
        done = rig.hosts[0].run(command, environment={**ENVIRONMENT, **(environment or {})})
        assert done.code == 0, done.stderr
        number = int(done.stdout)
        name = re.search(r"^#SBATCH --job-name=(\S+)$", script.read_text(), re.MULTILINE).group(1)
        return cls(rig, number, script.parent / f"{name}-{number}.out")

    def field(self, name: str) -> str:
        """Return one field of `scontrol show job`."""
        shown = self._login.run(["scontrol", "show", "job", "--oneliner", self.number], seconds=20).stdout
        return re.search(rf"\b{name}=(\S*)", shown).group(1)

    def signal(self, name: str, *options: str) -> None:
        done = self._login.run(["scancel", f"--signal={name}", *options, self.number])
        assert done.code == 0, done.stderr

    def hurry(self) -> None:
        """Start a requeued job now: Slurm would let it wait for two minutes.

        Waiting hides a fault of Slurm 22.05: it takes late messages of one start for the next one's. It then ends that
        start, or drops the host from the job and does not requeue the job when the host is lost.
        """
        if self.field("JobState") == "PENDING" and self.field("Restarts") != "0" and not self._has_steps():
            time.sleep(2)  # for the last message
            self._login.run(["scontrol", "update", f"jobid={self.number}", "StartTime=now"])

    def start_now(self, start: int) -> None:
        """Make a requeued job begin its start number `start`."""

        def started() -> bool:
            self.hurry()
            return f"start {start}:" in self.said()

        assert settled(started, True, every=SELDOM), self.said()

    def finished(self, *, seconds: float = 400) -> str:
        """Return the state in which the job ended after all requeues, or its state when the time is over."""

        def ended() -> bool:
            self.hurry()
            return self.field("JobState") in FINISHED

        settled(ended, True, seconds=seconds, every=SELDOM)
        return self.field("JobState")

    @property
    def _login(self) -> Host:
        return self.rig.hosts[0]

    def _has_steps(self) -> bool:
        """Return whether a host still has a Slurm process of the job."""
        keeper = f"slurmstepd: [{self.field('JobId')}."
        return any(keeper in line for line in self.rig.running())

    def said(self) -> str:
        return self.log.read_text() if self.log.exists() else ""
