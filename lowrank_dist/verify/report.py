"""The lines that a verification prints."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from lowrank_dist.arch.cut import whole_path
from lowrank_dist.config import Config
from lowrank_dist.parallel.topology import Topology
from lowrank_dist.verify.compare import Difference, Record, first_difference, largest

_HEAD = ("", "largest difference in", "run", "reference", "difference", "bound")


def beginning(config: Config, topology: Topology, layers: Sequence[int], depth: int, nbytes: int) -> Iterator[str]:
    """Yield the lines on what is compared. depth: layers of the whole model. nbytes: of the cut model's weights."""
    numbers = " and ".join(map(str, layers))
    yield (
        f"cut to layer{'s' * (len(layers) > 1)} {numbers} of {depth} ({nbytes / 1e9:.2f} GB on each node); "
        f"{topology.tp_size} tensor × {topology.dp_size} data parallel, sequence parallel "
        f"{'on' if topology.sequence_parallel else 'off'}, {config.model.dtype}, recompute {config.engine.recompute}, "
        f"packing {'on' if config.data.packing else 'off'}, {config.method}"
    )
    train = config.train
    yield (
        f"differs from the run: no dropout, train.eps {train.eps:g}, {train.global_batch} samples a step, constant "
        f"train.lr {train.lr:g}, random values in place of zeros at the start"
    )


def table(run: Record, reference: Record, differences: Sequence[Difference], layers: Sequence[int]) -> list[str]:
    """Return a line for each quantity, with the tensor that differs most beside its bound.

    layers: numbers of the cut model's layers in the whole one.
    """
    ours, theirs = run.quantities(), reference.quantities()
    rows = [_HEAD]
    for each in largest(differences):
        pair = ("", "")
        if not each.name:  # a single number
            pair = f"{float(ours[each.quantity]['']):.5f}", f"{float(theirs[each.quantity]['']):.5f}"
        rows.append((each.quantity, whole_path(each.name, layers), *pair, f"{each.found:.1e}", f"{each.bound:.1e}"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(_cells(row, widths)).rstrip() for row in rows]


def _cells(row: Sequence[str], widths: Sequence[int]) -> Iterator[str]:
    for number, (text, width) in enumerate(zip(row, widths, strict=True)):
        yield text.ljust(width) if number < 2 else text.rjust(width)


def verdict(run: Record, differences: Sequence[Difference], layers: Sequence[int]) -> str:
    """Return the last line: what was held against each other, or the first module that differs."""
    found = first_difference(differences)
    if found is None:
        steps = len(run.losses)
        return f"verified: {len(run.gradients[0])} trained tensors, {steps} steps, {len(run.inputs)} inputs of linears"
    where = f" of {whole_path(found.name, layers)}" if found.name else ""
    count = sum(not each.agrees for each in differences)
    return (
        f"DIFFERS: first in {found.quantity}{where} ({found.found:.1e}, bound {found.bound:.1e}); {count} of "
        f"{len(differences)} differ"
    )
