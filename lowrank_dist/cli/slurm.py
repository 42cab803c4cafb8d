"""`lowrank-dist slurm`: a job script for a run, filled in and checked before it waits in a queue."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from lowrank_dist.errors import UserError
from lowrank_dist.formats.paths import require_outside
from lowrank_dist.terminal import put, say

if TYPE_CHECKING:
    from lowrank_dist.config import Config
    from lowrank_dist.engine.job_layout import JobLayout
    from lowrank_dist.planner.layouts import Cluster
    from lowrank_dist.slurm.containers import Container, Runtime
    from lowrank_dist.slurm.job import Job

_WORDS = ("never", "auto")  # of train.resume


def _no_options(ctx: typer.Context, words: Path | list[str] | None) -> Path | list[str] | None:
    """Return the arguments. Raises UserError for an unknown option."""
    from lowrank_dist.config import Config

    for word in [str(words)] if isinstance(words, Path) else words or []:
        name, equals, value = word.removeprefix("--").partition("=")
        if word.startswith("--") and ("." in name or name in Config.model_fields):
            raise UserError(f"{word}: write the change as section.key=value, without hyphens")
        if word.startswith("-"):
            close = difflib.get_close_matches(f"--{name}", [each.opts[0] for each in ctx.command.params], n=1)
            meant = f"did you mean {close[0]}? " if close else ""
            given = f"{name}={value}" if equals else f"{name}[=VALUE]"
            given = given if word.startswith("--") else "NAME=VALUE, with its long name"
            raise UserError(f"{word}: no such option: {meant}An option of sbatch is given as --sbatch {given}")
    return words


def slurm_command(
    config: Annotated[Path, typer.Argument(help="YAML file of the run.", metavar="CONFIG", callback=_no_options)],
    nodes: Annotated[int, typer.Option(help="Nodes of the job.", metavar="N", min=1)],
    gpus_per_node: Annotated[
        int,
        typer.Option(help="GPUs per node, one rank each; with model.device=cpu, ranks per node.", metavar="N", min=1),
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="Changes to CONFIG.", metavar="section.key=value ...", callback=_no_options),
    ] = None,
    gpu: Annotated[
        str | None,
        typer.Option(
            help="GPU of the nodes: h100, h200, a100, … Required, unless model.device is cpu: the plan checks that the "
            "job fits, and chooses what CONFIG leaves open of the layout.",
            metavar="NAME",
        ),
    ] = None,
    gpu_memory: Annotated[
        str | None,
        typer.Option(
            help="Memory of a GPU with its unit, as nvidia-smi shows it (81559MiB). Default: that of --gpu.",
            metavar="79GiB",
        ),
    ] = None,
    job_name: Annotated[str, typer.Option(help="Name of the job, and of its log.", metavar="NAME")] = "lowrank",
    partition: Annotated[str | None, typer.Option(help="Partition of the job.", metavar="NAME")] = None,
    account: Annotated[str | None, typer.Option(help="Account that the job is charged to.", metavar="NAME")] = None,
    qos: Annotated[str | None, typer.Option(help="Quality of service of the job.", metavar="NAME")] = None,
    sbatch: Annotated[
        list[str] | None,
        typer.Option(
            help="Any other option of sbatch, such as 'gres=gpu:8', 'mem=0' or 'exclusive'. Repeatable.",
            metavar="OPTION[=VALUE]",
        ),
    ] = None,
    time: Annotated[str, typer.Option(help="Wall time of each (re)queued run.", metavar="D-HH:MM:SS")] = "24:00:00",
    cpus_per_task: Annotated[int, typer.Option(help="CPUs per rank.", metavar="N", min=1)] = 8,
    lead: Annotated[
        int,
        typer.Option(
            help="Seconds before the time limit at which the job is told to save and stop. A step, its evaluation and "
            "a checkpoint must fit into them.",
            metavar="N",
            min=1,
        ),
    ] = 300,
    requeue: Annotated[
        bool,
        typer.Option(
            "--requeue/--no-requeue", help="Requeue the job after it has saved at the time limit, or let it end."
        ),
    ] = True,
    max_requeues: Annotated[int, typer.Option(help="Requeues after which the job ends.", metavar="N", min=1)] = 20,
    setup: Annotated[
        Path | None,
        typer.Option(
            help="File of shell commands, for modules or conda, that the job runs first, on the host, even if it uses "
            "a container. The job ends if the last command fails; begin with `set -e` to end it if any command fails.",
            metavar="FILE",
        ),
    ] = None,
    container_image: Annotated[
        str | None,
        typer.Option(
            help="Image of a container for the ranks: a file, or in a registry, as nvcr.io/nvidia/pytorch:TAG for "
            "pyxis and docker://nvcr.io/nvidia/pytorch:TAG for apptainer. Code, CONFIG, model, data and output.dir "
            "are mounted under their own paths.",
            metavar="IMAGE",
        ),
    ] = None,
    container_runtime: Annotated[
        Literal["pyxis", "apptainer"] | None,
        typer.Option(help="Container runtime: pyxis (a plugin of Slurm) or apptainer. Default: pyxis."),
    ] = None,
    python: Annotated[
        str | None,
        typer.Option(
            help="Python interpreter of the job. Default: the current one; in a container, python3.", metavar="PATH"
        ),
    ] = None,
    snapshot: Annotated[
        bool,
        typer.Option(
            "--snapshot",
            help="Copy code and CONFIG beside output.dir. The job runs the copies, so later edits do not reach it.",
        ),
    ] = False,
    out: Annotated[
        Path | None, typer.Option(help="File to write; it must not exist. Default: JOB-NAME.sbatch.", metavar="FILE")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the script, write nothing.")] = False,
) -> None:
    """Write a job script that trains CONFIG under Slurm.

    The script is launch/slurm/train.sbatch, filled in and checked. Its first lines say how to submit, watch, stop and
    resume the job.
    """
    from lowrank_dist.config import load_config
    from lowrank_dist.slurm.directives import check_time, passed_on, plain
    from lowrank_dist.slurm.job import Job
    from lowrank_dist.slurm.script import checkout
    from lowrank_dist.slurm.snapshot import Snapshot

    changes = list(overrides or [])
    run = load_config(config, changes)
    layout = _planned_layout(config, changes, run, _cluster(run, nodes, gpus_per_node, gpu, gpu_memory))
    changes += layout.chosen
    check_time(time, lead)
    own = {"partition": partition, "account": account, "qos": qos}
    project, folder, resume = checkout(), _run_folder(config, changes, run), _resume(changes, run)
    job = Job(
        name=job_name,
        what=f"{run.model.path} by {run.method} on {layout.nodes}: {layout.candidate.job.layout}",
        host_memory=layout.host_memory,
        nodes=nodes,
        ranks=gpus_per_node,
        gpus=run.model.device != "cpu",
        cpus_per_task=cpus_per_task,
        time=time,
        lead=lead,
        directives={
            **{option: plain(option, value) for option, value in own.items() if value is not None},
            **passed_on(sbatch or []),
        },
        project=project,
        config=config,
        overrides=_kept(changes),
        inputs=run.inputs | ({} if resume in _WORDS else {"train.resume": Path(resume)}),
        run=folder,
        resume=resume,
        requeue=requeue,
        max_requeues=max_requeues,
        workdir=Path.cwd(),
        python=python,
        setup=setup,
        container=_container(container_image, container_runtime),
        snapshot=Snapshot.of(project, config, folder) if snapshot else None,
    )
    path = out or Path(f"{job_name}.sbatch")
    script = job.script(path)
    if dry_run:
        put(script, end="")
    else:
        if job.snapshot is not None:
            job.snapshot.write()
        _write_new(path, script)
    _report(layout, job, _warnings(run, job), dry_run)
    if not dry_run:
        say(f"{path}: {nodes} × {gpus_per_node} ranks, run folder {folder}; submit it with: sbatch {path}")


def _run_folder(config: Path, changes: list[str], run: Config) -> Path:
    """Return the run folder. Raises UserError where YAML does not read its path as text."""
    from lowrank_dist.config import load_config

    folder = run.output.dir.absolute()
    if load_config(config, [*_kept(changes), f"output.dir={folder}"]).output.dir != folder:
        raise UserError(
            f"output.dir: {str(folder)!r} would be read as another value by YAML on the job's command line; rename it"
        )
    return folder


def _kept(changes: list[str]) -> list[str]:
    """Return the changes without those that the script passes by itself, from RUN and RESUME."""
    return [change for change in changes if not _says(change, "output.dir", "train.resume")]


def _container(image: str | None, runtime: Runtime | None) -> Container | None:
    from lowrank_dist.slurm.containers import Container

    if image is None and runtime is not None:
        raise UserError(
            f"--container-runtime: {runtime} has no container to run; give --container-image, or leave it out"
        )
    return None if image is None else Container(image, runtime or "pyxis")


def _cluster(run: Config, nodes: int, gpus_per_node: int, gpu: str | None, gpu_memory: str | None) -> Cluster:
    from lowrank_dist.planner.hardware import GPUS, Gpu
    from lowrank_dist.planner.layouts import Cluster

    if run.model.device == "cpu":
        if gpu is not None or gpu_memory is not None:
            raise UserError("--gpu: model.device is cpu; leave --gpu and --gpu-memory out, or set model.device=auto")
        # The nodes' memory is unknown: every layout counts as one that fits. Times are not shown.
        return Cluster(nodes, gpus_per_node, Gpu("ranks", 2**60, 1e12, 1e11, 1e10, 1e10), 2**60)
    if gpu is None:
        raise UserError(
            f"--gpu is missing: name the GPU of the nodes ({', '.join(GPUS)}), so that the plan can check that the job "
            "fits; give --gpu-memory too where it has less or more memory. A run on CPUs needs model.device=cpu instead"
        )
    return Cluster.of(nodes, gpus_per_node, gpu, gpu_memory)


def _planned_layout(config: Path, changes: list[str], run: Config, cluster: Cluster) -> JobLayout:
    from lowrank_dist.engine.job_layout import job_layout
    from lowrank_dist.engine.planning import read_request

    if not run.model.path.is_dir():
        raise UserError(
            f"model.path: {run.model.path} is no folder here, and the plan needs its config.json; give the folder of a "
            "Hugging Face model (`hf download NAME --local-dir FOLDER` gets one)"
        )
    return job_layout(read_request(str(config), changes), cluster)


def _report(layout: JobLayout, job: Job, warnings: Iterable[str], dry_run: bool) -> None:
    say(f"layout: {layout}", err=dry_run)
    if layout.chosen:
        say(f"chosen by the plan: {' '.join(layout.chosen)}", err=dry_run)
    if job.snapshot is not None:
        written = "would be written" if dry_run else "written"
        say(f"snapshot of {job.project} at {job.snapshot.commit}: {written} to {job.code}", err=dry_run)
    for warning in (*([layout.warning] if layout.warning else []), *warnings):
        say(f"warning: {warning}", err=True)


def _resume(changes: list[str], run: Config) -> str:
    """Return the job's train.resume: as the command line has it, or a path from CONFIG, or auto."""
    # As it was written: a path such as ./auto would not survive being read.
    given = [change.partition("=")[2] for change in changes if _says(change, "train.resume")]
    if given:
        return given[-1]
    return str(run.train.resume.absolute()) if isinstance(run.train.resume, Path) else "auto"


def _warnings(run: Config, job: Job) -> Iterator[str]:
    if not any(run.model.path.glob("*.safetensors")):
        yield f"model.path: {run.model.path} has no weights (*.safetensors); put them there before the job starts"
    if run.output.save_every is None:
        yield (
            "output.save_every is null, so the job saves only when it is told to stop and at its end; if a node fails, "
            "all steps of that start are lost. Set output.save_every=N"
        )
    if job.requeue and job.resume != "auto":
        yield (
            f"each requeue starts with train.resume={job.resume} again, not from the newest checkpoint of output.dir; "
            "use train.resume=auto, or --no-requeue"
        )


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
