"""Check that the nodes of a job reach each other at ports that the kernel chooses, as gloo's connections need.

The store needs only MASTER_PORT, so a firewall that passes this port alone is unnoticed until gloo connects the ranks.
"""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch.distributed as dist

from lowrank_dist.backend import ports
from lowrank_dist.backend.interfaces import GLOO, gloo_interface, network_facts
from lowrank_dist.backend.node import host_name, node_id, node_names
from lowrank_dist.errors import UserError, some_of

# Keys in the job's store: where a rank listens, and the number of ranks that have tried the others.
_HERE, _DONE = "lowrank_dist/reach", "lowrank_dist/reach tried"
# Seconds that a rank waits for the others: gloo fails at once without a route, and after 30 s where packets are lost.
_GATHER_SECONDS = 40.0
_LEAVE_SECONDS = 10.0
_PAUSE_SECONDS = 0.1
_NODES = 16  # largest number of nodes that a rank tries
PORT_RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")


def require_reach(store: dist.Store, rank: int, size: int, master: str) -> None:
    """Raise UserError where this rank cannot connect to another node. Collective; called after gloo has failed."""
    address = gloo_interface(network_facts(several=True, nccl=False, master=master)).address
    if address is None:
        return
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    failures: list[str] = []
    # RuntimeError: the store is gone with rank 0, so gloo failed for another reason.
    with contextlib.suppress(RuntimeError), socket.create_server((address, 0), family=family) as listener:
        store.set(f"{_HERE}/{rank}", "\n".join((node_id(), address, str(listener.getsockname()[1]))))
        found = _gather(store, rank, size)
        with ThreadPoolExecutor(_NODES) as pool:
            failures = [text for text in pool.map(_try, found.values()) if text]
        store.add(_DONE, 1)
        _await_others(store, len(found) + 1)
    if failures:
        low, high = PORT_RANGE.read_text().split()
        raise UserError(
            f"{host_name()} ({address}) does not reach {some_of(failures)}, although the ranks met at "
            f"{master}: a firewall between the nodes, or an interface of another network. Let all TCP ports from "
            f"{low} to {high} through between the nodes, or set {GLOO} to the interface of a network that they share"
        )


def _gather(store: dist.Store, rank: int, size: int) -> Mapping[str, tuple[str, str, int]]:
    """Return name of each other node → the name, and the address and port of its lowest rank that told them."""
    end = time.monotonic() + _GATHER_SECONDS
    told: dict[int, list[str]] = {}
    while len(told) < size and time.monotonic() < end:
        for other in range(size):
            key = f"{_HERE}/{other}"
            if other not in told and store.check([key]):
                told[other] = store.get(key).decode().split("\n")
        time.sleep(_PAUSE_SECONDS)
    names = dict(zip(told, node_names([told[other][0] for other in told]), strict=True))
    found: dict[str, tuple[str, str, int]] = {}
    for other in sorted(told):
        if names[other] != names.get(rank) and len(found) < _NODES:
            found.setdefault(names[other], (names[other], told[other][1], int(told[other][2])))
    return found


def _try(other: tuple[str, str, int]) -> str:
    """Return "NODE (ADDRESS: why)" where no connection can be made; "" where one can."""
    name, address, port = other
    try:
        ports.connect(address, port).close()
    except OSError as error:
        return f"{name} ({address}: {ports.why(error)})"
    return ""


def _await_others(store: dist.Store, number: int) -> None:
    """Wait, at most `_LEAVE_SECONDS`, until `number` ranks have tried their connections.

    The caller keeps its listener open meanwhile, because the other ranks connect to it.
    """
    end = time.monotonic() + _LEAVE_SECONDS
    while store.add(_DONE, 0) < number and time.monotonic() < end:
        time.sleep(_PAUSE_SECONDS)
