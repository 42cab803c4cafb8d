"""Bottlenecks in plain PyTorch, hooked onto transformers' modules before its residual additions."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lowrank_dist.arch.config_json import read_architecture
from lowrank_dist.methods.bottleneck.config import AdapterConfig, has_norm, places
from lowrank_dist.methods.method import Setting
from lowrank_dist.methods.reference import (
    Reference,
    Start,
    all_layers,
    call,
    detached,
    leaves,
    load_frozen,
    unchanged,
)

adapted_layers, cut_section = all_layers, unchanged
# Place → the linear whose output, its bias included, the bottleneck takes.
_LAST = {"attention": "linear_proj", "mlp": "linear_fc2"}


def build(
    section: AdapterConfig, setting: Setting, start: Start, dtype: torch.dtype, device: torch.device
) -> Reference:
    """See `reference.ReferenceBuilder`."""
    model, architecture = load_frozen(setting.base, dtype, device), read_architecture(setting.base)
    parameters = leaves(start.values, device)
    for layer, kind in enumerate(architecture.layers):
        for place in places(setting.method):
            first = f"layers.{layer}.{place}."
            own = {name.removeprefix(first): leaf for name, leaf in parameters.items() if name.startswith(first)}
            path = kind.linears[_LAST[place]].parts[0].path.format(layer=layer)
            hook = partial(_bottleneck, own, has_norm(setting.method))
            model.get_submodule(path).register_forward_hook(hook)
    return Reference(model, architecture, parameters, partial(call, model), partial(detached, parameters))


def _bottleneck(own: Mapping[str, Tensor], normed: bool, module: Any, inputs: Any, output: Tensor) -> Tensor:
    cast = {name: leaf.to(output.dtype) for name, leaf in own.items()}
    inner = output
    if normed:
        inner = F.layer_norm(inner, inner.shape[-1:], cast["norm.weight"], cast["norm.bias"])
    inner = inner @ cast["down.weight"].T + cast["down.bias"]
    inner = inner.relu() if normed else 0.5 * inner * (1 + torch.erf(inner / 2**0.5))
    return output + inner @ cast["up.weight"].T + cast["up.bias"]
