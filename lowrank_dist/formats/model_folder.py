"""A local Hugging Face model folder, opened without reading its weights. Nothing remote, no pickle, no remote code."""

import os
import re
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from lowrank_dist.arch.architecture import Architecture
from lowrank_dist.arch.families import OUTPUT_LAYER
from lowrank_dist.arch.model_files import CONFIG_FILE, read_config, read_model_json, require_folder
from lowrank_dist.arch.tensors import hf_shapes, refuse_wrapped_names
from lowrank_dist.errors import UserError, some_of
from lowrank_dist.formats.paths import require_copyable
from lowrank_dist.formats.safetensors_file import read_header
from lowrank_dist.formats.text_files import TEXT_FILES
from lowrank_dist.untrusted.files import is_valid_path
from lowrank_dist.untrusted.json import brief

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

# safetensors' names of the element types a base model may have.
FLOAT_DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
_OPEN_FILES = 4
_COMPARED_ROWS = 256
_MOST_ALIKE = 3  # lines on tensors with the same fault
# Not copied into a merged model: weights in other files would be the unmerged ones, and an adapter's config would make
# transformers apply an adapter.
_WEIGHT_SUFFIXES = frozenset(".safetensors .bin .pt .pth .ckpt .h5 .msgpack .onnx .onnx_data .gguf .npz .ot".split())
_NOT_COPIED = frozenset((INDEX_FILE, "pytorch_model.bin.index.json", "adapter_config.json"))


@dataclass(frozen=True)
class StoredTensor:
    """One tensor as a file's header describes it. dtype: safetensors' name ("BF16")."""

    file: Path
    shape: tuple[int, ...]
    dtype: str


class Checkpoint:
    """The tensors of a model folder by name; made by `open_checkpoint`.

    Weights are memory-mapped: `slice(name)[rows, columns]` is a tensor on the mapped file; it copies nothing and must
    not be written to. A few files are kept open; use it as a context manager, or call `close`.
    """

    def __init__(self, path: Path, tensors: Mapping[str, StoredTensor]) -> None:
        self.path = path
        self._tensors = dict(tensors)
        self._open: OrderedDict[Path, Any] = OrderedDict()

    def __enter__(self) -> "Checkpoint":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def names(self) -> tuple[str, ...]:
        """Return the names of all tensors, sorted."""
        return tuple(sorted(self._tensors))

    def shape(self, name: str) -> tuple[int, ...]:
        return self._tensors[name].shape

    def dtype(self, name: str) -> torch.dtype:
        """Return the element type of a floating-point tensor; raises UserError for any other type."""
        stored = self._tensors[name]
        if stored.dtype not in FLOAT_DTYPES:
            raise UserError(
                f"{stored.file}: tensor {name} has dtype {stored.dtype}, not one of {', '.join(FLOAT_DTYPES)}; use "
                "an unquantized checkpoint"
            )
        return FLOAT_DTYPES[stored.dtype]

    def file(self, name: str) -> Path:
        """Return the file that holds `name`."""
        return self._tensors[name].file

    def main_dtype(self) -> torch.dtype:
        """Return the floating-point type that most elements have, which `model.dtype: auto` stands for.

        Raises UserError where no tensor is floating-point.
        """
        elements: dict[str, int] = {}
        for stored in self._tensors.values():
            if stored.dtype in FLOAT_DTYPES:
                elements[stored.dtype] = elements.setdefault(stored.dtype, 0) + torch.Size(stored.shape).numel()
        if not elements:
            raise UserError(f"{self.path}: no floating-point tensor in the checkpoint; use an unquantized checkpoint")
        return FLOAT_DTYPES[max(elements, key=elements.__getitem__)]

    def slice(self, name: str) -> Any:
        """Return a lazy view of `name`: slicing it gives a tensor on the mapped file, also valid after `close`."""
        return self._handle(self._tensors[name].file).get_slice(name)

    def close(self) -> None:
        """Close the files kept open; a later `slice` opens them again."""
        while self._open:
            self._open.popitem()[1].__exit__(None, None, None)

    def _handle(self, file: Path) -> Any:
        if file not in self._open:
            if len(self._open) == _OPEN_FILES:
                self._open.popitem(last=False)[1].__exit__(None, None, None)
            self._open[file] = safe_open(file, framework="pt", device="cpu")
        self._open.move_to_end(file)
        return self._open[file]


