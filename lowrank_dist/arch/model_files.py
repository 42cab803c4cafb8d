"""config.json and element types of a model folder, and the built-in shapes: published models without weights.

shapes/<name>.json is a config.json with every key that a plan reads. Sources: the models' own config.json files; for
GPT-3, Brown et al. 2020, table 2.1, with GPT-2's vocabulary.

Headers of safetensors files are read without torch or the safetensors library: `plan` starts without either.
"""

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lowrank_dist.arch.families import FAMILIES, Family
from lowrank_dist.errors import UserError
from lowrank_dist.untrusted.files import short_path
from lowrank_dist.untrusted.json import LARGEST, brief, parse_json, read_object

CONFIG_FILE = "config.json"
_ADAPTER_FILES = ("adapter_config.json", "bottleneck_config.json")
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+", re.ASCII)
GENERATION_FILE = "generation_config.json"
TOKENIZER_CONFIG_FILE = "tokenizer_config.json"

# torch's and safetensors' names of element types. An fp16 checkpoint runs in bf16, which has the range of fp32.
_DTYPES: Mapping[str, Literal["fp32", "bf16"]] = {"float32": "fp32", "bfloat16": "bf16", "float16": "bf16"}
_STORED_DTYPES: Mapping[str, Literal["fp32", "bf16"]] = {"F32": "fp32", "BF16": "bf16", "F16": "bf16"}

_SHAPES = Path(__file__).parent / "shapes"


@dataclass(frozen=True)
class Wrapper:
    """A model of images and text. texts: the families of the model of text in its text_config, the default first.

    defaults: keys that published files leave out of text_config → transformers' default.
    """

    model_class: str
    texts: tuple[str, ...]
    defaults: Mapping[str, int]


WRAPPERS: Mapping[str, Wrapper] = {
    "gemma3": Wrapper(
        "Gemma3ForConditionalGeneration", ("gemma3_text",), {"num_attention_heads": 8, "vocab_size": 262_208}
    ),
    "mistral3": Wrapper("Mistral3ForConditionalGeneration", ("mistral", "ministral3"), {}),
}
BUILT_IN = tuple(sorted(file.stem for file in _SHAPES.glob("*.json")))


def config_file(path: Path) -> Path:
    """Return the config.json of a model folder. A file is returned as it is."""
    if path.is_file() or path.name == CONFIG_FILE:
        return path
    return require_folder(path) / CONFIG_FILE


def require_folder(path: Path) -> Path:
    """Return `path`. Raises UserError where it is not a folder, with the download command for a name on the Hub."""
    if path.is_dir():
        return path
    raise UserError(
        f"{path}: no such folder"
        + (
            hub_hint(path)
            or "; give a local Hugging Face model folder (`hf download NAME --local-dir FOLDER` gets one from the Hub)"
        )
    )


def hub_hint(path: Path) -> str:
    """Return a hint for a missing path that looks like a name on the Hub; empty for other paths.

    The hint ends an error message and gives the command that downloads the model to this path.
    """
    if path.exists() or path.parent.is_dir() or not _HUB_NAME.fullmatch(str(path)):
        return ""
    return f". A model on the Hub is not downloaded by itself; run `hf download {path} --local-dir {path}` first"


def read_config(path: Path) -> dict[str, Any]:
    """Return the object in a model folder's config.json, or in the file itself.

    Raises UserError where there is none, and names the base where the folder is an adapter.
    """
    adapter = next((path / name for name in _ADAPTER_FILES if (path / name).is_file()), None)
    if adapter is not None and not (path / CONFIG_FILE).exists():
        base = read_object(adapter, "correct it").get("base_model_name_or_path")
        named = f" of {base}" if isinstance(base, str) and base else ""
        raise UserError(
            f"{path}: an adapter{named}, not a model; give the folder of its base model here (lora.init_from starts "
            "training from a LoRA adapter)"
        )
    return read_model_json(config_file(path), "a Hugging Face model folder has one, so download the model completely")


def read_model_json(file: Path, remedy: str) -> dict[str, Any]:
    """Return the JSON object in a file of a model folder. remedy: what to do where the file is missing."""
    if not file.is_file():
        raise UserError(f"{file}: missing; {remedy}")
    return read_object(file, "download the model again")


def class_note(folder: Path) -> list[str]:
    """Return a line where `architectures` in a model folder's config.json is not the class of its model_type.

    llama.cpp and vLLM choose by that key, transformers by model_type. No line for an unsupported model.
    """
    values = read_config(folder)
    expected, found = model_class(values), values.get("architectures")
    if expected is None or found == [expected]:
        return []
    where = f"{short_path(config_file(folder))}: architectures"
    if not found:
        return [f'{where} is missing, so llama.cpp and vLLM refuse the model; add "architectures": ["{expected}"]']
    return [
        f"{where} is {brief(found)}, but for model_type {values['model_type']!r} it is {[expected]}; llama.cpp and "
        "vLLM go by architectures, so correct it if they refuse the model or read it as another"
    ]


def model_class(values: Mapping[str, Any]) -> str | None:
    """Return the class that a config.json's `architectures` should name; None for an unsupported model."""
    name = values.get("model_type")
    if not isinstance(name, str):
        return None
    known: Mapping[str, Family | Wrapper] = {**FAMILIES, **WRAPPERS}
    return known[name].model_class if name in known else None


def built_in_config(name: str) -> dict[str, Any]:
    """Return the config.json of a built-in shape."""
    return read_config(_SHAPES / f"{name}.json")


def find_config(what: str) -> Path:
    """Return the path of a config.json. what: a built-in shape, a model folder or that file itself.

    Raises UserError for anything else.
    """
    if what in BUILT_IN:
        return _SHAPES / f"{what}.json"
    path = Path(what)
    if path.exists():
        return config_file(path)
    match = difflib.get_close_matches(what.lower(), BUILT_IN, n=1)
    meant = f"did you mean {match[0]}? If not: " if match else ""
    raise UserError(
        f"{what!r}: not a built-in shape, model folder or file; {meant}the shapes are {', '.join(BUILT_IN)}, and any "
        "other model is planned from its folder or its config.json"
    )


def declared_dtype(values: Mapping[str, Any]) -> Literal["fp32", "bf16"]:
    """Return the element type that a config.json declares for its weights, by default fp32. fp16 runs as bf16."""
    for key in ("dtype", "torch_dtype"):
        if isinstance(name := values.get(key), str):
            return _DTYPES.get(name, "fp32")
    return "fp32"


def stored_dtype(folder: Path) -> Literal["fp32", "bf16"] | None:
    """Return the element type with the most bytes in a model folder's first safetensors file; None if unknown.

    fp16 runs as bf16. The loader uses the dtype of the files, not that of config.json.
    """
    for file in sorted(folder.glob("*.safetensors"))[:1]:
        try:
            with file.open("rb") as stream:
                length = int.from_bytes(stream.read(8), "little")
                header = parse_json(stream.read(length)) if length <= LARGEST else {}
            sizes: dict[str, int] = {}
            for name, entry in header.items():
                if name != "__metadata__":
                    start, end = entry["data_offsets"]
                    sizes[entry["dtype"]] = sizes.get(entry["dtype"], 0) + end - start
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None  # the loader reports what is wrong with the file
        largest = max(sizes, key=lambda name: sizes[name], default="")
        return _STORED_DTYPES.get(largest)
    return None
