"""The network interface by which the ranks would meet, and the advice where they could not."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from lowrank_dist.backend.interfaces import Interface, NetworkFacts, address_of, interfaces, network_facts
from lowrank_dist.doctor import network
from lowrank_dist.doctor.network import infiniband_ports
from lowrank_dist.doctor.rows import Row

LO = Interface("lo", ("127.0.0.1", "::1"), True, 0)
ETH0 = Interface("eth0", ("10.77.0.2",), True, 10000)
IB0 = Interface("ib0", ("10.88.0.2", "fe80::1"), True, 0)
DOWN = Interface("eth1", (), False, 0)
CARDS = [LO, ETH0, IB0, DOWN]
JOB = NetworkFacts(CARDS, several=True, nccl=False, master="10.77.0.1", own="10.77.0.2", towards="10.77.0.2")
ALONE = NetworkFacts(CARDS, several=False, nccl=False, master=None, own="127.0.0.1", towards=None)


def rows(around: NetworkFacts, environment: Mapping[str, str]) -> dict[str, Row]:
    return {row.what: row for row in network.network(around, environment)}


def gloo(around: NetworkFacts, **environment: str) -> Row:
    return rows(around, environment)["interface of gloo"]


def nccl(around: NetworkFacts, value: str | None) -> Row:
    return rows(around, {} if value is None else {"NCCL_SOCKET_IFNAME": value})["interface of NCCL"]


def test_all_cards_are_named() -> None:
    assert rows(JOB, {})["NICs"].detail.startswith(
        "eth0 (10.77.0.2, 10 Gbit/s), ib0 (10.88.0.2, fe80::1), eth1 (down), lo (127.0.0.1, ::1)"
    )


def test_this_machine_has_a_loopback() -> None:
    (loopback,) = [card for card in interfaces() if card.name == "lo"]
    assert loopback.up and loopback.loopback and "127.0.0.1" in loopback.addresses
    assert not ETH0.loopback and not DOWN.loopback
    around = network_facts(several=False, nccl=False, master="127.0.0.1")
    assert around.towards == "127.0.0.1" and around.to_master == around.with_address("127.0.0.1") == loopback


@pytest.mark.parametrize(
    ("environment", "state", "said"),
    [
        ({}, "ok", "since this host's name is 10.77.0.2"),
        ({"GLOO_SOCKET_IFNAME": "eth0"}, "ok", "eth0 (10.77.0.2"),
        ({"GLOO_SOCKET_IFNAME": "eth0,ib0"}, "ok", "ib0"),
        ({"GLOO_SOCKET_IFNAME": "eth7"}, "broken", "no interface eth7 here, but lo (127.0.0.1, ::1), eth0"),
        ({"GLOO_SOCKET_IFNAME": "eth"}, "broken", "no interface eth here"),
        ({"GLOO_SOCKET_IFNAME": "eth1"}, "broken", "must be up and have an address"),
        ({"GLOO_SOCKET_IFNAME": "lo"}, "broken", "it reaches no other node"),
        ({"GLOO_SOCKET_IFNAME": "ib0"}, "warning", "MASTER_ADDR is reached through eth0"),
    ],
)
def test_what_gloo_is_told(environment: dict[str, str], state: str, said: str) -> None:
    row = gloo(JOB, **environment)
    assert row.state == state and said in row.detail
    assert state == "ok" or "set GLOO_SOCKET_IFNAME=eth0" in row.detail


def test_a_host_name_that_is_the_loopback() -> None:
    """Debian's installer maps the host name to 127.0.0.1; gloo then offers this address to the other nodes."""
    row = gloo(replace(JOB, own="127.0.0.1"))
    assert row.state == "broken" and "since this host's name is 127.0.0.1" in row.detail
    assert "set GLOO_SOCKET_IFNAME=eth0" in row.detail
    # The name is no address of this host: gloo falls back to the loopback.
    row = gloo(replace(JOB, own="10.1.2.3"))
    assert row.state == "broken" and "not an address of its own" in row.detail
    # On one node this is in order.
    assert gloo(replace(JOB, own="127.0.0.1", several=False)).state == "ok" and gloo(ALONE).state == "ok"
    assert "the network that the nodes share" in gloo(replace(ALONE, several=True)).detail


@pytest.mark.parametrize(
    ("value", "state", "said"),
    [
        (None, "ok", "chosen by NCCL itself"),
        ("eth0", "ok", "eth0 (10.77.0.2"),
        ("eth", "ok", "eth0 (10.77.0.2"),
        ("=eth0", "ok", "eth0"),
        ("=eth", "broken", "no interface eth here"),
        ("ib", "warning", "MASTER_ADDR is reached through eth0"),
        ("eth7", "broken", "no interface eth7 here"),
        ("eth7,eth0", "broken", "no interface eth7 here"),
        ("^docker,lo", "ok", "eth0"),
        ("^lo,ib", "ok", "eth0"),
        ("^eth,ib", "broken", "it reaches no other node"),
        ("^eth,ib,lo", "broken", "no interface"),
    ],
)
def test_what_nccl_is_told(value: str | None, state: str, said: str) -> None:
    row = nccl(replace(JOB, nccl=True), value)
    assert row.state == state and said in row.detail
    if value is not None and state == "broken":
        assert "set NCCL_SOCKET_IFNAME=eth0" in row.detail
        # Where no rank has a GPU, NCCL is not used.
        assert nccl(JOB, value).state == "warning"


def test_without_gpus_nccl_is_not_spoken_of() -> None:
    assert "interface of NCCL" not in rows(JOB, {})


def test_master_addr() -> None:
    assert rows(JOB, {})["MASTER_ADDR"] == Row("MASTER_ADDR", "ok", "10.77.0.1", alike="10.77.0.1")
    assert "MASTER_ADDR" not in rows(ALONE, {})
    for master, towards, said in (
        ("no-such-host.invalid", None, "cannot resolve the name"),
        ("127.0.0.1", "127.0.0.1", "on every node means the node itself"),
        ("10.77.0.1", None, "this node has no route"),
    ):
        row = rows(replace(JOB, master=master, towards=towards), {})["MASTER_ADDR"]
        assert row.state == "broken" and said in row.detail
    one_node = replace(JOB, master="127.0.0.1", towards="127.0.0.1", several=False)
    assert rows(one_node, {})["MASTER_ADDR"].state == "ok"


def test_a_name_that_nobody_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*_: object, **__: object) -> None:
        raise socket.gaierror("Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    assert address_of("h9") is None
    around = network_facts(several=True, nccl=False, master="h9")
    assert around.towards is None and around.own is None and around.to_master is None


def test_infiniband_as_the_kernel_shows_it(tmp_path: Path) -> None:
    port = tmp_path / "mlx5_0" / "ports" / "1"
    port.mkdir(parents=True)
    (port / "state").write_text("4: ACTIVE\n")
    (port / "rate").write_text("400 Gb/sec (4X NDR)\n")
    assert infiniband_ports(tmp_path) == ["mlx5_0 port 1 (ACTIVE, 400 Gb/sec (4X NDR))"]
    assert infiniband_ports(tmp_path / "none") == []