def open_checkpoint(path: Path) -> Checkpoint:
    """Return the checkpoint in folder `path`, checked from the files' headers alone.

    A single model.safetensors takes precedence over an index, as in transformers. Raises UserError, listing all
    problems, for: a missing folder, config.json or file; a folder of pickles; an index that is malformed, names a file
    outside the folder or a tensor that its file does not hold; a truncated or malformed file.
    """
    read_config(require_folder(path))
    if (path / SINGLE_FILE).is_file():
        return Checkpoint(path, _read_header(path / SINGLE_FILE))
    index = path / INDEX_FILE
    if not index.is_file():
        raise UserError(_no_weights(path))
    weight_map = _read_weight_map(index)
    problems, headers = [], {}
    for name in sorted(set(weight_map.values())):
        try:
            headers[name] = _read_header(path / name)
        except UserError as error:
            problems.append(f"{error} (named by {INDEX_FILE})")
    for tensor, name in weight_map.items():
        if name in headers and tensor not in headers[name]:
            problems.append(f"{index}: weight_map: tensor {tensor} is not in {name}; download the model again")
    if problems:
        raise UserError("\n".join(problems))
    return Checkpoint(path, {tensor: headers[name][tensor] for tensor, name in weight_map.items()})


def _read_weight_map(index: Path) -> dict[str, str]:
    content = read_model_json(index, "download the model again")
    if "weight_map" not in content or not isinstance(content["weight_map"], dict) or not content["weight_map"]:
        raise UserError(
            f"{index}: key weight_map must be an object that maps tensor names to file names; download it again"
        )
    for tensor, name in content["weight_map"].items():
        # Only a plain name: the Hub's cache may link files elsewhere, but an index must not name another folder.
        plain = isinstance(name, str) and not set(name) & set("/\\") and name.endswith(".safetensors")
        if not plain or not is_valid_path(name):
            raise UserError(
                f"{index}: weight_map: {tensor} is mapped to {brief(name)}, which is not the name of a .safetensors "
                "file in the model folder; download the index again"
            )
    return content["weight_map"]


def _read_header(file: Path) -> dict[str, StoredTensor]:
    if not file.is_file():
        raise UserError(f"{file}: missing; download the model completely")
    return {entry.name: StoredTensor(file, entry.shape, entry.dtype) for entry in read_header(file).entries}


def _no_weights(folder: Path) -> str:
    pickles = sorted(file.name for file in folder.iterdir() if file.suffix in (".bin", ".pt", ".pth", ".ckpt"))
    if pickles:
        return (
            f"{folder}: has only pickled weights ({', '.join(pickles[:3])}), which can run code when they are read; "
            "convert them once with transformers' save_pretrained(..., safe_serialization=True), or download the "
            ".safetensors files"
        )
    return f"{folder}: has neither {SINGLE_FILE} nor {INDEX_FILE}; download the model completely"


def check_checkpoint(architecture: Architecture, checkpoint: Checkpoint) -> None:
    """Compare the checkpoint's headers with the architecture; raise UserError with all differences, one line per kind.

    An output layer stored beside the word embeddings is also compared with them, in some rows.
    """
    refuse_wrapped_names(checkpoint.path, checkpoint.names(), lambda path, part: "save the model without its wrapper")
    problems = _tie_problems(architecture, checkpoint)
    told = (OUTPUT_LAYER.hf, architecture.embedding_name) if problems else ()
    missing, used, shapes, types = list[str](), set[str](), list[str](), list[str]()
    for name, expected in hf_shapes(architecture).items():
        found = stored_name(name, architecture, checkpoint)
        if found is None:
            missing += [] if name in told else [f"{name} {list(expected)}"]
            continue
        used.add(found)
        if checkpoint.shape(found) != expected:
            shapes.append(
                f"{checkpoint.file(found)}: tensor {found} has shape {list(checkpoint.shape(found))}, but config.json "
                f"asks for {list(expected)}; use the config.json that belongs to these weights"
            )
        try:
            checkpoint.dtype(found)
        except UserError as error:
            types.append(str(error))
    unknown = [name for name in checkpoint.names() if name not in used and not _is_ignored(name, architecture)]
    if missing:
        problems.append(f"{checkpoint.path}: {_tensors(missing, 'is', 'are')} missing; download the model again")
    for lines in (shapes, types):
        problems += lines[:_MOST_ALIKE]
        if len(lines) > _MOST_ALIKE:
            problems.append(f"{checkpoint.path}: and {len(lines) - _MOST_ALIKE} more tensors with such a fault")
    if unknown:
        where = checkpoint.path if len({checkpoint.file(name) for name in unknown}) > 1 else checkpoint.file(unknown[0])
        problems.append(
            f"{where}: {_tensors(unknown, 'does', 'do')} not exist in a {architecture.family} model with this "
            "config.json; use the config.json that belongs to these weights"
        )
    if problems:
        raise UserError("\n".join(problems))


