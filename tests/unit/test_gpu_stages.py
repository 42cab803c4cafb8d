"""tests/gpu/stages.py: a stage that fails, hangs or cannot start stops no other, and the time limit is kept."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.gpu import check, prepare, stages
from tests.gpu.stages import Outcome, Runner, Stage, select

# These tests wait for time limits.
pytestmark = pytest.mark.slow

MakeRunner = Callable[..., Runner]
HANG = "sleep 60"
# Seconds that a stage gets to set its trap before the interrupt comes.
HEARD = 3.0


@pytest.fixture
def make_runner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MakeRunner:
    """Return a maker of runners whose grace period is a fraction of a second."""
    monkeypatch.setattr(stages, "GRACE", 0.4)

    def make(seconds: float = 30.0, usual: float = 30.0) -> Runner:
        return Runner("rehearsal", "gpu-test", tmp_path / "out", tmp_path / "logs", seconds, usual)

    return make


def stage(script: str, seconds: float = 20.0, name: str = "a stage", if_time: bool = False) -> Stage:
    return Stage(name, seconds, ["sh", "-c", script], if_time)


def results(run: Runner) -> dict[str, str]:
    return {outcome.stage.name: outcome.result for outcome in run.outcomes}


def test_a_stage_that_fails_hangs_or_cannot_start_stops_no_other(make_runner: MakeRunner) -> None:
    run = make_runner()
    run.run(stage("echo fine", name="first"))
    run.run(stage("exit 3", name="fails"))
    run.run(stage(f"echo here; {HANG}", 1.0, "hangs"))
    run.run(stage("kill -SEGV $$", name="crashes"))
    run.run(Stage("cannot start", 5.0, ["/no/such/program"]))
    run.run(stage("echo '1 passed in 0.1s'", name="last"))
    assert results(run) == {
        "first": "ok",
        "fails": "FAILED: code 3",
        "hangs": "FAILED: ran past 1 s",
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
    assert not run.run(stage("exit 1")) and run.close() == 1


def test_the_table_stands_after_every_stage(make_runner: MakeRunner) -> None:
    """If the whole command is ended from outside, the results of finished stages are kept."""
    run, tables = make_runner(), []
    for name in ("one", "two"):
        run.run(stage("", name=name))
        tables.append((run.out / "gpu-test.txt").read_text())
    assert "one" in tables[0] and "two" not in tables[0] and "two" in tables[1]


def test_a_hanging_stage_that_ignores_the_interrupt_is_killed_with_its_children(make_runner: MakeRunner) -> None:
    run = make_runner()
    began = time.monotonic()
    run.run(stage(f"trap '' INT; {HANG} & echo $!; wait", HEARD, "deaf"))
    assert HEARD - 0.1 < time.monotonic() - began < HEARD + 3
    child = Path("/proc", run.outcomes[0].says, "stat")
    assert run.outcomes[0].says.isdigit()
    until = time.monotonic() + 5
    while is_running(child) and time.monotonic() < until:
        time.sleep(0.01)
    assert not is_running(child)


def is_running(stat: Path) -> bool:
    """Return whether the process runs; a zombie does not count."""
    try:
        return stat.read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_an_interrupted_stage_still_says_what_it_found(
    make_runner: MakeRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_runner()
    monkeypatch.setattr(stages, "GRACE", 10.0)  # long enough for the trap's output, on a busy machine too
    run.run(stage(f"trap 'echo 2 failed, 3 passed in 1s; exit 2' INT; {HANG} & wait", 10.0 + HEARD))
    assert run.outcomes[0].says == "2 failed, 3 passed" and run.outcomes[0].result == "FAILED: ran past 13 s"


def test_a_stage_that_ends_well_while_it_is_interrupted_has_not_failed(
    make_runner: MakeRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_runner()
    monkeypatch.setattr(stages, "GRACE", 10.0)
    assert run.run(stage(f"trap '' INT; sleep {HEARD + 0.5}; echo 3 passed in 1s", 10.0 + HEARD))
    assert HEARD < run.outcomes[0].seconds, "it was interrupted"
    assert results(run) == {"a stage": "ok"} and run.outcomes[0].says == "3 passed"


def test_the_budget_bounds_all_stages_together(make_runner: MakeRunner) -> None:
    """Three stages of a minute each in a budget of three seconds; the last has no time to start."""
    run = make_runner(seconds=3.0)
    for name in ("one", "two", "three"):
        run.run(stage(HANG, 2.0, name))
    assert run.elapsed < 4.5
    late = {"one": "FAILED: ran past 2 s", "two": "FAILED: ran past 1 s"}
    assert results(run) == {**late, "three": "not run: no time left"}
    assert run.close() == 1


@pytest.mark.parametrize("if_time", [True, False])
def test_not_run_is_a_failure_unless_it_was_for_spare_time(make_runner: MakeRunner, if_time: bool) -> None:
    run = make_runner(seconds=0.5)
    assert not run.run(stage("", 20.0, "late", if_time))
    assert results(run) == {"late": "not run: no time left"} and run.close() == (not if_time)


def test_a_larger_budget_stretches_the_stages_own_limits(make_runner: MakeRunner) -> None:
    assert not make_runner(seconds=30.0, usual=30.0).run(stage("sleep 1.2", 1.0))
    assert make_runner(seconds=90.0, usual=30.0).run(stage("sleep 1.2", 1.0))


def test_stages_run_beside_each_other(make_runner: MakeRunner) -> None:
    run = make_runner()
    building = run.start(stage("sleep 0.5; echo built", name="build"))
    assert run.run(stage("sleep 1.5; echo meanwhile", name="beside"))
    assert list(results(run)) == ["beside"] and run.finish(building) and run.outcomes[1].says == "built"
    assert run.outcomes[1].seconds < 1.2, "its seconds are its own"


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


# A child with its own session, like torchrun's ranks, whose parent ends or stays. It prints its process id at once.
LEFT_BEHIND = "setsid sh -c 'echo $$; exec sleep 60' & sleep 0.3"


def assert_dead(pid: str) -> None:
    until = time.monotonic() + 20
    while is_running(Path("/proc", pid, "stat")) and time.monotonic() < until:
        time.sleep(0.01)
    assert pid.isdigit() and not is_running(Path("/proc", pid, "stat"))


def test_nothing_of_a_stage_outlives_it_whatever_its_session(make_runner: MakeRunner) -> None:
    run = make_runner()
    beside = run.start(stage("sleep 2.5; echo built", name="beside"))
    run.run(stage(LEFT_BEHIND, name="ends"))
    run.run(stage(f"{LEFT_BEHIND}; {HANG}", 1.5, name="hangs"))
    assert results(run) == {"ends": "ok", "hangs": "FAILED: ran past 2 s"}
    for outcome in run.outcomes:
        assert_dead(outcome.says)
    assert run.finish(beside), "a stage that runs beside is another's"


RUN = """
import sys
from pathlib import Path
from tests.gpu.stages import Runner, Stage
out = Path(sys.argv[1])
with Runner("rehearsal", "gpu-test", out, out / "logs", 100.0, 100.0) as run:
    run.run(Stage("done", 20.0, ["true"]))
    run.run(Stage("cut off", 80.0, ["sh", "-c", sys.argv[2]]))
    run.run(Stage("not begun", 20.0, ["true"]))
