"""The attendance of a job: its ranks, their nodes and interfaces, as rank 0 takes it in the job's store.

A process group would wait for a rank that does not come, and for one that cannot be reached, without naming it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist

from lowrank_dist.backend.interfaces import gloo_interface, nccl_interface, network_facts
from lowrank_dist.backend.node import BOOT_ID, node_id, node_names
from lowrank_dist.errors import OtherRankError, UserError, some_of

# Keys in the job's store: a rank's arrival, the number of arrivals, rank 0's verdict, the number of ranks that read it.
_HERE, _CAME, _VERDICT, _READ = (f"lowrank_dist/{name}" for name in ("here", "came", "verdict", "verdict read"))
_PAUSE_SECONDS = 0.05
# Time that the others wait longer than rank 0, and that rank 0 waits for them to read its verdict.
_GRACE_SECONDS = 5.0
_SHOWN = 8  # ranks in a list


@dataclass(frozen=True)
class Arrival:
    """A rank's report of itself.

    node: its node's identity. network: identity of its network stack, which containers of one host may share. always:
    why it cannot meet any other rank; between_networks: why not one of another network stack; "" where it can.
    """

    node: str
    network: str
    always: str
    between_networks: str

    def to_text(self) -> str:
        return "\n".join((self.node, self.network, self.always, self.between_networks))

    @classmethod
    def of(cls, text: str) -> Arrival:
        return cls(*text.split("\n"))


def arrival(master: str, nccl: bool) -> Arrival:
    """Return the arrival of this rank. nccl: it uses NCCL. master: MASTER_ADDR."""
    said = []
    for several in (False, True):
        around = network_facts(several, nccl, master)
        judged = [gloo_interface(around), *([nccl_interface(around)] if nccl else [])]
        said.append(next((found.detail for found in judged if found.state == "broken"), "").replace("\n", " "))
    return Arrival(node_id(), _network(), *said)


def _network() -> str:
    try:
        return f"{BOOT_ID.read_text().strip()} {os.readlink('/proc/self/ns/net')}"
    except OSError:
        return node_id()


def take(store: dist.Store, rank: int, size: int, seconds: float, own: Arrival, where: str) -> None:
    """Wait until all ranks have come. where: the place of the store.

    Raises UserError on rank 0, and OtherRankError with the same text on the others that came, where a rank does not
    come within `seconds`, or cannot meet the others over its interface.
    """
    store.set(f"{_HERE}/{rank}", own.to_text())
    store.add(_CAME, 1)
    if rank != 0:
        store.wait([_VERDICT], timedelta(seconds=seconds + _GRACE_SECONDS))
        refusal = store.get(_VERDICT).decode()
        store.add(_READ, 1)
        if refusal:
            time.sleep(_GRACE_SECONDS)  # a launcher ends all ranks as soon as one has ended; rank 0 prints first
            raise OtherRankError(refusal)
        return
    _await(store, _CAME, size, seconds)
    keys = {other: f"{_HERE}/{other}" for other in range(size)}
    came = {other: Arrival.of(store.get(key).decode()) for other, key in keys.items() if store.check([key])}
    refusal = refuse(came, size, seconds, where)
    store.set(_VERDICT, refusal)
    if refusal:
        _await(store, _READ, len(came) - 1, _GRACE_SECONDS)  # the store ends with rank 0
        raise UserError(refusal)


def _await(store: dist.Store, counter: str, number: int, seconds: float) -> None:
    end = time.monotonic() + seconds
    while store.add(counter, 0) < number and time.monotonic() < end:
        time.sleep(_PAUSE_SECONDS)


def refuse(came: Mapping[int, Arrival], size: int, seconds: float, where: str) -> str:
    """Return why these ranks cannot form a process group, with the remedy; "" where they can."""
    nodes = dict(zip(came, node_names([each.node for each in came.values()]), strict=True))
    missing = [rank for rank in range(size) if rank not in came]
    if missing:
        ranks: dict[str, list[int]] = {}
        for rank, node in nodes.items():
            ranks.setdefault(node, []).append(rank)
        there = some_of([f"{_named(of)} on {node}" for node, of in ranks.items()], _SHOWN)
        return (
            f"{_named(missing)} of {size} did not come to {where}, within {seconds:.0f} s; came: {there}. See the "
            f"messages of the nodes that are missing; check that the launcher started {size} ranks (WORLD_SIZE), and "
            "that MASTER_ADDR and MASTER_PORT are the same on all nodes"
        )
    several = len({each.network for each in came.values()}) > 1
    for rank, each in came.items():
        problem = each.always or (each.between_networks if several else "")
        if problem:
            return f"{_named([rank])} on {nodes[rank]} cannot meet the others: {problem}"
    return ""


def _named(ranks: Sequence[int]) -> str:
    return f"rank{'s' * (len(ranks) > 1)} {some_of([str(rank) for rank in ranks], _SHOWN)}"