def _tensors(names: Sequence[str], one: str, several: str) -> str:
    return f"tensor {names[0]} {one}" if len(names) == 1 else f"{len(names)} tensors ({some_of(names)}) {several}"


def _tie_problems(architecture: Architecture, checkpoint: Checkpoint) -> list[str]:
    """Return a line where tie_word_embeddings of config.json contradicts the word embeddings and the output layer."""
    head, words = (architecture.find(name, checkpoint) for name in (OUTPUT_LAYER.hf, architecture.embedding_name))
    stated = f"{checkpoint.path / CONFIG_FILE}: tie_word_embeddings is {str(architecture.tied).lower()}"
    if read_config(checkpoint.path).get("tie_word_embeddings") is None:
        stated += f" (it is missing, and that is the default of a {architecture.family})"
    if not architecture.tied and (head is None) != (words is None):
        lacking = OUTPUT_LAYER.hf if head is None else architecture.embedding_name
        return [
            f"{stated}, but the weights have no {lacking}; set it to true if the model's output layer is its word "
            "embeddings, or download the model again if a file of it is missing"
        ]
    if architecture.tied and head is not None and words is not None and not _alike(checkpoint, head, words):
        return [
            f"{stated}, but {head} differs from {words}, so transformers 5 does not tie them; set it to false, or "
            f"remove {head} from the weights"
        ]
    return []


def _alike(checkpoint: Checkpoint, one: str, other: str) -> bool:
    """Return whether two matrices are equal in shape, and in rows from all over them."""
    if (shape := checkpoint.shape(one)) != checkpoint.shape(other):
        return False
    step = max(1, shape[0] // _COMPARED_ROWS)
    left, right = checkpoint.slice(one), checkpoint.slice(other)
    return all(torch.equal(left[row : row + 1], right[row : row + 1]) for row in range(0, shape[0], step))


def stored_name(name: str, architecture: Architecture, checkpoint: Checkpoint) -> str | None:
    """Return the name under which the checkpoint holds tensor `name`, or None.

    The base-model prefix may be missing; tied embeddings may be stored only under the name of the output layer.
    """
    found = architecture.find(name, checkpoint)
    if found is None and architecture.tied and name == architecture.embedding_name:
        found = architecture.find(OUTPUT_LAYER.hf, checkpoint)
    return found


def _is_ignored(name: str, architecture: Architecture) -> bool:
    if architecture.tied and architecture.find(OUTPUT_LAYER.hf, (name,)) is not None:
        return True
    bare = name.removeprefix(architecture.prefix)
    return any(re.fullmatch(pattern, bare) for pattern in architecture.ignored)


def other_files(base: Path) -> list[Path]:
    """Return the base's files without weights, index and config; subfolders included, hidden or linked ones excluded.

    They are copied unchanged. Raises UserError for a link out of the base (`require_copyable`) and for anything but a
    regular file.
    """
    found = []
    for parent, folders, names in os.walk(base):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            path = Path(parent, name)
            if path.suffix in _WEIGHT_SUFFIXES or name in _NOT_COPIED or path == base / "config.json":
                continue
            if not path.is_file():
                raise UserError(
                    f"{path}: cannot be copied, since it is not a regular file (a broken link?); remove or restore it"
                )
            found.append(require_copyable(path, base, TEXT_FILES))
    return sorted(found)
