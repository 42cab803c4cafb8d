"""The dropout masks of the linears: a pure function of a token's identity, independent of where it is computed.

The mask of an element is Philox4×32-7 of (seed, step, layer and input, sample in the global batch, position in the
sample, global feature), so any sharding, packing, padding or recomputation regenerates the same one.
"""

from __future__ import annotations

from torch import Tensor

from lowrank_dist.ops.mask import Mask


def stream_of(layer: int, number: int) -> int:
    """Return the 32-bit Philox stream of one linear input in layer `layer` (from 0).

    number: the input, as `arch.rows.Linear.stream` numbers it. Bits 0 to 23 hold 4 · layer + number mod 4, the bits
    above them number // 4.
    """
    assert 0 <= layer < 2**22 and 0 <= number < 2**10, "the stream has 32 bits"
    above, beside = divmod(number, 4)
    return above << 24 | layer * 4 + beside


class MaskSource:
    """The source of dropout masks, shared by all linears of a model.

    The engine announces each microbatch with `set`; the linears ask for masks with `mask`.

    `rows` is int64 [s, b] (sequence-major): index in the global batch × sequence limit + position in the sample.
    """

    def __init__(self, seed: int, threshold: int) -> None:
        self.seed = seed
        self.threshold = threshold
        self._rows: Tensor | None = None
        self._key: Tensor | None = None

    def set(self, step: int, rows: Tensor) -> None:
        """Announce a microbatch. The counters are created on the device of `rows`, without a copy from the host."""
        self._rows = rows
        self._key = rows.new_full((2,), self.seed)
        self._key[1:].fill_(step)

    def mask(self, stream: int, feature_offset: int, shard: tuple[int, int] | None) -> Mask | None:
        """Return the mask of one input, or None where p = 0. `shard` = (rank, size) where tokens are sharded."""
        if self.threshold == 0:
            return None
        if self._rows is None or self._key is None:
            raise AssertionError("dropout is on, but no microbatch was set; call MaskSource.set first")
        rows = self._rows if shard is None else self._rows.chunk(shard[1], dim=0)[shard[0]]
        return Mask(rows.reshape(-1), self._key, stream, self.threshold, feature_offset)
