"""Prompt tuning in plain PyTorch: trained rows among the embeddings that transformers' model gets as its input."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from lowrank_dist.arch.config_json import read_architecture
from lowrank_dist.methods.method import Setting
from lowrank_dist.methods.prompt.config import PromptConfig
from lowrank_dist.methods.reference import Reference, Start, all_layers, detached, leaves, load_frozen, unchanged

adapted_layers, cut_section = all_layers, unchanged
_ROWS = "prompt.embeddings"


def build(section: PromptConfig, setting: Setting, start: Start, dtype: torch.dtype, device: torch.device) -> Reference:
    """See `reference.ReferenceBuilder`."""
    model, architecture = load_frozen(setting.base, dtype, device), read_architecture(setting.base)
    parameters = leaves(start.values, device)

    def exported() -> dict[str, Tensor]:
        return {"prompt_embeddings": detached(parameters)[_ROWS]}

    compute = partial(_logits, model, parameters[_ROWS], architecture.vocab)
    return Reference(model, architecture, parameters, compute, exported)


def _logits(model: Any, rows: Tensor, vocab: int, input_ids: Tensor, keep: Tensor) -> Tensor:
    """Return the logits [n, V] of a sample that begins with the virtual tokens vocab, vocab + 1, …"""
    count = rows.size(0)
    assert input_ids[:count].tolist() == list(range(vocab, vocab + count)), "samples begin with all virtual tokens"
    words = model.get_input_embeddings()(input_ids[count:])
    embedded = torch.cat((rows.to(words.dtype), words))[None]
    logits: Tensor = model(inputs_embeds=embedded, logits_to_keep=keep, use_cache=False).logits[0]
    return logits
