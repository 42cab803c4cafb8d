"""The large products with frozen weights, alone or with the low-rank product added to the same output.

    Y = X·Wᵀ + bias                 `linear`, on the fastest library
    Y = X·Wᵀ + bias + U·Bᵀ          `adapted`
    dX = dY·W + m ⊙ (dU·A)          `adapted_grad_x`

In fp32 on a CPU, torch.mm calls MKL, which runs its AVX2 kernels on processors not made by Intel. oneDNN is in every
x86 build of torch and uses AVX-512 wherever the processor has it: 240 against 106 GFLOP/s per core on an AMD EPYC of
family 26, on the same plain layout and to the same accuracy (docs/LOG.md). bf16 goes to oneDNN either way, CUDA to
cuBLAS.

On CUDA the low-rank product is written first and the frozen GEMM adds to it (beta = 1). The frozen GEMM is compute
bound, so the read in its epilogue costs little. If the low-rank product came second, it would read and write the output
in an extra pass. The term that is written first is rounded before the sum. Here that is the low-rank product. On a CPU
oneDNN's fp32 product has no beta, so the low-rank product comes second.

Legend: T tokens, K inputs, O outputs, R = Σ r, m dropout mask.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lowrank_dist.ops.low_rank import expand, up
from lowrank_dist.ops.mask import Mask


def linear_ref(x_TK: Tensor, weight_OK: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return X·Wᵀ + bias in plain PyTorch: [T, K], [O, K] → [T, O]."""
    return x_TK @ weight_OK.t() if bias is None else torch.addmm(bias, x_TK, weight_OK.t())


def linear(x_TK: Tensor, weight_OK: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return X·Wᵀ + bias: [T, K], [O, K] → [T, O], contiguous. Any strides; no autograd.

    dX = dY·W is the same call with `weight.t()` as the weight.
    """
    if _onednn_is_faster(x_TK, weight_OK):
        # The operator that torch.compile emits for a linear on CPUs; the last three arguments are its fused activation.
        return torch.ops.mkldnn._linear_pointwise(x_TK, weight_OK, bias, "none", [], "")
    return linear_ref(x_TK, weight_OK, bias)


def linear_into(out_TO: Tensor, x_TK: Tensor, weight_OK: Tensor) -> None:
    """Write X·Wᵀ into `out` [T, O], which may be a slice of the columns of a wider message."""
    if x_TK.device.type == "cpu":
        out_TO.copy_(linear(x_TK, weight_OK))
    else:
        torch.mm(x_TK, weight_OK.t(), out=out_TO)


def _onednn_is_faster(x: Tensor, weight: Tensor) -> bool:
    if x.dtype != torch.float32 or x.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    # A weight that is dense in neither order runs in oneDNN's reference loop, a thousand times slower.
    dense = weight.is_contiguous() or weight.t().is_contiguous()
    return dense and x.numel() > 0 and weight.numel() > 0


def adapted(
    x_TK: Tensor, weight_OK: Tensor, bias: Tensor | None, u_TR: Tensor, bt_RO: Tensor, blocks: Sequence[int]
) -> Tensor:
    """Return X·Wᵀ + bias + U·Bᵀ: [T, O], contiguous. `blocks` as in ops/low_rank.py. No autograd."""
    if x_TK.device.type == "cuda":
        y_TO = u_TR @ bt_RO if bias is None else torch.addmm(bias, u_TR, bt_RO)
        return y_TO.addmm_(x_TK, weight_OK.t())
    y_TO = linear(x_TK, weight_OK, bias)
    up(y_TO, u_TR, bt_RO, blocks)
    return y_TO


def adapted_grad_x(dy_TO: Tensor, weight_OK: Tensor, du_TR: Tensor, a_RK: Tensor, mask: Mask | None) -> Tensor:
    """Return dY·W + m ⊙ (dU·A): [T, K], contiguous. No autograd."""
    if dy_TO.device.type == "cuda":
        dx_TK = dy_TO.new_empty(dy_TO.size(0), weight_OK.size(1))
        expand(dx_TK, du_TR, a_RK, mask, accumulate=False)
        return dx_TK.addmm_(dy_TO, weight_OK)
    dx_TK = linear(dy_TO, weight_OK.t())
    expand(dx_TK, du_TR, a_RK, mask)
    return dx_TK
