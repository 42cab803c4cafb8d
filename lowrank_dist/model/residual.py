"""What stands between a block and its residual: Megatron's addition, with a trained module before it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from torch import Tensor, nn


class ThenAdd(nn.Module):
    """In the place of Megatron's `get_bias_dropout_add`: a block's output goes through `module` before it is added."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, training: bool, fused: bool) -> Callable[..., Tensor]:
        add = get_bias_dropout_add(training, fused)

        def through(x_with_bias: tuple[Tensor, Tensor | None], residual: Tensor, *rest: Any) -> Tensor:
            x, bias = x_with_bias
            x = x if bias is None else x + bias
            return add((self.module(x), None), residual, *rest)

        return through
