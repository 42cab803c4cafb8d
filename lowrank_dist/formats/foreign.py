"""Adapters and checkpoints of other programs: recognised by files, keys and tensor names, with what to do with them.

Only names of files, the keys of an adapter_config.json and names of tensors are read.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from lowrank_dist.errors import UserError
from lowrank_dist.untrusted.files import short_path
from lowrank_dist.untrusted.json import read_object

_PEFT = "convert it to PEFT's format"
_MLX = (
    "an adapter of MLX; fuse it (mlx_lm.fuse --model BASE --adapter-path ADAPTER --save-path OUT), or "
    f"{_PEFT}: lora_a [in, r] and lora_b [r, out], transposed, are lora_A.weight and lora_B.weight"
)
_DIFFUSERS = "an adapter of an image model (diffusers or kohya); give one of a language model, in PEFT's format"
_ADAPTERHUB = (
    "an adapter of AdapterHub's library (adapters); merge it there (model.merge_adapter), or train it with PEFT"
)
_BRIDGE = f"an adapter of NeMo or Megatron-Bridge; {_PEFT} there"
_TORCHTUNE = (
    "a pickled checkpoint of torchtune, which is never read; give the folder of an epoch that has "
    "adapter_model.safetensors and adapter_config.json"
)
_FSDP = (
    "a sharded checkpoint of FSDP; merge its shards (accelerate merge-weights DIR OUT), or save the adapter with "
    "PEFT's model.save_pretrained(DIR)"
)
_DEEPSPEED = "a checkpoint of DeepSpeed; save its adapter with PEFT's model.save_pretrained(DIR)"
_GGUF = "a folder of GGUF files, for llama.cpp; give the PEFT adapter or the model that it was converted from"
_NAMED = (
    "an adapter with its name in the names of its tensors, as in a state dict; write it with PEFT's "
    "model.save_pretrained(DIR), which leaves the name out"
)
_EMBEDDING = (
    "an adapter with factors of an embedding, and only linears are supported; train it without the embedding in "
    "target_modules"
)
_UNPREFIXED = (
    "an adapter without 'base_model.model.' before the names of its tensors, so PEFT finds none of them; write it with "
    "PEFT's model.save_pretrained(DIR)"
)
# Name of a file that only one program writes → what the folder is and what to do. The first that matches counts.
_FILES: Sequence[tuple[re.Pattern[str], str]] = (
    (re.compile(r"adapters\.(safetensors|npz)"), _MLX),
    (re.compile(r"pytorch_lora_weights\.(safetensors|bin)"), _DIFFUSERS),
    (re.compile(r"pytorch_adapter\.bin|adapter\.safetensors|head_config\.json"), _ADAPTERHUB),
    (re.compile(r"lit_model\.pth(\.lora)?"), "an adapter of LitGPT; merge it there (litgpt merge_lora DIR)"),
    (re.compile(r"(adapter|hf_model)_\d[\d_]*\.(pt|bin)|adapter_model\.pt|recipe_state(\.pt)?"), _TORCHTUNE),
    (re.compile(r"latest_checkpointed_iteration\.txt|latest_train_state\.pt|iter_\d{7}|.*\.nemo"), _BRIDGE),
    (re.compile(r"pytorch_model_fsdp(_\d+)?|.*\.distcp"), _FSDP),
    (re.compile(r"zero_to_fp32\.py|global_step\d+"), _DEEPSPEED),
    (re.compile(r".*\.gguf"), _GGUF),
)
_TRAINER, _CONFIG = re.compile(r"checkpoint-\d+"), "adapter_config.json"
# Keys of an adapter_config.json without peft_type.
_KEYS: Sequence[tuple[frozenset[str], str]] = (
    (frozenset({"fine_tune_type", "lora_parameters", "lora_layers"}), _MLX),
    (frozenset({"config", "hidden_size", "model_class", "config_id"}), _ADAPTERHUB),
    (frozenset({"delta_type"}), f"an adapter of OpenDelta; merge it there, or {_PEFT}"),
)
# Name of a tensor that only one program writes → as in _FILES. The first that matches counts.
_TENSORS: Sequence[tuple[re.Pattern[str], str]] = (
    (re.compile(r".*\.lora_[ab]"), _MLX),
    (re.compile(r"lora_(unet|te\d*|transformer)_.*|(unet|text_encoder)\..*|.*\.lora\.(up|down)\.weight"), _DIFFUSERS),
    (re.compile(r".*\.adapter\.linear_(in|out)\.weight"), _BRIDGE),
    (re.compile(r".*\.lora_([AB]|embedding_[AB])\.(?!weight$)\w+(\.weight)?"), _NAMED),
    (re.compile(r".*\.lora_embedding_[AB]"), _EMBEDDING),
    (re.compile(r"(?!base_model\.model\.).*\.lora_[AB]\.weight"), _UNPREFIXED),
)
# Files of formats that are read here, or have their own refusal: a folder that has one is none of the above.
_OWN = frozenset(
    "adapter_model.safetensors adapter_model.bin bottleneck_config.json model.safetensors "
    "model.safetensors.index.json pytorch_model.bin pytorch_model.bin.index.json manifest.json".split()
)


def refuse_foreign_folder(folder: Path) -> None:
    """Raise UserError, with the remedy, where a folder is another program's adapter or checkpoint."""
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    if _OWN & set(names):
        return
    steps = [name for name in names if _TRAINER.fullmatch(name) and (folder / name / _CONFIG).is_file()]
    if steps:
        last = max(steps, key=lambda name: (len(name), name))
        raise UserError(
            f"{folder}: a run of transformers' Trainer; give one of its checkpoints, such as {folder / last}"
        )
    found = _by_keys(folder / _CONFIG) or _first(_FILES, names)
    if found is not None:
        raise UserError(f"{folder}: {found}")


def _by_keys(config: Path) -> str | None:
    values = read_object(config, "write the adapter again") if config.is_file() else {}
    known = [] if "peft_type" in values else [(keys & values.keys(), what) for keys, what in _KEYS]
    return next((f"{_CONFIG} has {', '.join(sorted(keys))}, so it is {what}" for keys, what in known if keys), None)


def foreign_tensors(names: Iterable[str]) -> str | None:
    """Return what an adapter with tensors of these names is, with the remedy; None where no program is recognised."""
    return _first(_TENSORS, names)


def _first(table: Sequence[tuple[re.Pattern[str], str]], names: Iterable[str]) -> str | None:
    held = list(names)
    found = ((name, what) for pattern, what in table for name in held if pattern.fullmatch(name))
    return next((f"has {short_path(name)}, so it is {what}" for name, what in found), None)
