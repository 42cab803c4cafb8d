"""The tables of a plan."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from lowrank_dist.plan.memory import PARTS


def tables(plan: Mapping[str, Any]) -> Group:
    """Return all tables and lines of a plan from `describe.describe`, to be printed."""
    return Group(*_sections(plan))


def _sections(plan: Mapping[str, Any]) -> Iterator[RenderableType]:
    yield Text(headline(plan), style="bold")
    yield verdict(plan)
    yield from _theta(plan)
    yield _memory(plan)
    yield _messages(plan)
    if plan["time"] is not None:
        yield from _time(plan)
    yield from _layouts(plan)
    yield _methods(plan)
    yield from map(Text, _notes(plan))
    if "verification" in plan:
        yield from _verification(plan["verification"])


def _table(title: str, *heads: str) -> Table:
    """Return an empty table at least as wide as its title, which rich would break otherwise."""
    return Table(*heads, title=title, min_width=len(title) + 2)


def headline(plan: Mapping[str, Any]) -> str:
    model, trained = plan["model"], plan["trained"]
    return (
        f"{model['name']}: |Φ| {model['parameters']:,} in {model['dtype']}, {trained['method']}: "
        f"|Θ| {trained['parameters']:,} ({percent(trained['percent'])} %)"
    )


def _trains_base(plan: Mapping[str, Any]) -> bool:
    """Return whether Θ is all of Φ."""
    return plan["trained"]["parameters"] == plan["model"]["parameters"]


def verdict(plan: Mapping[str, Any]) -> Text:
    """Return the line that says whether the plan fits and, where it does not, the remedies."""
    layout, cluster = plan["layout"], plan["cluster"]
    where = f"{cluster['nodes']} × {cluster['gpus_per_node']} {cluster['gpu']} of {size(cluster['memory'])}"
    need = f"{size(layout['memory'])} of {size(cluster['usable'])} that tensors can have on a GPU"
    if plan["fits"]:
        return Text(f"fits {where}: {layout_name(layout)}; {need}", style="green")
    remedies = "; ".join(plan["remedies"])
    return Text(
        f"does not fit {where}: the smallest layout ({layout_name(layout)}) needs {need}, {size(layout['short'])} too "
        f"much. It would fit with: {remedies}",
        style="red",
    )


def layout_name(layout: Mapping[str, Any]) -> str:
    words = [f"TP {layout['tensor']}", f"DP {layout['data']}", f"microbatch {layout['micro_batch']}"]
    words += ["sequence parallel"] * layout["sequence"] + ["recompute"] * layout["recompute"]
    return ", ".join(words)


def size(nbytes: float) -> str:
    """Return bytes as text ("1.5 GB"), in powers of ten, as memory is sold and files are listed."""
    for unit, power in (("TB", 12), ("GB", 9), ("MB", 6), ("kB", 3)):
        if abs(nbytes) >= 10**power:
            scaled = nbytes / 10**power
            return f"{scaled:.0f} {unit}" if scaled >= 100 else f"{scaled:.3g} {unit}"
    return f"{nbytes:.0f} B"


def percent(value: float) -> str:
    return f"{value:.0f}" if value >= 10 else f"{value:.2g}"


def _theta(plan: Mapping[str, Any]) -> Iterator[RenderableType]:
    files = plan["files"]
    table = _table("Θ", "trained", "parameters", "% of |Φ|")
    for name, found in plan["trained"]["by_module"].items():
        table.add_row(name, f"{found['parameters']:,}", percent(found["percent"]))
    yield table
    stored = f"adapter {size(files['adapter'])} in fp32 ({size(files['adapter_16_bit'])} in 16 bits)"
    if _trains_base(plan):
        stored = f"trained model {size(files['adapter'])}"
    yield Text(
        f"{stored} beside a base of {size(files['base'])}; checkpoint {size(files['checkpoint'])}; disk "
        f"{size(files['disk'])}; host memory of a node {size(files['host_memory_loading'])} while loading, rank 0 "
        f"{size(files['host_memory_saving'])} more while saving"
    )


def _memory(plan: Mapping[str, Any]) -> Table:
    kinds = {"without_recompute": "without recompute", "with_recompute": "with recompute"}
    table = _table("Memory of a GPU at the fullest moment", "part", *kinds.values())
    held = {name: plan["memory"][name] for name in kinds}
    for part in PARTS:
        table.add_row(part, *(size(found["parts"][part]) for found in held.values()))
    table.add_section()
    table.add_row("total", *(size(found["total"]) for found in held.values()))
    table.add_row("fullest moment", *(found["moment"] for found in held.values()))
    return table


def _messages(plan: Mapping[str, Any]) -> Table:
    table = _table("Messages of a rank in an optimizer step", "kind", "group", "calls", "of a microbatch", "bytes")
    for found in plan["messages"]:
        per = str(found["calls_per_microbatch"]) if found["calls_per_microbatch"] else "once a step"
        table.add_row(found["kind"], found["group"], str(found["calls"]), per, size(found["bytes"]))
    return table


def _time(plan: Mapping[str, Any]) -> Iterator[RenderableType]:
    time, flops = plan["time"], plan["flops"]
    table = _table(f"Step time on {plan['cluster']['gpu']}: modelled, not measured", "modelled", "seconds")
    for name, seconds in time["terms"].items():
        bound = " (bounds it)" if name == time["bound"] else ""
        table.add_row(name + bound, f"{seconds:.3f}")
    table.add_section()
    table.add_row("step", f"{time['seconds']:.3f}")
    yield table
    yield Text(
        f"{flops['executed']:.3g} FLOPs executed, {flops['model']:.3g} by the model"
        f"{'' if _trains_base(plan) else ', none for weight gradients of Φ'}; "
        f"modelled MFU {100 * time['mfu']:.1f} %, {time['tokens_per_second']:,.0f} tokens/s"
    )


def _layouts(plan: Mapping[str, Any]) -> Iterator[RenderableType]:
    table = _table("Layouts", "", "layout", "memory", "step (modelled)")
    for key in ("layout", "runner_up", "recommended"):
        found = plan[key]
        if found is not None:
            seconds = f"{found['seconds']:.3f} s" if "seconds" in found else ""
            name = {"layout": "planned", "runner_up": "runner-up", "recommended": "recommended"}[key]
            table.add_row(name, layout_name(found), size(found["memory"]), seconds)
    sizes = plan["tensor_sizes"]
    reasons: dict[str, list[int]] = {}
    for tensor, reason in sizes["not"].items():
        reasons.setdefault(reason, []).append(tensor)
    illegal = "; ".join(f"{ranges(found)}: {reason}" for reason, found in reasons.items())
    legal = f"tensor-parallel sizes {', '.join(map(str, sizes['legal']))}"
    yield table
    yield Text(f"{legal}. Not {illegal}" if illegal else legal)


def ranges(numbers: list[int]) -> str:
    """Return numbers as text, with runs of consecutive ones joined: "3, 5-7"."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and runs[-1][-1] == number - 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def _methods(plan: Mapping[str, Any]) -> Table:
    heads = (
        "method",
        "trained",
        "% of |Φ|",
        "memory of a GPU",
        "added calls a layer",
        "FLOPs of a step",
        "step (modelled)",
    )
    table = _table("The same by every method, on this layout", *heads)
    for found in plan["methods"]:
        name = f"{found['method']} ({found['placement']})" if found["placement"] else found["method"]
        memory = size(found["memory"]) + ("" if found["fits"] else ", does not fit")
        seconds = f"{found['seconds']:.3f} s" if "seconds" in found else ""
        row = (f"{found['trained']:,}", percent(found["percent"]), memory, str(found["added"]))
        table.add_row(name, *row, f"{found['flops']:.3g}", seconds)
    return table


