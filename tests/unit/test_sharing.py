"""Ranks share a device where they use the same one, whatever number of devices each of them sees."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist

from lowrank_dist.backend.sharing import Claim, Sharing, agree, share
from lowrank_dist.errors import OtherRankError, UserError
from tests import forked
from tests.forked import Outcome
from tests.integration.launching import environment, free_port

ROOT = Path(__file__).parents[2]
# A rank on a node with the GPUs of tests/fake_gpus.py. It prints what it shares; a group over NCCL is only asked for.
RANK = """
import os, sys
import torch
import torch.distributed as dist
from lowrank_dist.backend import select, sharing
from lowrank_dist.errors import UserError
from tests import fake_gpus
gpus = fake_gpus.slices(4) if os.environ["GPUS"] == "MIG" else fake_gpus.node(int(os.environ["GPUS"]))
fake_gpus.install(setattr, gpus)
sharing.installed_gpus = lambda: len(gpus)
join = dist.init_process_group
dist.init_process_group = lambda library, **options: join("gloo", **options)
try:
    backend = select.init_process_group(
        select.select_backend(os.environ.get("DEVICE", "auto"), select.local_rank()), 60
    )
except UserError as error:
    print(error)
    sys.exit(2)
dist.barrier()
print(backend.collective, backend.memory_for_a_rank() // 2**30, os.environ["LOCAL_RANK"])
select.shutdown(clean=True)
"""


def job(place: Path, gpus: int | str, masks: Sequence[str | None], **variables: str) -> list[Outcome]:
    """Run a rank for each mask on one node. gpus: how many the node has, or "MIG"."""
    script = place / "rank.py"
    script.write_text(RANK)
    size = str(len(masks))
    shared = {**environment(), "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "GPUS": str(gpus), **variables}
    shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    shared["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [shared.get("PYTHONPATH")])])
    shared.pop("CUDA_VISIBLE_DEVICES", None)
    ranks = [{**shared, "RANK": str(n), "LOCAL_RANK": str(n)} for n in range(len(masks))]
    for rank, mask in zip(ranks, masks, strict=True):
        rank |= {} if mask is None else {"CUDA_VISIBLE_DEVICES": mask}
    return forked.run_programs([script], ranks, seconds=90)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("gpus", "masks", "expected", "said"),
    [
        (4, ["0", "1", "2"], ["nccl 80 0"] * 3, ""),
        (4, [None] * 3, ["nccl 80 0", "nccl 80 1", "nccl 80 2"], ""),
        (
            2,
            ["0", "1", "1"],
            ["gloo 80 0", "gloo 40 0", "gloo 40 0"],
            "ranks 1, 2 on HOST share one GPU and its memory. NCCL refuses this, so all ranks use gloo (the node has 3 "
            "ranks and 2 GPUs)\n",
        ),
        (
            "MIG",
            ["MIG-0c8e", "MIG-1c8e"],
            ["gloo 10 0"] * 2,
            "ranks 0, 1 on HOST use MIG slices of one GPU. NCCL allows",
        ),
        (4, ["3", "3"], ["gloo 40 0"] * 2, "WARNING: ranks 0, 1 on HOST share one GPU and its memory."),
    ],
    ids=["one GPU a rank", "all GPUs", "a rank too many", "MIG", "one mask for all"],
)
def test_ranks_of_a_node(
    tmp_path: Path, gpus: int | str, masks: list[str | None], expected: list[str], said: str
) -> None:
    """`srun --gpus-per-task=1` shows each rank one GPU: taken for one GPU shared by all, it was refused or slow."""
    ended = job(tmp_path, gpus, masks)
    assert [one.stdout.strip() for one in ended] == expected, ended
    assert ended[0].stderr.startswith(said.replace("HOST", socket.gethostname())) if said else ended[0].stderr == ""
    assert not any(one.stderr for one in ended[1:]), "rank 0 speaks for all"


@pytest.mark.slow
@pytest.mark.parametrize("device", ["auto", "cuda"])
def test_a_rank_that_sees_no_gpu_is_named(tmp_path: Path, device: str) -> None:
    ended = job(tmp_path, 2, ["0", "1", ""], DEVICE=device)
    assert [one.code for one in ended] == [2, 2, 2]
    host = socket.gethostname()
    assert {one.stdout for one in ended} == {
        f"model.device: rank 2 on {host} uses no GPU (model.device={device}, CUDA_VISIBLE_DEVICES='', LOCAL_RANK=2), "
        f"but rank 0 on {host} does; give every rank a GPU of its own, or set model.device=cpu for all. "
        "`lowrank-dist doctor` says why a node's GPUs cannot be used\n"
    }


def on_node(node: str, units: Sequence[str | None], **more: object) -> list[Claim]:
    """Return the claims of a node's ranks, each of which sees its own GPU only."""
    seen = [(unit,) if unit is not None else () for unit in units]
    made = [Claim(node, "auto", "", unit, unit, visible) for unit, visible in zip(units, seen, strict=True)]
    return [replace(one, **more) for one in made]  # type: ignore[arg-type]


def shared(*nodes: Sequence[Claim]) -> Sharing:
    return share(dict(enumerate(one for node in nodes for one in node)))


def test_nccl_where_every_rank_of_every_node_has_a_gpu_of_its_own() -> None:
    assert shared(on_node("h1/a", ["x", "y"]), on_node("h2/b", ["z"])) == Sharing("nccl", [1, 1, 1])
    assert shared(on_node("h1/a", ["x"])) == Sharing("nccl", [1])


def test_one_shared_gpu_means_gloo_on_all_nodes() -> None:
    found = shared(on_node("h1/a", ["x", "y"]), on_node("h2/b", ["z", "z", "z"]))
    assert (found.collective, found.ranks_per_device) == ("gloo", [1, 1, 3, 3, 3])
    assert found.notes == [
        "ranks 2, 3, 4 on h2 share one GPU and its memory. NCCL refuses this, so all ranks use gloo (the node has 3 "
        "ranks and 1 GPU)"
    ]


def test_containers_of_one_host_can_share_a_gpu() -> None:
    """Their host names differ, so they are two nodes; the UUID of the GPU says what they share."""
    assert shared(on_node("pod1/a", ["x"]), on_node("pod2/a", ["x"])).ranks_per_device == [2, 2]


def test_cpus_are_shared_by_the_ranks_of_a_node() -> None:
    found = shared(on_node("worker/1", [None] * 2), on_node("worker/2", [None]))
    assert found == Sharing("gloo", [2, 2, 1])
    with pytest.raises(UserError, match="torch sees no CUDA device; use model.device=cpu"):
        shared(on_node("h1/a", [None], requested="cuda"))


@pytest.mark.parametrize(("installed", "visible"), [(8, ("x",)), (0, ("x", "y"))], ids=["driver", "masks"])
def test_a_mask_that_hides_gpus_is_warned_of(installed: int, visible: Sequence[str]) -> None:
    settings = "CUDA_VISIBLE_DEVICES=0, LOCAL_RANK=0"
    (line,) = shared(on_node("h1/a", ["x", "x"], installed=installed, visible=visible, settings=settings)).notes
    assert line.startswith("WARNING: ranks 0, 1 on h1 share one GPU") and f"rank 1: {settings}" in line
    assert f"although the node has {max(installed, 2)} GPUs for its 2 ranks" in line


def test_many_nodes_are_a_few_lines() -> None:
    found = shared(*(on_node(f"h{n}/a", [f"{n}", f"{n}"]) for n in range(9)))
    assert len(found.notes) == 4 and found.notes[-1] == "ranks share GPUs on 6 more nodes"


def agreed(claims: Mapping[int, Claim], size: int) -> dict[int, Sharing | Exception]:
    """Return what each rank with a claim is told; the others never come."""
    found: dict[int, Sharing | Exception] = {}
    store = dist.HashStore()
    waited = timedelta(seconds=1)
    store.set_timeout(waited)

    def rank(number: int) -> None:
        try:
            found[number] = agree(store, number, size, claims[number], waited)
        except Exception as error:
            found[number] = error

    threads = [threading.Thread(target=rank, args=(number,)) for number in claims]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    return found


def test_all_ranks_are_told_the_same() -> None:
    claims = on_node("h1/a", ["x", "y", "y"])
    assert agreed(dict(enumerate(claims)), 3) == dict.fromkeys(range(3), shared(claims))
    found = agreed(dict(enumerate(on_node("h1/a", ["x", None]))), 2)
    assert len({str(error) for error in found.values()}) == 1
    assert all(isinstance(error, UserError) for error in found.values())


def test_a_rank_that_tells_nothing_is_named() -> None:
    found = agreed({0: on_node("h1/a", ["x"])[0], 2: on_node("h1/a", ["y"])[0]}, 3)
    assert {number: type(error) for number, error in found.items()} == dict.fromkeys((0, 2), OtherRankError)
    assert str(found[0]) == "rank 1 did not tell its device within 1 s; see its own messages"
    assert str(found[2]).startswith("rank 0 did not answer which ranks share a device within 1 s")
