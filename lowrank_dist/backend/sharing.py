"""The sharing of devices between the ranks of a job: each rank reports its device, and rank 0 compares them for all.

The number of devices that a rank sees does not show it: a batch system may show each rank one GPU of its own, and a
mask may show several ranks the same one.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from lowrank_dist.backend.devices import MASK, installed_gpus, visible_cards
from lowrank_dist.backend.node import node_id, node_names
from lowrank_dist.errors import OtherRankError, UserError, some_of

NO_CUDA = "model.device: cuda was asked for, but torch sees no CUDA device; use model.device=cpu or auto"
# Keys in the job's store: each rank's claim, rank 0's answer, and the mark of a rank that has read it.
_CLAIM, _ANSWER, _READ = "lowrank_dist/device", "lowrank_dist/devices", "lowrank_dist/devices read"
# Time that rank 0 waits for the others to read an error, since the store may end with it.
_READ_WITHIN = timedelta(seconds=10)
_SHOWN = 3  # nodes whose ranks share GPUs that are listed


@dataclass(frozen=True)
class Claim:
    """The device of one rank, as the rank tells it.

    node: the node's identity. settings: the settings that decided the device, for messages. unit, gpu: as in
    `devices.Card`; None on a CPU. visible: the units that the rank sees. installed: GPUs of the node.
    """

    node: str
    requested: str
    settings: str
    unit: str | None = None
    gpu: str | None = None
    visible: Sequence[str] = ()
    installed: int = 0


@dataclass(frozen=True)
class Sharing:
    """The use of devices by the ranks of a job.

    collective: the library of all ranks, "nccl" or "gloo". ranks_per_device: for each claim, the number of ranks that
    use the same device; on CPUs, the same node. notes: lines for the user.
    """

    collective: str
    ranks_per_device: Sequence[int]
    notes: Sequence[str] = field(default_factory=list)


def claim(requested: str, device: torch.device) -> Claim:
    """Return the claim of this rank. device: the one that it uses. Call it before LOCAL_RANK is changed."""
    variables = (
        f"{name}={shlex.quote(os.environ[name])}" if name in os.environ else f"{name} not set"
        for name in (MASK, "LOCAL_RANK")
    )
    settings = ", ".join((f"model.device={requested}", *variables))
    if device.type == "cpu":
        return Claim(node_id(), requested, settings)
    cards = visible_cards()
    own = cards[device.index]
    return Claim(node_id(), requested, settings, own.unit, own.gpu, [card.unit for card in cards], installed_gpus())


def agree(store: dist.Store, rank: int, size: int, own: Claim, timeout: timedelta) -> Sharing:
    """Tell the others this rank's claim, and return how all ranks share devices. No process group is needed.

    timeout: the store's, for each key. Raises the same UserError on every rank where `share` does.
    """
    waited = f"within {timeout.total_seconds():.0f} s; see its own messages"
    store.set(f"{_CLAIM}/{rank}", json.dumps(asdict(own)))
    if rank == 0:
        claims = []
        for other in range(size):
            try:
                claims.append(Claim(**json.loads(store.get(f"{_CLAIM}/{other}"))))
            except dist.DistStoreError as error:
                raise OtherRankError(f"rank {other} did not tell its device {waited}") from error
        try:
            answer: dict[str, Any] = {"found": asdict(share(dict(enumerate(claims))))}
        except UserError as error:
            answer = {"error": str(error)}
        store.set(_ANSWER, json.dumps(answer))
    else:
        try:
            answer = json.loads(store.get(_ANSWER))
        except dist.DistStoreError as error:
            raise OtherRankError(f"rank 0 did not answer which ranks share a device {waited}") from error
        store.set(f"{_READ}/{rank}", "")
    if "found" in answer:
        return Sharing(**answer["found"])
    if rank == 0 and size > 1:
        with contextlib.suppress(RuntimeError, dist.DistError):  # a rank that is gone reads nothing
            store.wait([f"{_READ}/{other}" for other in range(1, size)], _READ_WITHIN)
    raise UserError(answer["error"])


def share(claims: Mapping[int, Claim]) -> Sharing:
    """Return how ranks share devices. claims: by rank.

    NCCL allows one rank per GPU, so where any two ranks share one, or slices of one, all ranks of the job use gloo.
    Raises UserError where some ranks have a GPU and others have none, or all have none and one asked for it.
    """
    nodes = dict(zip(claims, node_names([each.node for each in claims.values()]), strict=True))
    _refuse_without_gpu(claims, nodes)
    users = Counter(_unit(each) for each in claims.values())
    shared: dict[str, list[int]] = {}
    for rank, each in claims.items():
        if each.gpu is not None:
            shared.setdefault(each.gpu, []).append(rank)
    crowds = [ranks for ranks in shared.values() if len(ranks) > 1]
    collective = "nccl" if shared and not crowds else "gloo"
    return Sharing(collective, [users[_unit(each)] for each in claims.values()], _notes(claims, nodes, crowds))


def _unit(one: Claim) -> str:
    return one.node if one.unit is None else one.unit


def _refuse_without_gpu(claims: Mapping[int, Claim], nodes: Mapping[int, str]) -> None:
    without = [rank for rank, each in claims.items() if each.unit is None]
    if len(without) < len(claims):
        having = next(rank for rank in claims if rank not in without)
        if without:
            raise UserError(
                f"model.device: {_named(without, nodes)} uses no GPU ({claims[without[0]].settings}), but "
                f"{_named([having], nodes)} does; give every rank a GPU of its own, or set model.device=cpu for all. "
                "`lowrank-dist doctor` says why a node's GPUs cannot be used"
            )
    elif any(each.requested == "cuda" for each in claims.values()):
        raise UserError(NO_CUDA)


def _notes(claims: Mapping[int, Claim], nodes: Mapping[int, str], crowds: Sequence[Sequence[int]]) -> list[str]:
    """Return a line for each node on which ranks share a GPU, for the first nodes of them.

    crowds: the ranks of each GPU that several use.
    """
    first: dict[str, Sequence[int]] = {}
    for ranks in crowds:
        first.setdefault(nodes[ranks[0]], ranks)
    lines = [_note(claims, nodes, ranks) for ranks in list(first.values())[:_SHOWN]]
    if len(first) > _SHOWN:
        lines.append(f"ranks share GPUs on {len(first) - _SHOWN} more nodes")
    return lines


def _note(claims: Mapping[int, Claim], nodes: Mapping[int, str], ranks: Sequence[int]) -> str:
    """Return the line on one GPU that several ranks use."""
    here = [each for rank, each in claims.items() if nodes[rank] == nodes[ranks[0]]]
    units = {claims[rank].unit for rank in ranks}
    if len(units) > 1:
        said = f"{_named(ranks, nodes)} use MIG slices of one GPU. NCCL allows one rank per GPU"
        return f"{said}, so all ranks use gloo"
    said = f"{_named(ranks, nodes)} share one GPU and its memory. NCCL refuses this, so all ranks use gloo"
    there = max(len({unit for each in here for unit in each.visible}), max(each.installed for each in here))
    if there < len(here):
        return f"{said} (the node has {len(here)} ranks and {there} GPU{'s' * (there > 1)})"
    chosen = some_of([f"rank {rank}: {claims[rank].settings}" for rank in ranks], 2)
    return (
        f"WARNING: {said}, although the node has {there} GPUs for its {len(here)} ranks. Give each rank a GPU of its "
        f"own: one in CUDA_VISIBLE_DEVICES (as srun --gpus-per-task=1 does), or all of them there and a LOCAL_RANK of "
        f"its own. They have {chosen}"
    )


def _named(ranks: Sequence[int], nodes: Mapping[int, str]) -> str:
    where = some_of(list(dict.fromkeys(nodes[rank] for rank in ranks)))
    return f"rank{'s' * (len(ranks) > 1)} {some_of([str(rank) for rank in ranks])} on {where}"