def _notes(plan: Mapping[str, Any]) -> Iterator[str]:
    state = plan["state"]
    planned, full = ((state[f"{key}_bytes_per_parameter"], size(state[key])) for key in ("planned", "full"))
    yield (
        f"weights, gradients and optimiser of a replica: {plan['trained']['method']} {planned[0]:.3g} bytes a "
        f"parameter of Φ ({planned[1]}), full {full[0]:.3g} ({full[1]})"
    )
    if plan["model"]["name"] == "gpt3-175b":
        yield "Hu et al. (2021) print 350 GB for low-rank and 1.2 TB for full training of GPT-3 175B with Adam"


def _verification(found: Mapping[str, Any]) -> Iterator[RenderableType]:
    title = f"Executed on fake tensors: tensor-parallel rank {found['tensor_rank']}, operators of a CPU"
    table = _table(title, "", "formula", "executed", "difference")
    for name, row in found["memory"].items():
        cells = [f"{row[side]:.6g}" if "FLOPs" in name else size(row[side]) for side in ("formula", "executed")]
        table.add_row(name, *cells, f"{100 * row['difference']:+.3f} %")
    for when, sides in found["messages"].items():
        table.add_section()
        for kind in sorted(sides["formula"].keys() | sides["executed"].keys()):
            counts = [sides[side].get(kind, {"calls": 0, "bytes": 0}) for side in ("formula", "executed")]
            same = "exact" if counts[0] == counts[1] else "DIFFERS"
            texts = (f"{count['calls']} calls, {count['bytes']:,} B" for count in counts)
            table.add_row(f"{kind}, {when}", *texts, same)
    yield table
    if found["agrees"]:
        yield Text("the executed step agrees with the plan", style="green")
    else:
        yield Text("the executed step does not agree with the plan: please report this", style="red")
