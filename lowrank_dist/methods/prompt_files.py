"""Prefixes and prompts as PEFT folders: adapter_config.json and one tensor, `prompt_embeddings`.

Layout of PEFT 0.21 (`peft_model.get_prompt`): a prompt is [l, H]; a prefix is [l, 2·L·G·d], for each layer its keys and
then its values. Legend: l virtual positions, L layers, G key/value heads, d head width, H hidden.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors import safe_open
from torch import Tensor

from lowrank_dist.arch.architecture import Architecture
from lowrank_dist.errors import UserError
from lowrank_dist.formats.atomic import final_path
from lowrank_dist.formats.manifest import is_checkpoint, verify_manifest
from lowrank_dist.formats.model_card import NOT_MERGED, USE, WITH_GENERATE, WITH_PEFT, base_model, model_card
from lowrank_dist.formats.provenance import PROVENANCE_FILE, Provenance, read_provenance
from lowrank_dist.formats.report import Report
from lowrank_dist.formats.safetensors_file import read_header, write_fp32
from lowrank_dist.methods.files import (
    CONFIG_FILE,
    PUBLISHED,
    WEIGHTS_FILE,
    Inspected,
    MethodFiles,
    Published,
    any_there,
    no_update,
    norm,
    not_served,
    own_file,
)
from lowrank_dist.untrusted.json import read_object, typed_value
from lowrank_dist.untrusted.keys import EMPTY, KeyRule

Kind = Literal["PREFIX_TUNING", "PROMPT_TUNING"]
_TENSOR = "prompt_embeddings"
_FLOATS = ("F32", "BF16", "F16")
KEYS = KeyRule(
    applied=frozenset(
        "peft_type base_model_name_or_path num_virtual_tokens token_dim num_transformer_submodules "
        "num_attention_heads num_layers".split()
    ),
    # prefix_projection: PEFT saves the output of a prefix's MLP instead of the MLP.
    without_effect=frozenset(
        "prefix_projection task_type auto_mapping peft_version revision inference_mode encoder_hidden_size "
        "init_weights prompt_tuning_init prompt_tuning_init_text tokenizer_name_or_path tokenizer_kwargs".split()
    ),
    refused={"modules_to_save": "fully trained modules of the base are not supported"},
    nothing=EMPTY,
)


@dataclass(frozen=True)
class PromptLearning:
    """A trained prefix or prompt. kind: PEFT's name of the method. embeddings: [l, width] in fp32.

    The other fields describe the base, as PEFT requires. heads: key/value heads for a prefix, attention heads for a
    prompt. token_dim: G·d for a prefix, H for a prompt.
    """

    kind: Kind
    embeddings: Tensor
    layers: int
    heads: int
    token_dim: int
    base: str


def write_prompt_learning(folder: Path, learned: PromptLearning, provenance: Provenance) -> None:
    """Write the three files into an existing folder. Raises UserError for NaN or infinity."""
    if not torch.isfinite(learned.embeddings).all():
        raise UserError(
            f"{final_path(folder)}: not written, because {_TENSOR} has NaN or infinity; lower train.lr or resume "
            "earlier"
        )
    config: dict[str, Any] = {
        "peft_type": learned.kind,
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": learned.base,
        "num_virtual_tokens": learned.embeddings.size(0),
        "token_dim": learned.token_dim,
        "num_transformer_submodules": 1,
        "num_attention_heads": learned.heads,
        "num_layers": learned.layers,
        "inference_mode": True,
    }
    if learned.kind == "PREFIX_TUNING":
        config |= {"prefix_projection": False, "encoder_hidden_size": learned.token_dim}
    else:
        config |= {"prompt_tuning_init": "RANDOM", "prompt_tuning_init_text": None, "tokenizer_name_or_path": None}
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    (folder / PROVENANCE_FILE).write_text(provenance.to_json(), encoding="utf-8")
    write_fp32(folder / WEIGHTS_FILE, {_TENSOR: learned.embeddings.detach().to("cpu", torch.float32).contiguous()})


def read_prompt_learning(folder: Path) -> PromptLearning:
    """Read a PREFIX_TUNING or PROMPT_TUNING folder, written by PEFT or by this project.

    Raises UserError, with file and key, for a folder that is incomplete or inconsistent, and for a prefix whose file
    holds the MLP that computes its keys and values (prefix_projection).
    """
    if is_checkpoint(folder):
        verify_manifest(folder)
    config, where = _config(folder), folder / CONFIG_FILE
    named = _text(config, "peft_type", folder)
    kind: Kind | None = next((each for each in get_args(Kind) if each == named), None)
    if kind is None:
        raise UserError(f"{where}: peft_type is {named!r}; give a folder of type PREFIX_TUNING or PROMPT_TUNING")
    for key, reason in KEYS.refusals(config).items():
        raise UserError(f"{where}: {key} is {config[key]!r}: {reason}")
    if config.get("num_transformer_submodules") not in (None, 1):
        raise UserError(f"{where}: num_transformer_submodules is not 1; give the folder of a decoder-only model")
    sizes: dict[str, int] = {}
    for key in ("num_virtual_tokens", "num_layers", "num_attention_heads", "token_dim"):
        value = config.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise UserError(f"{where}: {key} must be an integer of at least 1, not {value!r}")
        sizes[key] = value
    width = sizes["token_dim"] * (2 * sizes["num_layers"] if kind == "PREFIX_TUNING" else 1)
    path, expected = own_file(folder, WEIGHTS_FILE), (sizes["num_virtual_tokens"], width)
    found = {entry.name: (entry.dtype, entry.shape) for entry in read_header(path).entries}
    if found.keys() != {_TENSOR} or found[_TENSOR][1] != expected or found[_TENSOR][0] not in _FLOATS:
        raise UserError(
            f"{path}: has {', '.join(f'{name} {list(shape)} {dtype}' for name, (dtype, shape) in found.items())}, "
            f"but {CONFIG_FILE} asks for {_TENSOR} {list(expected)} alone"
        )
    with safe_open(path, framework="pt") as file:
        embeddings = file.get_tensor(_TENSOR).float()
    if not torch.isfinite(embeddings).all():
        raise UserError(f"{path}: {_TENSOR} has NaN or infinity; take an earlier checkpoint")
    return PromptLearning(
        kind,
        embeddings,
        sizes["num_layers"],
        sizes["num_attention_heads"],
        sizes["token_dim"],
        typed_value(config, "base_model_name_or_path", str, where) or "",
    )


def require_fit(folder: Path, learned: PromptLearning, architecture: Architecture) -> None:
    """Raise UserError where the model does not have the sizes in the folder's config, or has too few positions."""
    where, length = folder / CONFIG_FILE, learned.embeddings.size(0)
    if learned.kind == "PREFIX_TUNING":
        expected = len(architecture.layers), architecture.kv_heads, architecture.kv_heads * architecture.head_dim
    else:
        expected = len(architecture.layers), architecture.heads, architecture.hidden
    found = learned.layers, learned.heads, learned.token_dim
    names = ("num_layers", "num_attention_heads", "token_dim")
    wrong = [
        f"{name} is {value}, but {other} in the model"
        for name, value, other in zip(names, found, expected, strict=True)
        if value != other
    ]
    if wrong:
        raise UserError(f"{where}: {'; '.join(wrong)}; give the model that it was trained on")
    if length >= architecture.max_positions:
        raise UserError(
            f"{where}: num_virtual_tokens is {length}, which leaves none of the model's {architecture.max_positions} "
            "positions; give the model that it was trained on"
        )


