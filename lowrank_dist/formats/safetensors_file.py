"""Reading and writing of safetensors files in parts; the safetensors library would hold whole files in memory.

Layout (https://github.com/huggingface/safetensors#format): 8 bytes little-endian header length, a JSON header that
gives each tensor's dtype, shape and [begin, end) in the data that follow. The data have no holes.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Self

import torch
from safetensors import SafetensorError, safe_open

from lowrank_dist.errors import UserError
from lowrank_dist.untrusted.files import short_path
from lowrank_dist.untrusted.json import LARGEST, parse_json

_ALIGNMENT = 8
_NAMES = {torch.float32: "F32", torch.int64: "I64"}


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a file: dtype as the format names it ("BF16"), shape, and its first byte and size in the data."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int


@dataclass(frozen=True)
class Header:
    """The tensors of one file in the order of their bytes, its metadata, and where in the file the data begin."""

    entries: tuple[TensorEntry, ...]
    metadata: Mapping[str, str]
    data_start: int


def read_header(path: Path) -> Header:
    """Read and check the header of a file; raises UserError where it is missing, truncated or malformed."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > LARGEST:
                raise ValueError(f"a header of {length} bytes; the limit is {LARGEST}")
            header = file.read(length)
        # The library checks the header against itself and the file's length (overflow, holes, overlaps, truncation).
        with safe_open(path, framework="pt"):
            pass
        pairs = parse_json(header, unique=True)
    except (OSError, SafetensorError, ValueError) as error:
        what = f"{short_path(path)}: truncated or not a safetensors file ({error})"
        raise UserError(f"{what}; copy it or download it again") from error
    metadata = pairs.pop("__metadata__", None) or {}
    entries = (
        TensorEntry(name, entry["dtype"], tuple(entry["shape"]), begin, end - begin)
        for name, entry in pairs.items()
        for begin, end in [entry["data_offsets"]]
    )
    return Header(tuple(sorted(entries, key=lambda entry: (entry.start, entry.nbytes))), metadata, 8 + length)


def read_into(file: FileIO, start: int, view: memoryview) -> None:
    """Fill `view` from position `start` of an unbuffered file; raises OSError where the file ends too early."""
    file.seek(start)
    while view:
        count = file.readinto(view)
        if not count:
            raise OSError(f"{file.name} ends {len(view)} bytes early, so it changed while it was read")
        view = view[count:]


class SafetensorsWriter:
    """Writes one file front to back: the header at once, then each tensor's bytes in the order of `entries`.

    metadata: text → text; `{"format": "pt"}` is what transformers and PEFT expect.
    """

    def __init__(self, path: Path, entries: Iterable[TensorEntry], metadata: Mapping[str, str]) -> None:
        header: dict[str, object] = {"__metadata__": dict(metadata)}
        self._expected = 0
        for entry in entries:
            end = self._expected + entry.nbytes
            header[entry.name] = {"dtype": entry.dtype, "shape": entry.shape, "data_offsets": [self._expected, end]}
            self._expected = end
        encoded = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        encoded += b" " * (-len(encoded) % _ALIGNMENT)
        self._written = 0
        self._file = path.open("xb")
        self._file.write(len(encoded).to_bytes(8, "little") + encoded)

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Append bytes to the data; raises OSError where the disk refuses."""
        self._file.write(data)
        self._written += memoryview(data).nbytes

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._file.close()
        assert kind is not None or self._written == self._expected, (
            "the data are shorter or longer than the header says"
        )


def write_fp32(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write contiguous fp32 CPU tensors, in the given order, to a file as transformers and PEFT expect it."""
    assert all(tensor.dtype == torch.float32 for tensor in tensors.values())
    write_tensors(path, tensors)


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write contiguous CPU tensors in fp32 or int64, in the given order, to a new file.

    The library's `save_file` gives every file mode 0600; this one has the mode that the umask says.
    """
    assert all(tensor.device.type == "cpu" for tensor in tensors.values())
    entries = (
        TensorEntry(name, _NAMES[tensor.dtype], tuple(tensor.shape), 0, tensor.nbytes)
        for name, tensor in tensors.items()
    )
    with SafetensorsWriter(path, entries, {"format": "pt"}) as file:
        for tensor in tensors.values():
            file.write(tensor_bytes(tensor))


def chunks(total: int, largest: int) -> Iterator[tuple[int, int]]:
    """Yield (start, stop) of the fewest pieces of `total` that are at most `largest`, all of nearly the same size."""
    count = -(-total // largest)
    for index in range(count):
        yield total * index // count, total * (index + 1) // count


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """Return the bytes of a contiguous CPU tensor as stored in a file, without a copy."""
    return tensor.flatten().view(torch.uint8).numpy().data
