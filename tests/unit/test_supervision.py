"""The record of a failure, the ranks' exchange on its cause, the detection of launchers, and a rank's part."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch.distributed as dist

from lowrank_dist.backend.launchers import Launcher, find_launchers, launcher_name, start_time
from lowrank_dist.errors import OtherRankError, UserError
from lowrank_dist.supervision import failure, peers
from lowrank_dist.supervision.failure import Failure, explains, read, record, retire
from lowrank_dist.supervision.peers import Answer, ask, lost_peers
from lowrank_dist.supervision.rank import FAILURE, INTERRUPTED, USER_ERROR, Supervision
from lowrank_dist.supervision.status import LEAVING, PHASES, Page

ROOT = Path(__file__).parents[2]
CAUSE = Failure(2, "h2", 4, "forward", "ValueError: no", "Traceback\n  …", True)
# A record is ours up to the first ": "; any text may follow.
MISLED = Failure(0, "h1", 4, "backward", "rank 9 on h9 failed first, no answer from rank 8: no", "", False)
MISSING = Failure(1, "h1", 4, "backward", "lost", "", False, ("rank 2 on h2",))


def fields(**other: object) -> Failure:
    return Failure(**{**vars(CAUSE), **other})


def test_a_record_says_who_where_and_when() -> None:
    assert str(CAUSE) == "rank 2 on h2 failed first, at step 4 in forward: ValueError: no\nTraceback\n  …"
    early = fields(step=0, phase="model", traceback="")
    assert str(early) == "rank 2 on h2 failed first, before the first step, in model: ValueError: no"
    assert (
        MISSING.headline == "rank 1 on h1 lost the other ranks at step 4 in backward, no answer from rank 2 on h2: lost"
    )
    many = fields(first=False, silent=[f"rank {n} on h" for n in range(100)]).headline
    assert "rank 7 on h and 92 more: " in many and "rank 8 on h" not in many


@pytest.mark.parametrize("order", [(MISLED, MISSING, CAUSE), (CAUSE, MISSING, MISLED), (MISSING, CAUSE, MISLED)])
def test_a_record_gives_way_to_one_that_explains_more(tmp_path: Path, order: tuple[Failure, ...]) -> None:
    for entry in order:
        record(tmp_path, entry)
    assert read(tmp_path) == str(CAUSE) and explains(read(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["FAILED"]


def test_the_first_of_those_that_explain_as_much_stays(tmp_path: Path) -> None:
    assert record(tmp_path, MISLED) == str(MISLED) and not explains(read(tmp_path))
    assert record(tmp_path, fields(first=False, silent=())) == str(MISLED)
    assert record(tmp_path, MISSING) == str(MISSING)
    assert record(tmp_path, CAUSE) == str(CAUSE)
    assert record(tmp_path, fields(rank=3)) == str(CAUSE)


def test_records_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError("no hard links here")

    monkeypatch.setattr(failure.os, "link", refuse)
    assert record(tmp_path, MISSING) == str(MISSING)
    assert record(tmp_path, CAUSE) == str(CAUSE) == record(tmp_path, MISLED)


def test_a_record_that_cannot_be_written_is_still_said(tmp_path: Path) -> None:
    said = record(tmp_path / "nowhere", CAUSE)
    assert said.startswith(str(CAUSE)) and "could not be written" in said


RACE = """
import sys, time
from pathlib import Path
from lowrank_dist.supervision.failure import Failure, record
rank = int(sys.argv[1])
entry = Failure(rank, "h", 1, "forward", "why", "x" * 5000, rank in (3, 5), ("rank 3 on h",) if rank % 2 else ())
time.sleep(max(0, float(sys.argv[3]) - time.time()))
record(Path(sys.argv[2]), entry)
"""


@pytest.mark.slow
def test_records_of_many_processes_at_once(tmp_path: Path) -> None:
    at = str(time.time() + 2)
    command = [sys.executable, "-c", RACE]
    processes = [subprocess.Popen([*command, str(rank), tmp_path, at], cwd=ROOT) for rank in range(8)]
    assert [process.wait() for process in processes] == [0] * 8
    headline, _, trace = read(tmp_path).partition("\n")
    assert headline[:18] in ("rank 3 on h failed", "rank 5 on h failed") and trace == "x" * 5000
    assert [path.name for path in tmp_path.iterdir()] == ["FAILED"]


@pytest.mark.parametrize("age", [0, 10, -3600], ids=["now", "before", "in the future"])
def test_a_record_is_put_aside_whatever_its_date(tmp_path: Path, age: int) -> None:
    record(tmp_path, CAUSE)
    os.utime(tmp_path / "FAILED", (time.time() - age, time.time() - age))
    retire(tmp_path)
    (kept,) = tmp_path.iterdir()
    assert kept.name.startswith("FAILED.") and kept.read_text().rstrip() == str(CAUSE)
    retire(tmp_path)
    retire(tmp_path / "nowhere")


def test_a_page_is_read_by_another_process() -> None:
    page = Page.make()
    assert page.folder() is None
    page.enter("backward", 12)
    page.set_folder("/runs/größte Läufe")
    code = "import sys; from lowrank_dist.supervision.status import Page; p = Page(int(sys.argv[1]))"
    code += "; print(p.state().phase); print(p.state().step, p.folder(), p.state().since)"
    done = subprocess.run(
        [sys.executable, "-c", code, str(page.descriptor)],
        cwd=ROOT,
        pass_fds=[page.descriptor],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == f"backward\n12 /runs/größte Läufe {page.state().since}\n"
    for phase in PHASES:
        page.enter(phase, 0)
        assert page.state().phase == phase
    page.close()


@pytest.fixture
def short_timeouts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "ASK_SECONDS", 1)
    monkeypatch.setattr(peers, "_EVERY_SECONDS", 0.02)


def ask_concurrently(store: dist.Store, said: dict[int, str | None], size: int = 4) -> dict[int, Answer]:
    """Let ranks that fail at the same time ask each other; return their answers."""
    with ThreadPoolExecutor(len(said)) as pool:
        answers = {rank: pool.submit(ask, store, rank, size, said[rank], lambda: False) for rank in said}
        return {rank: answer.result() for rank, answer in answers.items()}


def test_ranks_learn_the_cause_and_one_of_each_kind_prints(short_timeouts: None) -> None:
    answers = ask_concurrently(dist.HashStore(), {0: None, 1: "why", 2: "why else", 3: None})
    assert answers[1].should_print is not answers[2].should_print, "of two that failed first one prints"
    assert answers[0].should_print is not answers[3].should_print
    cause = "why" if answers[1].should_print else "why else"
    assert answers[0].cause == answers[3].cause == cause
    assert all(answer.reached and not answer.silent for answer in answers.values())


def test_of_ranks_that_say_the_same_one_prints(short_timeouts: None) -> None:
    answers = ask_concurrently(dist.HashStore(), dict.fromkeys(range(4), "why"))
    assert [answer.should_print for answer in answers.values()].count(True) == 1


@pytest.mark.parametrize("said", ["why", None])
def test_rank_0_keeps_the_store_until_the_others_have_their_answers(short_timeouts: None, said: str | None) -> None:
    """The store ends with rank 0. Without it a slow rank would print as well, below a trace of the store's."""
    finished: dict[str, float] = {}

    class Slow:
        """The store as a rank sees it that is slow after its first call."""

        def __init__(self, store: dist.Store) -> None:
            self._store = store

        def __getattr__(self, name: str) -> object:
            call = getattr(self._store, name)

            def slow(*arguments: object) -> object:
                if name in ("compare_set", "add"):
                    time.sleep(0.3)
                found = call(*arguments)
                if name in ("compare_set", "add"):
                    finished["slow"] = time.monotonic()
                return found

            return slow

    store = dist.HashStore()
    with ThreadPoolExecutor(2) as pool:
        slow = pool.submit(ask, Slow(store), 1, 2, said, lambda: False)  # type: ignore[arg-type]
        first = pool.submit(ask, store, 0, 2, "why", lambda: False)
        assert first.result().should_print
        finished["rank 0"] = time.monotonic()
        answer = slow.result()
    assert answer.reached and finished["slow"] < finished["rank 0"]
    assert answer.should_print is (said is None), "of those that only lost their peers one prints"


