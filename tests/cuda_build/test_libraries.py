"""The built libraries are complete: all symbols resolve, both load as on a GPU machine, every architecture is there.

Runs in the CUDA build of torch that check.sh built against; no kernel is loaded or run.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from lowrank_dist.ops import extension

BUILT = Path(__file__).parents[2] / "build/cuda-build-check/lib/lowrank_dist/ops"
PTX, CUBIN = 1, 2


def images(binary: bytes) -> set[tuple[int, int]]:
    """Return (kind, architecture) of all device code in a library, from the headers that nvcc's fatbinary writes."""
    found = set()
    start = binary.find(b"\x50\xed\x55\xba")
    while start >= 0:
        _, _, header, size = struct.unpack_from("<IHHQ", binary, start)
        at, end = start + header, start + header + size
        while at < end:
            kind, _, header, size = struct.unpack_from("<HHIQ", binary, at)
            found.add((kind, struct.unpack_from("<I", binary, at + 28)[0]))
            at += header + size
        start = binary.find(b"\x50\xed\x55\xba", end)
    return found


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Load the libraries of this build instead of those in the tree."""
    monkeypatch.setattr(extension, "LIBRARY", BUILT / extension.LIBRARY.name)
    monkeypatch.setattr(extension, "CUDA_LIBRARY", BUILT / extension.CUDA_LIBRARY.name)
    for cached in (extension.reason_not_loaded, extension.reason_not_loaded_cuda):
        cached.cache_clear()
    yield
    monkeypatch.undo()
    for cached in (extension.reason_not_loaded, extension.reason_not_loaded_cuda):
        cached.cache_clear()


def test_both_libraries_load_in_a_cuda_torch(built: None) -> None:
    """Python resolves every symbol when it opens a library, and the schemas are compared with the implementations."""
    assert torch.version.cuda == "13.0", "run through tests/cuda_build/check.sh"
    extension.require_compiled("cpu")
    extension.require_compiled("cuda")
    for operator in ("down", "expand", "grad_a"):
        for device in ("CPU", "CUDA"):
            assert torch._C._dispatch_has_kernel_for_dispatch_key(f"lowrank_dist::{operator}", device)
    assert not torch.cuda.is_initialized()


def test_neither_library_has_a_libstdcxx_of_its_own(built: None) -> None:
    """Though check.sh compiles with -static-libstdc++, the libraries load the shared libstdc++.

    With a libstdc++ of its own, an operator's error about an argument would end the process.
    """
    for library in (extension.LIBRARY, extension.CUDA_LIBRARY):
        assert b"\0libstdc++.so.6\0" in library.read_bytes(), library.name
    extension.require_compiled("cpu")
    out, matrix = torch.zeros(5, 3), torch.zeros(5, 3)
    with pytest.raises(RuntimeError, match=r"a must be Float \[4, 3\] on the CPU, not Int \[4, 3\]"):
        torch.ops.lowrank_dist.down(out, matrix, torch.zeros(4, 3).int(), [], None, None, 0, 0, 0)


def test_both_architectures_and_the_newest_ptx_are_shipped() -> None:
    found = images((BUILT / extension.CUDA_LIBRARY.name).read_bytes())
    assert found == {(CUBIN, 80), (CUBIN, 90), (PTX, 90)}
    assert images((BUILT / extension.LIBRARY.name).read_bytes()) == set()
