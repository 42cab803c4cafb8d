"""Ranks that cannot meet: each names the cause and the remedy, and ends as for a user's mistake."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest

from lowrank_dist.backend import ports
from lowrank_dist.backend.rendezvous import MeetingPlace, open_store
from lowrank_dist.doctor.board import Board, Unreached
from lowrank_dist.errors import RankIdentityError, UserError
from tests import forked
from tests.integration.launching import environment, free_port

# A rank that meets the others, prints what stopped it and ends as training does.
RANK = """
import sys
import torch
from lowrank_dist.backend.select import Backend, init_process_group
from lowrank_dist.errors import UserError
try:
    init_process_group(Backend(torch.device("cpu"), "gloo", "cpu"), 2)
except UserError as error:
    print(error)
    sys.exit(2)
"""


def silent(reached: socket.socket) -> None:
    time.sleep(30)


def speaks_first(reached: socket.socket) -> None:
    reached.sendall(b"SSH-2.0-OpenSSH_9.2\r\n")
    reached.recv(100)


def answers(reached: socket.socket) -> None:
    reached.recv(100)
    reached.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")


def closes(reached: socket.socket) -> None:
    pass


@contextmanager
def service(serve: Callable[[socket.socket], None]) -> Iterator[int]:
    """Run a program that serves each connection to a port, and yield the port."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def one(reached: socket.socket) -> None:
            with reached, contextlib.suppress(OSError):
                serve(reached)

        def run() -> None:
            with contextlib.suppress(OSError):
                while True:
                    threading.Thread(target=one, args=(listener.accept()[0],), daemon=True).start()

        threading.Thread(target=run, daemon=True).start()
        yield listener.getsockname()[1]


def rank(folder: Path, port: int, number: int = 1, host: str = "127.0.0.1") -> forked.Outcome:
    """Start one rank of two. On the code before this was checked some of them never end, so it has 40 s."""
    script = folder / "rank.py"
    script.write_text(RANK)
    place = {"RANK": str(number), "WORLD_SIZE": "2", "MASTER_ADDR": host, "MASTER_PORT": str(port)}
    (ended,) = forked.run_programs([script], [{**environment(), **place}], seconds=40)
    return ended


@pytest.mark.slow
@pytest.mark.parametrize(
    ("serve", "what"),
    [
        (silent, "it accepts connections and never answers"),
        (speaks_first, "it says b'SSH-2.0-OpenSSH_9.2"),
        (answers, "it answers b'HTTP/1.1 400 Bad Request"),
    ],
)
def test_another_program_at_the_port(serve: Callable[[socket.socket], None], what: str, tmp_path: Path) -> None:
    with service(serve) as port:
        ended = rank(tmp_path, port)
    assert ended.code == 2, ended
    assert f"MASTER_PORT: the program that listens at 127.0.0.1, port {port} is not rank 0 of this job" in ended.stdout
    assert what in ended.stdout and "set MASTER_PORT to a port that no program on 127.0.0.1 uses" in ended.stdout


@pytest.mark.slow
def test_nobody_at_the_port(tmp_path: Path) -> None:
    ended = rank(tmp_path, free_port())
    assert ended.code == 2 and "nothing listens at 127.0.0.1, port" in ended.stdout, ended
    assert "set MASTER_ADDR to rank 0's node" in ended.stdout
    with service(closes) as port:
        ended = rank(tmp_path, port)
    assert ended.code == 2 and "(it closes connections at once); check that 127.0.0.1 is rank 0's" in ended.stdout


@pytest.mark.slow
@pytest.mark.parametrize("host", ["no-such-host.invalid", "a..b", "x" * 70, "tcp://127.0.0.1"])
def test_a_master_without_address(host: str, tmp_path: Path) -> None:
    ended = rank(tmp_path, free_port(), host=host)
    assert ended.code == 2 and f"MASTER_ADDR: {socket.gethostname()} cannot resolve the name '{host}'" in ended.stdout
    assert "give an address, or correct /etc/hosts or DNS" in ended.stdout


def place(port: int, number: int = 0, host: str = "127.0.0.1") -> MeetingPlace:
    return MeetingPlace(host, port, number, 2, agent=False)


def test_a_port_in_use_is_named_with_its_holder() -> None:
    with service(silent) as port, pytest.raises(RankIdentityError) as raised:
        open_store(place(port), 3)
    said = str(raised.value)
    assert f"rank 0 cannot listen at 127.0.0.1, port {port}, which is already in use; give each run its own" in said
    assert f"it is held by process {os.getpid()} (" in said


def test_doctor_says_the_same() -> None:
    def join(port: int, number: int) -> None:
        Board.join(SimpleNamespace(rank=number, size=2, master="127.0.0.1", port=port, agent=False), 3)

    with service(silent) as port, pytest.raises(Unreached, match="already in use; give each run its own MASTER_PORT"):
        join(port, 0)
    with service(speaks_first) as port, pytest.raises(Unreached, match="MASTER_PORT: the program that listens at"):
        join(port, 1)


def test_a_port_of_root(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> socket.socket:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(socket, "create_server", refuse)
    with pytest.raises(RankIdentityError, match="MASTER_PORT: rank 0 may not listen .* from 1024 to 65535"):
        open_store(place(80), 3)


def test_a_master_that_is_another_node() -> None:
    """127.0.0.2 stands for a node that refuses: the socket of rank 0 listens at 127.0.0.1 alone."""
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    with pytest.MonkeyPatch.context() as patch, pytest.raises(UserError) as raised:
        patch.setattr(ports, "listen", lambda _: listener)
        open_store(place(port, host="127.0.0.2"), 1)
    assert "MASTER_ADDR: 127.0.0.2 does not lead to rank 0's node" in str(raised.value)
    assert f"set MASTER_ADDR to a name or an address of {socket.gethostname()}" in str(raised.value)


def test_a_port_that_was_just_closed() -> None:
    """Connections in TIME_WAIT do not keep rank 0 from its port."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)), listener.accept()[0] as accepted:
            accepted.close()  # this side closes first, and so waits
            time.sleep(0.05)
    assert open_store(place(port), 5).add("met", 1) == 1


def test_ranks_that_can_meet() -> None:
    """The control: a client that comes before rank 0 waits for it, under either name."""
    port, met = free_port(), []
    early = threading.Thread(target=lambda: met.append(open_store(place(port, 1, "localhost"), 20)))
    early.start()
    time.sleep(0.3)
    store = open_store(place(port), 20)
    early.join(20)
    store.set("said", "by rank 0")
    assert met[0].get("said") == b"by rank 0"


def test_a_long_wait_is_reported_once(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("lowrank_dist.backend.rendezvous.NOTE_SECONDS", 0.3)
    for local, lines in (("0", 1), ("1", 0)):
        monkeypatch.setenv("LOCAL_RANK", local)
        with pytest.raises(UserError):
            open_store(place(free_port(), 1), 1.5)
        said = capsys.readouterr().err
        assert said.count("rank 1 still waits for rank 0: nothing listens at 127.0.0.1") == lines, said