@pytest.mark.slow
def test_ranks_name_those_that_say_nothing(short_timeouts: None) -> None:
    began = time.monotonic()
    answers = ask_concurrently(dist.HashStore(), {0: None, 2: None})
    assert [answers[rank].silent for rank in (0, 2)] == [[1, 3], [1, 3]] and answers[0].cause is None
    assert 1 <= time.monotonic() - began < 2


@pytest.mark.slow
def test_a_store_that_fails_or_hangs(short_timeouts: None) -> None:
    class Gone:
        def set_timeout(self, timeout: object) -> None:
            raise dist.DistNetworkError("gone")

    class CutOff:
        def set_timeout(self, timeout: object) -> None:
            time.sleep(60)
            raise dist.DistNetworkError("gone")

    for store, limit in ((Gone(), 1), (CutOff(), 4)):
        began = time.monotonic()
        assert ask(store, 1, 2, None, lambda: False) == Answer(should_print=True, reached=False)
        assert time.monotonic() - began < limit


LAUNCH = [
    "/env/bin/python",
    "-u",
    "-m",
    "deepspeed.launcher.launch",
    "--world_info=eyJ",
    "--node_rank=1",
    "launch/train.py",
]


@pytest.mark.parametrize(
    "command, name",
    [
        (LAUNCH, "deepspeed's node launcher"),
        (["/env/bin/python", "/env/bin/deepspeed", "--num_gpus", "2", "launch/train.py"], "deepspeed"),
        (["/env/bin/python", "-m", "torch.distributed.run", "launch/train.py"], "torchrun"),
        (["/env/bin/python", "/env/bin/torchrun", "launch/train.py"], "torchrun"),
        (["slurmstepd: [12.0]"], "slurmstepd"),
        (["/env/bin/python", "launch/train.py", "config.yaml"], None),
        (["/env/bin/python", "launch.py", "config.yaml"], None),
        (["bash", "-c", "deepspeed launch/train.py"], None),
        (["vim", "/src/deepspeed/launch/train.py"], None),
        ([], None),
    ],
)
def test_what_is_a_launcher(command: list[str], name: str | None) -> None:
    assert launcher_name(command) == name


