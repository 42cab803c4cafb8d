"""Runs the stages of `make gpu-check` and `make gpu-bench`, each bounded in time and all of them within one budget.

The output of a stage is kept as soon as it ends. A stage that fails, hangs or cannot start does not stop the next. The
results folder gets two files: NAME.txt, the table, rewritten after every stage, and NAME.log, to which every stage's
output is added. A signal that ends the runner ends its stages, and the table says so. Needs no torch.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import re
import signal
import subprocess
import time
import uuid
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType, TracebackType

# Once its time is over, a stage has this long to print what it found; then it is killed.
GRACE = 5.0
# The bytes of a stage's output that the log keeps, and the lines and columns printed where it failed.
KEPT_BYTES, SHOWN_LINES, SHOWN_COLUMNS = 2**20, 40, 300
# A killed process is gone after this time, unless a driver holds it.
DYING = 5.0
_MARK = "GPU_CHECK_STAGE"
_ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None)
_PYTEST = re.compile(r"((?:\d+ (?:passed|failed|errors?|skipped|deselected|xfailed|warnings?)(?:, )?)+)(?: in .*)?$")


@dataclass(frozen=True)
class Stage:
    """One command. seconds: its limit, GRACE included. if_time: skipping it for lack of time is no failure.

    Needed beyond exit code 0: tests: at least one passes. writes: the name of a JSON in the runner's `out` that must
    be complete. when: called when its turn comes; where it returns False the stage does not exist.
    """

    name: str
    seconds: float
    command: Sequence[str]
    if_time: bool = False
    tests: bool = False
    writes: str = ""
    when: Callable[[], bool] | None = None


@dataclass(frozen=True)
class Outcome:
    """How a stage ended. result: "ok", "FAILED: …" or "not run: …"; says: the last line of its output."""

    stage: Stage
    seconds: float
    result: str
    says: str = ""

    @property
    def failed(self) -> bool:
        return self.result.startswith("FAILED") or (self.result.startswith("not run") and not self.stage.if_time)


@dataclass
class Running:
    """A started stage; `process` is None where the start failed. began: by the wall clock; until: monotonic.

    mark: in the environment of every process of the stage, whatever session or parent it has.
    """

    mark: str
    stage: Stage
    process: subprocess.Popen[bytes] | None
    log: Path
    limit: float
    began: float
    until: float


class Stopped(BaseException):
    """A signal told the runner to end."""


@dataclass
class Runner:
    """Runs stages. title: of the table. name: of the two files in `out`. logs: folder for each stage's whole output.

    As a context it handles signals: they end the stages and the context, and `close` returns 1.

    seconds: the budget of all stages, counted from when the runner is made. usual: the budget that the stages' own
    limits are made for; a larger budget stretches them.
    """

    title: str
    name: str
    out: Path
    logs: Path
    seconds: float
    usual: float
    environment: Mapping[str, str] = field(default_factory=lambda: dict(os.environ))
    outcomes: list[Outcome] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._began = time.monotonic()
        for folder in (self.out, self.logs):
            folder.mkdir(parents=True, exist_ok=True)
        self.log = self.out / f"{self.name}.log"
        self.log.write_text("", encoding="utf-8")
        self._running: list[Running] = []
        self._stopped = ""
        self._write_table()  # replaces the table of an earlier run

    def __enter__(self) -> Runner:
        self._handlers = {number: signal.signal(number, self._stop) for number in _ENDING}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, traceback: TracebackType | None) -> bool:
        for number in _ENDING:
            signal.signal(number, signal.SIG_IGN)
        for running in list(self._running):
            _kill(running)
            if not any(outcome.stage is running.stage for outcome in self.outcomes):
                self._ended(running, f"FAILED: stopped by {self._stopped or 'an error of the runner'}")
        self._write_table()
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        return kind is Stopped

    def _stop(self, number: int, frame: FrameType | None) -> None:
        for each in _ENDING:  # make and timeout may each send one
            signal.signal(each, signal.SIG_IGN)
        self._stopped = signal.Signals(number).name
        raise Stopped

    def forget(self, stages: Iterable[Stage]) -> None:
        """Remove the files that these stages wrote in an earlier run, so that they do not pass as this run's."""
        for stage in stages:
            if stage.writes:
                (self.out / stage.writes).unlink(missing_ok=True)

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self._began

    def run(self, stage: Stage) -> bool:
        """Run a stage to its end; return whether it succeeded."""
        return self.finish(self.start(stage))

    def start(self, stage: Stage) -> Running | None:
        """Start a stage, to be passed to `finish`; None where too little time is left or the stage does not exist."""
        if stage.when is not None and not stage.when():
            return None
        limit = min(stage.seconds * max(1.0, self.seconds / self.usual), self.seconds - self.elapsed)
        if limit <= 2 * GRACE and limit < stage.seconds:
            self._keep(Outcome(stage, 0.0, "not run: no time left"))
            return None
        print(f"== {stage.name} (at most {limit:.0f} s)", flush=True)
        log = self.logs / f"{re.sub(r'[^a-zA-Z0-9]+', '-', stage.name)}.log"
        began, until, mark = time.time(), time.monotonic() + limit, uuid.uuid4().hex
        with log.open("wb") as stream:
            try:
                # A session of its own, so that all processes that the stage leaves behind can be killed with it.
                process = subprocess.Popen(
                    list(stage.command),
                    stdin=subprocess.DEVNULL,
                    stdout=stream,
                    stderr=subprocess.STDOUT,
                    env={**self.environment, _MARK: mark},
                    start_new_session=True,
                    preexec_fn=_end_with_the_runner,
                )
            except OSError as error:
                stream.write(f"{error}\n".encode())
                process = None
        running = Running(mark, stage, process, log, limit, began, until)
        self._running.append(running)
        return running

    def finish(self, running: Running | None) -> bool:
        """Wait for a started stage, end it when its time is over, and keep its outcome; return whether it succeeded."""
        if running is None:
            return False
        # A stage beside others may have ended earlier. Its last output is the best estimate of when.
        over = running.process is None or running.process.poll() is not None
        ended = running.log.stat().st_mtime if over else None
        code, late = _wait(running)
        result = "ok" if code == 0 else f"FAILED: code {code}"
        if late and code != 0:  # a stage that ended well although late has not failed
            result = f"FAILED: ran past {running.limit:.0f} s" + (", cannot be killed" if code is None else "")
        return self._ended(running, result, ended)

    def _ended(self, running: Running, result: str, ended: float | None = None) -> bool:
        """Keep the outcome of a stage that has ended; return whether it succeeded. ended: the time, if not now."""
        text = running.log.read_bytes()[-KEPT_BYTES:].decode("utf-8", errors="replace")
        seconds = max(0.0, (ended or time.time()) - running.began)
        says = last_words(text)
        if result == "ok":
            result = self._unproven(running.stage, says) or result
        outcome = Outcome(running.stage, seconds, result, says)
        if outcome.failed:
            for line in text.splitlines()[-SHOWN_LINES:]:
                print(line[:SHOWN_COLUMNS])
        self._keep(outcome, text)
        self._running.remove(running)
        return not outcome.failed

    def _unproven(self, stage: Stage, says: str) -> str:
        """Return why exit code 0 is not enough; "" where it is."""
        if stage.tests and not re.search(r"\b[1-9]\d* passed", says):
            return "FAILED: no test passed"
        if stage.writes:
            try:
                found = json.loads((self.out / stage.writes).read_text(encoding="utf-8"))
            except (OSError, ValueError):
                return f"FAILED: {stage.writes} was not written"
            if not found.get("complete"):
                return f"FAILED: {stage.writes} is not complete"
        return ""

    def _keep(self, outcome: Outcome, text: str = "") -> None:
        print(f"-- {outcome.stage.name}: {outcome.result}, {outcome.seconds:.0f} s  {outcome.says}", flush=True)
        self.outcomes.append(outcome)
        with _reported(), self.log.open("a", encoding="utf-8") as log:
            log.write(f"\n===== {outcome.stage.name}: {outcome.result}, {outcome.seconds:.1f} s\n{text}")
        self._write_table()

    def _write_table(self) -> None:
        with _reported():
            (self.out / f"{self.name}.txt").write_text(self.table(), encoding="utf-8")

    def table(self) -> str:
        """Return the table of the stages so far: stage, seconds, result, last line of output."""
        rows = [("stage", "seconds", "result", "says")]
        rows += [(o.stage.name, f"{o.seconds:.1f}", o.result, o.says) for o in self.outcomes]
        names, _, results = (max(len(row[column]) for row in rows) for column in range(3))
        lines = [f"{name:<{names}}  {took:>7}  {result:<{results}}  {says}" for name, took, result, says in rows]
        head = f"{self.title}: {self.elapsed:.0f} of {self.seconds:.0f} s"
        head += f", stopped by {self._stopped}" if self._stopped else ""
        return "\n".join([head, "", *(line.rstrip() for line in lines)]) + "\n"

    def close(self) -> int:
        """Print the table. Returns the exit code: 1 if anything failed, nothing ran, or a signal ended it."""
        print(f"\n{self.table()}", end="", flush=True)
        return int(bool(self._stopped) or not self.outcomes or any(outcome.failed for outcome in self.outcomes))


