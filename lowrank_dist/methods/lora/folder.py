"""A folder of low-rank factors as others ask for it: recognised, inspected, published, served, started from."""

from __future__ import annotations

from pathlib import Path

from lowrank_dist.errors import UserError
from lowrank_dist.formats.model_card import USE, WITH_PEFT, base_model, model_card
from lowrank_dist.formats.provenance import Provenance, read_provenance
from lowrank_dist.formats.report import Report
from lowrank_dist.methods.files import (
    CONFIG_FILE,
    PICKLE_FILE,
    PUBLISHED,
    WEIGHTS_FILE,
    Inspected,
    MethodFiles,
    Published,
    any_there,
    own_file,
)
from lowrank_dist.methods.lora.adopt import adopt_adapter
from lowrank_dist.methods.lora.config import LoraConfig
from lowrank_dist.methods.lora.files import Adapter, read_adapter
from lowrank_dist.methods.lora.inspection import inspect_adapter
from lowrank_dist.methods.lora.peft_config import PeftConfig, read_config
from lowrank_dist.sections.section import MethodSection

# vLLM's LoRAConfig.max_lora_rank (vllm.config.lora.MaxLoRARanks without 1) and its default.
VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
VLLM_DEFAULT_RANK = 16


class LoraFiles(MethodFiles):
    """PEFT folders, all but those that say that another method wrote them (see `registry.HOMES`)."""

    published = PUBLISHED

    def wrote(self, folder: Path) -> bool:
        return any_there(folder, (CONFIG_FILE, WEIGHTS_FILE, PICKLE_FILE))

    def refuse_merge(self, folder: Path) -> None:
        """Low-rank updates are what can be merged."""

    def publish(self, source: Path, name: str, *, vllm: bool, max_rank: int | None) -> Published:
        provenance, adapter = read_provenance(source), read_adapter(source)
        config = read_config(own_file(source, CONFIG_FILE))
        largest = max(factor.rank for factor in adapter.factors.values())
        if vllm:
            _refuse_for_vllm(source, config, largest, max_rank)
        return Published(self.published, adapter_card(name, adapter, provenance, largest))

    def inspect(self, folder: Path, report: Report) -> Inspected:
        return inspect_adapter(folder, report)

    def complete(self, section: MethodSection, base: Path) -> LoraConfig:
        assert isinstance(section, LoraConfig)
        return adopt_adapter(section, base)


FILES = LoraFiles()


def adapter_card(name: str, adapter: Adapter, provenance: Provenance | None, largest_rank: int) -> str:
    """The card of an adapter. largest_rank: over its modules, which vLLM has to be told."""
    return model_card(name, "lora", adapter.base, _about(adapter), _usage(adapter, largest_rank), provenance)


def _about(adapter: Adapter) -> str:
    ranks = sorted({factor.rank for factor in adapter.factors.values()})
    size = sum(tensor.numel() for factor in adapter.factors.values() for tensor in factor.tensors)
    rank = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"
    kind = "DoRA" if adapter.dora else "LoRA"
    return (
        f"A {kind} adapter of {base_model(adapter.base)}: {rank}, {len(adapter.factors)} modules, {size:,} parameters."
    )


def _usage(adapter: Adapter, largest_rank: int) -> str:
    rank = f" --max-lora-rank {serving_rank(largest_rank) or largest_rank}" if largest_rank > VLLM_DEFAULT_RANK else ""
    served = f"""Served by vLLM (an adapter with rank or alpha patterns has to be merged first):

    vllm serve BASE --enable-lora{rank} --lora-modules adapter=ADAPTER"""
    if adapter.dora:
        served = """Served by vLLM, which takes no DoRA adapter, merged:

    vllm serve MERGED"""
    return f"""{USE}

{WITH_PEFT}

Merged into the base, as fast as the base alone:

    lowrank-dist merge --base BASE --adapter ADAPTER --out MERGED --verify

{served}"""


def serving_rank(rank: int) -> int | None:
    """The smallest --max-lora-rank under which vLLM serves an adapter of `rank`; None where there is none."""
    return next((size for size in VLLM_RANKS if size >= rank), None)


def _refuse_for_vllm(source: Path, config: PeftConfig, largest: int, max_rank: int | None) -> None:
    problems = []
    if config.dora:
        problems.append("vLLM does not serve DoRA: merge it into the base with lowrank-dist merge")
    if max_rank is not None and max_rank not in VLLM_RANKS:
        problems.append(f"--max-rank {max_rank}: vLLM takes one of {', '.join(map(str, VLLM_RANKS))}")
    fitting = serving_rank(largest)
    if largest > (max_rank or VLLM_DEFAULT_RANK):
        remedy = (
            "merge it into the base with lowrank-dist merge"
            if fitting is None
            else f"give --max-rank {fitting} and start vLLM with --max-lora-rank {fitting}"
        )
        problems.append(
            f"its largest rank is {largest}, above vLLM's limit of {max_rank or VLLM_DEFAULT_RANK}: {remedy}"
        )
    patterns = {"rank_pattern": config.rank_pattern, "alpha_pattern": config.alpha_pattern}
    problems += [
        f"{key} is set, which vLLM does not read, so that it would scale updates wrongly without a word: merge it into "
        "the base with lowrank-dist merge, or train with one rank and one alpha"
        for key, pattern in patterns.items()
        if pattern
    ]
    if problems:
        raise UserError(f"{source} is not exported for vLLM: {'; '.join(problems)}")
