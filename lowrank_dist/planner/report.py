"""The tables of a plan."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from lowrank_dist.planner.memory import PARTS
from lowrank_dist.planner.result import MemoryOfGpu, Plan, PlannedLayout, Setting
from lowrank_dist.planner.step_time import DATA, GEMMS, PASSES, TENSOR

LEGEND = "TP: tensor-parallel size. DP: data-parallel size. Microbatch: samples that a replica processes at a time."
# The label of each part of the memory, in the order of PARTS.
PART_NAMES = dict(
    zip(
        PARTS,
        (
            "frozen base weights",
            "trained parameters, fp32",
            "their gradients, fp32",
            "optimizer state: fp32 weights, Adam moments",
            "ZeRO's reduction bucket",
            "activations saved for backward",
            "gathered and partial messages",
            "logits of a block of tokens",
            "keys and values of an evaluation",
            "temporary tensors of operators",
        ),
        strict=True,
    )
)
TERM_NAMES = {
    GEMMS: "matrix products",
    PASSES: "reading and writing memory (norms, activations, AdamW)",
    TENSOR: "tensor-parallel collectives",
    DATA: "data-parallel collectives",
}
_SETTING_NAMES = {
    "train.global_batch": "samples per optimizer step",
    "data.max_length": "tokens per sample (all assumed full length)",
    "--target-share": "share of the tokens that is trained on",
    "parallel.tensor": "tensor-parallel size",
    "train.micro_batch": "samples per replica and microbatch",
    "engine.recompute": "recomputation of activations",
}
_SOURCES = {"given": "given", "default": "default", "plan": "chosen by the plan"}


def report(plan: Plan) -> Group:
    """Return all tables and lines of a plan, to be printed."""
    return Group(*_sections(plan))


def _sections(plan: Plan) -> Iterator[RenderableType]:
    yield Text(headline(plan), style="bold")
    yield workload(plan.workload.settings)
    yield from verdict(plan)
    yield from _trained(plan)
    yield from _memory(plan)
    yield from _collectives(plan)
    yield from _time(plan)
    yield from _layouts(plan)
    yield from _methods(plan)
    yield from map(Text, _notes(plan))


def table_of(title: str, *heads: str) -> Table:
    """Return an empty table at least as wide as its title, which rich would break otherwise."""
    return Table(*heads, title=title, min_width=len(title) + 2)


def headline(plan: Plan) -> str:
    model, trained = plan.model, plan.trained
    base = f"{model.name}: {model.parameters:,} parameters in {model.dtype}"
    if trained.all_of_base:
        return f"{base}; {trained.method} trains all of them"
    return f"{base}; {trained.method} trains {trained.parameters:,} beside them ({percent(trained.percent)} %)"


def workload(settings: Sequence[Setting]) -> Table:
    """Return the table of the values that the plan assumes and of their sources."""
    table = table_of("What is planned", "", "value", "set by", "key")
    for setting in settings:
        value = f"{percent(100 * float(setting.value))} %" if setting.name == "--target-share" else str(setting.value)
        table.add_row(_SETTING_NAMES.get(setting.name, setting.name), value, _SOURCES[setting.source], setting.name)
    return table


def verdict(plan: Plan) -> Iterator[RenderableType]:
    """Yield the lines that say whether the plan fits, with the remedies if it does not fit or is tight."""
    layout, cluster = plan.layout, plan.cluster
    where = f"{cluster.nodes} × {cluster.gpus_per_node} {cluster.gpu} of {memory_size(cluster.memory)}"
    need = f"{memory_size(layout.memory)} of the {memory_size(cluster.usable)} that tensors can use on a GPU"
    spare = memory_size(difference(cluster.usable, layout.memory))
    if not plan.fits:
        smallest = f"the smallest layout that the settings allow ({layout}) needs {need}"
        short = memory_size(difference(layout.memory, cluster.usable))
        yield Text(f"DOES NOT FIT {where}: {smallest}, {short} too much.", style="bold red")
    elif plan.tight:
        yield Text(
            f"FITS, BUT ONLY JUST, {where}: {layout}. It needs {need}; the {spare} to spare are "
            f"less than the plan's error of up to {percent(100 * plan.accuracy)} % "
            f"({memory_size(plan.accuracy * layout.memory)}), so it may run out of memory.",
            style="bold yellow",
        )
    else:
        yield Text(f"FITS {where}: {layout}. It needs {need}; {spare} to spare.", style="bold green")
    if layout.crosses_nodes:
        yield Text(
            f"A tensor-parallel group of {layout.tensor} crosses nodes of {cluster.gpus_per_node} GPUs: every layer "
            "waits for the network, and a run refuses it without parallel.across_nodes=true.",
            style="yellow",
        )
    if cluster.other_forms:
        form = f"{cluster.form} form" if cluster.form else "form"
        yield Text(
            f"{cluster.gpu} is the {form} that is sold as {cluster.sold_as} GB. Other forms and sizes: --gpu "
            f"{', '.join(cluster.other_forms)}.",
            style="dim",
        )
    if plan.auto_tensor is not None:
        yield Text(f"parallel.tensor=auto stands for {plan.auto_tensor} on these GPUs.")
    if plan.remedies:
        table = table_of("What fits: add one of these to the command", "add", "layout", "memory of a GPU", "step")
        for change in plan.remedies:
            found = change.layout
            table.add_row(change.words, str(found), memory_size(found.memory), _seconds(found))
        yield table
    elif not plan.fits:
        yield Text("No change of layout, length, nodes or GPU that the plan tries makes the run fit.", style="red")
    yield Text(LEGEND, style="dim")


def size(nbytes: float) -> str:
    """Return the bytes of a file or a message as text ("1.5 GB"), in powers of ten, as files are listed."""
    return _scaled(nbytes, (("TB", 10**12), ("GB", 10**9), ("MB", 10**6), ("kB", 10**3)))


def memory_size(nbytes: float) -> str:
    """Return bytes of memory as text ("1.5 GiB"), in powers of two, as nvidia-smi (in MiB) and a run show them."""
    return _scaled(nbytes, (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)))


def _scaled(nbytes: float, units: Sequence[tuple[str, int]]) -> str:
    for unit, scale in units:
        if abs(nbytes) >= scale:
            scaled = nbytes / scale
            return f"{scaled:.0f} {unit}" if scaled >= 100 else f"{scaled:.3g} {unit}"
    return f"{nbytes:.0f} B"


def difference(larger: float, smaller: float) -> float:
    """Return the difference of two sizes of memory in bytes, as it follows from their texts if both have decimals."""
    shown = [round(nbytes / 2**30, 1 if nbytes >= 10 * 2**30 else 2) for nbytes in (larger, smaller)]
    decimals = all(1 <= number < 100 for number in shown)
    return (shown[0] - shown[1]) * 2**30 if decimals and shown[0] > shown[1] else larger - smaller


def percent(value: float) -> str:
    return f"{value:.0f}" if value >= 10 else f"{value:.2g}"


def _seconds(layout: PlannedLayout) -> str:
    return "" if layout.seconds is None else f"{layout.seconds:.3f} s"


def _trained(plan: Plan) -> Iterator[RenderableType]:
    files, whole = plan.files, plan.trained.all_of_base
    table = table_of("Trained parameters", "module", "parameters", "% of the base")
    for name, share in plan.trained.by_module.items():
        table.add_row(name, f"{share.parameters:,}", percent(share.percent))
    yield table
    kept = "all kept but counted as 1" if files.kept is None else f"{files.kept} kept"
    stored = "trained model" if whole else "adapter"
    table = table_of("Files and host memory", "", "size")
    table.add_row("trained model" if whole else "adapter, fp32", size(files.adapter))
    if not whole:
        table.add_row("adapter, 16 bits", size(files.adapter_16_bit))
    table.add_row("base model", size(files.base))
    table.add_row(f"one checkpoint: {stored}, fp32 weights, Adam moments", size(files.checkpoint))
    table.add_row(f"disk: base + {stored} + checkpoints ({kept}, 1 being written)", size(files.disk))
    table.add_section()
    table.add_row("host memory of a node while it loads", memory_size(files.host_memory_loading))
    table.add_row("more on the first node while it saves", memory_size(files.host_memory_saving))
    yield table


def _memory(plan: Plan) -> Iterator[RenderableType]:
    held = (plan.memory.without_recompute, plan.memory.with_recompute)
    names = ("without recompute", "with recompute")
    heads = [f"{name} (planned)" if again == plan.layout.recompute else name for again, name in enumerate(names)]
    table = table_of("Memory of a GPU at the moment of a step when it is fullest", "part", *heads)
    for part in PARTS:
        if any(found.parts[part] for found in held):
            table.add_row(PART_NAMES[part], *(_held(found, part) for found in held))
    table.add_section()
    table.add_row("total", *(memory_size(found.total) for found in held))
    table.add_row("that moment", *(found.moment for found in held))
    yield table
    yield Text(
        f"–: there is none at that moment. Totals are accurate to {percent(100 * plan.accuracy)} %; "
        "--verify checks them against an executed step.",
        style="dim",
    )


def _held(found: MemoryOfGpu, part: str) -> str:
    return memory_size(found.parts[part]) if found.parts[part] else "–"


def _collectives(plan: Plan) -> Iterator[RenderableType]:
    heads = ("collective", "over ranks of", "calls per microbatch", "calls per step", "bytes per step")
    table = table_of("Collectives that a GPU takes part in", *heads)
    for found in plan.messages:
        per = str(found.calls_per_microbatch) if found.calls_per_microbatch else "–"
        table.add_row(found.kind, f"{found.group} parallelism", per, str(found.calls), size(found.bytes))
    if not plan.messages:
        yield Text("A step needs no collectives between GPUs.")
        return
    yield table
    several = f"{plan.layout.microbatches} microbatches" if plan.layout.microbatches > 1 else "1 microbatch"
    yield Text(f"A step has {several} per GPU. –: no call belongs to a microbatch's forward or backward.", style="dim")


def _time(plan: Plan) -> Iterator[RenderableType]:
    time, flops = plan.time, plan.flops
    if time is None:
        return
    table = table_of(f"Time of a step on {plan.cluster.gpu}: modelled, not measured", "term", "seconds", "share")
    for name, seconds in time.terms.items():
        largest = " – largest term" if name == time.bound else ""
        table.add_row(TERM_NAMES[name] + largest, f"{seconds:.3f}", f"{100 * seconds / time.seconds:.0f} %")
    table.add_section()
    table.add_row("step", f"{time.seconds:.3f}", "")
    yield table
    frozen = "" if plan.trained.all_of_base else " (a frozen base has no weight gradients)"
    yield Text(
        f"All GPUs execute {flops.executed:.3g} FLOPs per step; {flops.model:.3g} are the model's own{frozen}, "
        f"the rest is repeated work. Modelled: {100 * time.mfu:.1f} % of the GPUs' peak (MFU), "
        f"{time.tokens_per_second:,.0f} tokens/s."
    )


def _layouts(plan: Plan) -> Iterator[RenderableType]:
    table = table_of("Layouts that fit" if plan.fits else "Layouts", "", "layout", "memory of a GPU", "step (modelled)")
    names = {"planned": plan.layout, "next fastest, of another kind": plan.runner_up}
    names["fastest, if no layout key were set"] = plan.recommended
    for name, found in names.items():
        if found is not None:
            table.add_row(name, str(found), memory_size(found.memory), _seconds(found))
    yield table
    reasons: dict[str, list[int]] = {}
    for tensor, reason in plan.tensor_sizes.illegal.items():
        reasons.setdefault(reason, []).append(tensor)
    illegal = "; ".join(f"{ranges(found)} ({reason})" for reason, found in reasons.items())
    legal = f"Possible tensor-parallel sizes: {', '.join(map(str, plan.tensor_sizes.legal))}."
    yield Text(f"{legal} Not possible: {illegal}." if illegal else legal)


def ranges(numbers: list[int]) -> str:
    """Return numbers as text, with runs of consecutive ones joined: "3, 5-7"."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and runs[-1][-1] == number - 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def _methods(plan: Plan) -> Iterator[RenderableType]:
    heads = ("method", "trained", "% of base", "memory of a GPU", "added collectives per layer", "FLOPs per step")
    table = table_of("Other methods on the planned layout", *heads, "step (modelled)")
    for found in plan.methods:
        name = f"{found.method} ({found.placement})" if found.placement else found.method
        memory = memory_size(found.memory) + ("" if found.fits else ", does not fit")
        seconds = "" if found.seconds is None else f"{found.seconds:.3f} s"
        row = (f"{found.trained:,}", percent(found.percent), memory, str(found.added))
        table.add_row(name, *row, f"{found.flops:.3g}", seconds)
    yield table
    yield Text(
        "In brackets: how the trained parameters lie on tensor-parallel ranks. Added collectives: beyond those of a "
        "frozen layer. --bottleneck and --virtual-tokens set the sizes of the other methods.",
        style="dim",
    )


def _notes(plan: Plan) -> Iterator[str]:
    state = plan.state
    yield (
        f"Weights, gradients and optimizer state of one replica: {plan.trained.method} {size(state.planned)} "
        f"({state.planned_bytes_per_parameter:.3g} bytes per base parameter), full fine-tuning {size(state.full)} "
        f"({state.full_bytes_per_parameter:.3g})."
    )
    if plan.model.name == "gpt3-175b":
        yield "Hu et al. (2021) print 350 GB for low-rank and 1.2 TB for full training of GPT-3 175B with Adam."
