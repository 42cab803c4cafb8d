"""The dropout mask of the low-rank path: a function of seed, step, stream, token and feature, not of the sharding.

    m(t,k) = [draw16(t,k) >= threshold],    X̃ = m ⊙ X / (1 − threshold/65536)

`draw16` comes from Philox4x32 with 7 rounds (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).
The key is (seed, step), the counter (f >> 3, row mod 2^32, row >> 32, stream) with f = feature_offset + k. The four
words of a block are eight 16-bit draws, the low half of a word first, and f & 7 picks one.

The mask is binary: operators select with it, and 1/(1 − p) is folded into A with the scale of the factor. A dropped
element contributes nothing, even if it is infinite or NaN; such an element still reaches Y through the frozen
product.

Legend: T tokens, K features on this rank, G blocks of eight features.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

LEVELS = 1 << 16
_MASK32 = 0xFFFFFFFF
_ROUNDS = 7


def quantise(p: float) -> int:
    """Return the threshold for dropout probability p in [0, 1]: p in units of 1/65536, rounded.

    The effective probability is threshold/65536, also in the factor 1/(1 − p) that keeps the mean. Raises ValueError
    for p outside [0, 1], and for p below 1 that would round to 1 and silently drop everything.
    """
    if not 0 <= p <= 1 or (p < 1 and round(p * LEVELS) == LEVELS):
        raise ValueError(f"dropout probability {p} is neither in [0, 1 - 1/131072) nor 1")
    return round(p * LEVELS)


@dataclass(frozen=True)
class Mask:
    """A dropout mask, stored as the counters from which it is drawn.

    rows: int64 ≥ 0 [T], the number of each token. key: int64 [2], (seed, step). Both are on the computing device, so
    that a captured CUDA graph draws the mask of the step that is stored there. stream and key are taken modulo 2^32.
    threshold: 1 to 65536. feature_offset: the global index of the first feature.
    """

    rows: Tensor
    key: Tensor
    stream: int
    threshold: int
    feature_offset: int

    @property
    def scale(self) -> float:
        """1/(1 − p), which keeps the mean; 0 where everything is dropped."""
        return LEVELS / (LEVELS - self.threshold) if self.threshold < LEVELS else 0.0

    def keep(self, features: int) -> Tensor:
        """Return m, defined in plain PyTorch: bool [T, features] on the device of `rows`."""
        first = self.feature_offset // 8
        blocks_G = torch.arange(first, (self.feature_offset + features + 7) // 8, device=self.rows.device)
        draws = _draws(blocks_G, self.rows, self.key & _MASK32, self.stream & _MASK32)
        skip = self.feature_offset - 8 * first
        return draws[:, skip : skip + features] >= self.threshold

    def select(self, x_TK: Tensor) -> Tensor:
        """Return m ⊙ x in plain PyTorch: [T, K] → [T, K]."""
        return x_TK.masked_fill(~self.keep(x_TK.shape[1]), 0)


def counters(mask: Mask | None) -> tuple[Tensor | None, Tensor | None, int, int, int]:
    """Return the last arguments of a compiled operator: rows, key, stream, threshold (0: no mask), feature_offset."""
    if mask is None:
        return None, None, 0, 0, 0
    return mask.rows, mask.key, mask.stream & _MASK32, mask.threshold, mask.feature_offset


def _draws(blocks_G: Tensor, rows_T: Tensor, key: Tensor, stream: int) -> Tensor:
    """Return the 16-bit draws of every feature of the blocks: int64 [T, 8G]."""
    shape = (rows_T.shape[0], blocks_G.shape[0])
    counter = [
        (blocks_G & _MASK32).expand(shape),
        (rows_T & _MASK32)[:, None].expand(shape),
        (rows_T >> 32 & _MASK32)[:, None].expand(shape),
        torch.full((1, 1), stream, device=blocks_G.device).expand(shape),
    ]
    words = torch.stack(_philox4x32(counter, key), dim=-1)
    return torch.stack((words & 0xFFFF, words >> 16), dim=-1).reshape(shape[0], 8 * shape[1])


def _philox4x32(counter: list[Tensor], key: Tensor, rounds: int = _ROUNDS) -> list[Tensor]:
    """Return four output words for a counter of four words under the key's two words (32-bit words in int64)."""
    c0, c1, c2, c3 = counter
    key0, key1 = key[0], key[1]
    for _ in range(rounds):
        high0, low0 = _multiply32(c0, 0xD2511F53)
        high1, low1 = _multiply32(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = high1 ^ c1 ^ key0, low1, high0 ^ c3 ^ key1, low0
        key0, key1 = key0 + 0x9E3779B9 & _MASK32, key1 + 0xBB67AE85 & _MASK32
    return [c0, c1, c2, c3]


def _multiply32(a: Tensor, b: int) -> tuple[Tensor, Tensor]:
    """Return the high and low word of a 32×32-bit product, by halves: int64 cannot hold an unsigned 64-bit number."""
    low = a * (b & 0xFFFF)
    middle = a * (b >> 16) + (low >> 16)
    return middle >> 16, (middle & 0xFFFF) << 16 | low & 0xFFFF
