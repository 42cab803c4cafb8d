"""Ranks that do not come, or that cannot be reached, are named by rank 0 before a process group waits for them."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch.distributed as dist

from lowrank_dist.backend import attendance, interfaces
from lowrank_dist.backend.attendance import Arrival, arrival, refuse, take
from lowrank_dist.backend.interfaces import Interface
from lowrank_dist.errors import OtherRankError, UserError
from tests import forked
from tests.integration.launching import environment, free_port
from tests.unit.test_rendezvous import RANK

LO = Interface("lo", ("127.0.0.1", "::1"), True, 0)
ETH0 = Interface("eth0", ("10.77.0.1",), True, 10000)


def on(node: str, always: str = "", between: str = "", network: str = "") -> Arrival:
    return Arrival(f"{node}/boot", network or node, always, between)


def test_ranks_that_do_not_come() -> None:
    came = {0: on("h1"), 1: on("h1"), 4: on("h3")}
    said = refuse(came, 6, 600, "h1, port 29500")
    assert said.startswith("ranks 2, 3, 5 of 6 did not come to h1, port 29500, within 600 s; came: ranks 0, 1 on h1, ")
    assert "rank 4 on h3" in said and "check that the launcher started 6 ranks (WORLD_SIZE)" in said
    assert len(refuse(came, 1024, 600, "h1, port 29500")) < 500


def test_ranks_that_cannot_meet() -> None:
    wrong = "GLOO_SOCKET_IFNAME: no interface eth7 here"
    said = refuse({0: on("h1"), 1: on("h2", always=wrong)}, 2, 600, "h1, port 29500")
    assert said == f"rank 1 on h2 cannot meet the others: {wrong}"
    loopback = {rank: on(f"h{rank}", between="lo: it reaches no other node") for rank in range(2)}
    assert "rank 0 on h0 cannot meet the others: lo: it" in refuse(loopback, 2, 600, "h1, port 29500")
    # The controls: one host, and containers of one host that share its network.
    for name in ("h{}", "h1"):
        one = {rank: on(name.format(rank), between="lo", network="same") for rank in range(2)}
        assert refuse(one, 2, 600, "h1, port 29500") == ""


def own_arrival(monkeypatch: pytest.MonkeyPatch, own: str | None, variables: Mapping[str, str], nccl: bool) -> Arrival:
    monkeypatch.setattr(interfaces, "interfaces", lambda: [LO, ETH0])
    monkeypatch.setattr(interfaces, "address_of", lambda host: own if host == socket.gethostname() else "10.77.0.1")
    monkeypatch.setattr(interfaces, "_source", lambda _: "10.77.0.1")
    for name in (interfaces.GLOO, interfaces.NCCL):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    return arrival("h1", nccl)


@pytest.mark.parametrize(
    ("own", "variables", "nccl", "always", "between"),
    [
        ("10.77.0.1", {}, True, "", ""),
        ("127.0.1.1", {}, False, "", "not an address of its own: it reaches no other node"),
        (
            None,
            {},
            False,
            "",
            "since this host's name is not an address of its own: it reaches no other node; set GLOO",
        ),
        (None, {"GLOO_SOCKET_IFNAME": "eth0"}, False, "", ""),
        (
            "10.77.0.1",
            {"GLOO_SOCKET_IFNAME": "ib7"},
            False,
            "GLOO_SOCKET_IFNAME: no interface ib7 here",
            "no interface",
        ),
        ("10.77.0.1", {"NCCL_SOCKET_IFNAME": "ib7"}, True, "NCCL_SOCKET_IFNAME: no interface ib7", "ib7"),
        ("10.77.0.1", {"NCCL_SOCKET_IFNAME": "ib7"}, False, "", ""),
        ("10.77.0.1", {"NCCL_SOCKET_IFNAME": "lo"}, True, "", "it reaches no other node; set NCCL_SOCKET_IFNAME=eth0"),
    ],
)
def test_what_a_rank_tells(
    own: str | None,
    variables: dict[str, str],
    nccl: bool,
    always: str,
    between: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """127.0.1.1 is what Debian's /etc/hosts gives a host's own name, which leads every other node to itself."""
    found = own_arrival(monkeypatch, own, variables, nccl)
    assert (always in found.always, bool(found.always)) == (True, bool(always)), found
    assert (between in found.between_networks, bool(found.between_networks)) == (True, bool(between)), found
    assert Arrival.of(found.to_text()) == found


def attend(ranks: Mapping[int, Arrival], size: int, monkeypatch: pytest.MonkeyPatch) -> dict[int, str]:
    """Return the error of each rank; "" for none."""
    monkeypatch.setattr(attendance, "_GRACE_SECONDS", 1.0)
    store = dist.HashStore()

    def one(rank: int) -> str:
        try:
            take(store, rank, size, 1.0, ranks[rank], "h1, port 1")
        except UserError as error:
            assert isinstance(error, OtherRankError) == (rank > 0)
            return str(error)
        return ""

    with ThreadPoolExecutor(len(ranks)) as pool:
        return dict(zip(ranks, pool.map(one, ranks), strict=True))


def test_all_ranks_end_with_one_text(monkeypatch: pytest.MonkeyPatch) -> None:
    told = attend({0: on("h1"), 2: on("h2")}, 3, monkeypatch)
    assert len(set(told.values())) == 1 and told[0].startswith("rank 1 of 3 did not come"), told
    told = attend({0: on("h1"), 1: on("h2", always="no interface eth7")}, 2, monkeypatch)
    assert set(told.values()) == {"rank 1 on h2 cannot meet the others: no interface eth7"}
    assert attend({0: on("h1"), 1: on("h2")}, 2, monkeypatch) == {0: "", 1: ""}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"WORLD_SIZE": "3"}, "ranks 1, 2 of 3 did not come to 127.0.0.1, port"),
        ({"WORLD_SIZE": "1", "GLOO_SOCKET_IFNAME": "none7"}, "GLOO_SOCKET_IFNAME: no interface none7 here, but"),
    ],
)
def test_a_real_rank(variables: dict[str, str], said: str, tmp_path: Path) -> None:
    script = tmp_path / "rank.py"
    script.write_text(RANK)
    place = {"RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    (ended,) = forked.run_programs([script], [{**environment(), **place, **variables}], seconds=40)
    assert ended.code == 2 and said in ended.stdout and "Traceback" not in ended.stderr, ended
