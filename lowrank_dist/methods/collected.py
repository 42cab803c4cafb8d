"""Trained files of a Θ that is small enough to be held whole."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor


class Collected:
    """Keeps every tensor, and hands them to `write` at the end."""

    def __init__(self, write: Callable[[Mapping[str, Tensor]], None]) -> None:
        self._write = write
        self._tensors: dict[str, Tensor] = {}

    def put(self, name: str, tensor: Tensor) -> None:
        self._tensors[name] = tensor

    def finish(self) -> None:
        self._write(self._tensors)
