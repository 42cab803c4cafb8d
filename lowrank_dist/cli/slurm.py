"""`lowrank-dist slurm`: a job script for a run, filled in and checked before it waits in a queue."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from lowrank_dist.errors import UserError
from lowrank_dist.formats.paths import require_outside
from lowrank_dist.terminal import put, say


def slurm_command(
    config: Annotated[Path, typer.Argument(help="YAML file of the run.", metavar="CONFIG")],
    nodes: Annotated[int, typer.Option(help="Nodes of the job.", metavar="N", min=1)],
    gpus_per_node: Annotated[
        int,
        typer.Option(help="GPUs of a node, each with its rank; ranks where model.device is cpu.", metavar="N", min=1),
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Changes to CONFIG.", metavar="section.key=value ...")
    ] = None,
    gpu: Annotated[
        str | None,
        typer.Option(
            help="GPU of the nodes (h100, a100, …): what CONFIG leaves open of the layout then comes from the plan.",
            metavar="NAME",
        ),
    ] = None,
    job_name: Annotated[str, typer.Option(help="Name of the job.", metavar="NAME")] = "lowrank",
    partition: Annotated[str | None, typer.Option(help="As sbatch's.", metavar="NAME")] = None,
    account: Annotated[str | None, typer.Option(help="As sbatch's.", metavar="NAME")] = None,
    qos: Annotated[str | None, typer.Option(help="As sbatch's.", metavar="NAME")] = None,
    time: Annotated[str, typer.Option(help="Longest time the job may take.", metavar="D-HH:MM:SS")] = "24:00:00",
    cpus_per_task: Annotated[int, typer.Option(help="CPUs of a rank.", metavar="N", min=1)] = 8,
    lead: Annotated[
        int,
        typer.Option(
            help="Seconds before the end of the time at which the job is told to save and stop.", metavar="N", min=1
        ),
    ] = 300,
    out: Annotated[
        Path | None, typer.Option(help="File to write, NAME.sbatch if not given; must not exist.", metavar="FILE")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the script, write nothing.")] = False,
) -> None:
    """Write a job script that trains CONFIG under Slurm, from launch/slurm/train.sbatch."""
    from lowrank_dist.config import load_config
    from lowrank_dist.slurm import check_layout, check_time, checkout, fill

    changes = list(overrides or [])
    if gpu is not None:
        changes += _planned_layout(config, changes, nodes, gpus_per_node, gpu)
    run = load_config([str(config), *changes])
    parallel = run.parallel
    check_layout(nodes, gpus_per_node, tensor=parallel.tensor, data=parallel.data, across_nodes=parallel.across_nodes)
    check_time(time, lead)
    # These two the script passes by itself, from RUN and RESUME.
    kept = [change for change in changes if not _says(change, "output.dir", "train.resume")]
    folder = str(run.output.dir.absolute())
    if load_config([str(config), *kept, f"output.dir={folder}"]).output.dir != Path(folder):
        raise UserError(f"output.dir: {folder!r} means something else to YAML when a job passes it on; rename it")
    project = checkout()
    directives = {
        "job-name": job_name,
        "nodes": str(nodes),
        "ntasks-per-node": str(gpus_per_node),
        "gpus-per-node": None if run.model.device == "cpu" else str(gpus_per_node),
        "cpus-per-task": str(cpus_per_task),
        "time": time,
        "signal": f"B:USR1@{lead}",
        "partition": partition,
        "account": account,
        "qos": qos,
    }
    variables = {
        "PROJECT": str(project),
        "PYTHON": sys.executable,
        "WORKDIR": os.getcwd(),
        "CONFIG": str(config.absolute()),
        "OVERRIDES": kept,
        "RUN": folder,
        "EXTENSIONS": str(project / "build" / "torch_extensions"),
    }
    # As it was written: a path such as ./auto would not survive being read.
    resume = [change.partition("=")[2] for change in changes if _says(change, "train.resume")]
    variables |= {"RESUME": resume[-1]} if resume else {}
    template = (project / "launch" / "slurm" / "train.sbatch").read_text(encoding="utf-8")
    script = fill(template, directives, variables)
    if dry_run:
        put(script, end="")
        return
    path = out or Path(f"{job_name}.sbatch")
    _write_new(path, script)
    say(f"{path}: {nodes} × {gpus_per_node} ranks, run folder {folder}; submit it with: sbatch {path}")


def _planned_layout(config: Path, changes: list[str], nodes: int, gpus_per_node: int, gpu: str) -> list[str]:
    from lowrank_dist.engine.planning import layout_overrides, read_request
    from lowrank_dist.plan.hardware import gpu_of
    from lowrank_dist.plan.layouts import Cluster

    card = gpu_of(gpu)
    return layout_overrides(read_request(str(config), changes), Cluster(nodes, gpus_per_node, card, card.memory))


def _says(change: str, *keys: str) -> bool:
    return change.partition("=")[0] in keys


def _write_new(path: Path, text: str) -> None:
    require_outside(path)
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise UserError(f"--out: {path} exists already; give another name or move it away") from None
    except OSError as error:
        raise UserError(f"--out: cannot write {path}: {error.strerror}; give another name") from error
