"""A frozen weight and its low-rank factor in one buffer, so that one GEMM multiplies both (docs/DESIGN.md).

    column-parallel   buffer [O, K + R] = [W ∣ b]     Y = [X ∣ U]·bufferᵀ      [dX ∣ dU] = dY·buffer
    row-parallel      buffer [O + R, K] = [W ; a]     P = [X·Wᵀ ∣ U] = X·bufferᵀ      dX = [dY ∣ dU]·buffer

Only under sequence parallelism, where [X ∣ U] and [dY ∣ dU] lie side by side anyway: they are the messages. The
row-parallel identities need X̃ = X and hence no dropout; with a mask the linear uses W as a part of the buffer.

Legend: K inputs and O outputs of this rank's weight, R = Σ r; a = s·A [R, K]; b = block-diagonal B [O, R].
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

# Where it was measured to be faster (docs/LOG.md): 0.93 to 0.99 of the two products' time on a CPU. On an H200 a layer
# took 0.985 of the time in one setting, and no twin has trained with it there.
FASTER_ON = ("cpu",)


def wanted(lanes: Literal["auto", "on", "off"], device: str) -> bool:
    """Whether engine.lanes puts factors into lanes on this kind of device."""
    return lanes == "on" or (lanes == "auto" and device in FASTER_ON)


class Lanes:
    """The buffer. The weight's storage moves into it, so W exists once; the factor is written anew before each use."""

    def __init__(self, weight: nn.Parameter, total_rank: int, kind: Literal["column", "row"]) -> None:
        out_features, in_features = weight.shape
        self.kind = kind
        if kind == "column":
            self._buffer = weight.new_empty(out_features, in_features + total_rank, requires_grad=False)
            inside, self._factor = self._buffer[:, :in_features], self._buffer[:, in_features:]
        else:
            self._buffer = weight.new_empty(out_features + total_rank, in_features, requires_grad=False)
            inside, self._factor = self._buffer[:out_features], self._buffer[out_features:]
        inside.copy_(weight.detach())
        weight.data = inside

    def with_factor(self, factor: Tensor) -> Tensor:
        """The buffer with b [O, R] or a [R, K] in its lanes. A factor that changed since cannot be forgotten in it."""
        self._factor.copy_(factor)
        return self._buffer
