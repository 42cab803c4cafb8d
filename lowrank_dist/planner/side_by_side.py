"""Tables that compare several plans, or a plan and an executed step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from rich.console import Group, RenderableType
from rich.text import Text

from lowrank_dist.planner.report import (
    LEGEND,
    PART_NAMES,
    TERM_NAMES,
    headline,
    memory_size,
    percent,
    size,
    table_of,
    workload,
)
from lowrank_dist.planner.result import Plan, Verification


def side_by_side(plans: Mapping[str, Plan]) -> Group:
    """Return one table with a column for each plan. plans: keyed by what was changed, the unchanged one first."""
    return Group(*_compared(plans))


def _compared(plans: Mapping[str, Plan]) -> Iterator[RenderableType]:
    first = next(iter(plans.values()))
    if len({headline(plan) for plan in plans.values()}) == 1:
        yield Text(headline(first), style="bold")
    alike = {setting for plan in plans.values() for setting in plan.workload.settings}
    for plan in plans.values():
        alike &= set(plan.workload.settings)
    yield workload([setting for setting in first.workload.settings if setting in alike])
    cluster = first.cluster
    title = (
        f"{cluster.nodes} × {cluster.gpus_per_node} {cluster.gpu} of {memory_size(cluster.memory)}; times are modelled"
    )
    table = table_of(title, "", *plans)
    for name, value in _ROWS.items():
        cells = [value(plan) for plan in plans.values()]
        if any(cells):
            table.add_row(name, *cells)
    yield table
    yield Text(LEGEND, style="dim")


def _verdict(plan: Plan) -> str:
    if not plan.fits:
        return f"does not fit: {memory_size(plan.layout.short)} too much"
    return f"{'only just: ' if plan.tight else 'fits: '}{memory_size(plan.layout.spare)} to spare"


def _chosen(plan: Plan) -> str:
    """Return the keys that nobody gave and that may therefore differ between the plans."""
    return ", ".join(setting.name for setting in plan.workload.settings if setting.source == "plan")


def _timed(value: Callable[[Plan], str]) -> Callable[[Plan], str]:
    return lambda plan: value(plan) if plan.time is not None else ""


def _time(plan: Plan) -> str:
    assert plan.time is not None
    return f"{plan.time.seconds:.3f} s"


def _largest_term(plan: Plan) -> str:
    assert plan.time is not None
    share = plan.time.terms[plan.time.bound] / plan.time.seconds
    return f"{TERM_NAMES[plan.time.bound]}, {100 * share:.0f} %"


def _tokens(plan: Plan) -> str:
    assert plan.time is not None
    return f"{plan.time.tokens_per_second:,.0f}"


def _used(plan: Plan) -> str:
    assert plan.time is not None
    return f"{100 * plan.time.mfu:.1f} %"


_ROWS: dict[str, Callable[[Plan], str]] = {
    "layout": lambda plan: str(plan.layout),
    "chosen by the plan": _chosen,
    "fits": _verdict,
    "memory of a GPU": lambda plan: memory_size(plan.layout.memory),
    "trained parameters": lambda plan: f"{plan.trained.parameters:,}",
    "samples per step": lambda plan: str(plan.workload.global_batch),
    "microbatches per step": lambda plan: str(plan.layout.microbatches),
    "collectives per step": lambda plan: f"{sum(found.calls for found in plan.messages):,}",
    "bytes of collectives per step": lambda plan: size(sum(found.bytes for found in plan.messages)),
    "step": _timed(_time),
    "largest term": _timed(_largest_term),
    "tokens per second": _timed(_tokens),
    "peak FLOP/s used (MFU)": _timed(_used),
    "checkpoint": lambda plan: size(plan.files.checkpoint),
}


def verified(plan: Plan, found: Verification) -> Group:
    """Return the table of a plan beside its executed step, and that of why its peak is not the plan's total."""
    return Group(*_verified(plan, found))


def _verified(plan: Plan, found: Verification) -> Iterator[RenderableType]:
    title = f"The plan and an executed step: fake tensors, CPU operators, tensor-parallel rank {found.tensor_rank}"
    table = table_of(title, "", "formula", "executed", "difference")
    for name, row in found.memory.items():
        flops = "FLOPs" in name
        cells = [f"{value:.6g}" if flops else memory_size(value) for value in (row.formula, row.executed)]
        label = name if flops else PART_NAMES.get(name, f"{name} of two microbatches")
        table.add_row(label, *cells, f"{100 * row.difference:+.3f} %")
    for when, sides in found.messages.items():
        table.add_section()
        for kind in sorted(sides.formula.keys() | sides.executed.keys()):
            counts = [side.get(kind, {"calls": 0, "bytes": 0}) for side in (sides.formula, sides.executed)]
            same = "exact" if counts[0] == counts[1] else "DIFFERS"
            texts = (f"{count['calls']} call{'s' * (count['calls'] != 1)}, {count['bytes']:,} B" for count in counts)
            table.add_row(f"{kind}, {'per microbatch' if when == 'microbatch' else 'after the last'}", *texts, same)
    yield table
    table = table_of("Why that peak is not the plan's total", "", "memory")
    table.add_row("the plan's total", memory_size(plan.layout.memory))
    for reason, nbytes in found.from_plan:
        if nbytes:
            table.add_row(reason, f"{'+' if nbytes > 0 else '−'} {memory_size(abs(nbytes))}")
    table.add_row("formula of the peak above", memory_size(found.memory["peak"].formula))
    yield table
    if found.agrees:
        yield Text(f"The executed step agrees with the plan within {percent(100 * plan.accuracy)} %.", style="green")
    else:
        yield Text("The executed step does not agree with the plan: please report this.", style="red")
