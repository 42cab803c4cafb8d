"""Table 1 of Hu et al., "LoRA" (2021), repeated: latency of one forward pass, low-rank updates against adapter layers.

    python benchmarks/latency.py [--settings 1x128 16x256:5 …] [--trials 100] [--tp 1 2] [--device cpu] [--out DIR]

The model is GPT-2 medium (24 layers, H 1024, 16 heads) with random weights, in one process for each tensor-parallel
rank, over gloo on a CPU. A trial is one `CausalLM.decode` of the whole input, which is what a user waits for before the
first token: all layers with the keys and values kept, and the head on the last position, the same in every row. No
gradients, no sequence parallelism (there is none in decoding). A setting is BATCHxLENGTH[:TRIALS].

Rows, all on one base in memory: `base`, which is also any fully fine-tuned model; `merged`, the base's own modules with
weights W + s·B·A in q and v; `unmerged`, low-rank factors on q and v; adapter_l and adapter_h, at tensor parallel
sharded and replicated. Every row writes its weights to the same place in memory before a trial. The adapter rank or
bottleneck width is the multiple of every --tp whose |Θ| is nearest to the paper's.

Trials are interleaved: a round is one of every row, in a new random order, so that drift of the machine and what a row
leaves in the caches affect all rows alike. With several ranks a trial's time is the slowest one's, from a barrier on. A
row's relative latency is the mean of (row − base) of a round over the base's mean, ± its standard error. Collectives
are counted as they are issued (parallel/counting.py). Checks before timing: merged gives unmerged's results and
consists of the base's modules and parameters, and every row but the base's differs from it.

The last line is the verdict: merged adds nothing if it is within 2 standard errors (of at most 2.5 %) or 1 % of the
base and adds no collective; else the exit code is 1. results/latency.json (latency_cuda.json) and docs/latency.png are
written where the device's settings were all measured, with at least 100 trials of (1, 128); --out writes both whatever
was measured.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import math
import os
import random
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from record import machine, write_result
from rich import box
from rich.console import Console
from rich.table import Table
from spawn import start_ranks
from torch import Tensor, nn

from lowrank_dist.engine.planning import find_model
from lowrank_dist.methods.bottleneck.footprint import footprints_of_size
from lowrank_dist.methods.registry import Sizes

MODEL = "gpt2-medium"
TARGETS = ("q_proj", "v_proj")  # as the paper adapts GPT-2
SCALE, SPREAD = 2.0, 0.05  # s, and the size of every value of Θ: large enough that each row's output is its own
VOCAB_MULTIPLE = 128
WHOLE_TRIALS = 100
WITHIN_SHARE, WITHIN_ERRORS = 0.01, 2.0
LARGEST_NOISE = 0.05  # limit of two standard errors: with larger ones everything is within them
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# |merged − unmerged| over |unmerged − base| of the logits, at most.
AGREEMENT = {"fp32": 1e-3, "bf16": 0.2}
TIMEOUT_SECONDS = 3600
DOCS = Path(__file__).parents[1] / "docs"


@dataclass(frozen=True)
class Published:
    """Table 1 of the paper, on a Quadro RTX8000: |Θ|, milliseconds of merged, and those that adapter layers add."""

    theta: float
    milliseconds: float
    added: dict[str, float]


PUBLISHED = {
    (32, 512): Published(0.5e6, 1449.4, {"adapter_l": 0.022, "adapter_h": 0.030}),
    (16, 256): Published(11e6, 338.0, {"adapter_l": 0.050, "adapter_h": 0.084}),
    (1, 128): Published(11e6, 19.8, {"adapter_l": 0.207, "adapter_h": 0.303}),
}
# The shortest first: a time limit cuts off the least.
DEFAULTS = {"cpu": ((1, 128),), "cuda": tuple(reversed(PUBLISHED))}


@dataclass(frozen=True)
class Setting:
    batch: int
    length: int
    trials: int | None

    @property
    def published(self) -> Published:
        return PUBLISHED[self.batch, self.length]


@dataclass(frozen=True)
class Row:
    """One row of the table. placement: of adapter layers over several ranks."""

    method: str
    placement: str | None = None

    @property
    def name(self) -> str:
        return self.method if self.placement is None else f"{self.method}, {self.placement}"


def rows_of(tp: int) -> list[Row]:
    """Return the rows at tensor-parallel size `tp`, the base first."""
    placements = (None,) if tp == 1 else ("sharded", "replicated")
    adapters = [Row(method, placement) for method in ("adapter_l", "adapter_h") for placement in placements]
    return [Row("base"), Row("merged"), Row("unmerged"), *adapters]


def parameters_of(method: str, width: int) -> int:
    """Return |Θ| of factors of adapter rank `width` on TARGETS of every layer, or of adapter layers of that width."""
    shape = find_model(MODEL).architecture
    if method in ("adapter_l", "adapter_h"):
        (adapters,) = footprints_of_size(method, Sizes(bottleneck=width), shape, 1)
        return adapters.parameters(shape).trained
    return len(shape.layers) * len(TARGETS) * 2 * shape.hidden * width


def nearest_width(method: str, theta: float, step: int) -> int:
    """Return the multiple of `step`, at least one, whose |Θ| is nearest to `theta`; |Θ| is linear in it."""
    fixed = parameters_of(method, 0)
    slope = parameters_of(method, 1) - fixed
    return step * max(1, round((theta - fixed) / slope / step))


def order(count: int, number: int) -> list[int]:
    """Return the order of the rows in round `number`: random, the same on every rank."""
    return random.Random(number).sample(range(count), count)


# --- on every rank


@dataclass(frozen=True)
class Part:
    """One difference between a row and the base: an attribute of one object, and the row's value of it."""

    owner: Any
    name: str
    value: Any

    def put(self) -> Part:
        """Set the value; return the part that undoes it."""
        before = Part(self.owner, self.name, getattr(self.owner, self.name))
        if isinstance(self.owner, nn.Module) and self.name in self.owner._modules:
            delattr(self.owner, self.name)  # torch accepts no function in place of a module
        setattr(self.owner, self.name, self.value)
        return before