sys.exit(run.close())
"""


def started(out: Path, script: str) -> tuple[subprocess.Popen[str], str]:
    """Start a process with a runner; return it and the id of the process that its stage left in the background."""
    process = subprocess.Popen([sys.executable, "-c", RUN, str(out), script], stdout=subprocess.PIPE, text=True)
    log = out / "logs" / "cut-off.log"
    until = time.monotonic() + 60
    while not (log.exists() and log.read_text().endswith("\n")):
        assert time.monotonic() < until and process.poll() is None
        time.sleep(0.01)
    return process, log.read_text().strip()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_stage_and_is_in_the_table(tmp_path: Path, number: signal.Signals) -> None:
    process, child = started(tmp_path, f"{LEFT_BEHIND}; {HANG}")
    process.send_signal(number)
    process.send_signal(signal.SIGTERM)  # both signals, as make and timeout send them
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert_dead(child)
    table = (tmp_path / "gpu-test.txt").read_text()
    assert f"FAILED: stopped by {number.name}" in table and "done" in table and "not begun" not in table
    assert table in said and child in (tmp_path / "gpu-test.log").read_text()


def test_a_stage_ends_with_a_runner_that_is_killed(tmp_path: Path) -> None:
    process, leader = started(tmp_path, "echo $$; exec sleep 60")
    process.kill()
    process.communicate(timeout=60)
    assert_dead(leader)


def test_what_a_run_before_left_is_gone(make_runner: MakeRunner) -> None:
    run = make_runner()
    run.run(stage("", name="before"))
    ours, other = run.out / "ours.json", run.out / "other.json"
    for path in (ours, other):
        path.write_text('{"complete": true}')
    again = make_runner()
    assert "before" not in (again.out / "gpu-test.txt").read_text()
    again.forget([Stage("ours", 5.0, ["true"], writes="ours.json")])
    assert not ours.exists() and other.exists()


@pytest.mark.parametrize(
    ("script", "result"),
    [
        ("true", "FAILED: of.json was not written"),
        ("echo '{\"complete\": false}' >of.json", "FAILED: of.json is not complete"),
        ("echo '{\"complete\": true}' >of.json", "ok"),
    ],
)
def test_a_benchmark_without_its_whole_result_has_failed(make_runner: MakeRunner, script: str, result: str) -> None:
    run = make_runner()
    run.run(Stage("bench", 20.0, ["sh", "-c", f"cd {run.out}; {script}"], writes="of.json"))
    assert results(run) == {"bench": result}


@pytest.mark.parametrize(
    ("said", "result"),
    [("3 skipped in 1s", "FAILED: no test passed"), ("done", "FAILED: no test passed"), ("2 passed in 1s", "ok")],
)
def test_tests_of_which_none_passed_prove_nothing(make_runner: MakeRunner, said: str, result: str) -> None:
    run = make_runner()
    run.run(Stage("tests", 20.0, ["echo", said], tests=True))
    assert results(run) == {"tests": result}


def test_results_that_cannot_be_written_end_no_stage(
    make_runner: MakeRunner, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_runner()
    run.out.rename(tmp_path / "gone")
    assert run.run(stage("echo fine")) and run.close() == 0
    assert "not written: " in capsys.readouterr().out


def test_a_process_that_does_not_die_ends_no_run(make_runner: MakeRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    """Like a process that waits for a GPU's driver."""
    run = make_runner()
    kept: list[stages.Running] = []
    monkeypatch.setattr(stages, "_kill", kept.append)
    run.run(stage(f"trap '' INT; {HANG} & wait", HEARD))
    assert results(run) == {"a stage": "FAILED: ran past 3 s, cannot be killed"}
    monkeypatch.undo()
    stages._kill(kept[0])


