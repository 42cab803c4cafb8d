"""Dropout whose mask is a function of what an element is, never of where, when or on how many ranks it is computed.

    y[t,k] = x[t,k]·keep(t,k) / (1 − threshold/65536),    keep(t,k) = draw16(t,k) >= threshold

`draw16` comes from Philox4x32 with 7 rounds (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).
The key is (seed, step), the counter (f >> 3, row mod 2^32, row >> 32, stream) with f = feature_offset + k. The four
words of a block are eight 16-bit draws, the low half of a word first, and f & 7 picks one.

Legend: T tokens, K features on this rank, G blocks of eight features.
"""

from __future__ import annotations

import logging
from functools import cache

import torch
from torch import Tensor

from lowrank_dist.ops.extension import extension_loaded, why_not

LEVELS = 1 << 16
_MASK32 = 0xFFFFFFFF
_ROUNDS = 7


def quantise(p: float) -> int:
    """The threshold for dropout probability p in [0, 1): p in units of 1/65536, rounded. ValueError outside.

    The probability that is used, here and in the 1/(1 − p) that keeps the mean, is threshold/65536.
    """
    threshold = round(p * LEVELS) if 0 <= p < 1 else LEVELS
    if threshold >= LEVELS:
        raise ValueError(f"dropout probability {p} is not in [0, 1 - 1/131072)")
    return threshold


def philox_dropout(
    x_TK: Tensor, rows_T: Tensor, *, seed: int, step: int, stream: int, threshold: int, feature_offset: int = 0
) -> Tensor:
    """Dropout of x [T, K] (fp64, fp32, bf16 or fp16, any strides) → contiguous [T, K]; x itself at threshold 0.

    `rows_T` (int64 ≥ 0, [T]) names each token, `feature_offset` is the global index of x's first feature; seed, step
    and stream count modulo 2^32. The gradient is the same call on dY. Autograd does not pass through: the caller's own
    autograd function applies the mask both ways, so a tensor that asks for a gradient here is a programming error.
    """
    if threshold == 0:
        return x_TK
    assert not (torch.is_grad_enabled() and x_TK.requires_grad), "philox_dropout has no autograd of its own"
    if x_TK.device.type != "cpu" or not _compiled():
        return philox_dropout_ref(
            x_TK, rows_T, seed=seed, step=step, stream=stream, threshold=threshold, feature_offset=feature_offset
        )
    return torch.ops.lowrank_dist.dropout(
        x_TK, rows_T, seed & _MASK32, step & _MASK32, stream & _MASK32, threshold, feature_offset
    )


def philox_dropout_ref(
    x_TK: Tensor, rows_T: Tensor, *, seed: int, step: int, stream: int, threshold: int, feature_offset: int = 0
) -> Tensor:
    """The same function, bit for bit, in plain PyTorch: any device, differentiable in x."""
    features = x_TK.shape[1]
    first = feature_offset // 8
    blocks_G = torch.arange(first, (feature_offset + features + 7) // 8, device=x_TK.device)
    draws = _draws(blocks_G, rows_T, seed & _MASK32, step & _MASK32, stream & _MASK32)
    skip = feature_offset - 8 * first
    keep_TK = draws[:, skip : skip + features] >= threshold
    compute = torch.float64 if x_TK.dtype == torch.float64 else torch.float32
    return (x_TK.to(compute) * (keep_TK.to(compute) * (LEVELS / (LEVELS - threshold)))).to(x_TK.dtype)


def _draws(blocks_G: Tensor, rows_T: Tensor, seed: int, step: int, stream: int) -> Tensor:
    """The 16-bit draws of every feature of the blocks: int64 [T, 8G]."""
    shape = (rows_T.shape[0], blocks_G.shape[0])
    counter = [
        (blocks_G & _MASK32).expand(shape),
        (rows_T & _MASK32)[:, None].expand(shape),
        (rows_T >> 32 & _MASK32)[:, None].expand(shape),
        torch.full((1, 1), stream, device=blocks_G.device).expand(shape),
    ]
    words = torch.stack(_philox4x32(counter, seed, step), dim=-1)
    return torch.stack((words & 0xFFFF, words >> 16), dim=-1).reshape(shape[0], 8 * shape[1])


def _philox4x32(counter: list[Tensor], key0: int, key1: int, rounds: int = _ROUNDS) -> list[Tensor]:
    """Four int64 tensors that hold 32-bit words → four more."""
    c0, c1, c2, c3 = counter
    for _ in range(rounds):
        high0, low0 = _multiply32(c0, 0xD2511F53)
        high1, low1 = _multiply32(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = high1 ^ c1 ^ key0, low1, high0 ^ c3 ^ key1, low0
        key0, key1 = key0 + 0x9E3779B9 & _MASK32, key1 + 0xBB67AE85 & _MASK32
    return [c0, c1, c2, c3]


def _multiply32(a: Tensor, b: int) -> tuple[Tensor, Tensor]:
    """The high and the low word of a 32×32-bit product. By halves, since int64 holds no unsigned 64-bit number."""
    low = a * (b & 0xFFFF)
    middle = a * (b >> 16) + (low >> 16)
    return middle >> 16, (middle & 0xFFFF) << 16 | low & 0xFFFF


@cache
def _compiled() -> bool:
    """Whether the compiled operator is there; says so once where it is not."""
    if not extension_loaded():
        logging.getLogger(__name__).warning("dropout runs as plain PyTorch, several times slower: %s", why_not())
    return extension_loaded()


if extension_loaded():

    @torch.library.register_fake("lowrank_dist::dropout")
    def _(x: Tensor, rows: Tensor, seed: int, step: int, stream: int, threshold: int, feature_offset: int) -> Tensor:
        return x.new_empty(x.shape)
