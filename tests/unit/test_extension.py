"""The compiled operators that are loaded, their order, and the message where they are missing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from lowrank_dist.errors import UserError
from lowrank_dist.ops import extension
from tests.dist.ranks import DEVICE

COMMAND = "pip install --no-build-isolation --no-deps -e ."
LOAD = torch.ops.load_library


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[list[Path]]:
    """Simulate a CUDA build of torch without libraries; yield the list of loaded ones. An empty file counts as one."""
    order: list[Path] = []

    def load(path: Path) -> None:
        order.append(path)
        if path.read_bytes():
            LOAD(path)

    monkeypatch.setattr(extension, "LIBRARY", tmp_path / "_C.abi3.so")
    monkeypatch.setattr(extension, "CUDA_LIBRARY", tmp_path / "_C_cuda.abi3.so")
    monkeypatch.setattr(torch.ops, "load_library", load)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    forget()
    yield order
    monkeypatch.undo()
    forget()


def forget() -> None:
    extension.reason_not_loaded.cache_clear()
    extension.reason_not_loaded_cuda.cache_clear()


def test_the_operators_for_this_device_are_built_here() -> None:
    extension.require_compiled("cpu")
    extension.require_compiled(DEVICE)
    assert extension.extension_loaded() and extension.reason_not_loaded() is None
    assert extension.describe(DEVICE).startswith(f"compiled operators for {DEVICE} (")


def test_the_schemas_come_before_the_cuda_operators(loaded: list[Path]) -> None:
    extension.LIBRARY.touch()
    extension.CUDA_LIBRARY.touch()
    assert extension.cuda_extension_loaded() and extension.extension_loaded() and extension.cuda_extension_loaded()
    assert loaded == [extension.LIBRARY, extension.CUDA_LIBRARY], "each once"
    assert extension.describe("cuda") == "compiled operators for cuda (_C_cuda.abi3.so)"
    extension.require_compiled("cuda")


def test_without_the_schemas_no_cuda_operators(loaded: list[Path]) -> None:
    extension.CUDA_LIBRARY.touch()
    assert not extension.cuda_extension_loaded() and loaded == []
    assert extension.reason_not_loaded_cuda() == extension.reason_not_loaded()


def test_the_cpu_operators_do_not_want_the_cuda_ones(loaded: list[Path]) -> None:
    extension.LIBRARY.touch()
    assert extension.extension_loaded() and loaded == [extension.LIBRARY]
    extension.require_compiled("cpu")
    assert not extension.cuda_extension_loaded()


def test_a_cpu_build_of_torch_loads_no_cuda_operators(loaded: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    extension.LIBRARY.touch()
    extension.CUDA_LIBRARY.touch()
    assert not extension.cuda_extension_loaded() and extension.CUDA_LIBRARY not in loaded
    assert "is not a CUDA build" in extension.reason_not_loaded_cuda()
    refused("cuda", "nvcc")


@pytest.mark.parametrize(("device", "wants"), [("cpu", "C++ compiler"), ("cuda", "nvcc")])
def test_a_missing_library_is_named_with_the_command(loaded: list[Path], device: str, wants: str) -> None:
    if device == "cuda":
        extension.LIBRARY.touch()
    refused(device, "was not built", wants)


@pytest.mark.parametrize(("device", "wants"), [("cpu", "C++ compiler"), ("cuda", "nvcc")])
def test_a_broken_library_is_named_with_the_command(loaded: list[Path], device: str, wants: str) -> None:
    if device == "cuda":
        extension.LIBRARY.touch()
    broken = extension.LIBRARY if device == "cpu" else extension.CUDA_LIBRARY
    broken.write_bytes(b"not a library")
    refused(device, str(broken), f"cannot be loaded by torch {torch.__version__}", wants)


def refused(device: str, *said: str) -> None:
    """Check that requiring operators fails and the description says so, both with the command and all of `said`."""
    line = extension.describe(device)
    assert line.startswith(f"plain PyTorch operators for {device}: ") and "\n" not in line
    with pytest.raises(UserError) as error:
        extension.require_compiled(device)
    for message in (line, str(error.value)):
        assert [part for part in (COMMAND, *said) if part not in message] == []
