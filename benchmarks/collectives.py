"""Collective calls per layer, forward and backward: Megatron's own frozen linears against the adapted ones.

    python benchmarks/collectives.py [--tp 2] [--family llama]

A tiny random model is written and loaded twice by --tp processes over gloo: with Megatron's unmodified
ColumnParallelLinear and RowParallelLinear, and with low-rank factors on every choice of targets. Both are counted with
an embedding whose output requires a gradient, as it does where everything is trained, so that the lowest layer is a
layer like the others; "as trained" is the adapted model with its frozen embedding. One layer is a model of two layers
minus a model of one. Counted where torch.distributed hands a call to the dispatcher; a planted call must show. The last
line is the largest difference found, `added_per_layer=…`, over all settings.

A frozen layer of an olmo2 has one call more each way, for its norms of queries and keys over all heads, and an adapted
one has it too. The figures of an olmo2 are printed and not recorded.
"""

import argparse
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from record import machine, write_result
from rich.console import Console
from rich.table import Table
from spawn import start_ranks
from transformers import LlamaConfig, LlamaForCausalLM, Olmo2Config, Olmo2ForCausalLM
from transformers.utils.logging import disable_progress_bar

HIDDEN, DEPTHS, RANK = 128, (1, 2), 4
ROWS, LENGTH = 2, 32
TARGETS = {
    "all-linear": "all-linear",
    **{
        name: [f"{name}_proj"] if "+" not in name else [f"{part}_proj" for part in name.split("+")]
        for name in ("q", "k", "v", "o", "gate", "up", "down", "q+v", "q+k+v", "gate+up", "o+down")
    },
}

FAMILIES = {"llama": (LlamaConfig, LlamaForCausalLM), "olmo2": (Olmo2Config, Olmo2ForCausalLM)}

Calls = dict[str, Counter[str]]
Ranks = dict[str, int]


@dataclass(frozen=True)
class Setting:
    """One row of the result; `targets` None is the frozen model. `planted`: one added call each way."""

    sequence: bool
    recompute: bool
    targets: str | None
    trained: bool = False
    planted: bool = False


def settings() -> list[Setting]:
    modes = [(sequence, recompute) for sequence in (True, False) for recompute in (False, True)]
    return [
        *(Setting(*mode, None) for mode in modes),
        *(Setting(*mode, name, trained) for mode in modes for name in TARGETS for trained in (False, True)),
        *(Setting(sequence, False, "all-linear", planted=True) for sequence in (True, False)),
    ]


def write_model(folder: Path, layers: int, family: str) -> Path:
    config_class, model_class = FAMILIES[family]
    config = config_class(
        vocab_size=256,
        hidden_size=HIDDEN,
        intermediate_size=2 * HIDDEN,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=LENGTH,
        tie_word_embeddings=False,
    )
    model_class(config).save_pretrained(folder)
    return folder


def rank_main(rank: int, tp: int, port: int, folders: dict[int, Path], parent: Connection) -> None:
    """On one rank: count every setting at every depth and send the results of `measure`, by (setting, depth)."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(tp), LOCAL_WORLD_SIZE=str(tp))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    from lowrank_dist.backend.select import init_process_group, select_backend, shutdown
    from lowrank_dist.parallel.topology import Topology

    init_process_group(select_backend("cpu"), timeout_seconds=60)
    topology = Topology.build(tp, None, None, timeout_seconds=60)
    results = {
        (setting, depth): measure(setting, folder, replace(topology, sequence_parallel=setting.sequence))
        for setting in settings()
        for depth, folder in folders.items()
    }
    parent.send(results)
    parent.recv()
    shutdown(clean=True)


def measure(setting: Setting, folder: Path, topology: Any) -> tuple[Calls, Calls, Ranks]:
    """Return calls and bytes by phase and kind of one microbatch's forward and backward, and R of each linear."""
    from lowrank_dist.parallel.counting import count_collectives

    model, ranks = build(setting, folder, topology)
    if not setting.trained:
        model.embedding.register_forward_hook(lambda module, args, output: output.requires_grad_())
    if setting.planted:
        model.decoder.layers[0].mlp.linear_fc1.register_forward_hook(partial(plant, topology.tp_group))
    tokens = torch.arange(ROWS * LENGTH).view(ROWS, LENGTH)
    positions = torch.arange(LENGTH).expand(ROWS, LENGTH)
    with count_collectives() as forward:
        loss = model.loss(tokens, positions, target_index=tokens.flatten(), target_ids=tokens.flatten())
    with count_collectives() as backward:
        loss.backward()
    phases = {"forward": forward, "backward": backward}
    calls = {phase: count.calls_by_kind() for phase, count in phases.items()}
    return calls, {phase: count.bytes_by_kind() for phase, count in phases.items()}, ranks