PROBE = """
from lowrank_dist.backend.launchers import find_launchers
print(*(found.name for found in find_launchers()), sep="\\n")
"""
RUNS_THE_REST = (
    "#!/usr/bin/env python\nimport subprocess, sys\nsys.exit(subprocess.call(sys.argv[sys.argv.index('--') + 1:]))\n"
)


@pytest.fixture
def programs(tmp_path: Path) -> Path:
    """Write programs with the names of launchers, which run the command after --."""
    for name in ("torchrun", "deepspeed", "launch.py"):
        (tmp_path / name).write_text(RUNS_THE_REST)
    return tmp_path


def probe(*chain: object) -> list[str]:
    command = [str(word) for word in (*chain, sys.executable, "-c", PROBE)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.split("\n")[:-1]


def test_finds_the_launchers_above_a_rank(programs: Path) -> None:
    torchrun = (sys.executable, programs / "torchrun", "--")
    deepspeed = (sys.executable, programs / "deepspeed", "--")
    node = (sys.executable, programs / "launch.py", "--world_info=eyJ", "--")
    assert probe() == [""]
    assert probe(*torchrun) == ["torchrun"]
    # Through a shell, which is no launcher and may exit.
    assert probe(*deepspeed, "bash", "-c", '"$@"; :', "bash", *node) == ["deepspeed's node launcher", "deepspeed"]


def test_finds_the_deepspeed_that_reached_this_node_by_pdsh(programs: Path) -> None:
    """It is no ancestor of the rank: ssh and a daemon are between."""
    shell = "exec -a pdsh bash -c 'read -r; :' pdsh -w h1 --world_info=eyJ"
    runner = subprocess.Popen(
        [sys.executable, programs / "deepspeed", "--", "bash", "-c", shell], stdin=subprocess.PIPE, cwd=ROOT
    )
    try:
        node = (sys.executable, programs / "launch.py", "--world_info=eyJ", "--")
        end = time.monotonic() + 10
        while len(found := probe(*node)) < 2 and time.monotonic() < end:
            time.sleep(0.1)
        assert found == ["deepspeed's node launcher", "deepspeed"]
        other = (sys.executable, programs / "launch.py", "--world_info=other", "--")
        assert probe(*other) == ["deepspeed's node launcher"]
    finally:
        runner.communicate(b"\n")


def test_a_launcher_lives_until_it_ends() -> None:
    process = subprocess.Popen(["sleep", "60"])
    launcher = Launcher(process.pid, start_time(Path("/proc", str(process.pid))), "torchrun")
    assert launcher.is_alive() and not launcher._replace(start_time="1").is_alive()
    process.kill()
    while launcher.is_alive():  # before the parent knows of its death
        time.sleep(0.01)
    process.wait()
    assert not launcher.is_alive()


def test_an_orphan_misses_the_launcher_that_its_environment_names(monkeypatch: pytest.MonkeyPatch) -> None:
    signs = {"TORCHELASTIC_RUN_ID": "none"}
    assert find_launchers(signs) == [], "another process started this one"
    monkeypatch.setattr(os, "getppid", lambda: 1)
    assert find_launchers({}) == []
    (gone,) = find_launchers(signs)
    assert gone.name == "torchrun" and not gone.is_alive()


@pytest.mark.parametrize(
    "error, lost",
    [
        (dist.DistNetworkError("socket"), True),
        (RuntimeError("[/gloo/transport/tcp/pair.cc:553] Connection closed by peer [::1]"), True),
        (RuntimeError("Connection reset by peer"), True),
        (ValueError("Connection reset by peer"), False),
        (RuntimeError("CUDA out of memory"), False),
        (MemoryError(), False),
    ],
)
def test_which_errors_are_of_lost_peers(error: Exception, lost: bool) -> None:
    assert lost_peers(error) is lost


@pytest.fixture
def supervision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Supervision]:
    monkeypatch.setenv("RANK", "0")
    with Supervision(60) as entered:
        entered.record_failures_in(tmp_path)
        yield entered


