"""No kernel spills in half precision, on any architecture that is shipped."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.cuda_build.ptxas import Kernel, parse

ROOT = Path(__file__).parents[2]
LOG = ROOT / "build/cuda-build-check/build.log"
SHIPPED = ("sm_80", "sm_90")
OPERATORS = ("down_half", "expand_half", "grad_a_half")
KERNEL = re.compile(r"__global__\s+(?:__launch_bounds__\((?:[^()]|\([^()]*\))*\)\s*)?void\s+(\w+)")

ENTRY = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '{symbol}' for '{arch}'
ptxas info    : Function properties for {symbol}
    {stack} bytes stack frame, {stores} bytes spill stores, {loads} bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 480 bytes cmem[0]
ptxas info    : Compile time = 98.788 ms
"""
HALF = "_ZN12lowrank_dist9down_halfINS_8BFloat16ELi4EEEvv"
SINGLE = "_ZN12lowrank_dist12simt_productIfEEvv"


def entry(symbol: str, arch: str = "sm_90", stack: int = 0, stores: int = 0, loads: int = 0) -> str:
    return ENTRY.format(symbol=symbol, arch=arch, stack=stack, stores=stores, loads=loads)


def spilling(kernels: list[Kernel]) -> list[Kernel]:
    return [kernel for kernel in kernels if kernel.main and kernel.spills]


def absent(sources: dict[str, str], kernels: list[Kernel]) -> list[str]:
    """Return the kernels of the sources that were not compiled for every architecture."""
    declared = {name for text in sources.values() for name in KERNEL.findall(text)}
    assert len(declared) == sum(text.count("__global__") for text in sources.values()), "a kernel has no name here"
    compiled = {(re.search(r"(\w+)[<(]", kernel.name)[1], kernel.arch) for kernel in kernels}
    return sorted(f"{name} for {arch}" for name in declared for arch in SHIPPED if (name, arch) not in compiled)


@pytest.fixture(scope="module")
def kernels() -> list[Kernel]:
    return parse(LOG.read_text())


def test_half_precision_does_not_spill(kernels: list[Kernel]) -> None:
    assert spilling(kernels) == []
    assert all(any(k.main and k.arch == arch and op in k.name for k in kernels) for arch in SHIPPED for op in OPERATORS)


def test_every_kernel_is_compiled_for_every_architecture(kernels: list[Kernel]) -> None:
    sources = {path.name: path.read_text() for path in (ROOT / "csrc/cuda").glob("*.cu*")}
    assert sources and absent(sources, kernels) == []
    per_arch = [{kernel.name for kernel in kernels if kernel.arch == arch} for arch in SHIPPED]
    assert per_arch[0] == per_arch[1] != set()
    assert {kernel.arch for kernel in kernels} == set(SHIPPED)


@pytest.mark.parametrize("spilled", [{"stack": 8}, {"stores": 4}, {"loads": 4}])
def test_a_planted_spill_is_found(spilled: dict[str, int]) -> None:
    quiet = entry(HALF, "sm_80") + entry(SINGLE, **spilled)
    assert spilling(parse(quiet)) == []
    (found,) = spilling(parse(quiet + entry(HALF, **spilled)))
    assert found.arch == "sm_90" and "down_half<lowrank_dist::BFloat16, 4>" in found.name


def test_a_report_that_is_not_understood_is_refused() -> None:
    with pytest.raises(ValueError, match="2 kernels were compiled, but 1"):
        parse(entry(HALF) + entry(SINGLE).replace("bytes spill stores", "bytes of spills"))


def test_a_kernel_that_was_not_compiled_is_found() -> None:
    source = {"a.cu": "__global__ __launch_bounds__(f(2), 1) void\n down_half(int n) {}\n__global__ void other() {}"}
    compiled = parse(entry(HALF, "sm_80"))
    assert absent(source, compiled) == ["down_half for sm_90", "other for sm_80", "other for sm_90"]
