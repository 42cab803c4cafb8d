"""Ranks of two hosts that cannot meet: names, routes, /etc/hosts and firewalls. Each rank says the cause."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.cluster.rig import Host, Rig
from tests.cluster.runs import ENVIRONMENT
from tests.integration.launching import Outcome, free_port
from tests.unit.test_rendezvous import RANK

TIMEOUT = 6  # seconds that a rank waits; RANK has its own


def meet(rig: Rig, folder: Path, *of: Mapping[str, str], seconds: int = TIMEOUT) -> list[Outcome]:
    """Start a rank on each host by hand, at the same time. of: further variables of each."""
    script = folder / "rank.py"
    script.write_text(RANK.replace('"cpu"), 2)', f'"cpu"), {seconds})'))
    shared = {**ENVIRONMENT, "WORLD_SIZE": "2", "MASTER_ADDR": "h1", "MASTER_PORT": str(free_port())}

    def one(rank: int) -> Outcome:
        more = of[rank] if rank < len(of) else {}
        environment = {**shared, "RANK": str(rank), **more}
        return rig.hosts[rank].run([sys.executable, script], seconds=120, environment=environment)

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(one, range(2)))


@contextmanager
def changed(host: Host, do: str, undo: str) -> Iterator[None]:
    assert host.run(["bash", "-c", do]).code == 0, do
    try:
        yield
    finally:
        assert host.run(["bash", "-c", undo]).code == 0, undo


def test_ranks_that_meet(quiet_rig: Rig, tmp_path: Path) -> None:
    """The control."""
    assert [one.code for one in meet(quiet_rig, tmp_path, seconds=60)] == [0, 0]


def test_a_master_that_cannot_be_resolved(quiet_rig: Rig, tmp_path: Path) -> None:
    one, two = meet(quiet_rig, tmp_path, {"MASTER_ADDR": "head.cluster"}, {"MASTER_ADDR": "head.cluster"})
    for host, ended in (("h1", one), ("h2", two)):
        assert ended.code == 2 and f"MASTER_ADDR: {host} cannot resolve the name 'head.cluster'" in ended.stdout, ended


@pytest.mark.parametrize("kind", ["blackhole", "unreachable", "prohibit"])
def test_a_master_without_route(kind: str, quiet_rig: Rig, tmp_path: Path) -> None:
    """Rank 0 names the rank that did not come, the other one why."""
    route = f"route add {kind} 10.77.0.1/32"
    with changed(quiet_rig.hosts[1], f"ip {route}", f"ip {route.replace('add', 'delete')}"):
        one, two = meet(quiet_rig, tmp_path)
    assert one.code == 2 and "rank 1 of 2 did not come to h1, port" in one.stdout and "rank 0 on h1" in one.stdout, one
    assert two.code == 2 and "MASTER_ADDR: h2 does not reach h1, port" in two.stdout, two


def test_a_master_that_is_another_host(quiet_rig: Rig, tmp_path: Path) -> None:
    one, two = meet(quiet_rig, tmp_path, {"MASTER_ADDR": "h2"}, {"MASTER_ADDR": "h2"})
    assert one.code == 2 and "MASTER_ADDR: h2 does not lead to rank 0's node, h1" in one.stdout, one
    assert two.code == 2 and "nothing listens at h2, port" in two.stdout and "rank 0's node" in two.stdout, two


def test_the_own_name_is_a_loopback(quiet_rig: Rig, tmp_path: Path) -> None:
    """Debian's /etc/hosts gives the own name 127.0.1.1. gloo listens there, where the other host finds itself."""
    hosts = tmp_path / "hosts"
    hosts.write_text("127.0.0.1 localhost\n127.0.1.1 h1\n10.77.0.2 h2\n")
    with changed(quiet_rig.hosts[0], f"mount --bind {hosts} /etc/hosts", "umount /etc/hosts"):
        ended = meet(quiet_rig, tmp_path)
        freed = meet(quiet_rig, tmp_path, {"GLOO_SOCKET_IFNAME": "eth0"}, seconds=60)
    for one in ended:
        assert one.code == 2 and "rank 0 on h1 cannot meet the others: lo (127.0.0.1" in one.stdout, one
        assert "reaches no other node; set GLOO_SOCKET_IFNAME" in one.stdout
    assert [one.code for one in freed] == [0, 0], freed


def test_a_firewall_for_all_ports_but_the_store(quiet_rig: Rig, tmp_path: Path) -> None:
    """Stood in for by an interface over which nothing arrives: the ranks meet, and gloo cannot connect them."""
    make = "ip link add other0 type veth peer name other1 && ip address add 10.9.0.2/24 dev other0"
    make += " && ip link set other0 up && ip link set other1 up"
    with changed(quiet_rig.hosts[1], make, "ip link delete other0"):
        one, two = meet(quiet_rig, tmp_path, {}, {"GLOO_SOCKET_IFNAME": "other0"})
    assert one.code == 2 and "h1 (10.77.0.1) does not reach h2 (10.9.0.2: " in one.stdout, (one, two)
    assert "although the ranks met at h1" in one.stdout and "a firewall between the nodes" in one.stdout
    assert two.code != 0, two
