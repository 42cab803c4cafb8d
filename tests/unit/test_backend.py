"""The choice of device and collectives, by the launcher's variables and the number of GPUs."""

from __future__ import annotations

import os

import pytest
import torch

from lowrank_dist.backend import select
from lowrank_dist.errors import UserError


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Simulate `gpus["count"]` GPUs; `gpus["set"]` becomes the index of the current device."""
    state = {"count": 1}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: state["count"] > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: state["count"])
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: state.update(set=device.index))
    monkeypatch.setattr(select.megatron, "prepare", lambda device: None)
    for name in ("DS_ACCELERATOR", "LOCAL_RANK", "LOCAL_SIZE", "LOCAL_WORLD_SIZE"):
        # Set before deleting, so that monkeypatch undoes what the test leaves behind.
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    return state


@pytest.mark.parametrize(
    ("count", "rank", "size", "device", "collective", "sharing"),
    [
        (1, 0, 1, 0, "nccl", 1),
        (1, 1, 2, 0, "gloo", 2),
        (4, 3, 4, 3, "nccl", 1),
        (4, 5, 8, 1, "gloo", 2),
        (4, 5, 9, 1, "gloo", 3),
        (8, 1, 2, 1, "nccl", 1),
    ],
)
def test_ranks_share_gpus_over_gloo_only_where_they_must(
    gpus: dict[str, int], count: int, rank: int, size: int, device: int, collective: str, sharing: int
) -> None:
    gpus["count"] = count
    backend = select.select_backend("auto", rank, size)
    assert backend == select.Backend(torch.device("cuda", device), collective, "cuda", sharing)
    assert gpus["set"] == device and os.environ["DS_ACCELERATOR"] == "cuda"


def test_without_a_gpu(gpus: dict[str, int]) -> None:
    gpus["count"] = 0
    assert select.select_backend("auto", 0, 3) == select.Backend(torch.device("cpu"), "gloo", "cpu", 3)
    assert os.environ["DS_ACCELERATOR"] == "cpu"
    with pytest.raises(UserError, match="model.device=cpu"):
        select.select_backend("cuda", 0, 1)


def test_cpu_can_be_asked_for(gpus: dict[str, int]) -> None:
    assert select.select_backend("cpu", 0, 1).device.type == "cpu"


def test_the_launchers_agree(gpus: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    assert select.local_rank_and_size() == (0, 1)
    monkeypatch.setenv("LOCAL_RANK", "2")
    monkeypatch.setenv("LOCAL_SIZE", "3")  # deepspeed
    assert select.local_rank_and_size() == (2, 3)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")  # torchrun
    assert select.local_rank_and_size() == (2, 4)


def test_deepspeed_is_told_the_device_and_not_the_rank(gpus: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed's engine calls set_device(LOCAL_RANK); on a shared GPU no device has the second rank's number."""
    monkeypatch.setenv("LOCAL_RANK", "1")
    select.set_local_rank_to_device(select.select_backend("cpu", 1, 2))
    assert os.environ["LOCAL_RANK"] == "1"
    select.set_local_rank_to_device(select.select_backend("cuda", 1, 2))
    assert os.environ["LOCAL_RANK"] == "0"
