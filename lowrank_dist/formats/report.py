"""The report of an inspection, shown as text or JSON, and the inspection of a Hugging Face model folder."""

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import torch

from lowrank_dist.arch.architecture import Architecture
from lowrank_dist.arch.config_json import UnsupportedModel, read_architecture
from lowrank_dist.arch.model_files import CONFIG_FILE, TOKENIZER_CONFIG_FILE, class_note, read_config
from lowrank_dist.arch.tensors import hf_shapes
from lowrank_dist.errors import UserError
from lowrank_dist.formats.model_folder import (
    FLOAT_DTYPES,
    INDEX_FILE,
    SINGLE_FILE,
    Checkpoint,
    check_checkpoint,
    open_checkpoint,
)
from lowrank_dist.formats.safetensors_file import read_header
from lowrank_dist.untrusted.json import brief, read_object

T = TypeVar("T")
P = ParamSpec("P")
# For families that are not supported here: label → names of its key in config.json.
_SIZES = {
    "layers": ("num_hidden_layers", "n_layer"),
    "hidden": ("hidden_size", "n_embd"),
    "heads": ("num_attention_heads", "n_head"),
}
_SHARD = re.compile(r"model-\d+-of-\d+\.safetensors", re.ASCII)
_TOKENIZERS = ("tokenizer.json", "tokenizer.model")
_TEMPLATES = ("chat_template.jinja", "chat_template.json")


