"""The implementation that runs: plain PyTorch on demand or without the library, and each instruction set of a CPU."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from lowrank_dist.ops import extension
from tests.dist import ranks
from tests.operands import DTYPES, HALVES, OperatorCase, grid
from tests.operator_checks import notices_what_is_broken, rounds_as_pytorch

pytestmark = pytest.mark.slow

OPERATORS = ["down", "expand", "grad_a"]
# ATEN_CPU_CAPABILITY → the level that the operators report. AVX-512 where this processor has it.
LEVELS = {"default": "baseline", "avx2": "AVX2"}
if torch.backends.cpu.get_cpu_capability() == "AVX512":
    LEVELS["avx512"] = "AVX-512"


@pytest.fixture
def plain() -> Iterator[None]:
    extension.use_plain(True)
    yield
    extension.use_plain(False)


@pytest.fixture
def no_extension(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Simulate that no library was built."""
    monkeypatch.setattr(extension, "LIBRARY", tmp_path / "_C.abi3.so")
    monkeypatch.setattr(extension, "CUDA_LIBRARY", tmp_path / "_C_cuda.abi3.so")
    cached = (extension.reason_not_loaded, extension.reason_not_loaded_cuda, extension._available)
    for function in cached:
        function.cache_clear()
    yield
    monkeypatch.undo()
    for function in cached:
        function.cache_clear()


def is_the_reference(case: OperatorCase) -> bool:
    found = case.run()
    # On a GPU cuBLAS chooses its kernel, and so the order of the sums, by the operands' addresses.
    reference = case.plain(case.dtype, ranks.device(), placed=True)
    return torch.equal(found, reference.to(found.dtype)) and found.any().item()


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_plain_pytorch_on_demand(name: str, dtype: torch.dtype, plain: None) -> None:
    """Also into columns of a message. Blocks are hints: plain PyTorch multiplies the zeros."""
    assert not extension.compiled(torch.empty(0, device=ranks.device()))
    for threshold in (0, 6554):
        for accumulate in {name != "expand", True}:
            case = OperatorCase(
                name,
                dtype,
                65,
                250,
                12,
                threshold,
                3,
                message=(3, 2, 1),
                accumulate=accumulate,
                layouts=("columns",) * 2,
            )
            assert is_the_reference(case)


def test_the_compiled_operators_run_otherwise() -> None:
    """The control: the compiled operators sum fp32 in another order."""
    assert extension.compiled(torch.empty(0, device=ranks.device()))
    assert not is_the_reference(OperatorCase("down", torch.float32, 65, 1032, 12, 6554))


def test_a_device_without_operators_of_ours_runs_plain_pytorch() -> None:
    assert not extension.compiled(torch.empty(0, device="meta"))


def test_without_the_library_the_reference_runs_and_says_so_once(
    no_extension: None, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        assert all(is_the_reference(OperatorCase(name, torch.bfloat16, 65, 250, 12, 6554)) for name in OPERATORS)
    (record,) = caplog.records
    assert (
        "plain PyTorch is used instead of the compiled operators" in record.message
        and "was not built" in record.message
    )


@pytest.mark.parametrize("name", OPERATORS)
def test_plain_pytorch_takes_no_more_than_it_should(name: str, plain: None) -> None:
    """Plain PyTorch itself passes the tolerance rule with half of what is allowed, in every dtype."""
    for dtype in HALVES:
        case = OperatorCase(name, dtype, 65, 250, 12, 6554)
        assert (
            case.error_over_tolerance(case.plain(torch.float32 if name == "grad_a" else dtype, ranks.device())) <= 0.5
        )


def check_level(name: str) -> None:
    """Check an instruction set in a new process: its name, errors, conversions and mask."""
    torch.set_num_threads(1)
    assert torch.ops.lowrank_dist.cpu_capability() == name, torch.ops.lowrank_dist.cpu_capability()
    for operator in OPERATORS:
        for dtype in DTYPES:
            for case in grid(operator, dtype, step=3):
                case.check()
            notices_what_is_broken(operator, dtype)
            check_blocks(operator, dtype)
    for operator in ("down", "expand"):
        for dtype in HALVES:
            rounds_as_pytorch(operator, dtype)


def check_blocks(operator: str, dtype: torch.dtype) -> None:
    for blocks in ((0, 0, 0, 0), (3, 127, 0, 5, 130, 1, 5, 1, 140, 0, 6, 2, 140, 200, 6, 14), (0, 340, 19, 1)):
        OperatorCase(operator, dtype, 37, 340, 20, 6554, 5, blocks=blocks, layouts=("misaligned", "columns")).check()


# All other tests of operators run at the machine's own level.
@pytest.mark.parametrize(
    "level", [pytest.param(level, marks=() if level == "avx2" else pytest.mark.nightly) for level in LEVELS]
)
def test_every_instruction_set(level: str) -> None:
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": level, "LOWRANK_DIST_TEST_DEVICE": "cpu"}
    code = f"from tests.unit.test_ops_choice import check_level; check_level({LEVELS[level]!r})"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
