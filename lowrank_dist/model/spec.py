"""Megatron's configuration of each kind of layer, and the spec that combines Megatron's modules with ours."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn
from torch.distributed import ProcessGroup
from torch.nn import functional as F

from lowrank_dist.arch.architecture import Architecture, LayerKind
from lowrank_dist.model.attention import CoreAttention
from lowrank_dist.model.layers import FrozenNorm, LayerSubmodules, RecomputableLayer, SwiGlu
from lowrank_dist.model.norms import HeadsNormAttention
from lowrank_dist.parallel.topology import Topology

ACTIVATIONS = {
    "silu": F.silu,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
}
# The norms of a layer, by the names of Megatron's layer and of LayerSubmodules; absent ones stay IdentityOp or None.
_NORMS = ("input_layernorm", "pre_mlp_layernorm", "post_self_attn_layernorm", "post_mlp_layernorm")


def transformer_config(
    architecture: Architecture, kind: LayerKind, topology: Topology, dtype: torch.dtype, device: torch.device
) -> TransformerConfig:
    """Return Megatron's configuration of one kind of layer: no dropout, no initialisation, no GPU-only fusion."""
    gated_silu = architecture.gated and architecture.activation == "silu"
    return TransformerConfig(
        num_layers=len(architecture.layers),
        hidden_size=architecture.hidden,
        num_attention_heads=architecture.heads,
        num_query_groups=architecture.kv_heads,
        kv_channels=architecture.head_dim,
        ffn_hidden_size=kind.ffn,
        normalization=architecture.norm,
        layernorm_epsilon=architecture.norm_eps,
        layernorm_zero_centered_gamma=architecture.zero_centered_norm,
        activation_func=F.silu if gated_silu else ACTIVATIONS[architecture.activation],
        gated_linear_unit=architecture.gated,
        # Megatron's hook for an activation module that gets the whole [gate ∣ up]; the module is ours, not
        # Transformer Engine's.
        use_te_activation_func=gated_silu,
        add_bias_linear=False,  # `_with_bias` says which linears have one
        qk_layernorm=architecture.qk_norm,
        softmax_scale=architecture.attention_multiplier,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=topology.tp_size,
        sequence_parallel=topology.sequence_parallel,
        params_dtype=dtype,
        use_cpu_initialization=device.type == "cpu",
        perform_initialization=False,
        persist_layer_norm=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
    )


@dataclass(frozen=True)
class MlpSpec:
    """The spec of the MLP for Megatron's layers: layers before 0.18 read its attributes, later ones call it.

    It is not a ModuleSpec, because newer layers log a warning for an MLP spec of that type. Older layers pass the
    process group only to a ModuleSpec, so `params` holds the group.
    """

    submodules: MLPSubmodules
    params: Mapping[str, Any]
    module: type = MLP

    def __call__(self, config: TransformerConfig, **_: Any) -> nn.Module:
        return self.module(config, self.submodules, **self.params)


def layer_specs(
    architecture: Architecture,
    configs: Mapping[LayerKind, TransformerConfig],
    linears: tuple[type, type],
    group: ProcessGroup,
) -> TransformerBlockSubmodules:
    """Return the decoder's spec: Megatron's layers with the given column- and row-parallel linears.

    configs: Megatron's configuration of each kind. group: the tensor-parallel group.
    """
    specs = {
        kind: _layer_spec(kind, config, linears, group, architecture.residual_multiplier)
        for kind, config in configs.items()
    }
    return TransformerBlockSubmodules(layer_specs=[specs[kind] for kind in architecture.layers], layer_norm=FrozenNorm)


def _layer_spec(
    kind: LayerKind,
    config: TransformerConfig,
    linears: tuple[type, type],
    group: ProcessGroup,
    residual_scale: float,
) -> ModuleSpec:
    built = {name: _with_bias(linears[each.kind == "row"], each.bias) for name, each in kind.linears.items()}
    qk_norm = FrozenNorm if config.qk_layernorm else IdentityOp
    norms = {name: FrozenNorm for name in _NORMS if kind.has(name)}
    return ModuleSpec(
        module=RecomputableLayer,
        params={"kind_config": config, "residual_scale": residual_scale},
        submodules=LayerSubmodules(
            self_attention=ModuleSpec(
                module=HeadsNormAttention if kind.norms_all_heads else SelfAttention,
                params={"attn_mask_type": AttnMaskType.causal},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=built["linear_qkv"],
                    core_attention=ModuleSpec(module=CoreAttention, params={"kind": kind}),
                    linear_proj=built["linear_proj"],
                    q_layernorm=qk_norm,
                    k_layernorm=qk_norm,
                ),
            ),
            mlp=MlpSpec(
                MLPSubmodules(
                    linear_fc1=built["linear_fc1"],
                    linear_fc2=built["linear_fc2"],
                    activation_func=SwiGlu if config.use_te_activation_func else None,
                ),
                {"tp_group": group},
            ),
            **norms,
        ),
    )


def _with_bias(linear: type, bias: bool) -> type:
    """Return the linear with or without a bias. Megatron's configuration has one switch for linears of three kinds."""

    class WithBias(linear):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **{**kwargs, "bias": bias})

    return WithBias