@dataclass(frozen=True)
class Values:
    """A row's values of one weight, and the base's `own`; written into the weight's own memory.

    Every row writes all of its values, the base too, so that all rows' weights lie in the same place and were written
    equally recently.
    """

    weight: nn.Parameter
    values: Tensor
    own: Tensor

    def put(self) -> Values:
        """Write the values; return the part that undoes it."""
        self.weight.data.copy_(self.values)
        return self.plain

    @property
    def plain(self) -> Values:
        """The same weight with the base's values."""
        return Values(self.weight, self.own, self.own)


@contextmanager
def installed(parts: Sequence[Part | Values]) -> Iterator[None]:
    """Turn the model into the row's inside the block."""
    before = [part.put() for part in parts]
    try:
        yield
    finally:
        for part in before:
            part.put()


class Bench:
    """The base on this rank, and the rows of one setting made from it."""

    def __init__(self, tp: int, args: argparse.Namespace) -> None:
        from lowrank_dist.backend.select import init_process_group, local_rank, select_backend
        from lowrank_dist.model.causal_lm import CausalLM
        from lowrank_dist.parallel.topology import Topology

        self.backend = init_process_group(select_backend(args.device, local_rank()), TIMEOUT_SECONDS)
        self.topology = Topology.build(tp, None, False, TIMEOUT_SECONDS)
        self.dtype = args.dtype
        self.model = CausalLM(
            find_model(MODEL).architecture,
            self.topology,
            dtype=DTYPES[args.dtype],
            device=self.backend.device,
            vocab_multiple=VOCAB_MULTIPLE,
        ).eval()
        self._fill()

    @torch.no_grad()
    def _fill(self) -> None:
        """Initialise as GPT-2: each tensor is seeded by its name, and a shard also by its rank."""
        from lowrank_dist.arch.architecture import padded_vocab
        from lowrank_dist.arch.tensors import copy_plans

        architecture, size = self.model.architecture, self.topology.tp_size
        plans = copy_plans(architecture, 0, size, padded_vocab(architecture.vocab, VOCAB_MULTIPLE, size))
        for name, parameter in self.model.named_parameters():
            if parameter.dim() == 1:
                parameter.fill_(float(name.endswith("weight")))
                continue
            rank = self.topology.tp_rank if plans[name].cut else 0
            values = torch.empty(parameter.shape).normal_(0, 0.02, generator=_generator(f"{name}:{rank}"))
            parameter.copy_(values)

    def _slots(self) -> list[tuple[nn.Module, str]]:
        """Return every place where a method puts something of its own."""
        from lowrank_dist.parallel.linear import LowRankLinear

        linears = [module for module in self.model.modules() if isinstance(module, LowRankLinear)]
        slots: list[tuple[nn.Module, str]] = [(linear, name) for linear in linears for name in ("frozen", "update")]
        sums = [add for layer in self.model.decoder.layers for add in (layer.self_attn_bda, layer.mlp_bda)]
        return slots + [(add, "bottleneck") for add in sums]

    def _taken(self, attach: Callable[[], Any]) -> tuple[list[Part], int]:
        """Return the parts that `attach` (→ Theta) adds, with nonzero values, and their |Θ|. The model is restored."""
        slots = self._slots()
        before = [Part(owner, name, getattr(owner, name)) for owner, name in slots]
        theta = attach()
        shapes = theta.all_shapes()
        values = {name: torch.empty(s).normal_(0, SPREAD, generator=_generator(name)) for name, s in shapes.items()}
        theta.set_from_whole(values, self.topology.coordinates)
        after = [Part(owner, name, getattr(owner, name)) for owner, name in slots]
        parts = [new for old, new in zip(before, after, strict=True) if new.value is not old.value]
        for part in before:
            part.put()
        return parts, sum(value.numel() for value in values.values())

    def _low_rank(self, rank: int) -> tuple[list[Part], int]:
        from lowrank_dist.arch.placement import LoraRules, place_factors
        from lowrank_dist.methods.lora.factors import inject, lora_theta
        from lowrank_dist.parallel.masks import MaskSource

        topology = self.topology
        placements = place_factors(self.model.architecture, LoraRules(rank, SCALE * rank, TARGETS, False, {}, {}))
        masks = MaskSource(0, 0)

        def attach() -> Any:
            adapted = inject(self.model, placements, masks, 0, topology.tp_rank, topology.tp_size)
            return lora_theta(adapted, topology.tp_size, masks)

        return self._taken(attach)

    def _adapter(self, row: Row, bottleneck: int) -> tuple[list[Part], int]:
        from lowrank_dist.methods.bottleneck.files import BottleneckConfig
        from lowrank_dist.methods.bottleneck.method import Adapters

        architecture = self.model.architecture
        config = BottleneckConfig(
            method=row.method,
            bottleneck=bottleneck,
            layers=len(architecture.layers),
            hidden=architecture.hidden,
            base=MODEL,
        )
        method = Adapters(config, row.placement or "replicated", 0)
        return self._taken(lambda: method.attach(self.model, self.topology, resumed=True))

    def parts(self, widths: dict[str, int]) -> dict[Row, tuple[list[Part | Values], int]]:
        """Return every row's difference from the base, and its |Θ|."""
        low_rank, theta = self._low_rank(widths["unmerged"])
        folded = [merged(part.owner, part.value) for part in low_rank if part.name == "update"]
        plain = [values.plain for values in folded]
        made: dict[Row, tuple[list[Part | Values], int]] = {}
        for row in rows_of(self.topology.tp_size):
            if row.method == "base":
                made[row] = (plain, 0)
            elif row.method == "merged":
                made[row] = (folded, theta)
            elif row.method == "unmerged":
                made[row] = (low_rank + plain, theta)
            else:
                parts, count = self._adapter(row, widths[row.method])
                made[row] = (parts + plain, count)
        return made

    def describe(self) -> tuple[list[tuple[str, str]], list[tuple[str, tuple[int, ...], str, tuple[int, ...]]]]:
        """Describe the current model: its modules and their kinds, and its parameters with shape, dtype, strides."""
        modules = [(name, type(module).__qualname__) for name, module in self.model.named_modules()]
        parameters = [(name, tuple(p.shape), str(p.dtype), p.stride()) for name, p in self.model.named_parameters()]
        return modules, parameters

    def measure(self, setting: Setting, trials: int, widths: dict[str, int]) -> list[dict[str, Any]]:
        """Check, count and time every row: its |Θ|, collectives by kind, and the seconds of each trial on this rank."""
        from lowrank_dist.parallel.counting import count_collectives

        device = self.backend.device
        tokens = torch.arange(setting.batch * setting.length, device=device).view(setting.batch, -1)
        tokens = tokens * 48_271 % self.model.architecture.vocab
        cache = self.model.new_cache(torch.zeros(setting.batch, dtype=torch.int64, device=device), setting.length)

        def forward() -> Tensor:
            cache.filled = 0
            return self.model.decode(tokens, cache)

        made = self.parts(widths)
        facts: list[dict[str, Any]] = []
        logits, kinds = {}, {}
        for row, (parts, theta) in made.items():
            with installed(parts), count_collectives() as count:
                logits[row], kinds[row] = forward(), self.describe()
            facts.append({"name": row.name, "theta": theta, "calls": count.calls_by_kind(), "seconds": []})
        self._require(logits, kinds)
        del logits
        gc.collect()
        gc.disable()
        for number in range(-1, trials):  # the first round warms up
            for index in order(len(made), number):
                with installed(list(made.values())[index][0]):
                    seconds = self._timed(forward)
                if number >= 0:
                    facts[index]["seconds"].append(seconds)
        gc.enable()
        return facts

    def _timed(self, forward: Callable[[], Tensor]) -> float:
        if self.topology.tp_size > 1:
            torch.distributed.barrier(self.topology.tp_group)
        self.backend.synchronize()
        started = time.perf_counter()
        logits = forward()
        self.backend.synchronize()
        seconds = time.perf_counter() - started
        del logits  # freed while no time is measured
        return seconds

    def _require(self, logits: dict[Row, Tensor], kinds: dict[Row, Any]) -> None:
        """Raise AssertionError unless each row is what it claims to be."""
        base, own, plain = Row("base"), Row("merged"), Row("unmerged")
        assert kinds[own] == kinds[base], "merged is not made of the base's modules and parameters"
        assert kinds[plain] != kinds[base], "unmerged is made of the base's modules alone"
        vocab = min(self.model.architecture.vocab, logits[base].size(1))  # −∞ in padding rows of the last rank
        found = {row: value.float()[:, :vocab].nan_to_num(neginf=0.0) for row, value in logits.items()}

        def apart(a: Row, b: Row) -> float:
            return (found[a] - found[b]).abs().max().item()

        update = apart(plain, base)
        assert apart(own, plain) <= AGREEMENT[self.dtype] * update, "merged computes something else than unmerged"
        for row in found:
            assert row == base or apart(row, base) > 0.01 * found[base].abs().max().item(), f"{row.name} is the base"


