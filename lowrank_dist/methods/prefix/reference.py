"""Prefix tuning in plain PyTorch: keys and values that transformers' model finds in its cache.

Legend: l virtual positions, L layers, G key/value heads, d head width.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor, nn

from lowrank_dist.arch.config_json import read_architecture
from lowrank_dist.methods.method import Setting
from lowrank_dist.methods.prefix.config import PrefixConfig
from lowrank_dist.methods.reference import Reference, Start, all_layers, leaves, load_frozen, unchanged

adapted_layers, cut_section = all_layers, unchanged


def build(section: PrefixConfig, setting: Setting, start: Start, dtype: torch.dtype, device: torch.device) -> Reference:
    """See `reference.ReferenceBuilder`. The exported files do not hold the MLP, so it starts from `start.values`."""
    model, architecture = load_frozen(setting.base, dtype, device), read_architecture(setting.base)
    parameters = leaves(start.values, device)

    def exported() -> dict[str, Tensor]:
        return {"prompt_embeddings": _keys_values(parameters).detach().cpu().flatten(1)}

    return Reference(model, architecture, parameters, partial(_logits, model, parameters, dtype), exported)


def _keys_values(parameters: Mapping[str, Tensor]) -> Tensor:
    """Return keys and values [l, L, 2, G, d] in fp32."""
    if "prefix" in parameters:
        return parameters["prefix"]
    of = {name.removeprefix("prefix."): leaf for name, leaf in parameters.items()}
    inner = torch.tanh(of["embedding"] @ of["hidden.weight"].T + of["hidden.bias"])
    return torch.einsum("lw,nkgdw->lnkgd", inner, of["output.weight"]) + of["output.bias"]


def _logits(
    model: nn.Module, parameters: Mapping[str, Tensor], dtype: torch.dtype, input_ids: Tensor, keep: Tensor
) -> Tensor:
    from transformers import DynamicCache

    cache = DynamicCache()
    for layer, own in enumerate(_keys_values(parameters).to(dtype).unbind(1)):
        keys, values = own.permute(1, 2, 0, 3)[:, None]  # [1, G, l, d] each
        cache.update(keys, values, layer)
    found: Tensor = model(input_ids=input_ids[None], past_key_values=cache, logits_to_keep=keep, use_cache=True).logits[
        0
    ]
    return found
