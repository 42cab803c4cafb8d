"""Network interfaces of a node, and those over which gloo and NCCL would meet."""

from __future__ import annotations

import ipaddress
import os
import re
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from lowrank_dist.errors import some_of

GLOO, NCCL = "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"


class Judgement(NamedTuple):
    """The verdict on an interface: state, and the reason with the remedy. address: None if the interface has none."""

    state: Literal["ok", "warning", "broken"]
    detail: str
    address: str | None = None


@dataclass(frozen=True)
class Interface:
    """A network card. addresses: IPv4 and IPv6. speed: Mbit/s, 0 where the driver does not report it."""

    name: str
    addresses: tuple[str, ...]
    up: bool
    speed: int

    @property
    def loopback(self) -> bool:
        return any(ipaddress.ip_address(address).is_loopback for address in self.addresses)

    def __str__(self) -> str:
        state = (", ".join(self.addresses) or "no address") if self.up else "down"
        return f"{self.name} ({state}{f', {self.speed / 1000:g} Gbit/s' if self.up and self.speed else ''})"


@dataclass(frozen=True)
class NetworkFacts:
    """The facts on which the choice of an interface depends.

    several: the job has ranks on other nodes. nccl: collectives go over NCCL. master: the job's MASTER_ADDR, None
    without a job. own: the address that this host's name resolves to. towards: the local address that packets to master
    leave from.
    """

    interfaces: Sequence[Interface]
    several: bool
    nccl: bool
    master: str | None
    own: str | None
    towards: str | None

    def with_address(self, address: str | None) -> Interface | None:
        return next((card for card in self.interfaces if address in card.addresses), None)

    @property
    def to_master(self) -> Interface | None:
        """The interface that leads to MASTER_ADDR, and so to other nodes; None where it is not known."""
        return self.with_address(self.towards) if self.master is not None else None


def network_facts(several: bool, nccl: bool, master: str | None) -> NetworkFacts:
    return NetworkFacts(
        interfaces(), several, nccl, master, address_of(socket.gethostname()), _source(master) if master else None
    )


def interfaces() -> list[Interface]:
    import psutil  # DeepSpeed needs it as well

    families = (socket.AF_INET, socket.AF_INET6)
    found = psutil.net_if_addrs()
    return [
        Interface(
            name,
            # Link-local IPv6 addresses carry their interface behind a %.
            tuple(one.address.partition("%")[0] for one in found.get(name, ()) if one.family in families),
            facts.isup,
            facts.speed,
        )
        for name, facts in psutil.net_if_stats().items()
    ]


def address_of(host: str) -> str | None:
    """Return the address that a name resolves to, or None."""
    try:
        return str(socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][4][0])
    except OSError:
        return None


def _source(host: str) -> str | None:
    """Return the local address that packets to `host` leave from. Nothing is sent."""
    address = address_of(host)
    if address is None:
        return None
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((address, 9))
            return str(probe.getsockname()[0])
        except OSError:
            return None


def gloo_interface(around: NetworkFacts, environment: Mapping[str, str] = os.environ) -> Judgement:
    """Judge gloo's interface.

    Without GLOO_SOCKET_IFNAME gloo binds to the address of the host's own name or, failing that, to the loopback.
    """
    names = [name for name in environment.get(GLOO, "").split(",") if name]
    if names:
        known = {card.name: card for card in around.interfaces}
        missing = [name for name in names if name not in known]
        if missing:
            return Judgement("broken", _no_interface(GLOO, missing, around))
        return _judged(GLOO, [known[name] for name in names], "", around)
    chosen = around.with_address(around.own)
    reason = f", since this host's name is {around.own}"
    if chosen is None:
        chosen = next((card for card in around.interfaces if card.loopback), None)
        reason = ", since this host's name is not an address of its own"
    return _judged(GLOO, [chosen] if chosen else [], reason, around)


def nccl_interface(around: NetworkFacts, environment: Mapping[str, str] = os.environ) -> Judgement:
    """Judge NCCL's interface.

    NCCL_SOCKET_IFNAME lists beginnings of names, after = whole names; after ^ they are excluded. Without it NCCL avoids
    loopback and docker.
    """
    value = environment.get(NCCL, "")
    if not value:
        return Judgement("ok", "chosen by NCCL itself (NCCL_SOCKET_IFNAME is not set)")
    match = re.fullmatch(r"(\^?)(=?)(.*)", value)
    assert match is not None, "every text matches"
    excluded, exact, listed = bool(match[1]), bool(match[2]), [name for name in match[3].split(",") if name]

    def named(card: Interface, name: str) -> bool:
        return card.name == name if exact else card.name.startswith(name)

    chosen = [card for card in around.interfaces if any(named(card, name) for name in listed) != excluded]
    missing = [name for name in listed if not any(named(card, name) for card in around.interfaces)]
    if not chosen or (missing and not excluded):
        judged = Judgement("broken", _no_interface(NCCL, missing or listed, around))
    else:
        judged = _judged(NCCL, chosen, "", around)
    # Without CUDA nothing uses NCCL.
    return judged if around.nccl or judged.state != "broken" else judged._replace(state="warning")


def _judged(variable: str, cards: Sequence[Interface], reason: str, around: NetworkFacts) -> Judgement:
    """Judge whether ranks can meet over these cards."""
    said = ", ".join(map(str, cards)) + reason
    usable = [card for card in cards if card.up and card.addresses]
    if not usable:
        detail = f"{said or 'none'}: it must be up and have an address; {_advice(variable, around)}"
        return Judgement("broken", detail)
    address = usable[0].addresses[0]
    if around.several and all(card.loopback for card in usable):
        return Judgement("broken", f"{said}: it reaches no other node; {_advice(variable, around)}", address)
    if around.several and around.to_master is not None and around.to_master not in usable:
        detail = f"{said}: MASTER_ADDR is reached through {around.to_master}; unless both reach all nodes, "
        return Judgement("warning", detail + _advice(variable, around), address)
    return Judgement("ok", said, address)


def _no_interface(variable: str, missing: Sequence[str], around: NetworkFacts) -> str:
    there = some_of([str(card) for card in around.interfaces])
    return f"{variable}: no interface {', '.join(missing)} here, but {there}; {_advice(variable, around)}"


def _advice(variable: str, around: NetworkFacts) -> str:
    if around.to_master is not None and not around.to_master.loopback:
        return f"set {variable}={around.to_master.name}"
    return f"set {variable} to the interface of the network that the nodes share"
