"""Modules of the frozen model that replace Megatron's fused ones."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lowrank_dist.backend.apex import norm_class
from lowrank_dist.model.norms import ZeroCenteredNorm


class FrozenNorm:
    """Builder of the norm that a TransformerConfig names, with or without sequence parallelism.

    Megatron's wrapper of the torch norms refuses sequence parallelism, because it would have to reduce the gradient of
    the weight over token shards. The weight of a frozen norm has no gradient. On CUDA the norm is apex's if apex is
    usable.
    """

    def __new__(cls, config: TransformerConfig, hidden_size: int, eps: float, **_: Any) -> Any:
        if config.layernorm_zero_centered_gamma:
            return ZeroCenteredNorm(hidden_size, eps).to(config.params_dtype)
        # The model is built under `with torch.device(…)`, so the default device is the one that the norms run on.
        kind = norm_class(config.normalization, torch.get_default_device().type)
        return kind(hidden_size, eps=eps).to(config.params_dtype)


class _SwiGlu(torch.autograd.Function):
    """silu(gate) ⊙ up. It saves only its input; Megatron's expression saves three tensors of this width."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        gate, up = gate_up.chunk(2, dim=-1)
        grad = torch.empty_like(gate_up)
        d_gate, d_up = grad.chunk(2, dim=-1)
        torch.mul(dy, F.silu(gate), out=d_up)
        torch.ops.aten.silu_backward(dy * up, gate, grad_input=d_gate)
        return grad


class SwiGlu(nn.Module):
    """Activation of a gated MLP on this rank's [gate ∣ up]: [.., 2F / N] → [.., F / N]."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()

    def forward(self, gate_up: Tensor) -> Tensor:
        return _SwiGlu.apply(gate_up)


class ResidualAdd(nn.Module):
    """Replacement of Megatron's `get_bias_dropout_add` that transforms a block's output before the residual addition.

    The output passes `bottleneck` (that of an adapter method), the layer's post-norm and the scale, where these exist.
    """

    def __init__(self, norm: nn.Module | None, scale: float) -> None:
        super().__init__()
        self.bottleneck: nn.Module | None = None
        # The norm is already a submodule of the layer; the tuple keeps torch from registering it here a second time.
        self._norm, self._scale = (norm,), scale

    def forward(self, training: bool, fused: bool) -> Callable[..., Tensor]:
        add = get_bias_dropout_add(training, fused)
        modules = [module for module in (self.bottleneck, *self._norm) if module is not None]
        if not modules and self._scale == 1.0:
            return add

        def through(x_with_bias: tuple[Tensor, Tensor | None], residual: Tensor, *rest: Any) -> Tensor:
            x, bias = x_with_bias
            x = x if bias is None else x + bias
            for module in modules:
                x = module(x)
            if self._scale != 1.0:
                x = x * self._scale
            return add((x, None), residual, *rest)

        return through


@dataclass
class LayerSubmodules(TransformerLayerSubmodules):
    """Megatron's submodules, plus builders of the post-norms on the outputs of attention and MLP."""

    post_self_attn_layernorm: Callable[..., nn.Module] | None = None
    post_mlp_layernorm: Callable[..., nn.Module] | None = None


def _post_norm(builder: Callable[..., nn.Module] | None, config: TransformerConfig) -> nn.Module | None:
    if builder is None:
        return None
    return builder(config=config, hidden_size=config.hidden_size, eps=config.layernorm_epsilon)


class RecomputableLayer(TransformerLayer):
    """A transformer layer that can drop its activations and run again in backward.

    It uses PyTorch's non-reentrant checkpoint. Megatron's asks for CUDA RNG state, and its re-entrant form gives the
    first layer's factors no gradient when the embedding is frozen. No RNG state is kept, because dropout masks are
    functions of counters.

    A block's output may pass a norm (LayerSubmodules) and a scale, `residual_scale`, before it is added to the residual
    stream; Megatron's layer has a place for neither.
    """

    recompute = False

    def __init__(
        self,
        config: TransformerConfig,
        submodules: LayerSubmodules,
        *args: Any,
        kind_config: TransformerConfig,
        residual_scale: float = 1.0,
        **kwargs: Any,
    ) -> None:
        """Build the layer from `kind_config`. Megatron's block passes every layer the same `config`."""
        config = kind_config
        super().__init__(config, submodules, *args, **kwargs)
        self.post_self_attn_layernorm = _post_norm(submodules.post_self_attn_layernorm, config)
        self.post_mlp_layernorm = _post_norm(submodules.post_mlp_layernorm, config)
        self.self_attn_bda = ResidualAdd(self.post_self_attn_layernorm, residual_scale)
        self.mlp_bda = ResidualAdd(self.post_mlp_layernorm, residual_scale)
        # Megatron's handler is torch.enable_grad: in evaluation, trained bottleneck layers and biases would keep what
        # they save for backward.
        self.bias_dropout_add_exec_handler = nullcontext

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        if not (self.recompute and torch.is_grad_enabled()):
            return super().forward(*args, **kwargs)
        return checkpoint(self._forward_once, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

    def _forward_once(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        try:
            return super().forward(*args, **kwargs)
        finally:
            # Megatron 0.19 keeps the input of the second norm here, and with it all that the layer saved, until the
            # layer ends. In backward the checkpoint ends the layer early, by an exception, so Megatron never drops it.
            self.mlp_norm_manager = None
