"""The options of a merge, as text: `DIR=0.7`, `5GB`, `bf16`."""

import math
import re
from dataclasses import dataclass
from pathlib import Path

from lowrank_dist.errors import UserError
from lowrank_dist.untrusted.files import is_valid_path, short_path

# Decimal and binary units, as in transformers' save_pretrained(max_shard_size=…).
_UNITS = {
    f"{prefix}{infix}B": base**power
    for power, prefix in enumerate("KMGT", start=1)
    for infix, base in (("", 1000), ("i", 1024))
}
_SIZE = re.compile(rf"([0-9]+(?:\.[0-9]+)?)({'|'.join(_UNITS)})")
# Value of --dtype → safetensors' name of the type; `auto` keeps each tensor's own.
DTYPES = {"auto": None, "fp32": "F32", "bf16": "BF16", "fp16": "F16"}


@dataclass(frozen=True)
class WeightedAdapter:
    """An adapter folder and the factor w on its update. Raises UserError for a weight of zero, NaN or infinity."""

    path: Path
    weight: float = 1.0

    def __post_init__(self) -> None:
        if not math.isfinite(self.weight) or self.weight == 0:
            raise UserError(f"adapter {self.path}: weight {self.weight:g} is zero or not finite; give another weight")

    def __str__(self) -> str:
        return f"{self.path} × {self.weight:g}"


@dataclass(frozen=True)
class OutputFormat:
    """The format in which a merged model is stored.

    shard_size: largest bytes of tensors in a file, unless one tensor is larger; None for the same files as the base.
    dtype: type of all floating-point tensors as safetensors names it (F32, BF16, F16); None for each tensor's own.
    tokenizer: folder or file of the tokenizer to store; None for that of the adapters, or of the base where they have
    none. Raises UserError for another dtype, and for a size below 1.
    """

    shard_size: int | None = None
    dtype: str | None = None
    tokenizer: Path | None = None

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES.values():
            names = ", ".join(name for name in DTYPES.values() if name is not None)
            raise UserError(f"dtype {self.dtype}: give one of {names}, or None for each tensor's own")
        if self.shard_size is not None and self.shard_size < 1:
            raise UserError(f"shard_size {self.shard_size}: give the bytes of a file, at least 1, or None")


SAME_AS_BASE = OutputFormat()


def parse_adapter(text: str) -> WeightedAdapter:
    """Return the adapter of `DIR` or `DIR=WEIGHT`. Raises UserError for other text.

    If a folder named `text` exists, it is taken; else the part after the last "=" is the weight. So "runs/lr=0.1" is
    that folder where it exists, and "runs/lr=0.1=0.5" is the same folder with a weight.
    """
    path, separator, weight = text.rpartition("=")
    if not is_valid_path(text):
        raise UserError(f"--adapter {short_path(text)}: not a valid path; give DIR or DIR=WEIGHT")
    if not separator or Path(text).is_dir():
        return WeightedAdapter(Path(text))
    try:
        number = float(weight)
    except ValueError as error:
        raise UserError(
            f"--adapter {text}: no such folder, and {weight!r} after the last '=' is not a number; give DIR or "
            "DIR=WEIGHT, such as run/adapter=0.7"
        ) from error
    if not path:
        raise UserError(f"--adapter {text}: no folder before '='; give DIR=WEIGHT, such as run/adapter=0.7")
    return WeightedAdapter(Path(path), number)


def parse_shard_size(text: str) -> int:
    """Return the bytes of "5GB" (5·10⁹) or "2GiB" (2·2³⁰). Raises UserError, naming the units, for other text."""
    match = _SIZE.fullmatch(text.strip())
    size = float(match[1]) * _UNITS[match[2]] if match else 0.0
    if not 1 <= size < math.inf:
        units = ", ".join(_UNITS)
        raise UserError(f"--shard-size {short_path(text)}: give a number above zero and a unit of {units}, such as 5GB")
    return int(size)


def parse_dtype(text: str) -> str | None:
    """Return safetensors' name of the type to store in; None for `auto`. Raises UserError for other text."""
    if text not in DTYPES:
        raise UserError(f"--dtype {text}: give one of {', '.join(DTYPES)}")
    return DTYPES[text]
