"""Nodes that do not reach each other at gloo's ports, although their ranks have met."""

from __future__ import annotations

import socket
from unittest import mock

import pytest
import torch.distributed as dist

from lowrank_dist.backend import reach
from lowrank_dist.backend.interfaces import Judgement
from lowrank_dist.backend.reach import require_reach
from lowrank_dist.errors import UserError
from tests.integration.launching import free_port


@pytest.fixture(autouse=True)
def _loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reach, "gloo_interface", lambda _: Judgement("ok", "lo", "127.0.0.1"))
    monkeypatch.setattr(reach, "_LEAVE_SECONDS", 0.2)


def told(store: dist.Store, node: str, port: int) -> dist.Store:
    """Return the store with what rank 1 tells."""
    store.set(f"{reach._HERE}/1", f"{node}/boot\n127.0.0.1\n{port}")
    return store


def test_a_node_behind_a_firewall() -> None:
    with pytest.raises(UserError) as raised:
        require_reach(told(dist.HashStore(), "h2", free_port()), 0, 2, "h1")
    said = str(raised.value)
    assert said.startswith(
        f"{socket.gethostname()} (127.0.0.1) does not reach h2 (127.0.0.1: connection refused), alth"
    )
    assert "Let all TCP ports from" in said and "or set GLOO_SOCKET_IFNAME to the interface" in said


def test_nodes_that_reach_each_other() -> None:
    """The control: gloo failed for another reason, which is then reported."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        require_reach(told(dist.HashStore(), "h2", other.getsockname()[1]), 0, 2, "h1")


def test_a_rank_that_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reach, "_GATHER_SECONDS", 0.3)
    require_reach(dist.HashStore(), 0, 2, "h1")
    gone = mock.Mock(spec=dist.Store, set=mock.Mock(side_effect=dist.DistNetworkError("Broken pipe")))
    require_reach(gone, 1, 2, "h1")