def merged(linear: nn.Module, factors: Any) -> Values:
    """Return the linear's weight with the update of this rank's shard, rounded once: W + s·B·A."""
    own = linear.weight.detach().clone()
    update = factors.dense_bt(torch.float32).t() @ factors.scaled_a(torch.float32, None)
    return Values(linear.weight, update.add_(own.float()).to(own.dtype), own)


def _generator(name: str) -> torch.Generator:
    digest = hashlib.sha256(name.encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))


def rank_main(rank: int, tp: int, port: int, args: argparse.Namespace, parent: Connection) -> None:
    """Run one rank; send the results of every setting as they come."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(tp), LOCAL_WORLD_SIZE=str(tp))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(max(1, args.threads // tp))
    from lowrank_dist.backend.libraries import quiet_libraries
    from lowrank_dist.backend.select import shutdown

    quiet_libraries()
    bench = Bench(tp, args)
    for setting in args.settings:
        parent.send(bench.measure(setting, setting.trials or args.trials, widths_of(setting, args.tp)))
    parent.recv()
    shutdown(clean=True)


# --- in the parent process


def widths_of(setting: Setting, sizes: Sequence[int]) -> dict[str, int]:
    """Return adapter rank or width by method: the same at every tensor-parallel size, so a multiple of each."""
    step = math.lcm(*sizes)
    theta = setting.published.theta
    widths = {method: nearest_width(method, theta, step) for method in ("adapter_l", "adapter_h")}
    return widths | {"unmerged": nearest_width("unmerged", theta, 1)}


def statistics_of(base: Sequence[float], row: Sequence[float]) -> dict[str, float]:
    """Return mean and deviation in ms; and a round's mean difference and standard error over the base's mean."""
    differences = [mine - its for mine, its in zip(row, base, strict=True)]
    mean = statistics.mean(base)
    spread = [statistics.stdev(values) if len(values) > 1 else math.nan for values in (row, differences)]
    return {
        "milliseconds": 1e3 * statistics.mean(row),
        "deviation": 1e3 * spread[0],
        "added": statistics.mean(differences) / mean,
        "standard_error": spread[1] / math.sqrt(len(differences)) / mean,
    }


def judged(setting: Setting, tp: int, trials: int, widths: dict[str, int], ranks: Sequence[Any]) -> dict[str, Any]:
    """Return the figures of one setting from the results of its ranks."""
    facts = ranks[0]
    for other in ranks[1:]:
        same = [[fact[key] for key in ("name", "theta", "calls")] for fact in other]
        assert same == [[fact[key] for key in ("name", "theta", "calls")] for fact in facts], "ranks are not alike"
    slowest = [
        [max(of_rank) for of_rank in zip(*(rank[index]["seconds"] for rank in ranks), strict=True)]
        for index in range(len(facts))
    ]
    rows = []
    for row, fact, seconds in zip(rows_of(tp), facts, slowest, strict=True):
        method = "unmerged" if row.method == "merged" else row.method
        width = widths.get(method)
        if width is not None:
            assert fact["theta"] == parameters_of(method, width), f"{row.name}: |Θ| is not the formula's"
        more: Counter[str] = fact["calls"] - facts[0]["calls"]
        assert not facts[0]["calls"] - fact["calls"], f"{row.name} issues fewer collectives than the base"
        rows.append(
            {
                "name": row.name,
                "method": row.method,
                "theta": fact["theta"],
                "width": width,
                "collectives": fact["calls"].total(),
                "added_collectives": dict(more),
                **statistics_of(slowest[0], seconds),
            }
        )
    return {"batch": setting.batch, "length": setting.length, "tp": tp, "trials": trials, "rows": rows}


def run(tp: int, args: argparse.Namespace, console: Console) -> list[dict[str, Any]]:
    """Run every setting at one tensor-parallel size."""
    processes, pipes = start_ranks(rank_main, tp, args)
    results = []
    for setting in args.settings:
        try:
            ranks = [pipe.recv() for pipe in pipes]
        except EOFError:
            sys.exit(f"a rank of {tp} ended before its time; what it said stands above")
        results.append(judged(setting, tp, setting.trials or args.trials, widths_of(setting, args.tp), ranks))
        show(results[-1], console)
    for pipe in pipes:  # receive all first: the ranks leave together
        pipe.send("bye")
    for process in processes:
        process.join()
    return results


def show(result: dict[str, Any], console: Console) -> None:
    """Print one setting as a Markdown table."""
    published = PUBLISHED[result["batch"], result["length"]]
    console.print(
        f"\nbatch {result['batch']}, length {result['length']}, |Θ| about {published.theta / 1e6:g}M, "
        f"TP {result['tp']}, {result['trials']} trials; published: Quadro RTX8000\n"
    )
    table = Table(box=box.MARKDOWN)
    for name in ("", "|Θ|", "r or m", "ms", "over base", "added collectives", "published ms", "published"):
        # A bar inside a cell would end it.
        table.add_column(name.replace("|", r"\|"), justify="left" if not name else "right")
    for row in result["rows"]:
        added = published.added.get(row["method"])
        theirs = published.milliseconds if row["method"] in ("base", "merged") else None
        if added is not None:
            theirs = published.milliseconds * (1 + added)
        table.add_row(
            row["name"],
            f"{row['theta']:,}" if row["theta"] else "",
            "" if row["width"] is None else str(row["width"]),
            f"{row['milliseconds']:.1f} ± {row['deviation']:.1f}",
            "" if row["method"] == "base" else f"{row['added']:+.1%} ± {row['standard_error']:.1%}",
            collectives(row),
            "" if theirs is None else f"{theirs:.1f}",
            "" if added is None else f"{added:+.1%}",
        )
    console.print(table)


def collectives(row: dict[str, Any]) -> str:
    """Return the collectives that a row adds to a forward pass, by kind; for the base, all of its own."""
    if row["method"] == "base":
        return f"(has {row['collectives']})"
    return ", ".join(f"{count} {kind}" for kind, count in sorted(row["added_collectives"].items())) or "0"


def verdict(result: dict[str, Any]) -> tuple[str, bool]:
    """Return whether merged adds nothing, and the verdict as a sentence."""
    row = next(row for row in result["rows"] if row["method"] == "merged")
    noise = WITHIN_ERRORS * row["standard_error"]
    tells = noise <= LARGEST_NOISE
    within = abs(row["added"]) <= max(WITHIN_SHARE, noise)
    holds = tells and within and not row["added_collectives"]
    return (
        f"({result['batch']}, {result['length']}), TP {result['tp']}: merged {row['added']:+.2%} ± "
        f"{row['standard_error']:.2%} of the base, {sum(row['added_collectives'].values())} collectives added "
        f"(at most {WITHIN_ERRORS:g} standard errors or {WITHIN_SHARE:.0%}, and none): "
        f"{'holds' if holds else 'MISSED' if tells else 'TOO NOISY TO TELL, take more trials or a quiet machine'}"
    ), holds


def draw(results: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw the latency that each row adds to the base's, with two standard errors, beside the published one."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    sizes = list(dict.fromkeys(result["tp"] for result in results))
    figure = Figure(figsize=(5.5 * len(sizes), 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    for place, tp in enumerate(sizes, start=1):
        axes = figure.add_subplot(1, len(sizes), place, title=f"TP {tp}", ylabel="added to the base's latency, %")
        shown = [result for result in results if result["tp"] == tp]
        names = [row["name"] for row in shown[0]["rows"][1:]]
        width = 0.8 / len(names)
        for index, name in enumerate(names):
            x = [at + (index - (len(names) - 1) / 2) * width for at in range(len(shown))]
            rows = [result["rows"][index + 1] for result in shown]
            errors = [100 * WITHIN_ERRORS * row["standard_error"] for row in rows]
            axes.bar(x, [100 * row["added"] for row in rows], width, yerr=errors, label=name, capsize=2)
            known = [
                (at, 100 * PUBLISHED[result["batch"], result["length"]].added[row["method"]])
                for at, result, row in zip(x, shown, rows, strict=True)
                if row["method"] in ("adapter_l", "adapter_h")
            ]
            if known:
                label = "published" if index == len(names) - 1 else None
                axes.plot(*zip(*known, strict=True), "kD", markerfacecolor="white", zorder=3, label=label)
        axes.set_xticks(range(len(shown)), [f"({result['batch']}, {result['length']})" for result in shown])
        axes.axhline(0, color="black", linewidth=0.8)
        axes.grid(axis="y", alpha=0.3)
        axes.legend(fontsize="small")
    figure.savefig(path, dpi=90)


def parse_setting(text: str) -> Setting:
    """Parse BATCHxLENGTH[:TRIALS]."""
    try:
        sizes, _, trials = text.partition(":")
        batch, length = map(int, sizes.split("x"))
        setting = Setting(batch, length, int(trials) if trials else None)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text} is not BATCHxLENGTH[:TRIALS]") from None
    if (batch, length) not in PUBLISHED or (setting.trials is not None and setting.trials < 1):
        known = ", ".join(f"{batch}x{length}" for batch, length in PUBLISHED)
        raise argparse.ArgumentTypeError(f"{text}: the settings are {known}, with at least one trial")
    return setting


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--settings", nargs="+", type=parse_setting, metavar="BATCHxLENGTH[:TRIALS]")
    parser.add_argument("--trials", type=int, default=WHOLE_TRIALS, help="trials of a setting that gives no number")
    parser.add_argument("--tp", nargs="+", type=int, help="tensor-parallel sizes (default: 1 and 2 on a CPU, else 1)")
    parser.add_argument("--device", choices=DEFAULTS, default="cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument(
        "--threads", type=int, default=len(os.sched_getaffinity(0)), help="threads of all ranks together"
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="write JSON and picture there, even of a partial run")
    args = parser.parse_args()
    args.settings = args.settings or [Setting(*sizes, None) for sizes in DEFAULTS[args.device]]
    args.tp = args.tp or ([1, 2] if args.device == "cpu" else [1])
    if min(args.trials, args.threads) < 1:
        parser.error("--trials and --threads must be at least 1")
    heads = find_model(MODEL).architecture.heads
    if any(tp < 1 or heads % tp for tp in args.tp):
        parser.error(f"--tp must divide {heads} heads")
    if args.device == "cuda" and max(args.tp) > torch.cuda.device_count():
        parser.error(f"--tp {max(args.tp)} needs as many GPUs: ranks that share one measure its time slices")
    return args


def is_whole(args: argparse.Namespace) -> bool:
    """Return whether this measurement goes into the results folder, by the rule of the module docstring."""
    trials = {(setting.batch, setting.length): setting.trials or args.trials for setting in args.settings}
    sizes = {1, 2} if args.device == "cpu" else {1}
    enough = trials.get((1, 128), 0) >= WHOLE_TRIALS
    return enough and set(DEFAULTS[args.device]) <= trials.keys() and sizes <= set(args.tp) and args.dtype == "fp32"


def main() -> None:
    args = parse()
    started_on = machine(args.device)
    console = Console(width=150)
    results = [result for tp in args.tp for result in run(tp, args, console)]
    verdicts = [verdict(result) for result in results]
    figures = {
        "model": MODEL,
        "dtype": args.dtype,
        "device": args.device,
        "threads": args.threads,
        "published_on": "Quadro RTX8000",
        "settings": results,
        "merged_adds_nothing": all(holds for _, holds in verdicts),
    }
    name = "latency_cuda" if args.device == "cuda" else "latency"
    if is_whole(args):
        print(f"\nwritten: {write_result(name, started_on, figures)}, {DOCS / f'{name}.png'}")
        draw(results, DOCS / f"{name}.png")
    if args.out is not None:
        write_result(name, started_on, figures, args.out)
        draw(results, args.out / f"{name}.png")
    print()
    for words, _ in verdicts:
        print(words)
    sys.exit(0 if figures["merged_adds_nothing"] else 1)


if __name__ == "__main__":
    main()
