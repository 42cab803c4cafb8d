"""The CUDA kernels on a CPU: csrc/cuda, built against an emulated GPU (see machine.h), and functions that call it."""

from __future__ import annotations

import ctypes
import hashlib
import os
import subprocess
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).parents[2]
SOURCES = [
    *(ROOT / f"csrc/cuda/{name}.cu" for name in ("down", "expand", "grad_a")),
    Path(__file__).with_name("harness.cpp"),
]
INCLUDES = [Path(__file__).parent, ROOT / "csrc/cuda", ROOT / "csrc/include"]
# Without the fortified longjmp, which takes a fibre's stack for a corrupted one.
FLAGS = ["-std=c++17", "-O2", "-fPIC", "-U_FORTIFY_SOURCE", "-Wall", "-Wno-unknown-pragmas", "-DLOWRANK_EMULATE"]

DTYPES = {torch.float64: 0, torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}
# Faults that the machine can be given: enum Fault in machine.h.
NO_FAULT, NO_BARRIER, NO_WAIT, SWAPPED_FRAGMENT = range(4)


class EmulationError(RuntimeError):
    """The emulated device stopped: an access outside the operands, a misaligned access, or a deadlock."""


class Matrix(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("ld", ctypes.c_int64),
    ]

    @classmethod
    def of(cls, matrix: Tensor) -> Matrix:
        assert matrix.dim() == 2 and (matrix.stride(1) == 1 or matrix.shape[1] <= 1)
        return cls(matrix.data_ptr(), *matrix.shape, matrix.stride(0))


class MaskArgs(ctypes.Structure):
    _fields_ = [
        ("rows", ctypes.c_void_p),
        ("key", ctypes.c_void_p),
        ("stream", ctypes.c_uint32),
        ("threshold", ctypes.c_uint32),
        ("feature_offset", ctypes.c_int64),
    ]


@cache
def library() -> ctypes.CDLL:
    """Return the library of emulated kernels, compiled into build/emulation whenever a source has changed."""
    headers = sorted(path for folder in INCLUDES for pattern in ("*.h", "*.cuh") for path in folder.glob(pattern))
    digest = hashlib.sha256("\0".join(FLAGS).encode())
    for path in (*SOURCES, *headers):
        digest.update(path.read_bytes())
    target = ROOT / f"build/emulation/{digest.hexdigest()[:16]}.so"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        # Built under a temporary name first: another process may be building it too.
        unfinished = target.with_suffix(f".{os.getpid()}.so")
        includes = [f"-I{folder}" for folder in INCLUDES]
        command = ["g++", *FLAGS, *includes, "-shared", "-x", "c++", *map(str, SOURCES), "-o", str(unfinished)]
        subprocess.run(command, check=True)
        unfinished.replace(target)
    loaded = ctypes.CDLL(str(target))
    loaded.emulation_error.restype = ctypes.c_char_p
    loaded.emulation_blocks.restype = ctypes.c_int64
    for operator in ("down", "grad_a"):
        function = getattr(loaded, f"emulate_{operator}_workspace")
        function.restype = ctypes.c_uint64
        function.argtypes = [ctypes.c_int, *[ctypes.c_int64] * 3, ctypes.c_int]
    return loaded


def workspace_bytes(
    operator: str, dtype: torch.dtype, tokens: int, features: int, ranks: int, multiprocessors: int
) -> int:
    """Return the workspace bytes of a launch.

    operator: "down", "expand", "write" (expand that does not read out) or "grad_a".
    """
    if operator in ("expand", "write"):
        return 0
    return getattr(library(), f"emulate_{operator}_workspace")(DTYPES[dtype], tokens, features, ranks, multiprocessors)


def run(
    operator: str,
    out: Tensor,
    left: Tensor,
    right: Tensor,
    *,
    rows: Tensor | None = None,
    key: Tensor | None = None,
    stream: int = 0,
    threshold: int = 0,
    feature_offset: int = 0,
    multiprocessors: int = 4,
    schedule: int = 0,
    fault: int = NO_FAULT,
) -> int:
    """Launch once into `out`. Returns the number of kernels launched. `left` and `right` as in the operator's schema.

    `schedule` seeds the order in which blocks, warps and lanes run. Raises EmulationError.
    """
    emulated = library()
    tokens, features, ranks = {
        "down": lambda: (*left.shape, right.shape[0]),
        "expand": lambda: (*out.shape, right.shape[0]),
        "write": lambda: (*out.shape, right.shape[0]),
        "grad_a": lambda: (*right.shape, left.shape[1]),
    }[operator]()
    size = workspace_bytes(operator, left.dtype, tokens, features, ranks, multiprocessors)
    # 0xFF everywhere is a NaN in every dtype.
    workspace = torch.full((size + 16,), 0xFF, dtype=torch.uint8)
    start = workspace.data_ptr() + -workspace.data_ptr() % 16
    emulated.emulation_begin(schedule, fault)
    emulated.emulation_name(ctypes.c_void_p(start), ctypes.c_int64(size), 1)
    for tensor, writable in ((out, 1), (left, 0), (right, 0), (rows, 0), (key, 0)):
        if tensor is not None and tensor.numel() > 0:
            elements = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
            span = ctypes.c_int64(elements * tensor.element_size())
            emulated.emulation_name(ctypes.c_void_p(tensor.data_ptr()), span, writable)
    mask = MaskArgs(
        None if rows is None else rows.data_ptr(),
        None if key is None else key.data_ptr(),
        stream & 0xFFFFFFFF,
        threshold,
        feature_offset,
    )
    code = getattr(emulated, f"emulate_{operator}")(
        DTYPES[left.dtype],
        *map(ctypes.byref, (Matrix.of(out), Matrix.of(left), Matrix.of(right), mask)),
        ctypes.c_void_p(start),
        multiprocessors,
    )
    if code != 0:
        raise EmulationError(emulated.emulation_error().decode())
    return emulated.emulation_launches()


def mma(dtype: torch.dtype, a: Tensor, b: Tensor, c: Tensor) -> None:
    """Run one mma.m16n8k16 in place on c. Registers by lane: c float32 [32, 4], a int32 [32, 4], b int32 [32, 2]."""
    emulated = library()
    emulated.emulation_begin(0, NO_FAULT)
    code = emulated.emulate_mma(DTYPES[dtype], *(ctypes.c_void_p(tensor.data_ptr()) for tensor in (a, b, c)))
    if code != 0:
        raise EmulationError(emulated.emulation_error().decode())


def rounded(dtype: torch.dtype, values: Tensor) -> Tensor:
    """Return float32 values converted by the emulated GPU to a 16-bit dtype and back."""
    bits = torch.empty(values.shape, dtype=torch.int16)
    back = torch.empty_like(values)
    library().emulate_round(
        DTYPES[dtype],
        *(ctypes.c_void_p(tensor.data_ptr()) for tensor in (values, bits, back)),
        ctypes.c_int64(values.numel()),
    )
    assert torch.equal(bits.view(dtype).float(), back) or torch.isnan(back).any()
    return back
