"""`lowrank-dist plan`: does a run fit, and what does it cost?"""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer

from lowrank_dist.cli.arguments import keys_as_options
from lowrank_dist.errors import UserError
from lowrank_dist.terminal import open_console, put

if TYPE_CHECKING:
    from lowrank_dist.planner.result import Plan


def plan_command(
    what: Annotated[
        str,
        typer.Argument(
            help="A run's YAML file, a built-in shape (gpt3-175b, llama-3-70b, …), a model folder or its config.json.",
            metavar="CONFIG|SHAPE|MODEL_DIR",
            callback=keys_as_options,
        ),
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            help="Changes to the run's config, as for training: method=full, lora.rank=16, parallel.tensor=8. The "
            "plan chooses the layout keys (such as parallel.tensor) that are left open: with a CONFIG those that are "
            "null or auto, with a shape or a model folder those not given here.",
            metavar="section.key=value ...",
            callback=keys_as_options,
        ),
    ] = None,
    nodes: Annotated[int, typer.Option(help="Nodes of the cluster.", metavar="N")] = 1,
    gpus_per_node: Annotated[int, typer.Option(help="GPUs of a node.", metavar="N")] = 8,
    gpu: Annotated[
        str,
        typer.Option(
            help='GPU, as torch, Slurm or people name it: h100, h100-pcie, a100-40gb, "NVIDIA H200", gpu:a100:8. A '
            "wrong name lists those that are known.",
            metavar="NAME",
        ),
    ] = "h100",
    gpu_memory: Annotated[
        str | None,
        typer.Option(
            help="Memory of a GPU with its unit, as nvidia-smi shows it (81559MiB). Default: that of --gpu.",
            metavar="79GiB",
        ),
    ] = None,
    target_share: Annotated[
        float | None,
        typer.Option(
            help="Fraction of the tokens that are targets (completions, not prompts), above 0 and at most 1. "
            "Default: 1.",
            metavar="SHARE",
        ),
    ] = None,
    compare: Annotated[
        list[str] | None,
        typer.Option(
            help="Show the plan beside the same plan with these changes, in quotes: --compare 'parallel.tensor=4 "
            "engine.recompute=full'. Repeat it for more plans.",
            metavar="'section.key=value ...'",
        ),
    ] = None,
    bottleneck: Annotated[
        int,
        typer.Option(
            help="Bottleneck width of adapter_h and adapter_l in the table of other methods.",
            metavar="M",
            min=1,
            max=65536,
        ),
    ] = 64,
    virtual_tokens: Annotated[
        int,
        typer.Option(
            help="Number of virtual positions of method=prefix and prompt in the table of other methods.",
            metavar="L",
            min=1,
            max=65536,
        ),
    ] = 32,
    verify: Annotated[
        bool,
        typer.Option(
            "--verify",
            help="Run the planned step on fake tensors (sizes without data) and compare the counts with the plan. "
            "Takes seconds to minutes.",
        ),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
) -> None:
    """Check whether a run fits on the given GPUs, and show its memory, collectives and time. Needs no weights or GPU.

    Exit code: 0 if it fits; 1 if no layout fits ("fits": false in JSON; with --compare, if no plan fits) or if
    --verify finds a difference; 2 for an error in the input.
    """
    from lowrank_dist.engine.plan import plan
    from lowrank_dist.methods.registry import Sizes
    from lowrank_dist.planner.layouts import Cluster

    if verify and compare:
        raise UserError("--compare and --verify: give one of them; a comparison is not executed")
    cluster = Cluster.of(nodes, gpus_per_node, gpu, gpu_memory)
    sizes = Sizes(bottleneck=bottleneck, virtual_positions=virtual_tokens)
    given = overrides or []

    def planned(changes: str = "", progress: Callable[[str], None] | None = None) -> Plan:
        words = [*given, *_words(changes)]
        return plan(what, cluster, words, target_share=target_share, sizes=sizes, verify=progress)

    if compare:
        _compare({"as given": planned()} | {changes: planned(changes) for changes in compare}, as_json)
        return
    if verify:
        with _progress() as progress:
            found = planned(progress=progress)
    else:
        found = planned()
    _show(found, as_json)
    if not found.fits or (found.verification is not None and not found.verification.agrees):
        raise typer.Exit(1)


def _words(changes: str) -> list[str]:
    """Return the overrides in the text of a --compare."""
    try:
        return shlex.split(changes)
    except ValueError as error:
        raise UserError(f"--compare: {changes!r}: {error}; give overrides, with spaces between them") from None


@contextmanager
def _progress() -> Iterator[Callable[[str], None]]:
    """Show the stages of the executed step on stderr: on a terminal with the time, elsewhere a line each."""
    from lowrank_dist.backend.libraries import quiet_libraries

    quiet_libraries()
    console = open_console(err=True)
    if not console.is_terminal:
        yield lambda stage: console.print(f"verifying: {stage}", soft_wrap=True)
        return
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    with Progress(SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn(), console=console) as bar:
        task = bar.add_task("verifying")
        yield lambda stage: bar.update(task, description=f"verifying: {stage}")
        bar.update(task, description="verified")


def _compare(plans: dict[str, Plan], as_json: bool) -> None:
    if as_json:
        found = [{"changes": name, "plan": plan.to_json()} for name, plan in plans.items()]
        put(
            json.dumps(
                {"fits": any(plan.fits for plan in plans.values()), "compared": found}, indent=2, allow_nan=False
            )
        )
    else:
        from lowrank_dist.planner.side_by_side import side_by_side

        _print(side_by_side(plans))
    if not any(plan.fits for plan in plans.values()):
        raise typer.Exit(1)


def _show(plan: Plan, as_json: bool) -> None:
    if as_json:
        put(json.dumps(plan.to_json(), indent=2, allow_nan=False))
        return
    from lowrank_dist.planner.report import report
    from lowrank_dist.planner.side_by_side import verified

    _print(report(plan))
    if plan.verification is not None:
        _print(verified(plan, plan.verification))


def _print(tables: object) -> None:
    console = open_console()
    # A file or a pipe has no width to fit.
    (console if console.is_terminal else open_console(width=140)).print(tables)
