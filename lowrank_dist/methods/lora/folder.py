"""The `MethodFiles` of LoRA: recognise, inspect, publish, export for a server, and start training from an adapter."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from lowrank_dist.arch.architecture import Architecture
from lowrank_dist.arch.config_json import read_architecture
from lowrank_dist.arch.model_files import class_note
from lowrank_dist.errors import UserError
from lowrank_dist.formats.model_card import USE, WITH_PEFT, base_model, model_card
from lowrank_dist.formats.provenance import PROVENANCE_FILE, Provenance, fingerprint, read_provenance
from lowrank_dist.formats.report import Report
from lowrank_dist.methods.files import (
    CONFIG_FILE,
    LLAMA_CPP,
    PICKLE_FILE,
    PUBLISHED,
    VLLM,
    WEIGHTS_FILE,
    Inspected,
    MethodFiles,
    Published,
    any_there,
    own_file,
)
from lowrank_dist.methods.lora.adopt import adopt_adapter
from lowrank_dist.methods.lora.config import LoraConfig
from lowrank_dist.methods.lora.extras import has_extras, note_on_copies, require_copies
from lowrank_dist.methods.lora.files import AdapterFactors, read_adapter
from lowrank_dist.methods.lora.inspection import inspect_adapter
from lowrank_dist.methods.lora.peft_config import key_notes, read_config
from lowrank_dist.methods.lora.serving import (
    VLLM_DEFAULT_RANK,
    folded,
    reads_alike,
    refuse_unserved,
    serving_notes,
    serving_rank,
    write_folded,
)
from lowrank_dist.sections.section import MethodSection


class LoraFiles(MethodFiles):
    """All PEFT folders except those that another method claims first (see `registry.METHOD_PACKAGES`)."""

    published = PUBLISHED

    def wrote(self, folder: Path) -> bool:
        return any_there(folder, (CONFIG_FILE, WEIGHTS_FILE, PICKLE_FILE))

    def refuse_merge(self, folder: Path) -> None:
        """Do nothing: low-rank updates can be merged."""

    def publish(self, source: Path, name: str, *, target: str | None, max_rank: int | None) -> Published:
        provenance = read_provenance(source)
        base = _base_here(provenance)
        adapter, config = read_adapter(source, base), read_config(own_file(source, CONFIG_FILE))
        if target is not None:
            refuse_unserved(source, config, adapter, target, max_rank)
        unseen = f"its base was not found; `lowrank-dist inspect {source} --base DIR` checks that no factor is missing"
        served = [] if target is None else serving_notes(adapter, target)
        if target is not None and base is not None and provenance is not None:
            served += class_note(Path(provenance.base))
        notes = (*([] if base else [unseen]), *self.notes(source), *served)
        card = adapter_card(name, adapter, provenance, target)
        if base is not None and provenance is not None:
            require_copies(source, Path(provenance.base))
        else:
            notes = (*notes, *note_on_copies(own_file(source, WEIGHTS_FILE)))
        extras = has_extras(source)
        if target is None or (reads_alike(config, adapter) and not extras):
            # Copy the files and do not rewrite them: their own config is exact about how PEFT reads them.
            return Published(self.published, card, notes=notes)
        alike = folded(adapter)
        note = (
            f"its scales were multiplied into B, so rank and alpha are now {next(iter(alike.factors.values())).rank} "
            "everywhere"
        )
        left = (f"its tensors that are no factors were left out, since {target} refuses them",) if extras else ()
        changes = (note, *left, *notes)
        return Published((PROVENANCE_FILE,), card, partial(write_folded, config=config, adapter=alike), changes)

    def inspect(self, folder: Path, report: Report) -> Inspected:
        return inspect_adapter(folder, report)

    def notes(self, folder: Path) -> list[str]:
        return key_notes(own_file(folder, CONFIG_FILE))

    def complete(self, section: MethodSection, base: Path) -> LoraConfig:
        assert isinstance(section, LoraConfig)
        return adopt_adapter(section, base)


FILES = LoraFiles()


def _base_here(provenance: Provenance | None) -> Architecture | None:
    """Return the architecture of the base of an adapter, if the base's folder is on this machine and unchanged."""
    if provenance is None or not Path(provenance.base).is_dir():
        return None
    try:
        same = fingerprint(Path(provenance.base)) == provenance.base_fingerprint
    except UserError:  # the folder now holds another, incomplete model
        return None
    return read_architecture(Path(provenance.base)) if same else None


def adapter_card(name: str, adapter: AdapterFactors, provenance: Provenance | None, target: str | None) -> str:
    """Return the model card of an adapter. target: the program for which it is exported, one of TARGETS, or None."""
    return model_card(name, "lora", adapter.base, _about(adapter), _usage(adapter, target), provenance)


def _about(adapter: AdapterFactors) -> str:
    ranks = sorted({factor.rank for factor in adapter.factors.values()})
    size = sum(tensor.numel() for factor in adapter.factors.values() for tensor in factor.tensors)
    rank = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"
    kind = "DoRA" if adapter.dora else "LoRA"
    return (
        f"A {kind} adapter of {base_model(adapter.base)}: {rank}, {len(adapter.factors)} modules, {size:,} parameters."
    )


def _usage(adapter: AdapterFactors, target: str | None) -> str:
    return f"""{USE}

{WITH_PEFT}

Merge it into the base, and it is as fast as the base alone:

    lowrank-dist merge --base BASE --adapter ADAPTER --out MERGED --verify

{_served(adapter, target)}"""


def _served(adapter: AdapterFactors, target: str | None) -> str:
    if adapter.dora:
        return """vLLM and llama.cpp serve no DoRA adapters, but they serve the merged model:

    vllm serve MERGED"""
    if target == LLAMA_CPP:
        return """With llama.cpp:

    python convert_lora_to_gguf.py --base BASE ADAPTER"""
    largest = max(factor.rank for factor in adapter.factors.values())
    rank = f" --max-lora-rank {serving_rank(largest) or largest}" if largest > VLLM_DEFAULT_RANK else ""
    exported = "" if target == VLLM else " (the folder exported with --for vllm)"
    return f"""With vLLM{exported}:

    vllm serve BASE --enable-lora{rank} --lora-modules adapter=ADAPTER"""