@pytest.mark.parametrize(
    ("code", "expected"),
    [("print('a warning'); print(2)", True), ("print(1)", False), ("print('no')", False), ("raise OSError", False)],
)
def test_the_number_of_gpus_is_asked_for_without_risk(
    monkeypatch: pytest.MonkeyPatch, code: str, expected: bool
) -> None:
    monkeypatch.setattr(check, "DEVICE", "cuda")
    monkeypatch.setattr(check, "python", lambda *_: [sys.executable, "-c", code])
    assert check.several_gpus() == expected


def test_a_stage_whose_time_never_comes_is_not_in_the_table(make_runner: MakeRunner) -> None:
    run = make_runner()
    assert not run.run(Stage("several GPUs", 5.0, ["true"], when=lambda: False)) and run.outcomes == []


def test_stages_are_chosen_by_name() -> None:
    every = [stage("", name=name) for name in ("environment", "accuracy", "twins")]
    assert [one.name for one in select(every, {"twins", "environment"})] == ["environment", "twins"]
    assert select(every, ()) == every
    with pytest.raises(SystemExit, match=r"no stage is called acuracy; there are\n  environment\n  accuracy"):
        select(every, {"acuracy"})
    assert not [one.name for one in check.stages() if "," in one.name], "names are separated by commas"


@pytest.mark.parametrize(
    ("only", "built", "ran"),
    [
        ("", True, ["build", "early", "late"]),
        ("late", True, ["build", "late"]),
        ("early", False, ["early"]),
        (" early , late", True, ["build", "early", "late"]),
    ],
)
def test_a_part_of_the_stages_builds_what_it_needs(
    make_runner: MakeRunner, monkeypatch: pytest.MonkeyPatch, only: str, built: bool, ran: list[str]
) -> None:
    run = make_runner()
    monkeypatch.setenv("GPU_CHECK_ONLY", only)
    monkeypatch.setattr(prepare, "install_wheels", lambda _: None)
    monkeypatch.setattr(
        prepare, "build", lambda run, beside: [run.run(one) for one in [stage("", name="build"), *beside]][0]
    )
    assert prepare.execute(run, [stage("", name="early")], [stage("", name="late")], without_operators=False) == 0
    assert list(results(run)) == ran and ("build" in ran) == built
