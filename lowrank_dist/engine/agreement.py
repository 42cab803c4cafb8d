"""Checks that all ranks of a run have the same config, installation and files, before anything is trained or written.

Ranks that differ would still train together: data-parallel ranks would average gradients of two learning rates,
tensor-parallel ranks would multiply shards of two models. Files are compared by content, since every node may have its
own copy. Values that belong to one rank (its numbers, its device) are not compared.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
import torch.distributed as dist

import lowrank_dist
from lowrank_dist.arch.model_files import GENERATION_FILE
from lowrank_dist.backend import apex
from lowrank_dist.backend.select import Backend
from lowrank_dist.checkpoint.training_state import DataState
from lowrank_dist.config import Config
from lowrank_dist.engine.datasets import Data
from lowrank_dist.engine.resumable import flat_keys
from lowrank_dist.formats.provenance import digest_of, fingerprint, installed_versions
from lowrank_dist.formats.text_files import tokenizer_digest
from lowrank_dist.methods.registry import method_package
from lowrank_dist.ops import extension
from lowrank_dist.parallel.collectives import require_agreement

# Paths that may differ: `require_same_inputs` compares the files by content, and only rank 0 reads the checkpoint.
_PATHS = ("model.path", "data.train", "data.eval", "data.tokenizer", "train.resume")
_SHOWN = 12  # hex digits of a SHA-256 in a message


def require_same_start(config: Config, backend: Backend) -> None:
    """Raise UserError on every rank where configuration or installation differ between ranks. Collective.

    Must be the first collective: configuration and installation decide which collectives follow.
    """
    own = {key: json.dumps(value) for key, value in flat_keys(config.read_keys()).items() if key not in _PATHS}
    own.pop(_start_key(config), None)
    if config.train.resume in ("never", "auto"):
        own["train.resume"] = json.dumps(config.train.resume)
    own |= installed_versions()
    own["lowrank_dist's code"] = _shown(digest_of(_sources()))
    if config.engine.kernels != "plain":
        own |= _libraries(backend.device.type)
    _require(own, backend.device, "Start all ranks with one configuration, on nodes with one installation")


def require_same_inputs(config: Config, data: Data, device: torch.device, *, afresh: bool) -> None:
    """Raise UserError on every rank where base, tokenizer, data or starting adapter differ between ranks. Collective.

    afresh: the run does not resume from a checkpoint, so the adapter that it starts from is compared too.
    """
    model, words = config.model.path, config.data.tokenizer or config.model.path
    own = {
        "data.train": _content(data.state),
        "data.eval": _content(data.held_out_state),
        "model.path": _shown(fingerprint(model)),
        "data.tokenizer": _shown(tokenizer_digest(words)),
    }
    if config.eval.generate is not None:
        assert config.data.eval is not None, "generation needs an eval set"
        own["data.eval, prompts included"] = _shown(digest_of([config.data.eval]))
        own[GENERATION_FILE] = _shown(digest_of([model / GENERATION_FILE]))
    adapter = config.own_section.starts_from
    if afresh and adapter is not None:
        own[_start_key(config)] = _shown(
            digest_of(adapter / name for name in method_package(config.method).files.published)
        )
    _require(own, device, "Give all nodes the same files; their paths may differ, but not their contents")


def _require(own: dict[str, str], device: torch.device, remedy: str) -> None:
    world = dist.group.WORLD
    assert world is not None, "the ranks have met"
    require_agreement(own, world, device, remedy)


def _start_key(config: Config) -> str:
    """Return the config key, in the method's own section, of the adapter that training starts from."""
    return f"{method_package(config.method).section}.init_from"


def _sources() -> list[Path]:
    return sorted(Path(lowrank_dist.__file__).parent.rglob("*.py"))


def _libraries(device: str) -> dict[str, str]:
    """Return library that replaces PyTorch's operators on `device` → digest or version, or why it is not in use."""
    files = [extension.LIBRARY] if device == "cpu" else [extension.LIBRARY, extension.CUDA_LIBRARY]
    found = {"compiled operators": extension.reason_not_loaded_on(device) or _shown(digest_of(files))}
    return found if device == "cpu" else {**found, "apex": apex.describe(device)}


def _content(state: DataState | None) -> str:
    return "none" if state is None else f"{state.samples} samples, tokens of SHA-256 {_shown(state.sha256)}"


def _shown(digest: str) -> str:
    return f"{digest[:_SHOWN]}…"
