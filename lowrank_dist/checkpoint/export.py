"""A checkpoint or adapter folder → an adapter folder to publish or serve, with a model card."""

import shutil
from pathlib import Path

from lowrank_dist.checkpoint.model_card import (
    VLLM_DEFAULT_RANK,
    VLLM_RANKS,
    bottlenecks_card,
    model_card,
    prompt_learning_card,
    serving_rank,
)
from lowrank_dist.errors import UserError
from lowrank_dist.formats.atomic import atomic_folder
from lowrank_dist.formats.provenance import PROVENANCE_FILE, Provenance, read_provenance
from lowrank_dist.methods.bottleneck import files as bottlenecks
from lowrank_dist.methods.kinds import Kind, kind_of
from lowrank_dist.methods.lora.files import CONFIG_FILE, WEIGHTS_FILE, own_file, read_adapter
from lowrank_dist.methods.lora.peft_config import PeftConfig, read_config
from lowrank_dist.methods.prompt_files import read_prompt_learning

CARD_FILE = "README.md"


def export(source: Path, out: Path, *, vllm: bool = False, max_rank: int | None = None) -> None:
    """Write the adapter of `source`, unchanged, and README.md into the new folder `out`. All or nothing.

    vllm: refuse what vLLM would not load or would scale wrongly; max_rank: the --max-lora-rank that it is started with.
    Raises UserError for a run folder, a whole model, what the reader of its method refuses, a malformed provenance, and
    an `out` that exists.
    """
    kind = kind_of(source)
    if kind is None and (source / "checkpoints").is_dir():
        raise UserError(
            f"{source} is a run, not a checkpoint: give {source / 'checkpoints' / 'best'} or "
            f"{source / 'checkpoints' / 'last'}"
        )
    if kind == "model":
        raise UserError(
            f"{source} is not exported: it is a whole model and a Hugging Face folder already. Use it as it lies; to "
            "publish it, leave out optimizer.safetensors, trainer_state.json and manifest.json"
        )
    provenance = read_provenance(source)
    if kind in ("lora", None):
        names, card = (CONFIG_FILE, WEIGHTS_FILE), _lora_card(source, out.name, provenance, vllm, max_rank)
    else:
        names, card = _of_another_method(source, out.name, kind, provenance, vllm)
    # The files themselves, not written anew: only their own config says for sure what they mean to PEFT.
    with atomic_folder(out) as temporary:
        for name in (*names, *([PROVENANCE_FILE] if provenance is not None else [])):
            shutil.copyfile(own_file(source, name), temporary / name)
        (temporary / CARD_FILE).write_text(card, encoding="utf-8")


def _lora_card(source: Path, name: str, provenance: Provenance | None, vllm: bool, max_rank: int | None) -> str:
    adapter = read_adapter(source)
    config = read_config(own_file(source, CONFIG_FILE))
    largest = max(factor.rank for factor in adapter.factors.values())
    if vllm:
        _refuse_for_vllm(source, config, largest, max_rank)
    return model_card(name, adapter, provenance, largest)


def _of_another_method(
    source: Path, name: str, kind: Kind, provenance: Provenance | None, vllm: bool
) -> tuple[tuple[str, str], str]:
    """Files to copy, and the card."""
    if vllm:
        what = {"prefix": "a prefix", "prompt": "a prompt", "bottlenecks": "adapter layers"}[kind]
        raise UserError(
            f"{source} is not exported for vLLM: it is {what}, and of adapters vLLM serves LoRA alone; leave --for "
            "out, or train with method lora"
        )
    if kind == "bottlenecks":
        card = bottlenecks_card(name, bottlenecks.read_bottlenecks(source), provenance)
        return (bottlenecks.CONFIG_FILE, bottlenecks.WEIGHTS_FILE), card
    return (CONFIG_FILE, WEIGHTS_FILE), prompt_learning_card(name, read_prompt_learning(source), provenance)


def _refuse_for_vllm(source: Path, config: PeftConfig, largest: int, max_rank: int | None) -> None:
    problems = []
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
