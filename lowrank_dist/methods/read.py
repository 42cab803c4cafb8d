"""A folder that a method wrote, onto the model that it was trained on: what decoding needs."""

from __future__ import annotations

from pathlib import Path

from lowrank_dist.arch.placement import place
from lowrank_dist.errors import UserError
from lowrank_dist.methods import prompt_files as prompt_learning
from lowrank_dist.methods.bottleneck import files as bottlenecks
from lowrank_dist.methods.bottleneck.method import Adapters
from lowrank_dist.methods.kinds import kind_of
from lowrank_dist.methods.lora.adopt import factors_for, refuse_another_base, refuse_foreign, rules_of
from lowrank_dist.methods.lora.files import read_adapter
from lowrank_dist.methods.lora.inject import inject
from lowrank_dist.methods.lora.state import spread_factors
from lowrank_dist.methods.prefix.method import PrefixTuning
from lowrank_dist.methods.prefix.module import KEYS_VALUES
from lowrank_dist.methods.prompt.module import add_virtual_tokens
from lowrank_dist.model.gpt import CausalLM
from lowrank_dist.parallel.masks import MaskSource
from lowrank_dist.parallel.topology import Topology


def attach(model: CausalLM, base: Path, folder: Path, topology: Topology) -> None:
    """Give the model what was trained on it: a PEFT folder (LoRA, prefix, prompt), adapter layers, or a checkpoint.

    Raises UserError for what the readers refuse, for something that was trained on another base (by fingerprint, where
    it has one), for modules or shapes that this model does not have, and for what is a whole model.
    """
    kind = kind_of(folder)
    if kind == "model":
        raise UserError(f"{folder} is a whole model, not an adapter: give it in place of the base, as the model")
    refuse_another_base(folder, base)
    if kind == "bottlenecks":
        _attach_bottlenecks(model, folder, topology)
    elif kind in ("prefix", "prompt"):
        _attach_prompt_learning(model, folder, topology)
    else:
        _attach_lora(model, base, folder, topology)


def _attach_lora(model: CausalLM, base: Path, folder: Path, topology: Topology) -> None:
    adapter = read_adapter(folder)
    refuse_foreign(folder, adapter, model.architecture.linear_modules(), base)
    placements = place(model.architecture, rules_of(adapter, model.architecture))
    factors = factors_for(folder, adapter, placements, base)
    adapted = inject(model, placements, MaskSource(0, 0), 0, topology.tp_rank, topology.tp_size)
    spread_factors(adapted, topology.tp_rank, factors)


def _attach_bottlenecks(model: CausalLM, folder: Path, topology: Topology) -> None:
    found = bottlenecks.read_bottlenecks(folder)
    bottlenecks.require_fit(folder, found.config, model.architecture)
    # The same function either way; a width that the ranks do not divide is no reason to refuse.
    placement = "replicated" if found.config.bottleneck % topology.tp_size else "sharded"
    theta = Adapters(found.config, placement, 0).attach(model, topology, resumed=True)
    theta.spread(found.tensors, topology.tp_rank)


def _attach_prompt_learning(model: CausalLM, folder: Path, topology: Topology) -> None:
    found, architecture = prompt_learning.read_prompt_learning(folder), model.architecture
    prompt_learning.require_fit(folder, found, architecture)
    length = found.embeddings.size(0)
    if found.kind == "PREFIX_TUNING":
        theta = PrefixTuning(length, None, architecture, str(folder), 0).attach(model, topology, resumed=True)
        shape = (length, architecture.layers, 2, architecture.kv_heads, architecture.head_dim)
        theta.spread({KEYS_VALUES: found.embeddings.view(shape)}, topology.tp_rank)
    else:
        add_virtual_tokens(model, found.embeddings.to(next(model.parameters()).device))
