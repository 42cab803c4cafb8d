"""Tensors beside the factors in a PEFT adapter's file that do not make it more than an update s·B·A.

PEFT's `save_embedding_layers`, which is on where the output layer is a target, puts copies of the base's embeddings
there, and loads them in place of the base's. Some variants of LoRA keep what only their training needs.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch
from safetensors import safe_open

from lowrank_dist.arch.architecture import WORD_EMBEDDINGS
from lowrank_dist.arch.config_json import read_architecture
from lowrank_dist.arch.families import FAMILIES, OUTPUT_LAYER
from lowrank_dist.arch.wrappers import WRAPPED
from lowrank_dist.errors import UserError, some_of
from lowrank_dist.formats.model_folder import FLOAT_DTYPES, open_checkpoint, stored_name
from lowrank_dist.formats.safetensors_file import TensorEntry, chunks, read_header
from lowrank_dist.methods.files import WEIGHTS_FILE, own_file

_EMBEDDINGS = "|".join(
    sorted(
        {
            re.escape(rule.hf.removesuffix(".weight"))
            for family in (*FAMILIES.values(), *WRAPPED)
            for rule in family.tensors
            if rule.megatron in (WORD_EMBEDDINGS, OUTPUT_LAYER.megatron)
        }
    )
)
_COPY = re.compile(rf"base_model\.model\.(?P<module>{_EMBEDDINGS})(\.base_layer)?\.weight")
# VeLoRA's projection of saved activations, and MonteCLoRA's sampler: outside training both are plain LoRA in PEFT.
_TRAINING_ONLY = re.compile(r"base_model\.model\.[\w.]+\.lora_(velora_embed|monteclora_sampler\.\w+)", re.ASCII)
_COMPARED_BYTES = 64 << 20


def is_extra(name: str) -> bool:
    """Return whether a tensor of this name is no factor and may lie beside them."""
    return _COPY.fullmatch(name) is not None or _TRAINING_ONLY.fullmatch(name) is not None


def has_extras(folder: Path) -> bool:
    """Return whether an adapter's file has tensors beside its factors."""
    return any(is_extra(entry.name) for entry in read_header(own_file(folder, WEIGHTS_FILE)).entries)


def base_copies(path: Path) -> list[TensorEntry]:
    """Return the entries of an adapter's file that are copies of the base's embeddings."""
    return [entry for entry in read_header(path).entries if _COPY.fullmatch(entry.name)]


def note_on_copies(path: Path) -> list[str]:
    """Return a line where the file has copies of the base's embeddings, and there is no base to compare them with."""
    if not (copies := base_copies(path)):
        return []
    names = some_of([entry.name for entry in copies])
    return [
        f"{path}: {names}: taken for a copy of the base's and left out; whether it is one cannot be checked without "
        "the base: `lowrank-dist inspect ADAPTER --base DIR` checks it"
    ]


def require_copies(folder: Path, base: Path) -> None:
    """Raise UserError where an adapter's copies of the base's embeddings are not those of `base`, bit for bit.

    They are compared in the type of the copy: an adapter in bf16 may belong to a base in fp32.
    """
    path = own_file(folder, WEIGHTS_FILE)
    copies = base_copies(path)
    if not copies:
        return
    architecture = read_architecture(base)
    with open_checkpoint(base) as checkpoint, safe_open(path, framework="pt") as file:
        for entry in copies:
            match = _COPY.fullmatch(entry.name)
            assert match is not None, "base_copies returns no other"
            name = f"{match['module']}.weight"
            stored = stored_name(name, architecture, checkpoint)
            if stored is None and architecture.tied:
                stored = stored_name(architecture.embedding_name, architecture, checkpoint)
            if stored is None:
                raise _another(path, entry, f"{base} has no {name}")
            if checkpoint.shape(stored) != entry.shape:
                shapes = f"it is {list(entry.shape)}, and {stored} of {base} is {list(checkpoint.shape(stored))}"
                raise _another(path, entry, f"{shapes}, so the vocabulary was resized")
            if not _equal(file.get_slice(entry.name), checkpoint.slice(stored), entry):
                raise _another(
                    path, entry, f"it differs from {stored} of {base}, so it was trained, or has another base"
                )


def _equal(copy: object, base: object, entry: TensorEntry) -> bool:
    rows = max(1, entry.shape[0])
    largest = max(1, _COMPARED_BYTES * rows // max(1, entry.nbytes))
    for first, last in chunks(rows, largest):
        left = copy[first:last]  # type: ignore[index]
        if not torch.equal(left, base[first:last].to(left.dtype)):  # type: ignore[index]
            return False
    return entry.dtype in FLOAT_DTYPES


def _another(path: Path, entry: TensorEntry, what: str) -> UserError:
    return UserError(
        f"{path}: {entry.name}: {what}; only updates s·B·A are supported, so give the base that it was trained on, or "
        "put base and adapter together with PEFT first: PeftModel.from_pretrained(model, ADAPTER).merge_and_unload()"
    )
