"""Trained keys and values in every layer (Li & Liang 2021), cut over tensor parallelism by heads.

Legend: l virtual positions, L layers, G key/value heads of the model and g of this rank, d head width, H hidden, w
width of the reparametrising MLP, N ranks.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.nn import functional as F

from lowrank_dist.parallel.theta import ALL, Held, Index, Piece, all_of, mark

KEYS_VALUES = "prefix"
EMBEDDING, HIDDEN, HIDDEN_BIAS, OUTPUT, OUTPUT_BIAS = (
    f"prefix.{name}" for name in ("embedding", "hidden.weight", "hidden.bias", "output.weight", "output.bias")
)


class Prefix(nn.Module):
    """Keys and values [L, 2, g, l, d] of this rank's heads, in fp32.

    They are the parameters themselves, or with `width` an MLP's output over a trained embedding of each position:
    W_o·tanh(W_h·e + b_h) + b_o. Where heads are fewer than ranks, of which several then share one, the parameters are
    whole on every rank and each rank's gradient is that of its own head.
    """

    def __init__(
        self,
        length: int,
        width: int | None,
        *,
        hidden: int,
        layers: int,
        kv_heads: int,
        head_dim: int,
        group: ProcessGroup,
        device: torch.device,
    ) -> None:
        super().__init__()
        self.length = length
        self._size = group.size()
        self._cut = kv_heads % self._size == 0
        self._heads, self._rank = kv_heads, group.rank()
        held = kv_heads // self._size if self._cut else kv_heads
        self._whole = (layers, 2, kv_heads, head_dim)
        local = (layers, 2, held, head_dim)
        alone = self._size == 1

        def parameter(*shape: int, sharded: bool) -> nn.Parameter:
            tensor = torch.zeros(shape, dtype=torch.float32, device=device)
            # What lies before the heads has a gradient from every rank's, of which the sum is the whole.
            return mark(nn.Parameter(tensor), sharded=sharded and not alone, partial=not sharded)

        self.keys_values = self.embedding = None
        if width is None:
            self.keys_values = parameter(length, *local, sharded=self._cut)
        else:
            self.embedding = parameter(length, hidden, sharded=False)
            self.hidden, self.hidden_bias = parameter(width, hidden, sharded=False), parameter(width, sharded=False)
            self.output = parameter(*local, width, sharded=self._cut)
            self.output_bias = parameter(*local, sharded=self._cut)
        self._width, self._hidden = width, hidden

    def forward(self) -> Tensor:
        if self.embedding is None:
            found = self.keys_values
        else:
            inner = torch.tanh(F.linear(self.embedding, self.hidden, self.hidden_bias))
            found = F.linear(inner, self.output.flatten(0, 3), self.output_bias.flatten()).unflatten(
                1, self.output_bias.shape
            )
        if not self._cut:
            # Several ranks share a head.
            own = self._rank * self._heads // self._size
            found = found[:, :, :, own : own + 1]
        return found.permute(1, 2, 3, 0, 4)

    def shapes(self) -> tuple[dict[str, tuple[int, ...]], ...]:
        """Of each parameter in turn: the stored tensor and its whole shape."""
        if self._width is None:
            return ({KEYS_VALUES: (self.length, *self._whole)},)
        return (
            {EMBEDDING: (self.length, self._hidden)},
            {HIDDEN: (self._width, self._hidden)},
            {HIDDEN_BIAS: (self._width,)},
            {OUTPUT: (*self._whole, self._width)},
            {OUTPUT_BIAS: self._whole},
        )

    def layout(self, tp_rank: int) -> list[Held]:
        """Of each parameter in turn: what it is on a tensor-parallel rank."""
        held = []
        for parameter, shapes in zip(self.parameters(), self.shapes(), strict=True):
            ((name, shape),) = shapes.items()
            piece = Piece(name, self._heads_of(name, tp_rank), lambda local: local) if self._cut else all_of(name)
            held.append(Held(tuple(parameter.shape), (piece,)))
            assert self._cut or tuple(parameter.shape) == shape
        return held

    def _heads_of(self, name: str, tp_rank: int) -> Index:
        before = {KEYS_VALUES: 3, OUTPUT: 2, OUTPUT_BIAS: 2}.get(name)
        if before is None:
            return ALL
        count = self._heads // self._size
        return (*(slice(None),) * before, slice(tp_rank * count, (tp_rank + 1) * count))


def keys_values(tensors: dict[str, Tensor]) -> Tensor:
    """[l, L, 2, G, d] from the stored tensors of a `Prefix`, whole, with or without an MLP."""
    if KEYS_VALUES in tensors:
        return tensors[KEYS_VALUES]
    inner = torch.tanh(F.linear(tensors[EMBEDDING], tensors[HIDDEN], tensors[HIDDEN_BIAS]))
    output, bias = tensors[OUTPUT], tensors[OUTPUT_BIAS]
    return F.linear(inner, output.flatten(0, 3), bias.flatten()).unflatten(1, bias.shape)