def build(setting: Setting, folder: Path, topology: Any) -> tuple[Any, Ranks]:
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear

    from lowrank_dist.arch.placement import LoraRules, place_factors
    from lowrank_dist.methods.lora.factors import inject
    from lowrank_dist.model.load import check_model, load_model
    from lowrank_dist.parallel.frozen import fuses_factors
    from lowrank_dist.parallel.masks import MaskSource

    load: Callable[..., Any] = partial(
        load_model,
        folder,
        check_model(folder, topology.tp_size, LENGTH),
        topology,
        device=torch.device("cpu"),
        dtype="fp32",
        vocab_multiple=1,
        broadcast=False,
    )
    if setting.targets is None:
        model, ranks = load(linears=(ColumnParallelLinear, RowParallelLinear)), {}
    else:
        model = load()
        placements = place_factors(
            model.architecture, LoraRules(RANK, 2.0 * RANK, TARGETS[setting.targets], False, {}, {})
        )
        fuse_factors = fuses_factors("auto", "cpu")
        adapted = inject(model, placements, MaskSource(0, 0), 0, topology.tp_rank, topology.tp_size, fuse_factors)
        ranks = dict.fromkeys(model.architecture.layers[0].linears, 0)
        ranks |= {x.placement.linear: x.factors.total_rank for x in adapted if x.placement.layer == 0}
    model.set_recompute(setting.recompute)
    return model, ranks


def plant(group: Any, module: Any, args: Any, output: Any) -> None:
    """A forward hook that adds one call in forward and one in backward."""
    torch.distributed.all_reduce(torch.zeros(1), group=group)
    output[0].register_hook(lambda grad: torch.distributed.all_reduce(torch.zeros(1), group=group))


def run(tp: int, folders: dict[int, Path]) -> dict[tuple[Setting, int], tuple[Calls, Calls, Ranks]]:
    ranks, pipes = start_ranks(rank_main, tp, folders)
    results = [pipe.recv() for pipe in pipes]
    for pipe in pipes:  # receive all before waiting for any: they leave together
        pipe.send("bye")
    for process in ranks:
        process.join()
    assert all(result == results[0] for result in results), "ranks of one group must issue the same calls"
    return results[0]


def added(frozen: Calls, adapted: Calls) -> int:
    """Return the number of calls by which two counts differ, in either direction, phase by phase and kind by kind."""
    return sum(
        abs(adapted[phase][kind] - frozen[phase][kind])
        for phase in frozen
        for kind in frozen[phase].keys() | adapted[phase].keys()
    )


def mean_rank(ranks: Ranks, repeated: set[str]) -> float:
    """Return the mean R of a layer's messages under sequence parallelism; over H it is the layer's allowed growth.

    Each linear has one message forward and one backward. Recomputation repeats the forward ones of the `repeated`.
    """
    messages = {name: 2 + (name in repeated) for name in ranks}
    return sum(messages[name] * rank for name, rank in ranks.items()) / sum(messages.values())


def one_layer(deep: Calls, shallow: Calls) -> dict[str, int]:
    return {phase: deep[phase].total() - shallow[phase].total() for phase in deep}