@dataclass(frozen=True)
class Report:
    """The findings of an inspection of a folder.

    kind: adapter, checkpoint, run or model. facts: name_of_fact → scalar, list or mapping of these, in order. tables:
    name → rows with the same keys. warnings: things that work but that the user should know. problems: faults, each
    with file, key and remedy.
    """

    path: Path
    kind: str
    facts: dict[str, Any] = field(default_factory=dict)
    tables: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @property
    def verifies(self) -> bool:
        return not self.problems

    def read(self, where: Path, reader: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T | None:
        """Return the result of `reader`, or None where it raises; each line of a UserError becomes a problem."""
        try:
            return reader(*args, **kwargs)
        except UserError as error:
            self.problems.extend([line for line in str(error).splitlines() if line.strip()])
        except Exception as error:  # files are untrusted: any exception is a finding, not a crash
            self.problems.append(f"{where}: cannot be read ({one_line(error)}); write or download it again")
        return None

    def to_json(self) -> dict[str, Any]:
        """Return the report as JSON values. NaN and infinity, which JSON does not have, become text."""
        whole = {
            "path": self.path,
            "kind": self.kind,
            "verifies": self.verifies,
            "facts": self.facts,
            "tables": self.tables,
            "warnings": self.warnings,
            "problems": self.problems,
        }
        return _jsonable(whole)


def one_line(error: Exception) -> str:
    """Return the error's message on one line, preceded by its type unless it is a UserError."""
    text = " ".join(str(error).split())
    return text if isinstance(error, UserError) else f"{type(error).__name__}: {text}"


def _jsonable(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _jsonable(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_jsonable(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if value is None or isinstance(value, str | bool | int | float) else str(value)


def count_parameters(architecture: Architecture | None, checkpoint: Checkpoint) -> int:
    """Return the number of parameters, tied ones counted once.

    For an unsupported family (`architecture` is None) it is the number of stored elements.
    """
    if architecture is not None:
        return sum(torch.Size(shape).numel() for shape in hf_shapes(architecture).values())
    return sum(torch.Size(checkpoint.shape(name)).numel() for name in checkpoint.names())


def inspect_model(folder: Path) -> Report:
    """Return the report on a model folder. An unsupported model is no problem, an incomplete one is."""
    report = Report(folder, "model")
    checkpoint = report.read(folder, open_checkpoint, folder)
    architecture, reason = try_architecture(folder)
    if reason is not None:
        report.read(folder / "config.json", _require_config, folder)
    report.facts.update(_described(folder, architecture))
    if checkpoint is not None:
        with checkpoint:
            report.facts["parameters"] = count_parameters(architecture, checkpoint)
            report.read(folder, _files, folder, checkpoint, report)
            if architecture is not None:
                report.read(folder, check_checkpoint, architecture, checkpoint)
    _tokenizer(folder, report)
    if architecture is not None and report.problems:
        reason = f"the folder is broken: {report.problems[0]}"
    report.facts["trainable_here"] = reason is None
    if reason is not None:
        report.facts["why_not"] = reason
    elif architecture is not None:
        report.warnings.extend(class_note(folder))
        report.facts["tensor_parallel_sizes"] = list(architecture.legal_tp_sizes())
    return report


def try_architecture(folder: Path) -> tuple[Architecture | None, str | None]:
    """Return (architecture, None), or None and the reason why the folder's model is not supported."""
    try:
        return read_architecture(folder), None
    except Exception as error:  # config.json is untrusted, and an inspection reports what it finds
        return None, one_line(error)


def _require_config(folder: Path) -> None:
    """Raise UserError for an invalid config.json, but not for a valid one of an unsupported model."""
    if (folder / CONFIG_FILE).is_file():  # else open_checkpoint has reported it
        with suppress(UnsupportedModel):
            read_architecture(folder)


def _described(folder: Path, architecture: Architecture | None) -> dict[str, Any]:
    if architecture is not None:
        widths = [kind.ffn for kind in architecture.kinds]
        return {
            "family": architecture.family,
            "layers": len(architecture.layers),
            "hidden": architecture.hidden,
            "heads": architecture.heads,
            "kv_heads": architecture.kv_heads,
            "head_dim": architecture.head_dim,
            "ffn": widths[0] if len(widths) == 1 else widths,
            "vocabulary": architecture.vocab,
            "positions": architecture.max_positions,
            "tied_embeddings": architecture.tied,
        }
    try:
        config = read_config(folder)
    except UserError:
        return {}  # open_checkpoint has reported why
    named = config["model_type"] if "model_type" in config else "not named"
    found: dict[str, Any] = {"family": named if isinstance(named, str) else brief(named)}
    for label, keys in _SIZES.items():
        sizes = [config[key] for key in keys if key in config and isinstance(config[key], int)]
        if sizes:
            found[label] = sizes[0]
    if isinstance(tied := config["tie_word_embeddings"] if "tie_word_embeddings" in config else None, bool):
        found["tied_embeddings"] = tied
    return found


def _files(folder: Path, checkpoint: Checkpoint, report: Report) -> None:
    """Add dtypes, shards and bytes to the report, and a problem for each tensor or file that contradicts the index."""
    shards = sorted({checkpoint.file(name) for name in checkpoint.names()})
    dtypes: Counter[str] = Counter()
    nbytes = 0
    for shard in shards:
        for entry in read_header(shard).entries:
            if entry.name not in checkpoint:
                report.problems.append(f"{shard}: tensor {entry.name} is not in {INDEX_FILE}; download the model again")
            elif checkpoint.file(entry.name) != shard:
                report.problems.append(
                    f"{shard}: tensor {entry.name} is also in {checkpoint.file(entry.name).name}, the file that "
                    f"{INDEX_FILE} names; download the model again"
                )
            else:
                dtypes[entry.dtype] += torch.Size(entry.shape).numel()
                nbytes += entry.nbytes
    report.facts.update(
        {
            "dtypes": dict(sorted(dtypes.items())),
            "tensors": len(checkpoint.names()),
            "shards": len(shards),
            "tensor_bytes": nbytes,
            "file_bytes": sum(shard.stat().st_size for shard in shards),
        }
    )
    odd = sorted(set(dtypes) - set(FLOAT_DTYPES))
    if odd:
        report.warnings.append(
            f"{folder}: tensors in {', '.join(odd)}, which are quantized types; use an unquantized checkpoint"
        )
    if (folder / SINGLE_FILE).is_file():
        if (folder / INDEX_FILE).is_file():
            report.warnings.append(
                f"{folder}: {INDEX_FILE} is ignored, because {SINGLE_FILE} has priority; remove one of them"
            )
        return
    strays = sorted(p.name for p in folder.iterdir() if _SHARD.fullmatch(p.name) and folder / p.name not in shards)
    report.problems.extend([f"{folder / name}: not in {INDEX_FILE}; download the model again" for name in strays])
    index = read_object(folder / INDEX_FILE, "download it again")
    metadata = index["metadata"] if "metadata" in index else None
    said = metadata["total_size"] if isinstance(metadata, dict) and "total_size" in metadata else None
    # No reader uses total_size, and published models have it wrong: a warning and not a problem.
    if said is not None and said != nbytes:
        report.warnings.append(
            f"{folder / INDEX_FILE}: total_size is {said}, but the tensors have {nbytes} bytes in all"
        )


def _tokenizer(folder: Path, report: Report) -> None:
    found = [name for name in _TOKENIZERS if (folder / name).is_file()]
    report.facts["tokenizer"] = found or "none"
    if not found:
        report.warnings.append(
            f"{folder}: has neither {' nor '.join(_TOKENIZERS)}; set data.tokenizer to a folder that has one"
        )
    templates = [name for name in _TEMPLATES if (folder / name).is_file()]
    settings = folder / TOKENIZER_CONFIG_FILE
    if settings.is_file():
        values = report.read(settings, read_object, settings, "download it again")
        if values is not None and "chat_template" in values and values["chat_template"]:
            templates.append(settings.name)
    report.facts["chat_template_in"] = templates or "none"
