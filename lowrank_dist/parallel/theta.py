"""The trained parameters Θ on the ranks, and the map between them and the stored tensors.

One map serves initialisation, checkpoints and resumption of every method: a tensor is stored whole, and any rank of any
layout takes its slices from it.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lowrank_dist.parallel.coordinates import RankCoordinates
from lowrank_dist.parallel.masks import MaskSource

Index = tuple[slice | list[int], ...]
ALL: Index = (slice(None),)


@dataclass(frozen=True)
class TensorSlice:
    """A part of one stored tensor in one parameter: `whole[index]` equals `view(local)`.

    view: maps the parameter, or a tensor shaped like it (its fp32 master, an optimizer moment), to a view of the part.
    """

    tensor: str
    index: Index
    view: Callable[[Tensor], Tensor]


def whole_tensor(tensor: str) -> TensorSlice:
    """Return the slice of a parameter that holds the whole stored tensor."""
    return TensorSlice(tensor, ALL, lambda local: local)


@dataclass(frozen=True)
class LocalShard:
    """One parameter on one rank: its shape and its slices. Elements in no slice are padding, which stays zero."""

    shape: tuple[int, ...]
    slices: tuple[TensorSlice, ...]


@dataclass(frozen=True)
class TrainedParameter:
    """One parameter of Θ and its placement on the ranks.

    parameter: that of this rank, in fp32, with the attributes that `mark` sets. shapes: name → whole shape of the
    stored tensors whose slices the parameter holds, on this or another rank; a stored tensor belongs to one parameter
    only. shard_at: function from a rank's coordinates to its share there; pure, so any rank can compute it for all.
    of_expert: the rank's expert coordinate decides its share, not the dense one.
    """

    parameter: nn.Parameter
    shapes: Mapping[str, tuple[int, ...]]
    shard_at: Callable[[RankCoordinates], LocalShard]
    of_expert: bool = False

    def shard_key(self, coordinates: RankCoordinates) -> tuple[int, int]:
        """Return the key that is common to all ranks with the same share (data-parallel replicas)."""
        dense, expert = coordinates
        return (expert.ep, expert.pp) if self.of_expert else (dense.tp, dense.pp)

    def is_sent_by(self, coordinates: RankCoordinates) -> bool:
        """Return whether a rank's share goes into a checkpoint: every shard does, of copies only the first rank's."""
        return is_sharded(self.parameter) or self.shard_key(coordinates)[0] == 0


def _nothing() -> None:
    pass


@dataclass(frozen=True)
class Theta:
    """The parameters that a method trains, in the order that optimizer and checkpoints use.

    masks: the source of dropout masks; call its `set` with each microbatch. refresh: recomputes what the method derives
    from the parameters. Call it whenever their values have changed, by an optimizer step or a restore. Collective.
    """

    trained: tuple[TrainedParameter, ...]
    masks: MaskSource
    refresh: Callable[[], None] = _nothing

    @property
    def parameters(self) -> tuple[nn.Parameter, ...]:
        """The parameters of this rank."""
        return tuple(each.parameter for each in self.trained)

    @property
    def elements(self) -> int:
        """The number of elements on this rank."""
        return sum(parameter.numel() for parameter in self.parameters)

    def all_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return stored name → whole shape."""
        return {name: shape for each in self.trained for name, shape in each.shapes.items()}

    def set_from_whole(self, values: Mapping[str, Tensor], coordinates: RankCoordinates) -> None:
        """Set every parameter of the rank at `coordinates` from whole tensors, given by stored name. Collective."""
        for each in self.trained:
            copy_from_whole(each.shard_at(coordinates).slices, values, each.parameter)
        self.refresh()

    def batches(self, elements: int) -> list[list[int]]:
        """Return groups of consecutive parameter numbers: each at most `elements` stored elements, or one parameter."""
        found: list[list[int]] = []
        room = 0
        for number, each in enumerate(self.trained):
            size = sum(torch.Size(shape).numel() for shape in each.shapes.values())
            if not found or size > room:
                found.append([])
                room = elements
            found[-1].append(number)
            room -= size
        return found


def mark(parameter: nn.Parameter, *, sharded: bool, partial: bool) -> nn.Parameter:
    """Set the attributes of a parameter of Θ that the engine reads, and return the parameter.

    sharded: tensor parallelism cuts it; otherwise every rank has a copy. partial: it is a copy whose gradient is a
    partial sum over the ranks (the deferred reduction); otherwise every rank has the whole gradient.
    """
    assert not (sharded and partial)
    marked: Any = parameter  # torch declares no attributes of ours
    marked.tensor_model_parallel, marked.tp_partial_grad = sharded, partial  # the first is DeepSpeed's name too
    return parameter


def is_sharded(parameter: nn.Parameter) -> bool:
    """Return whether tensor parallelism cuts a `mark`ed parameter; else every rank has a copy."""
    marked: Any = parameter
    return marked.tensor_model_parallel


def is_partial(parameter: nn.Parameter) -> bool:
    """Return whether the gradient of a `mark`ed parameter is a partial sum over the ranks."""
    marked: Any = parameter
    return marked.tp_partial_grad


def drawn_by_name(name: str, seed: int, rows: int, columns: int) -> Tensor:
    """Return [rows, columns] of U(−1/√columns, 1/√columns), a linear's usual initialisation, seeded by (seed, name)."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
    bound = 1 / math.sqrt(columns)
    return torch.empty(rows, columns).uniform_(-bound, bound, generator=generator)


@torch.no_grad()
def copy_from_whole(slices: Iterable[TensorSlice], values: Mapping[str, Tensor], local: Tensor) -> None:
    """Fill a parameter, or a tensor shaped like it, from whole tensors."""
    for tensor_slice in slices:
        tensor_slice.view(local).copy_(values[tensor_slice.tensor][tensor_slice.index])


@torch.no_grad()
def copy_to_whole(slices: Iterable[TensorSlice], local: Tensor, values: Mapping[str, Tensor]) -> None:
    """Copy one rank's slices into whole tensors: the inverse of `copy_from_whole`."""
    for tensor_slice in slices:
        values[tensor_slice.tensor][tensor_slice.index] = tensor_slice.view(local)
