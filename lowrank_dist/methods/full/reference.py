"""Full fine-tuning of transformers' own model. It starts from what transformers loads, which checks our loader."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from lowrank_dist.arch.config_json import read_architecture
from lowrank_dist.methods.method import Setting
from lowrank_dist.methods.reference import (
    Reference,
    Start,
    all_layers,
    call_with,
    detached,
    leaves,
    load_frozen,
    unchanged,
)
from lowrank_dist.sections.section import MethodSection

adapted_layers, cut_section = all_layers, unchanged


def build(
    section: MethodSection, setting: Setting, start: Start, dtype: torch.dtype, device: torch.device
) -> Reference:
    """See `reference.ReferenceBuilder`. A tied output layer is one parameter with the embeddings."""
    model, architecture = load_frozen(setting.base, dtype, device), read_architecture(setting.base)
    parameters = leaves(dict(model.named_parameters()), device)
    # Rows that the model never reads have no gradient, and the run writes them as they are in the base.
    unused = {rule.hf: rule.row_offset for rule in architecture.tensors if rule.row_offset}
    before = {name: parameters[name][:rows].detach().cpu().clone() for name, rows in unused.items()}

    def exported() -> dict[str, Tensor]:
        found = detached(parameters)
        for name, rows in before.items():
            found[name][: rows.size(0)] = rows
        return found

    return Reference(model, architecture, parameters, partial(call_with, model, parameters), exported)