def select(stages: Collection[Stage], only: Collection[str]) -> list[Stage]:
    """Return the stages of these names, in their own order; all where none is named.

    Raises SystemExit for an unknown name.
    """
    unknown = set(only) - {stage.name for stage in stages}
    if unknown:
        known = "".join(f"\n  {stage.name}" for stage in stages)
        raise SystemExit(f"GPU_CHECK_ONLY: no stage is called {', '.join(sorted(unknown))}; there are{known}")
    return [stage for stage in stages if not only or stage.name in only]


@contextlib.contextmanager
def _reported() -> Iterator[None]:
    """Print an OSError instead of raising it: a full disk or a missing results folder must end no stage."""
    try:
        yield
    except OSError as error:
        print(f"not written: {error}", flush=True)


def _end_with_the_runner() -> None:
    """Let the kernel kill this process, a stage before its command, once the runner is dead, however it died."""
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    # A shell's background processes ignore SIGINT, which would then not reach the stage.
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _wait(running: Running) -> tuple[int | None, bool]:
    """Wait for a stage and kill what it leaves behind. Return its exit code, and whether its time ran out.

    The code is None where the process does not die.
    """
    process, late = running.process, False
    if process is None:
        return 127, False
    try:
        process.wait(max(0.0, running.until - GRACE - time.monotonic()))
    except subprocess.TimeoutExpired:
        late = True
        # SIGINT first: pytest then still reports its failures.
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(max(0.0, running.until - time.monotonic()))
    _kill(running)
    return process.poll(), late


def _kill(running: Running) -> None:
    """Kill all of a stage's processes, including a launcher's ranks, which have sessions of their own."""
    until = time.monotonic() + DYING
    while time.monotonic() < until:
        left = _marked(running.mark)
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if running.process is not None:
            running.process.poll()
        if not left:
            return
        time.sleep(0.02)


def _marked(mark: str) -> list[int]:
    """Return the processes that have the mark in their environment."""
    sign, found = f"{_MARK}={mark}".encode(), []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):  # another user's process, or one that has ended
            if sign in path.read_bytes():
                found.append(int(path.parent.name))
    return found


def last_words(text: str) -> str:
    """Return pytest's count of tests where there is one, else the last line that is not empty."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    counts = (match[1] for line in reversed(lines[-30:]) if (match := _PYTEST.match(line.strip("= "))))
    return next(counts, lines[-1] if lines else "")[:100]
