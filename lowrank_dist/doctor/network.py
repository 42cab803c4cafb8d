"""Checks of a node's network cards, and of the interface over which the ranks would meet."""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Mapping
from pathlib import Path

from lowrank_dist.backend.interfaces import NCCL, NetworkFacts, address_of, gloo_interface, nccl_interface
from lowrank_dist.doctor.rows import Row

INFINIBAND = Path("/sys/class/infiniband")


def network(around: NetworkFacts, environment: Mapping[str, str] = os.environ) -> list[Row]:
    """Return rows on the cards, MASTER_ADDR, and the interface of gloo and NCCL."""
    cards = sorted(around.interfaces, key=lambda card: (card.loopback, not card.up, card.name))
    rows = [Row("NICs", "ok", ", ".join(map(str, cards)) + "".join(f", {port}" for port in infiniband_ports()))]
    if around.master is not None:
        rows.append(_master(around))
    gloo, nccl = gloo_interface(around, environment), nccl_interface(around, environment)
    rows.append(Row("interface of gloo", gloo.state, gloo.detail))
    if around.nccl or NCCL in environment:
        rows.append(Row("interface of NCCL", nccl.state, nccl.detail))
    return rows


def infiniband_ports(place: Path = INFINIBAND) -> list[str]:
    """Return the ports of InfiniBand and RoCE cards with their state and rate, as the kernel reports them."""
    return [
        f"{port.parts[-3]} port {port.name} ({_text(port / 'state').partition(': ')[2]}, {_text(port / 'rate')})"
        for port in sorted(place.glob("*/ports/*"))
    ]


def _text(path: Path) -> str:
    return path.read_text().strip()


def _master(around: NetworkFacts) -> Row:
    address = address_of(str(around.master))
    if address is None:
        detail = f"this node cannot resolve the name {around.master}; give an address, or correct /etc/hosts or DNS"
        return Row("MASTER_ADDR", "broken", detail)
    said = f"{around.master} is {address}" if address != around.master else address
    if around.several and ipaddress.ip_address(address).is_loopback:
        detail = (
            f"{said}, which on every node means the node itself; give the address of rank 0's node on the common "
            "network"
        )
        return Row("MASTER_ADDR", "broken", detail)
    if around.towards is None:
        return Row("MASTER_ADDR", "broken", f"{said}, to which this node has no route; correct the routes")
    return Row("MASTER_ADDR", "ok", said, alike=address)
