"""tests/gpu/stages.py: a stage that fails, hangs or cannot start stops no other, and the time is kept to."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.gpu import stages
from tests.gpu.stages import Outcome, Runner, Stage

MakeRunner = Callable[..., Runner]


@pytest.fixture
def make_runner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MakeRunner:
    """A runner whose grace is a fraction of a second."""
    monkeypatch.setattr(stages, "GRACE", 0.4)

    def make(seconds: float = 30.0, usual: float = 30.0) -> Runner:
        return Runner("rehearsal", "gpu-test", tmp_path / "out", tmp_path / "logs", seconds, usual)

    return make


def stage(code: str, seconds: float = 20.0, name: str = "a stage", if_time: bool = False) -> Stage:
    return Stage(name, seconds, [sys.executable, "-c", code], if_time)


def results(run: Runner) -> dict[str, str]:
    return {outcome.stage.name: outcome.result for outcome in run.outcomes}


def test_a_stage_that_fails_hangs_or_cannot_start_stops_no_other(make_runner: MakeRunner) -> None:
    run = make_runner()
    run.run(stage("print('fine')", name="first"))
    run.run(stage("raise SystemExit(3)", name="fails"))
    run.run(stage("import time; print('here', flush=True); time.sleep(60)", 1.5, "hangs"))
    run.run(stage("import os; os.kill(os.getpid(), 11)", name="crashes"))
    run.run(Stage("cannot start", 5.0, ["/no/such/program"]))
    run.run(stage("print('1 passed in 0.1s')", name="last"))
    assert results(run) == {
        "first": "ok",
        "fails": "FAILED: code 3",
        "hangs": "FAILED: ran past 2 s",
        "crashes": "FAILED: code -11",
        "cannot start": "FAILED: code 127",
        "last": "ok",
    }
    assert run.close() == 1
    table, log = (run.out / f"gpu-test.{ending}" for ending in ("txt", "log"))
    lines = table.read_text().splitlines()[3:]
    assert [line.split("  ")[0] for line in lines] == list(results(run))
    assert lines[0].endswith("fine") and lines[-1].endswith("1 passed")
    assert "here" in log.read_text() and "No such file" in log.read_text()


def test_only_a_run_without_failure_ends_with_zero(make_runner: MakeRunner) -> None:
    run = make_runner()
    assert run.close() == 1, "nothing ran"
    assert run.run(stage("")) and run.close() == 0
    assert not run.run(stage("raise SystemExit(1)")) and run.close() == 1


def test_the_table_stands_after_every_stage(make_runner: MakeRunner) -> None:
    """What ends the whole command from outside loses nothing of what had ended."""
    run, tables = make_runner(), []
    for name in ("one", "two"):
        run.run(stage("", name=name))
        tables.append((run.out / "gpu-test.txt").read_text())
    assert "one" in tables[0] and "two" not in tables[0] and "two" in tables[1]


def test_a_hanging_stage_that_ignores_the_interrupt_is_killed_with_its_children(make_runner: MakeRunner) -> None:
    run = make_runner()
    code = (
        "import signal, subprocess, sys, time; signal.signal(signal.SIGINT, signal.SIG_IGN);"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']);"
        "print(child.pid, flush=True); time.sleep(60)"
    )
    began = time.monotonic()
    run.run(stage(code, 2.0, "deaf"))
    assert 1.5 < time.monotonic() - began < 4
    child = run.outcomes[0].says
    state = subprocess.run(["ps", "-o", "stat=", "-p", child], capture_output=True, text=True).stdout.strip()
    assert state in ("", "Z", "Zs"), f"the child {child} lives on as {state}"


def test_an_interrupted_stage_still_says_what_it_found(make_runner: MakeRunner) -> None:
    run = make_runner()
    code = "import time\ntry:\n    time.sleep(60)\nexcept KeyboardInterrupt:\n    print('2 failed, 3 passed in 1s')"
    run.run(stage(code, 1.5))
    assert run.outcomes[0].says == "2 failed, 3 passed" and run.outcomes[0].failed


def test_the_budget_bounds_all_stages_together(make_runner: MakeRunner) -> None:
    """Three that would each sleep a minute, in a budget of three seconds; the last has no time to begin."""
    run = make_runner(seconds=3.0)
    for name in ("one", "two", "three"):
        run.run(stage("import time; time.sleep(60)", 2.0, name))
    assert run.elapsed < 3.6
    late = {"one": "FAILED: ran past 2 s", "two": "FAILED: ran past 1 s"}
    assert results(run) == {**late, "three": "not run: no time left"}
    assert run.close() == 1


@pytest.mark.parametrize("if_time", [True, False])
def test_not_run_is_a_failure_unless_it_was_for_spare_time(make_runner: MakeRunner, if_time: bool) -> None:
    run = make_runner(seconds=0.5)
    assert not run.run(stage("", 20.0, "late", if_time))
    assert results(run) == {"late": "not run: no time left"} and run.close() == (not if_time)


def test_a_larger_budget_stretches_the_stages_own_limits(make_runner: MakeRunner) -> None:
    nap = "import time; time.sleep(1.2)"
    assert not make_runner(seconds=30.0, usual=30.0).run(stage(nap, 1.0))
    assert make_runner(seconds=90.0, usual=30.0).run(stage(nap, 1.0))


def test_stages_run_beside_each_other(make_runner: MakeRunner) -> None:
    run = make_runner()
    building = run.start(stage("import time; time.sleep(1.0); print('built')", name="build"))
    assert run.run(stage("print('meanwhile')", name="beside"))
    assert list(results(run)) == ["beside"] and run.finish(building) and run.outcomes[1].says == "built"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("F.\n=== 1 failed, 12 passed, 2 warnings in 3.21s ===\n", "1 failed, 12 passed, 2 warnings"),
        ("12 passed in 3.21s (0:00:03)\n", "12 passed"),
        ("3 passed in 1s\nlater words of an interpreter that ends\n", "3 passed"),
        ("one\n\n two \n\n", "two"),
        ("", ""),
    ],
)
def test_last_words(text: str, expected: str) -> None:
    assert stages.last_words(text) == expected


def test_what_failed_is_told_from_what_had_no_time() -> None:
    spare, wanted = stage("", if_time=True), stage("")
    assert not Outcome(spare, 0.0, "not run: no time left").failed
    assert Outcome(wanted, 0.0, "not run: no time left").failed and Outcome(spare, 0.0, "FAILED: code 1").failed