def compare(
    family: str, setting: Setting, results: dict[tuple[Setting, int], tuple[Calls, Calls, Ranks]]
) -> dict[str, Any]:
    """Return the figures of one choice of targets against the frozen model in the same mode."""
    shallow, deep = DEPTHS
    frozen = Setting(setting.sequence, setting.recompute, None)
    calls = [one_layer(results[key, deep][0], results[key, shallow][0]) for key in (frozen, setting)]
    sizes = [one_layer(results[key, deep][1], results[key, shallow][1]) for key in (frozen, setting)]
    trained = Setting(setting.sequence, setting.recompute, setting.targets, trained=True)
    before, after = (sum(size.values()) for size in sizes)
    ranks = results[setting, deep][2]
    # Nothing needs the result of the last message, fc2's, again, except a norm behind the MLP.
    repeated = {name for name in ranks if name != "linear_fc2" or family == "olmo2"} if setting.recompute else set()
    growth, allowed = after / before - 1, mean_rank(ranks, repeated) / HIDDEN
    over_heads = (2 + setting.recompute) * 8 * ROWS * LENGTH * (family == "olmo2")
    # Without sequence parallelism every product is added before the reduction: no message grows.
    expected = allowed * (1 - over_heads / before) if setting.sequence else 0.0
    assert abs(growth - expected) < 1e-9, f"{setting}: bytes grow by {growth:.6f} instead of {expected:.6f}"
    return {
        "targets": setting.targets,
        "sequence_parallel": setting.sequence,
        "recompute": setting.recompute,
        "calls_per_layer": dict(zip(("frozen", "adapted"), calls, strict=True)),
        "bytes_per_layer": dict(zip(("frozen", "adapted"), sizes, strict=True)),
        "byte_growth": growth,
        "rank_over_hidden": allowed,
        f"calls_of_{deep}_layers": {
            name: {phase: dict(count) for phase, count in results[key, deep][0].items()}
            for name, key in (("frozen", frozen), ("adapted", setting), ("as_trained", trained))
        },
        "added_per_layer": max(
            added(results[frozen, depth][0], results[setting, depth][0]) / depth for depth in DEPTHS
        ),
    }


def show(rows: list[dict[str, Any]], tp: int) -> None:
    deep = f"calls_of_{DEPTHS[-1]}_layers"
    for sequence, recompute in dict.fromkeys((row["sequence_parallel"], row["recompute"]) for row in rows):
        table = Table(
            *("targets", "forward calls", "backward calls", "KiB", "growth", "R/H", "as trained"),
            title=f"One layer, frozen → adapted; TP {tp}, sequence parallel {'on' if sequence else 'off'}"
            f"{', recompute' if recompute else ''}",
        )
        for row in rows:
            if (row["sequence_parallel"], row["recompute"]) != (sequence, recompute):
                continue
            calls, sizes = row["calls_per_layer"].values(), [sum(x.values()) for x in row["bytes_per_layer"].values()]
            whole = [sum(sum(kinds.values()) for kinds in phases.values()) for phases in row[deep].values()]
            table.add_row(
                row["targets"],
                *(" → ".join(str(count[phase]) for count in calls) for phase in ("forward", "backward")),
                " → ".join(f"{size / 1024:.1f}" for size in sizes),
                f"{row['byte_growth']:.2%}",
                f"{row['rank_over_hidden']:.2%}",
                f"{whole[2]} of {whole[0]}",
            )
        Console(width=100).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tp", type=int, default=2, choices=(2, 4, 8), help="tensor-parallel ranks")
    parser.add_argument("--family", default="llama", choices=FAMILIES)
    args = parser.parse_args()
    tp = args.tp
    disable_progress_bar()
    started_on = machine()
    with tempfile.TemporaryDirectory(prefix="collectives.") as folder:
        results = run(tp, {layers: write_model(Path(folder, str(layers)), layers, args.family) for layers in DEPTHS})
    compared = [s for s in settings() if s.targets is not None and not s.trained and not s.planted]
    rows = [compare(args.family, setting, results) for setting in compared]
    show(rows, tp)
    print(
        f"KiB: whole messages of one layer, both ways. R/H: R of a layer's messages, their mean, over H = {HIDDEN}.\n"
        f"as trained: all calls of {DEPTHS[-1]} adapted layers above a frozen embedding, of those of the frozen layers."
    )
    for planted in (setting for setting in settings() if setting.planted):
        frozen = Setting(planted.sequence, planted.recompute, None)
        seen = {depth: added(results[frozen, depth][0], results[planted, depth][0]) for depth in DEPTHS}
        if set(seen.values()) != {2}:
            sys.exit(f"two calls were planted and the count shows {seen}: the counter is wrong")
        mode = "on" if planted.sequence else "off"
        print(
            f"planted with sequence parallel {mode}: 1 call forward, 1 backward; the count shows {seen[DEPTHS[0]]} more"
        )
    worst = max(row["added_per_layer"] for row in rows)
    model = {"hidden": HIDDEN, "rank": RANK, "rows": ROWS, "length": LENGTH, "depths": DEPTHS}
    if args.family == "llama":
        write_result("collectives", started_on, {"tp": tp, "model": model, "settings": rows, "added_per_layer": worst})
    print(f"added_per_layer={worst:g}")


if __name__ == "__main__":
    main()
