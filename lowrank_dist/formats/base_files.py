"""The files of a base folder that go with its weights, whatever these become: tokenizer, templates, generation."""

import os
from pathlib import Path

from lowrank_dist.errors import UserError
from lowrank_dist.formats.model_folder import INDEX_FILE

# Weights in any other format would be the unmerged ones; an adapter's config would make transformers apply an adapter.
_WEIGHT_SUFFIXES = frozenset(".safetensors .bin .pt .pth .ckpt .h5 .msgpack .onnx .onnx_data .gguf .npz .ot".split())
_NOT_COPIED = frozenset((INDEX_FILE, "pytorch_model.bin.index.json", "adapter_config.json"))


def other_files(base: Path) -> list[Path]:
    """Every other file of the base that holds no weights, subfolders included, hidden or linked folders not."""
    found = []
    for parent, folders, names in os.walk(base):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            path = Path(parent, name)
            if path.suffix in _WEIGHT_SUFFIXES or name in _NOT_COPIED or path == base / "config.json":
                continue
            if not path.is_file():
                raise UserError(
                    f"{path} cannot be copied, it is no regular file (a broken link?): remove or restore it"
                )
            found.append(path)
    return sorted(found)
