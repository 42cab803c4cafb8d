"""The model that a command decodes with: a base or merged folder, alone or with what a method trained on it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from lowrank_dist.arch.config_json import read_architecture
from lowrank_dist.data.tokenizer import Tokenizer, load_tokenizer
from lowrank_dist.methods.registry import reader_of
from lowrank_dist.model.gpt import CausalLM
from lowrank_dist.model.load import load_model
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
    """This rank's shard of the model in `path`, with what any method trained into the folder `adapter`.

    dtype: auto (the weights' own), fp32 or bf16. tokenizer: its folder, `path` where it is not given.
    """
    words = load_tokenizer(tokenizer or path)
    # No length is refused here: prompts are checked one by one, and decoding applies a sliding window.
    architecture = read_architecture(path)
    architecture.check_tp(topology.tp_size)
    model = load_model(
        path,
        architecture,
        topology,
        device=device,
        dtype=dtype,
        vocab_multiple=_VOCAB_MULTIPLE,
        broadcast=topology.dp_size > 1,
    )
    if adapter is not None:
        reader_of(adapter).tuner.attach_trained(model, path, adapter, topology)
    return Loaded(path, model.eval(), words)
