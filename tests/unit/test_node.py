"""Ranks are on one node where host name and boot id agree: one of them alone is the same on several nodes."""

from __future__ import annotations

import re
import socket
from pathlib import Path

import pytest

from lowrank_dist.backend import node
from lowrank_dist.backend.node import node_id, node_names
from tests import forked
from tests.integration.launching import ROOT, environment, free_port

# A rank that prints the names of all ranks' nodes, and then an error on what differs between them.
RANK = """
import os, socket
from pathlib import Path
import torch
import torch.distributed as dist
from lowrank_dist.backend import node
from lowrank_dist.parallel.collectives import host_names, require_agreement
socket.gethostname = lambda: os.environ["HOST"]
node.BOOT_ID = Path(os.environ["BOOT"])
dist.init_process_group("gloo")
world = dist.group.WORLD
print(*host_names(world), sep="|")
try:
    require_agreement({"train.lr": os.environ["RANK"]}, world, torch.device("cpu"), "Correct it.")
except ValueError as error:
    print(error)
dist.barrier()
dist.destroy_process_group()
"""


@pytest.mark.parametrize(
    ("identities", "names"),
    [
        (("h1/a", "h1/a", "h2/b"), ("h1", "h1", "h2")),
        # Containers on one host.
        (("h1/a", "h2/a"), ("h1", "h2")),
        (("worker/1f3a-5", "worker/77b0-5", "worker/1f3a-5"), ("worker (1f3a)", "worker (77b0)", "worker (1f3a)")),
        (("worker/1f3a-5", "worker/1f3a-6", "h1/1f3a-6"), ("worker (1f3a-5)", "worker (1f3a-6)", "h1")),
        # A kernel that shows no boot id.
        (("h1/", "h1/", "h2/"), ("h1", "h1", "h2")),
        (("localhost/", "localhost/b"), ("localhost ()", "localhost (b)")),
    ],
)
def test_different_nodes_have_different_names(identities: tuple[str, ...], names: tuple[str, ...]) -> None:
    assert node_names(identities) == names


def test_an_identity_is_host_name_and_boot_id(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: "worker")
    assert re.fullmatch(r"worker/[0-9a-f-]{36}", node_id()) and node_id() == node_id()
    monkeypatch.setattr(node, "BOOT_ID", tmp_path / "boot_id")
    assert node_id() == "worker/"
    (tmp_path / "boot_id").write_text("b\n")
    assert node_id() == "worker/b"


def test_the_node_is_identified_in_one_place() -> None:
    """A second use of the host name would group ranks by another rule; interfaces.py resolves the name."""
    sources = (ROOT / "lowrank_dist").rglob("*.py")
    names = re.compile(r"gethostname|getfqdn|platform\.node|nodename")
    found = {str(path.relative_to(ROOT / "lowrank_dist")) for path in sources if names.search(path.read_text())}
    assert found == {"backend/node.py", "backend/interfaces.py"}


@pytest.mark.slow
def test_ranks_on_nodes_of_one_name(tmp_path: Path) -> None:
    """Ranks 0 and 1 are on one node; rank 2 is on another, which has the same host name."""
    script = tmp_path / "rank.py"
    script.write_text(RANK)
    for boot in ("1f3a", "77b0"):
        (tmp_path / boot).write_text(f"{boot}-4c1e\n")
    job = {**environment(), "WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    boots = [tmp_path / "1f3a", tmp_path / "1f3a", tmp_path / "77b0"]
    ranks = [{**job, "RANK": str(n), "HOST": "worker", "BOOT": str(boot)} for n, boot in enumerate(boots)]
    for one in forked.run_programs([script], ranks, seconds=60):
        names, error = one.stdout.splitlines()
        assert names == "worker (1f3a)|worker (1f3a)|worker (77b0)"
        assert "0 on rank 0 (worker (1f3a))" in error and "2 on rank 2 (worker (77b0))" in error
