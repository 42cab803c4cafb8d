"""The options of a merge, as text: `DIR=0.7`, `5GB`, `bf16`."""

import math
import re
from dataclasses import dataclass
from pathlib import Path

from lowrank_dist.errors import UserError
from lowrank_dist.untrusted.files import is_nameable, shown

# Decimal and binary units as transformers' save_pretrained(max_shard_size=…) reads them.
_UNITS = {
    f"{prefix}{infix}B": base**power
    for power, prefix in enumerate("KMGT", start=1)
    for infix, base in (("", 1000), ("i", 1024))
}
_SIZE = re.compile(rf"([0-9]+(?:\.[0-9]+)?)({'|'.join(_UNITS)})")
# The option's name → safetensors' name of the type; `auto` keeps each tensor's own.
DTYPES = {"auto": None, "fp32": "F32", "bf16": "BF16", "fp16": "F16"}


@dataclass(frozen=True)
class WeightedAdapter:
    """An adapter folder and the factor w on its update; UserError for a weight that is zero, NaN or infinite."""

    path: Path
    weight: float = 1.0

    def __post_init__(self) -> None:
        if not math.isfinite(self.weight) or self.weight == 0:
            raise UserError(f"adapter {self.path}: weight {self.weight:g} makes no sense: give a finite one but zero")

    def __str__(self) -> str:
        return f"{self.path} × {self.weight:g}"


@dataclass(frozen=True)
class Stored:
    """How a merged model is stored.

    shard_size: bytes of tensors in a file, at most, unless one tensor is larger; None for the base's own files. dtype:
    safetensors' name of the type of all floating-point tensors; None for each one's own. tokenizer: the folder, or the
    file, of the one that goes with it; None for that of the adapters, or of the base where they have none.
    """

    shard_size: int | None = None
    dtype: str | None = None
    tokenizer: Path | None = None


AS_THE_BASE = Stored()


def parse_adapter(text: str) -> WeightedAdapter:
    """`DIR` or `DIR=WEIGHT`. A folder whose whole name is `text` wins; else what follows the last "=" is the weight.

    So "runs/lr=0.1" is that folder where it exists, and "runs/lr=0.1=0.5" is the same with a weight.
    """
    path, separator, weight = text.rpartition("=")
    if not is_nameable(text):
        raise UserError(f"--adapter {shown(text)}: no folder can be called so: give DIR or DIR=WEIGHT")
    if not separator or Path(text).is_dir():
        return WeightedAdapter(Path(text))
    try:
        number = float(weight)
    except ValueError as error:
        raise UserError(
            f"--adapter {text}: there is no such folder, and {weight!r} after the last '=' is no number: give DIR or "
            "DIR=WEIGHT, such as run/adapter=0.7"
        ) from error
    if not path:
        raise UserError(f"--adapter {text}: no folder before '=': give DIR=WEIGHT, such as run/adapter=0.7")
    return WeightedAdapter(Path(path), number)


def parse_shard_size(text: str) -> int:
    """Bytes of "5GB" (5·10⁹) or "2GiB" (2·2³⁰); UserError naming the units for anything else."""
    match = _SIZE.fullmatch(text.strip())
    size = float(match[1]) * _UNITS[match[2]] if match else 0.0
    if not 1 <= size < math.inf:
        units = ", ".join(_UNITS)
        raise UserError(f"--shard-size {shown(text)}: give a number above zero and a unit of {units}, such as 5GB")
    return int(size)


def parse_dtype(text: str) -> str | None:
    """Safetensors' name of the type to store in; None for `auto`."""
    if text not in DTYPES:
        raise UserError(f"--dtype {text}: give one of {', '.join(DTYPES)}")
    return DTYPES[text]
