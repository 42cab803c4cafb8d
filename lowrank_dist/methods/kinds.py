"""What a method wrote into a folder, told by its files alone."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from lowrank_dist.errors import UserError
from lowrank_dist.formats.model_folder import INDEX_FILE, SINGLE_FILE
from lowrank_dist.methods.bottleneck import files as bottlenecks
from lowrank_dist.methods.lora.files import CONFIG_FILE, WEIGHTS_FILE
from lowrank_dist.methods.prompt_files import peft_type

Kind = Literal["lora", "prefix", "prompt", "bottlenecks", "model"]
_OF_PEFT: dict[str, Kind] = {"PREFIX_TUNING": "prefix", "PROMPT_TUNING": "prompt"}
# Why a merge cannot take it, and what can be done instead.
_NO_UPDATES: dict[Kind, str] = {
    "prefix": "is a prefix: more keys and values for attention to see, which are in no weight of the base",
    "prompt": "is a prompt: more embeddings before the input, which are in no weight of the base",
    "bottlenecks": "is adapter layers: each has a nonlinearity between its two products, so that no weight of the base "
    "can take it up",
}


def kind_of(folder: Path) -> Kind | None:
    """What the folder holds; a PEFT folder that says of itself nothing else is "lora". None where it has no such files.

    "model": a Hugging Face model, which a checkpoint of full fine-tuning is.
    """
    names = {CONFIG_FILE, WEIGHTS_FILE, "adapter_model.bin"}
    if any((folder / name).exists() for name in (bottlenecks.CONFIG_FILE, bottlenecks.WEIGHTS_FILE)):
        return "bottlenecks"
    if any((folder / name).exists() for name in names):
        try:
            return _OF_PEFT.get(peft_type(folder), "lora")
        except UserError:  # which the reader of a LoRA adapter says as well
            return "lora"
    if any((folder / name).exists() for name in ("config.json", SINGLE_FILE, INDEX_FILE)):
        return "model"
    return None


def refuse_unmergeable(folder: Path) -> None:
    """Raise UserError for what cannot be folded into the weights of a base, and for what is a whole model already."""
    kind = kind_of(folder)
    if kind == "model":
        raise UserError(f"{folder} is a whole model, not an adapter: there is nothing to merge, use it as it is")
    if kind in _NO_UPDATES:
        raise UserError(
            f"{folder} {_NO_UPDATES[kind]}: it cannot be merged, only low-rank updates (method lora) can. Give it to "
            "lowrank-dist generate or evaluate with --adapter"
        )
