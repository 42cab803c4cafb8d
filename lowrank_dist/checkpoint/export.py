"""A checkpoint or adapter folder → an adapter folder to publish or serve, with a model card."""

import shutil
from pathlib import Path

from lowrank_dist.errors import UserError
from lowrank_dist.formats.atomic import atomic_folder
from lowrank_dist.formats.provenance import PROVENANCE_FILE
from lowrank_dist.methods.files import own_file
from lowrank_dist.methods.registry import home_of, reader_of

CARD_FILE = "README.md"


def export(source: Path, out: Path, *, vllm: bool = False, max_rank: int | None = None) -> None:
    """Write the adapter of `source`, unchanged, and README.md into the new folder `out`. All or nothing.

    vllm: refuse what vLLM would not load or would scale wrongly; max_rank: the --max-lora-rank that it is started with.
    Raises UserError for a run folder, a whole model, what the reader of its method refuses, a malformed provenance, and
    an `out` that exists.
    """
    if home_of(source) is None and (source / "checkpoints").is_dir():
        raise UserError(
            f"{source} is a run, not a checkpoint: give {source / 'checkpoints' / 'best'} or "
            f"{source / 'checkpoints' / 'last'}"
        )
    published = reader_of(source).files.publish(source, out.name, vllm=vllm, max_rank=max_rank)
    # The files themselves, not written anew: only their own config says for sure what they mean to PEFT.
    with atomic_folder(out) as temporary:
        for name in published.files:
            # PEFT's own folders have no provenance.
            if name != PROVENANCE_FILE or (source / name).exists():
                shutil.copyfile(own_file(source, name), temporary / name)
        (temporary / CARD_FILE).write_text(published.card, encoding="utf-8")
