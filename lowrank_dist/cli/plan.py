"""`lowrank-dist plan`: will it fit, what will it cost, and is that true?"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lowrank_dist.errors import UserError
from lowrank_dist.terminal import open_console, put

if TYPE_CHECKING:
    from lowrank_dist.engine.planning import Request


def plan_command(
    what: Annotated[
        str,
        typer.Argument(
            help="A run's YAML file, a built-in shape (gpt3-175b, llama-3-70b, …), a model folder or its config.json.",
            metavar="CONFIG|SHAPE|MODEL_DIR",
        ),
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="As for training.", metavar="section.key=value ...")
    ] = None,
    nodes: Annotated[int, typer.Option(help="Nodes of the cluster.", metavar="N")] = 1,
    gpus_per_node: Annotated[int, typer.Option(help="GPUs of a node.", metavar="N")] = 8,
    gpu: Annotated[str, typer.Option(help="Which GPU: h100, h200, a100, …", metavar="NAME")] = "h100",
    gpu_memory: Annotated[
        str | None, typer.Option(help="Memory of a GPU with its unit, if not the GPU's own.", metavar="80GB")
    ] = None,
    target_share: Annotated[
        float, typer.Option(help="Part of the tokens that is trained on, above 0 and at most 1.", metavar="SHARE")
    ] = 1.0,
    bottleneck: Annotated[
        int, typer.Option(help="Bottleneck of adapter layers beside the planned method.", metavar="M", min=1)
    ] = 64,
    virtual_tokens: Annotated[
        int, typer.Option(help="Positions of prefix and prompt beside the planned method.", metavar="L", min=1)
    ] = 32,
    verify: Annotated[
        bool, typer.Option("--verify", help="Run the planned step on fake tensors and hold the plan against it.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="The same as JSON.")] = False,
) -> None:
    """Plan a run by its method: parameters, memory, messages, FLOPs, time, layouts. No weights, no GPU."""
    from lowrank_dist.engine.planning import fixed_of, job_of, read_request
    from lowrank_dist.methods.registry import Sizes, footprints_beside
    from lowrank_dist.plan.describe import describe
    from lowrank_dist.plan.hardware import bytes_in, gpu_of
    from lowrank_dist.plan.layouts import Cluster, Fixed, choose

    for option, value in (("--nodes", nodes), ("--gpus-per-node", gpus_per_node)):
        if value < 1:
            raise UserError(f"{option}: {value} is not a number of machines to plan for; give at least 1")
    if not 0 < target_share <= 1:
        raise UserError(f"--target-share: {target_share} is no part of the tokens; give a number above 0, at most 1")
    card = gpu_of(gpu)
    memory = card.memory if gpu_memory is None else bytes_in(gpu_memory, "--gpu-memory")
    cluster = Cluster(nodes, gpus_per_node, card, memory)
    request = _with_adapter(read_request(what, overrides or []))
    job, fixed = job_of(request, target_share), fixed_of(request)
    planned = choose(job, fixed, cluster)
    free = choose(job, Fixed(), cluster)
    recommended = None if free.best.job.layout == planned.best.job.layout else free
    sizes = Sizes(bottleneck=bottleneck, virtual_positions=virtual_tokens)
    tensor = planned.best.job.layout.tensor
    others = footprints_beside(job.footprint, sizes, job.architecture, tensor)
    output = request.config.output
    plan = describe(planned, recommended, cluster, others, output.keep_last, output.keep_best)
    if verify:
        from lowrank_dist.engine.dry_run import verification

        plan["verification"] = verification(planned.best, request)
    _show(plan, as_json)
    if verify and not plan["verification"]["agrees"]:
        raise typer.Exit(1)


def _with_adapter(request: Request) -> Request:
    """Return the request with what the adapter that training starts from says of its factors."""
    config = request.config
    if config.own_section.starts_from is None:
        return request
    if not request.whole:
        raise UserError(
            "lora.init_from: an adapter is read together with its model: plan a run's YAML file, or give lora.rank and "
            "lora.targets"
        )
    from lowrank_dist.methods.registry import method_package

    section = method_package(config.method).files.complete(config.own_section, config.model.path)
    return replace(request, config=config.with_own_section(section))


def _show(plan: dict[str, Any], as_json: bool) -> None:
    if as_json:
        put(json.dumps(plan, indent=2, allow_nan=False))
        return
    from lowrank_dist.plan.report import tables

    console = open_console()
    # Into a file or a pipe, tables are as wide as they are.
    (console if console.is_terminal else open_console(width=140)).print(tables(plan))
