"""Errors that a limit has caused (open files, processes, /dev/shm) are reported as the limit, with the remedy."""

from __future__ import annotations

import errno
import fcntl
import resource
import socket
import subprocess
from pathlib import Path

import pytest
from typer.core import TyperGroup
from typer.testing import CliRunner

from lowrank_dist.backend import exhaustion
from lowrank_dist.backend.exhaustion import explain, name_limits
from lowrank_dist.cli.main import app
from lowrank_dist.doctor.machine import open_files
from lowrank_dist.errors import LimitError, UserError
from lowrank_dist.supervision import rank
from lowrank_dist.supervision.rank import USER_ERROR, Supervision
from lowrank_dist.supervision.status import Page
from tests import forked
from tests.integration.launching import environment, free_port

GLOO = "[enforce fail at gloo/transport/tcp/loop.cc:105] fd_ != -1. -1 vs -1. epoll_create: Too many open files"


def raised(error: Exception) -> Exception:
    try:
        raise error
    except Exception as caught:
        return caught


def chained() -> Exception:
    try:
        try:
            raise OSError(errno.EMFILE, "Too many open files", "model.safetensors")
        except OSError as error:
            raise RuntimeError("the model cannot be loaded") from error
    except RuntimeError as error:
        return error


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.EMFILE, "Too many open files", "/a"), "too many open files on "),
        (RuntimeError(GLOO), "too many open files on "),
        (chained(), "too many open files on "),
        (OSError(errno.ENFILE, "Too many open files in system"), "sysctl fs.file-max"),
        (RuntimeError("can't start new thread"), "(`ulimit -u`)"),
        (RuntimeError("std::thread: Resource temporarily unavailable"), "(`ulimit -u`)"),
        (RuntimeError("Resource temporarily unavailable"), "(`ulimit -u`)"),
        (RuntimeError("NCCL: Error while creating shared memory segment /dev/shm/nccl-x (size 9637888)"), "--shm-size"),
        (OSError(errno.ENOSPC, "No space left on device", "/dev/shm/torch_1"), "--shm-size=8g"),
    ],
)
def test_an_error_of_a_limit(error: Exception, said: str) -> None:
    text = explain(raised(error))
    assert text is not None and said in text and socket.gethostname() in text and "\n" not in text
    with pytest.raises(LimitError), name_limits():
        raise error


def test_a_process_that_cannot_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")

    monkeypatch.setattr(exhaustion, "process_bounds", lambda: iter([(Path("/sys/fs/cgroup/job"), 77)]))
    monkeypatch.setattr(subprocess, "_fork_exec", refuse)
    monkeypatch.setattr(subprocess, "_USE_POSIX_SPAWN", False)
    with pytest.raises(LimitError) as found, name_limits():
        subprocess.Popen(["true"], close_fds=True)
    assert "pids.max of /sys/fs/cgroup/job: 77" in str(found.value) and "OMP_NUM_THREADS" in str(found.value)


def test_other_errors_stay_what_they_are(tmp_path: Path) -> None:
    """The control. A file lock that another process holds gives EAGAIN as well."""
    file = tmp_path / "lock"
    with file.open("w") as one, file.open("w") as two:
        fcntl.flock(one, fcntl.LOCK_EX)
        with pytest.raises(BlockingIOError), name_limits():
            fcntl.flock(two, fcntl.LOCK_EX | fcntl.LOCK_NB)
    for error in (
        OSError(errno.ENOSPC, "No space left on device", "/runs/a"),
        FileNotFoundError(2, "No such file", "/dev/shm/a"),
        RuntimeError("gloo: Connection closed by peer"),
        RuntimeError("recv: Resource temporarily unavailable"),
        ValueError("Too many open files"),
    ):
        assert explain(raised(error)) is None
    with pytest.raises(UserError, match="^wrong$"), name_limits():
        raise UserError("wrong")


@pytest.mark.parametrize(
    ("soft", "hard", "said"),
    [(64, 64, "its hard limit is 64; raise nofile in"), (64, 524288, "run `ulimit -n 524288` before the launcher")],
)
def test_the_remedy_for_open_files(soft: int, hard: int, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (soft, hard))
    assert said in str(explain(OSError(errno.EMFILE, "Too many open files")))
    (row,) = open_files()
    assert row.state == "warning" and said in row.detail
    monkeypatch.setattr(resource, "getrlimit", lambda _: (65536, 524288))
    assert open_files()[0].state == "ok"


def test_a_rank_that_lost_nobody(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """gloo's error was taken for one of a lost peer. The limit is printed once, by rank 0 of a node at once."""
    monkeypatch.setenv("LOCAL_RANK", "0")
    supervision = Supervision(60)
    supervision._page = Page.make()
    assert supervision.failed(raised(RuntimeError(GLOO))) == USER_ERROR
    said = capsys.readouterr().err
    assert said.startswith("lowrank_dist: too many open files on ") and "ulimit -n" in said and "lost" not in said
    assert "Traceback" not in said


def test_a_rank_that_cannot_start_its_watchdog(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(rank, "start", refuse)
    with pytest.raises(LimitError, match="ulimit -n"):
        Supervision(60).__enter__()


@pytest.mark.parametrize("command", ["generate", "evaluate", "doctor"])
def test_a_command(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EMFILE, "Too many open files", "/a")

    monkeypatch.setattr(TyperGroup, "invoke", refuse)
    found = CliRunner().invoke(app, [command])
    assert found.exit_code == USER_ERROR and found.stderr.startswith("error: too many open files on "), found.stderr


# A rank with so few file descriptors left; it prints as a command does.
RANK = """
import os, resource, sys
import torch
from lowrank_dist.backend.exhaustion import name_limits
from lowrank_dist.backend.select import Backend, init_process_group
from lowrank_dist.errors import UserError
limit = max(map(int, os.listdir("/proc/self/fd"))) + int(os.environ["LEFT"])
resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
try:
    with name_limits():
        init_process_group(Backend(torch.device("cpu"), "gloo", "cpu"), 5)
except UserError as error:
    print(error)
    sys.exit(2)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("left", "code"), [(1, 2), (5, 2), (9, 2), (60, 0)])
def test_a_rank_without_descriptors(left: int, code: int, tmp_path: Path) -> None:
    """Before, the message depended on the call that reached the limit: gloo could not resolve its own address."""
    script = tmp_path / "rank.py"
    script.write_text(RANK)
    place = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    (ended,) = forked.run_programs([script], [{**environment(), **place, "LEFT": str(left)}], seconds=60)
    assert ended.code == code and "Traceback" not in ended.stderr, ended
    assert ended.stdout.startswith("too many open files on " if code else ""), ended
