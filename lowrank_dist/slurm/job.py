"""A training job, and the script that Slurm runs for it."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path

from lowrank_dist import __version__
from lowrank_dist.slurm.containers import Container, mounts_of
from lowrank_dist.slurm.directives import ask_for_gpus
from lowrank_dist.slurm.script import fill, with_directives, with_header
from lowrank_dist.slurm.setup import with_setup
from lowrank_dist.slurm.snapshot import Snapshot

_MEMORY = "# Host memory of a node; 0 is all of it."  # in the template


@dataclass(frozen=True)
class Job:
    """A training job.

    what: model, method, nodes and layout, in words. host_memory: the memory that a node needs, in words. ranks: per
    node. time: the time limit as sbatch takes it; lead: seconds before it at which the job is told to stop. directives:
    more options of sbatch, each with its value, or None for an option without one. overrides, run (the run folder) and
    resume: of the configuration. inputs: key → file or folder that the run reads. python: None for this interpreter, or
    for python3 in a container.
    """

    name: str
    what: str
    host_memory: str
    nodes: int
    ranks: int
    gpus: bool
    cpus_per_task: int
    time: str
    lead: int
    directives: Mapping[str, str | None]
    project: Path
    config: Path
    overrides: Sequence[str]
    inputs: Mapping[str, Path]
    run: Path
    resume: str
    requeue: bool
    max_requeues: int
    workdir: Path
    python: str | None
    setup: Path | None
    container: Container | None
    snapshot: Snapshot | None

    def script(self, file: Path) -> str:
        """Return the job's script, from launch/slurm/train.sbatch. file: where it will lie.

        Raises UserError for directives, a setup or a container that the job cannot run with.
        """
        template = (self.project / "launch" / "slurm" / "train.sbatch").read_text(encoding="utf-8")
        template = template.replace(_MEMORY, f"{_MEMORY} {self.host_memory}")
        more = dict(self.directives) | ({} if self.requeue else {"no-requeue": None})
        script = with_directives(fill(template, self._directives, self._variables), more)
        if self.container is not None:
            mounts = mounts_of({"CONFIG": self.config, **self.inputs}, [self.code, self.workdir, self.run, self._built])
            script = self.container.fill(script, mounts, self.workdir, gpus=self.gpus)
        if self.setup is not None:
            script = with_setup(script, self.setup)
        return with_header(script, self._header(file))

    @property
    def code(self) -> Path:
        """The folder with launch/ and lowrank_dist/ that the job runs."""
        return self.project if self.snapshot is None else self.snapshot.folder

    @property
    def _built(self) -> Path:
        """The folder of compiled extensions. A container has another torch, so it has a folder of its own."""
        image = "" if self.container is None else f"-{self.container.digest}"
        return self.project / "build" / f"torch_extensions{image}"

    @property
    def _directives(self) -> dict[str, str | None]:
        asked_for = ask_for_gpus(self.directives, self.nodes, self.ranks)
        # Slurm refuses a second number of CPUs. In tres-per-task it is one of a list, as in cpu=8,gres/gpu=1.
        counted = "cpus-per-gpu" in self.directives or "cpu" in (self.directives.get("tres-per-task") or "")
        return {
            "job-name": self.name,
            "nodes": str(self.nodes),
            "ntasks-per-node": str(self.ranks),
            "gpus-per-node": str(self.ranks) if self.gpus and not asked_for else None,
            "cpus-per-task": None if counted else str(self.cpus_per_task),
            "time": self.time,
            "signal": f"B:USR1@{self.lead}",
        }

    @property
    def _variables(self) -> dict[str, str | Sequence[str]]:
        return {
            "PROJECT": str(self.code),
            "PYTHON": self.python or (sys.executable if self.container is None else "python3"),
            "WORKDIR": str(self.workdir),
            "CONFIG": str(self.config.absolute() if self.snapshot is None else self.snapshot.config),
            "OVERRIDES": self.overrides,
            "RUN": str(self.run),
            "RESUME": self.resume,
            "REQUEUE": "yes" if self.requeue else "no",
            "MAX_REQUEUES": str(self.max_requeues),
            "EXTENSIONS": str(self._built),
        }

    def _header(self, file: Path) -> Iterator[str]:
        """Yield the lines of the comment at the top, for a reader of the script."""
        run, submit = shlex.quote(str(self.run)), f"sbatch {shlex.quote(str(file))}"
        log = (self.directives.get("output") or "%x-%j.out").strip('"').replace("%x", self.name).replace("%j", "JOB")
        saves = f"{self.lead} s before its limit of {self.time} the job saves"
        yield f"Trains {self.what}."
        yield f"Written by lowrank-dist {__version__} on {date.today()} from {self.config.absolute()}."
        yield ""
        yield f"Submit:  {submit}    # prints the number JOB"
        yield f"Watch:   squeue --job JOB; tail -F {log}    # in the folder of sbatch"
        yield f"         tail -F {run}/metrics.jsonl"
        yield "Stop:    scancel JOB    # ranks that have not saved after Slurm's KillWait (30 s by default) are killed"
        yield f"         touch {run}/STOP; scancel --batch --signal=USR1 JOB    # ends when it has saved"
        if self.resume == "auto":
            yield f"Resume:  rm -f {run}/STOP; {submit}    # from the newest checkpoint"
        else:
            yield f"Again:   rm -f {run}/STOP; {submit}    # with train.resume={self.resume}"
        if self.requeue:
            yield f"Limit:   {saves} and requeues itself, at most {self.max_requeues} times"
        else:
            yield f"Limit:   {saves} and ends (REQUEUE=no); submit it again to go on"
        if self.snapshot is None:
            yield f"Code:    {self.project}, as it is at each start of the job"
        else:
            yield f"Code:    a snapshot of {self.project} at {self.snapshot.commit}, with the configuration"
        yield f"Result:  {run}/adapter"