def raised(error: BaseException) -> BaseException:
    try:
        raise error
    except BaseException as caught:
        return caught


def test_a_failure_is_recorded_where_it_happened(
    supervision: Supervision, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    supervision.enter("forward", 3)
    supervision.enter(LEAVING)  # said first by a rank that has to clean up
    assert supervision.failed(raised(ValueError("why"))) == FAILURE
    said = read(tmp_path)
    assert f"{supervision.host} failed first, at step 3 in forward: ValueError: why\nTraceback" in said
    assert capsys.readouterr().err == f"lowrank_dist: {said}\n"


def test_a_mistake_is_one_message(supervision: Supervision, capsys: pytest.CaptureFixture[str]) -> None:
    assert supervision.failed(raised(UserError("this file"))) == USER_ERROR
    assert capsys.readouterr().err == "lowrank_dist: this file\n"


def test_a_rank_that_only_lost_its_peers_repeats_the_cause(
    supervision: Supervision, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record(tmp_path, CAUSE)
    assert supervision.failed(raised(OtherRankError("another rank could not save"))) == USER_ERROR
    assert read(tmp_path) == str(CAUSE) and capsys.readouterr().err == f"lowrank_dist: {CAUSE}\n"


def test_a_rank_left_behind_records_the_cause_that_it_is_told(
    supervision: Supervision, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The rank that failed first had no space to write FAILED; FAILED does not name this rank."""
    told = f"{CAUSE}\n(and {tmp_path / 'FAILED'} could not be written: [Errno 28] No space left on device)"
    monkeypatch.setattr(supervision, "_ask_peers", lambda *_: Answer(should_print=True, cause=told))
    assert supervision.failed(raised(RuntimeError("gloo/pair.cc: Connection closed by peer"))) == FAILURE
    assert read(tmp_path) == told and explains(told) and capsys.readouterr().err == f"lowrank_dist: {told}\n"
    # Control: where nobody knows the cause, the missing ranks are named.
    (tmp_path / "FAILED").unlink()
    monkeypatch.setattr(supervision, "_ask_peers", lambda *_: Answer(should_print=True, silent=[3]))
    supervision.failed(raised(RuntimeError("gloo/pair.cc: Connection closed by peer")))
    said = read(tmp_path)
    assert said and " lost the other ranks " in said and ", no answer from rank 3: " in said


def test_ctrl_c_is_no_failure(supervision: Supervision, tmp_path: Path) -> None:
    assert supervision.failed(KeyboardInterrupt()) == INTERRUPTED and read(tmp_path) is None


def test_what_cannot_be_asked_does_not_hide_the_failure(
    supervision: Supervision, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """When memory is exhausted, no thread can ask the others, and perhaps there is no store."""
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 1 // 0)
    with caplog.at_level(logging.ERROR):
        assert supervision.failed(raised(MemoryError())) == FAILURE
    assert "MemoryError" in read(tmp_path) and "could not be asked" in caplog.text


def test_signals_are_noted_and_the_watchdog_ends_with_the_rank(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with Supervision(60) as entered:
        assert not entered.stop.told
        for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGTERM):
            os.kill(os.getpid(), number)
        assert entered.stop.told and entered.stop.by == "SIGUSR1"
        guard = entered._watchdog
        assert guard.poll() is None
    assert guard.poll() is not None and signal.getsignal(signal.SIGTERM) is before
