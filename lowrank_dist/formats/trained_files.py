"""Writers of what a method trained: the protocol, and the one for a Θ that is small enough to be held whole."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

from torch import Tensor


class TrainedFiles(Protocol):
    """Writes what a method trained into a folder, as those read it who have no use for an optimiser's state.

    It is given every tensor of Θ, by its stored name, in fp32, one after the other, and told when it has them all.
    `finish` raises UserError for what no one may take for trained weights: nothing, no change, NaN or infinity.
    """

    def put(self, name: str, tensor: Tensor) -> None: ...

    def finish(self) -> None: ...


class Collected:
    """Keeps every tensor, and hands them to `write` at the end."""

    def __init__(self, write: Callable[[Mapping[str, Tensor]], None]) -> None:
        self._write = write
        self._tensors: dict[str, Tensor] = {}

    def put(self, name: str, tensor: Tensor) -> None:
        self._tensors[name] = tensor

    def finish(self) -> None:
        self._write(self._tensors)
