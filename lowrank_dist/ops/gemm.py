"""The large matrix products with frozen weights: Y = X·Wᵀ, on whichever library multiplies fastest.

In fp32 on a CPU torch.mm goes to MKL, which runs its AVX2 kernels on processors that are not Intel's; oneDNN, which is
in every x86 build of torch, uses AVX-512 wherever it is: 240 against 106 GFLOP/s a core on an AMD EPYC of family 26, on
the same plain layout and to the same accuracy (docs/LOG.md). bf16 goes to oneDNN either way, CUDA to cuBLAS.

Legend: T tokens, K inputs, O outputs.
"""

from __future__ import annotations

import torch
from torch import Tensor


def linear_ref(x_TK: Tensor, weight_OK: Tensor, bias: Tensor | None = None) -> Tensor:
    """X·Wᵀ + bias in plain PyTorch: [T, K], [O, K] → [T, O]."""
    return x_TK @ weight_OK.t() if bias is None else torch.addmm(bias, x_TK, weight_OK.t())


def linear(x_TK: Tensor, weight_OK: Tensor, bias: Tensor | None = None) -> Tensor:
    """X·Wᵀ + bias: [T, K], [O, K] → [T, O], contiguous. Any strides; no autograd (called from hand-written functions).

    With `weight.t()` as the weight it is the product with W itself, dX = dY·W.
    """
    if _onednn_is_faster(x_TK, weight_OK):
        # The operator that torch.compile emits for a linear on CPUs; the last three arguments are its fused activation.
        return torch.ops.mkldnn._linear_pointwise(x_TK, weight_OK, bias, "none", [], "")
    return linear_ref(x_TK, weight_OK, bias)


def linear_into(out_TO: Tensor, x_TK: Tensor, weight_OK: Tensor) -> None:
    """X·Wᵀ written into `out` [T, O], which may be columns of a wider message."""
    if x_TK.device.type == "cpu":
        out_TO.copy_(linear(x_TK, weight_OK))
    else:
        torch.mm(x_TK, weight_OK.t(), out=out_TO)


def _onednn_is_faster(x: Tensor, weight: Tensor) -> bool:
    if x.dtype != torch.float32 or x.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    # A weight that is not dense in one of the two orders falls to oneDNN's reference loop, a thousand times slower.
    dense = weight.is_contiguous() or weight.t().is_contiguous()
    return dense and x.numel() > 0 and weight.numel() > 0
