"""Runs the stages of `make gpu-check` and `make gpu-bench`, each bounded in time and all of them within one budget.

What a stage said is kept as soon as it ends, and one that fails, hangs or cannot start does not keep the next from
running. In the folder for results lie two files: NAME.txt, the table, written anew after every stage, and NAME.log,
which every stage's output is added to. No torch is needed here.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

# A stage has this long to say what it found once its time is over; then it is killed.
GRACE = 5.0
# Of a stage's output, what the log that is sent back keeps, and what is printed where it failed.
KEPT_BYTES, SHOWN_LINES, SHOWN_COLUMNS = 2**20, 40, 300
_PYTEST = re.compile(r"((?:\d+ (?:passed|failed|errors?|skipped|deselected|xfailed|warnings?)(?:, )?)+)(?: in .*)?$")


@dataclass(frozen=True)
class Stage:
    """One command. seconds: at most, GRACE included. if_time: that it is not begun for want of time is no failure."""

    name: str
    seconds: float
    command: Sequence[str]
    if_time: bool = False


@dataclass(frozen=True)
class Outcome:
    """How a stage ended. result: "ok", "FAILED: …" or "not run: …"; says: its own last words."""

    stage: Stage
    seconds: float
    result: str
    says: str = ""

    @property
    def failed(self) -> bool:
        return self.result.startswith("FAILED") or (self.result.startswith("not run") and not self.stage.if_time)


@dataclass
class Running:
    """A stage that was started; `process` is None where that failed. began: by the wall clock; until: monotonic."""

    stage: Stage
    process: subprocess.Popen[bytes] | None
    log: Path
    limit: float
    began: float
    until: float


@dataclass
class Runner:
    """title: what runs, for the table. name: of the two files in `out`. logs: a folder for each stage's whole output.

    seconds: the budget of all stages, counted from when the runner is made; `usual` is the one that the stages' own
    limits are meant for, and a larger budget stretches them.
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

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self._began

    def run(self, stage: Stage) -> bool:
        """Run a stage to its end; whether it succeeded."""
        return self.finish(self.start(stage))

    def start(self, stage: Stage) -> Running | None:
        """Start a stage, to be handed to `finish`; None where too little time is left."""
        limit = min(stage.seconds * max(1.0, self.seconds / self.usual), self.seconds - self.elapsed)
        if limit <= 2 * GRACE and limit < stage.seconds:
            self._keep(Outcome(stage, 0.0, "not run: no time left"))
            return None
        print(f"== {stage.name} (at most {limit:.0f} s)", flush=True)
        log = self.logs / f"{re.sub(r'[^a-zA-Z0-9]+', '-', stage.name)}.log"
        began, until = time.time(), time.monotonic() + limit
        with log.open("wb") as stream:
            try:
                # A session of its own, so that whatever the stage leaves behind can be ended with it.
                process = subprocess.Popen(
                    list(stage.command),
                    stdin=subprocess.DEVNULL,
                    stdout=stream,
                    stderr=subprocess.STDOUT,
                    env=dict(self.environment),
                    start_new_session=True,
                )
            except OSError as error:
                stream.write(f"{error}\n".encode())
                process = None
        return Running(stage, process, log, limit, began, until)

    def finish(self, running: Running | None) -> bool:
        """Wait for a started stage, end it where its time is over, and keep its outcome; whether it succeeded."""
        if running is None:
            return False
        # One that ran beside others may have ended before: with its last word, as far as can be told.
        over = running.process is None or running.process.poll() is not None
        ended = running.log.stat().st_mtime if over else None
        code, late = (127, False) if running.process is None else _wait(running.process, running.until)
        result = "ok" if code == 0 else f"FAILED: code {code}"
        if late and code:  # one that was at its end anyway, and says so, has not failed
            result = f"FAILED: ran past {running.limit:.0f} s"
        text = running.log.read_bytes()[-KEPT_BYTES:].decode("utf-8", errors="replace")
        seconds = max(0.0, (ended or time.time()) - running.began)
        outcome = Outcome(running.stage, seconds, result, last_words(text))
        if outcome.failed:
            for line in text.splitlines()[-SHOWN_LINES:]:
                print(line[:SHOWN_COLUMNS])
        self._keep(outcome, text)
        return not outcome.failed

    def _keep(self, outcome: Outcome, text: str = "") -> None:
        print(f"-- {outcome.stage.name}: {outcome.result}, {outcome.seconds:.0f} s  {outcome.says}", flush=True)
        self.outcomes.append(outcome)
        with self.log.open("a", encoding="utf-8") as log:
            log.write(f"\n===== {outcome.stage.name}: {outcome.result}, {outcome.seconds:.1f} s\n{text}")
        (self.out / f"{self.name}.txt").write_text(self.table(), encoding="utf-8")

    def table(self) -> str:
        """What has run so far: stage, seconds, result, and what it said last."""
        rows = [("stage", "seconds", "result", "says")]
        rows += [(o.stage.name, f"{o.seconds:.1f}", o.result, o.says) for o in self.outcomes]
        names, _, results = (max(len(row[column]) for row in rows) for column in range(3))
        lines = [f"{name:<{names}}  {took:>7}  {result:<{results}}  {says}" for name, took, result, says in rows]
        head = f"{self.title}: {self.elapsed:.0f} of {self.seconds:.0f} s"
        return "\n".join([head, "", *(line.rstrip() for line in lines)]) + "\n"

    def close(self) -> int:
        """Print the table. Returns the exit code: 1 if anything failed, or nothing ran."""
        print(f"\n{self.table()}", end="", flush=True)
        return int(not self.outcomes or any(outcome.failed for outcome in self.outcomes))


def _wait(process: subprocess.Popen[bytes], until: float) -> tuple[int, bool]:
    """The exit code of a stage, and whether its time ran out; nothing of its session is left behind."""
    late = False
    try:
        process.wait(max(0.0, until - GRACE - time.monotonic()))
    except subprocess.TimeoutExpired:
        late = True
        # An interrupt first: pytest then still says what has failed.
        process.send_signal(signal.SIGINT)
        try:
            process.wait(max(0.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            pass
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    return process.wait(), late


def last_words(text: str) -> str:
    """pytest's count of tests where there is one, else the last line that is not empty."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    counts = (match[1] for line in reversed(lines[-30:]) if (match := _PYTEST.match(line.strip("= "))))
    return next(counts, lines[-1] if lines else "")[:100]
