"""A checkpoint or adapter folder → a PEFT adapter folder to publish or serve, with a model card."""

import shutil
from pathlib import Path

from lowrank_dist.checkpoint.adapter import CONFIG_FILE, WEIGHTS_FILE, own_file, read_adapter
from lowrank_dist.checkpoint.atomic import atomic_folder
from lowrank_dist.checkpoint.model_card import VLLM_DEFAULT_RANK, VLLM_RANKS, model_card, serving_rank
from lowrank_dist.checkpoint.peft_config import PeftConfig, read_config
from lowrank_dist.checkpoint.provenance import PROVENANCE_FILE, read_provenance
from lowrank_dist.errors import UserError

CARD_FILE = "README.md"


def export(source: Path, out: Path, *, vllm: bool = False, max_rank: int | None = None) -> None:
    """Write the adapter of `source`, unchanged, and README.md into the new folder `out`. All or nothing.

    vllm: refuse what vLLM would not load or would scale wrongly; max_rank: the --max-lora-rank that it is started with.
    Raises UserError for a run folder, what `read_adapter` refuses, a malformed provenance, and an `out` that exists.
    """
    if not (source / CONFIG_FILE).exists() and (source / "checkpoints").is_dir():
        raise UserError(
            f"{source} is a run, not a checkpoint: give {source / 'checkpoints' / 'best'} or "
            f"{source / 'checkpoints' / 'last'}"
        )
    adapter, provenance = read_adapter(source), read_provenance(source)
    config = read_config(own_file(source, CONFIG_FILE))
    largest = max(factor.rank for factor in adapter.factors.values())
    if vllm:
        _refuse_for_vllm(source, config, largest, max_rank)
    # The files themselves, not written anew: only their own config says for sure what they mean to PEFT.
    names = [CONFIG_FILE, WEIGHTS_FILE, *([PROVENANCE_FILE] if provenance is not None else [])]
    with atomic_folder(out) as temporary:
        for name in names:
            shutil.copyfile(own_file(source, name), temporary / name)
        (temporary / CARD_FILE).write_text(model_card(out.name, adapter, provenance, largest), encoding="utf-8")


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
