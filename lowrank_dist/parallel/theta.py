"""Θ on the ranks: its parameters, and which part of which stored tensor lies in which of them.

One map serves initialisation, checkpoints and resumption of every method: a tensor is stored whole, and any rank of any
layout takes its pieces from it.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lowrank_dist.parallel.masks import MaskSource

Index = tuple[slice | list[int], ...]
ALL: Index = (slice(None),)


@dataclass(frozen=True)
class Piece:
    """A part of one stored tensor in one parameter: `whole[index]` is `view(local)`.

    view: takes the parameter, or a tensor like it (its master, a moment), to a view of the part.
    """

    tensor: str
    index: Index
    view: Callable[[Tensor], Tensor]


def all_of(tensor: str) -> Piece:
    """The piece of a parameter that is the stored tensor."""
    return Piece(tensor, ALL, lambda local: local)


@dataclass(frozen=True)
class Held:
    """One parameter on one rank: its shape and its pieces. What no piece covers is padding, which stays zero."""

    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]


@dataclass(frozen=True)
class Theta:
    """The parameters that a method trains, and how they lie on the ranks.

    parameters: of this rank, fp32, `mark`ed, in the order that optimiser and checkpoints go by. shapes: of each
    parameter, the stored tensors (name → whole shape) that it holds pieces of on some rank; a tensor is in one
    parameter's alone. layout: tensor-parallel rank → what each parameter is there; pure, so that any rank can tell for
    all. masks: of the dropout, to be told of each microbatch.
    """

    parameters: tuple[nn.Parameter, ...]
    shapes: tuple[Mapping[str, tuple[int, ...]], ...]
    layout: Callable[[int], Sequence[Held]]
    masks: MaskSource

    def __post_init__(self) -> None:
        assert len(self.parameters) == len(self.shapes)

    @property
    def elements(self) -> int:
        """Of this rank."""
        return sum(parameter.numel() for parameter in self.parameters)

    def all_shapes(self) -> dict[str, tuple[int, ...]]:
        """Stored name → whole shape."""
        return {name: shape for shapes in self.shapes for name, shape in shapes.items()}

    def spread(self, values: Mapping[str, Tensor], tp_rank: int) -> None:
        """Set every parameter from whole tensors by their stored names."""
        for parameter, held in zip(self.parameters, self.layout(tp_rank), strict=True):
            scatter(held.pieces, values, parameter)

    def batches(self, elements: int) -> list[list[int]]:
        """Numbers of consecutive parameters whose stored tensors have about so many elements together."""
        found: list[list[int]] = []
        room = 0
        for number, shapes in enumerate(self.shapes):
            size = sum(torch.Size(shape).numel() for shape in shapes.values())
            if not found or size > room:
                found.append([])
                room = elements
            found[-1].append(number)
            room -= size
        return found


def mark(parameter: nn.Parameter, *, sharded: bool, partial: bool) -> nn.Parameter:
    """Say what the engine must know of a parameter of Θ.

    sharded: cut over tensor parallelism, else a copy on every rank. partial: a copy whose gradient is a partial sum
    over the ranks (the deferred reduction), else every rank has the whole of it.
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
    """Return [rows, columns] of U(−1/√columns, 1/√columns), a linear's usual start, from (seed, name) alone."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
    bound = 1 / math.sqrt(columns)
    return torch.empty(rows, columns).uniform_(-bound, bound, generator=generator)


@torch.no_grad()
def scatter(pieces: Iterable[Piece], values: Mapping[str, Tensor], local: Tensor) -> None:
    """Fill a parameter, or a tensor like it, from whole tensors."""
    for piece in pieces:
        piece.view(local).copy_(values[piece.tensor][piece.index])


@torch.no_grad()
def gather(pieces: Iterable[Piece], local: Tensor, values: Mapping[str, Tensor]) -> None:
    """Fill whole tensors with what one rank has of them: the inverse of `scatter`."""
    for piece in pieces:
        values[piece.tensor][piece.index] = piece.view(local)
