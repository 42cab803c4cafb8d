"""The choice of a rank's device, by the launcher's variables and what CUDA shows of the node's GPUs."""

from __future__ import annotations

import os

import pytest
import torch

from lowrank_dist.backend import select
from lowrank_dist.backend.devices import visible_cards
from lowrank_dist.errors import UserError
from tests import fake_gpus
from tests.fake_gpus import FakeGpu

VARIABLES = ("DS_ACCELERATOR", "LOCAL_RANK", "LOCAL_SIZE", "LOCAL_WORLD_SIZE", "WORLD_SIZE", "CUDA_VISIBLE_DEVICES")


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(select.megatron, "prepare", lambda device: None)
    for name in VARIABLES:
        # Set before deleting, so that monkeypatch undoes what the test leaves behind.
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


@pytest.mark.parametrize(("count", "rank", "device"), [(1, 0, 0), (1, 1, 0), (4, 3, 3), (4, 5, 1), (8, 1, 1)])
def test_a_rank_uses_the_visible_gpu_of_its_number(
    monkeypatch: pytest.MonkeyPatch, count: int, rank: int, device: int
) -> None:
    fake_gpus.install(monkeypatch.setattr, fake_gpus.node(count))
    chosen: list[int] = []
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: chosen.append(device.index))
    backend = select.select_backend("auto", rank)
    assert backend == select.Backend(torch.device("cuda", device), "nccl", "cuda")
    assert chosen == [device] and os.environ["DS_ACCELERATOR"] == "cuda"


def test_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_gpus.install(monkeypatch.setattr, [])
    assert select.select_backend("auto", 2) == select.Backend(torch.device("cpu"), "gloo", "cpu")
    assert os.environ["DS_ACCELERATOR"] == "cpu"
    with pytest.raises(UserError, match="model.device=cpu"):
        select.select_backend("cuda")
    # A rank of a job reports it when the ranks meet: then the message says what the others have.
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert select.select_backend("cuda").device.type == "cpu"


def test_cpu_can_be_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_gpus.install(monkeypatch.setattr, fake_gpus.node(1))
    assert select.select_backend("cpu").device.type == "cpu"


def test_the_launchers_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    assert (select.local_rank(), select.local_size()) == (0, 1)
    monkeypatch.setenv("LOCAL_RANK", "2")
    monkeypatch.setenv("LOCAL_SIZE", "3")  # deepspeed
    assert (select.local_rank(), select.local_size()) == (2, 3)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")  # torchrun
    assert (select.local_rank(), select.local_size()) == (2, 4)


def test_deepspeed_is_told_the_device_and_not_the_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed's engine calls set_device(LOCAL_RANK): the number of the GPU among those that the rank sees."""
    fake_gpus.install(monkeypatch.setattr, fake_gpus.node(4))
    monkeypatch.setenv("LOCAL_RANK", "3")
    select.set_local_rank_to_device(select.select_backend("cpu", 3))
    assert os.environ["LOCAL_RANK"] == "3"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    select.set_local_rank_to_device(select.select_backend("cuda", 3))
    assert os.environ["LOCAL_RANK"] == "0"


@pytest.mark.parametrize(("given", "left"), [(None, "0"), ("3", "3")])
def test_ranks_on_cpus_that_were_numbered_by_hand(
    monkeypatch: pytest.MonkeyPatch, given: str | None, left: str
) -> None:
    """DeepSpeed's engine needs LOCAL_RANK, and RANK alone is enough for all else."""
    monkeypatch.setenv("LOCAL_RANK", given or "")  # so that it is restored
    if given is None:
        del os.environ["LOCAL_RANK"]
    select.set_local_rank_to_device(select.Backend(torch.device("cpu"), "gloo", "cpu"))
    assert os.environ["LOCAL_RANK"] == left


def test_cards_have_the_same_identity_under_every_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_gpus.install(monkeypatch.setattr, fake_gpus.node(4))
    everything = visible_cards()
    assert len({card.unit for card in everything}) == len({card.gpu for card in everything}) == 4
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,1")
    assert visible_cards() == [everything[2], everything[1]]


@pytest.mark.parametrize("bus", [16, 0], ids=["PCI address", "no PCI address"])
@pytest.mark.parametrize("own", [True, False], ids=["UUID of the slice", "UUID of the GPU"])
def test_mig_slices_are_units_of_one_gpu(monkeypatch: pytest.MonkeyPatch, bus: int, own: bool) -> None:
    found = []
    cut = fake_gpus.slices(2)
    gpus = [FakeGpu(f"{n}c8e" if own else one.uuid, bus, one.name, one.memory, one.entry) for n, one in enumerate(cut)]
    fake_gpus.install(monkeypatch.setattr, gpus)
    for one in gpus:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", one.entry)
        found += visible_cards()
    assert len({card.unit for card in found}) == 2 and len({card.gpu for card in found}) == 1


def test_cards_without_a_uuid_are_known_by_their_address(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_gpus.install(monkeypatch.setattr, [FakeGpu("00000000-0000-0000", bus) for bus in (16, 17)])
    assert len({card.unit for card in visible_cards()}) == 2