def _config(folder: Path) -> dict[str, Any]:
    return read_object(own_file(folder, CONFIG_FILE), "write the adapter again")


def _text(config: dict[str, Any], key: str, folder: Path) -> str:
    value = config.get(key)
    if not isinstance(value, str):
        raise UserError(f"{folder / CONFIG_FILE}: {key} must be text, not {value!r}")
    return value


@dataclass(frozen=True)
class PromptLearningFiles(MethodFiles):
    """The folders of prefix or prompt. name: the method's name. tag: its Hub tag. merging: why it cannot be merged."""

    kind: Kind
    name: str
    tag: str
    merging: str

    published = PUBLISHED

    def wrote(self, folder: Path) -> bool:
        if not any_there(folder, (CONFIG_FILE, WEIGHTS_FILE)):
            return False
        try:
            return _text(_config(folder), "peft_type", folder) == self.kind
        except UserError:  # the LoRA reader raises the same error
            return False

    def notes(self, folder: Path) -> list[str]:
        return KEYS.notes(_config(folder), str(folder / CONFIG_FILE))

    def refuse_merge(self, folder: Path) -> None:
        raise no_update(folder, f"a {self.name} ({self.merging}), which no weight of the base can represent")

    def publish(self, source: Path, name: str, *, target: str | None, max_rank: int | None) -> Published:
        provenance = read_provenance(source)
        if target is not None:
            raise not_served(source, f"a {self.name}", target)
        learned = read_prompt_learning(source)
        size = learned.embeddings.numel()
        about = f"A {self.name} for {base_model(learned.base)}: {_where(learned)}, {size:,} parameters."
        usage = f"{USE}\n\n{WITH_PEFT}\n\n{WITH_GENERATE}\n\n{NOT_MERGED}"
        return Published(self.published, model_card(name, self.tag, learned.base, about, usage, provenance))

    def inspect(self, folder: Path, report: Report) -> Inspected:
        path = folder / WEIGHTS_FILE
        learned = report.read(path, read_prompt_learning, folder)
        report.facts["method"] = self.name
        if learned is None:
            return Inspected()
        report.facts.update(
            {
                "base": learned.base or "not named",
                "virtual_positions": learned.embeddings.size(0),
                "layers": learned.layers,
                "heads": learned.heads,
                "token_dim": learned.token_dim,
                "parameters": learned.embeddings.numel(),
                "dtypes": sorted({entry.dtype for entry in read_header(path).entries}),
                "bytes": path.stat().st_size,
                "norm": norm([learned.embeddings]),
            }
        )
        return Inspected(learned.base, lambda base: require_fit(folder, learned, base.architecture))


PREFIX = PromptLearningFiles("PREFIX_TUNING", "prefix", "prefix-tuning", "more keys and values for attention to see")
PROMPT = PromptLearningFiles("PROMPT_TUNING", "prompt", "prompt-tuning", "more embeddings before the input")


def _where(learned: PromptLearning) -> str:
    length = learned.embeddings.size(0)
    if learned.kind == PREFIX.kind:
        return f"keys and values at {length} positions of every one of {learned.layers} layers"
    return f"embeddings at {length} positions before the input"
