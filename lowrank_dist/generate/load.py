"""What to decode with: a base or merged folder, alone or with what a method trained on it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from lowrank_dist.checkpoint.adapter import read_adapter
from lowrank_dist.data.tokenizer import Tokenizer, load_tokenizer
from lowrank_dist.lora.adopt import factors_for, refuse_another_base, refuse_foreign, rules_of
from lowrank_dist.lora.inject import inject
from lowrank_dist.lora.placement import place
from lowrank_dist.lora.state import spread_factors
from lowrank_dist.model.build import load_model
from lowrank_dist.model.gpt import CausalLM
from lowrank_dist.parallel.masks import MaskSource
from lowrank_dist.parallel.topology import Topology

_VOCAB_MULTIPLE = 128


@dataclass(frozen=True)
class Loaded:
    """A model ready to decode, with its tokenizer; path: the folder of the base or merged model."""

    path: Path
    model: CausalLM
    tokenizer: Tokenizer


def load(
    path: Path,
    adapter: Path | None,
    topology: Topology,
    device: torch.device,
    *,
    dtype: str = "auto",
    tokenizer: Path | None = None,
) -> Loaded:
    """This rank's shard of the model in `path`, with the adapter of any folder that `attach` knows.

    dtype: auto (the weights' own), fp32 or bf16. tokenizer: its folder, `path` where it is not given.
    """
    words = load_tokenizer(tokenizer or path)
    # Lengths are checked prompt by prompt, and a sliding window is applied when decoding: neither limits anything here.
    model = load_model(
        path,
        topology,
        device=device,
        dtype=dtype,
        max_length=1,
        vocab_multiple=_VOCAB_MULTIPLE,
        broadcast=topology.dp_size > 1,
    )
    if adapter is not None:
        attach(model, path, adapter, topology)
    return Loaded(path, model.eval(), words)


def attach(model: CausalLM, base: Path, folder: Path, topology: Topology) -> None:
    """Give the model what was trained on it: the low-rank factors of a PEFT folder or of one of our checkpoints.

    Raises UserError for what `read_adapter` refuses, an adapter of another base (by fingerprint, where it has one),
    and factors of modules or shapes that this model does not have.
    """
    adapter = read_adapter(folder)
    refuse_another_base(folder, base)
    refuse_foreign(folder, adapter, model.architecture.linear_modules(), base)
    placements = place(model.architecture, rules_of(adapter, model.architecture))
    factors = factors_for(folder, adapter, placements, base)
    adapted = inject(model, placements, MaskSource(0, 0), 0, topology.tp_rank, topology.tp_size)
    spread_factors(adapted, topology.tp_rank, factors)
