"""The reports of a run whose disk is full: each sink says so once, and nothing else happens."""

from __future__ import annotations

import errno
import json
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

# Loaded here so that the zygote's children need not load it when they open the sinks.
import pytest
import torch.utils.tensorboard  # noqa: F401

from lowrank_dist.engine.reporter import Reporter, Sink, keep_records, open_reporter
from lowrank_dist.engine.run_folder import RankLog, RunFolder
from lowrank_dist.errors import UserError
from tests.faults import Action, Zygote

STEPS = 3
SINKS = ("metrics.jsonl", "tensorboard", "loss.png")


def report(root: Path) -> list[str]:
    """Report a few steps with their events; return all messages that were shown to the user."""
    logging.getLogger().addHandler(logging.NullHandler())  # like the beginning of launch/train.py
    output = SimpleNamespace(tensorboard=True, plot=True)
    run: Any = SimpleNamespace(writes=True, config=SimpleNamespace(output=output), folder=RunFolder(root), state=None)
    reporter, told = open_reporter(run, STEPS), Watcher()
    reporter.add("the test", lambda: told)
    for step in range(1, STEPS + 1):
        values = {"loss": 1 / step, "learning_rate": 0.1, "grad_norm": 1.0, "tokens_per_second": 9.0, "memory_gib": 1.0}
        reporter.record(step, values)
        reporter.say(f"step {step}")
    reporter.close()
    return told.lines


class Watcher(Sink):
    """Records the messages."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, message: str) -> None:
        self.lines.append(message)


def recorded(root: Path) -> list[int]:
    """Return the steps in metrics.jsonl, whose last line may be incomplete."""
    lines = (root / "metrics.jsonl").read_text().split("\n")
    return [json.loads(line)["step"] for line in lines[:-1]]


@pytest.fixture(scope="module")
def zygote() -> Iterator[Zygote]:
    with Zygote(f"{__name__}:report") as started:
        yield started


@pytest.mark.slow
@pytest.mark.parametrize("action", [Action.NO_SPACE, Action.NO_SPACE_ONCE])
def test_a_full_disk_ends_no_report(
    zygote: Zygote, tmp_path: Path, action: Action, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "plain").mkdir()
    plain = zygote.run(tmp_path / "plain")
    assert plain.error is None and plain.value == [f"step {step}" for step in range(1, STEPS + 1)], plain.traceback
    assert recorded(tmp_path / "plain") == [*range(1, STEPS + 1)] and plain.count > 10
    capfd.readouterr()
    failed = set()
    for nth in range(action.value % 3 + 1, plain.count + 1, 3):  # every third: each takes a second
        root = tmp_path / f"{action.name}-{nth}"
        root.mkdir()
        outcome = zygote.run(root, nth=nth, action=action)
        where = f"{action.name} at {nth} of {plain.count}: {plain.trace[nth - 1]}"
        assert outcome.error is None and not outcome.killed, f"{where}: {outcome.error} {outcome.traceback}"
        news = [line for line in outcome.value if not line.startswith("step ")]
        assert [line for line in outcome.value if line not in news] == plain.value, where
        assert all("could not be written: " in line and "The run continues" in line for line in news), news
        names = [line.partition(" ")[0] for line in news]
        assert len(names) == len(set(names)) and set(names) <= set(SINKS), f"{where}: {news}"
        failed |= set(names)
        steps = recorded(root) if (root / "metrics.jsonl").exists() else []
        # With free space again no step is missing.
        expected = len(steps) if action is Action.NO_SPACE or steps == [] else STEPS
        assert steps == [*range(1, expected + 1)], f"{where}: {steps}"
    assert failed == set(SINKS) if action is Action.NO_SPACE else failed
    assert "Traceback" not in capfd.readouterr().err


def test_it_can_fail() -> None:
    """Control: an error that is not a sink's disk error passes through, and a working sink gets everything."""

    class Broken(Sink):
        def record(self, record: Any) -> None:
            raise KeyboardInterrupt

    reporter, told = Reporter(0.0), Watcher()
    reporter.add("told", lambda: told)
    reporter.add("broken", Broken)
    with pytest.raises(KeyboardInterrupt):
        reporter.record(1, {})
    reporter.add("never", lambda: open_nothing())
    reporter.say("on")
    assert told.lines == ["never could not be written: no room. The run continues", "on"]


def open_nothing() -> Sink:
    raise OSError("no room")


def test_records_that_cannot_be_cut_back_are_a_mistake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the start a user is present, and the checkpoint is unchanged."""
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "time": 1}\n{"step": 2, "time": 2}\n')

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_text", full)
        with pytest.raises(UserError, match=r"metrics.jsonl: No space left on device; is the disk full\?"):
            keep_records(path, 1)
    assert len(path.read_text().splitlines()) == 2
    assert [record["step"] for record in keep_records(path, 1)] == [1]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has a full device")
def test_a_log_that_fails_is_said_once(capsys: pytest.CaptureFixture[str]) -> None:
    log = RankLog("/dev/full")
    for _ in range(3):
        log.handle(logging.LogRecord("x", logging.INFO, "x", 1, "a line", (), None))
    said = capsys.readouterr().err
    assert (
        said == "lowrank_dist: /dev/full could not be written: [Errno 28] No space left on device. The run continues\n"
    )
    # Control: a mistake in a log call is shown as usual.
    log.handle(logging.LogRecord("x", logging.INFO, "x", 1, "%d", ("a",), None))
    assert "TypeError" in capsys.readouterr().err
    assert log.stream is not None
    log.stream = sys.stderr
