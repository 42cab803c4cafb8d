"""Reports of a run on rank 0, one sink each: metrics.jsonl, TensorBoard scalars, the console and loss.png.

The log is not a sink: every rank keeps its own, with the messages of all modules (`RunFolder.log`).
"""

from __future__ import annotations

import contextlib
import json
import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import progress

from lowrank_dist.engine.run import Run
from lowrank_dist.engine.run_folder import RunFolder
from lowrank_dist.errors import UserError
from lowrank_dist.formats.atomic import temporary_name
from lowrank_dist.formats.paths import open_without_links
from lowrank_dist.generate.metrics import METRICS
from lowrank_dist.terminal import open_console, say
from lowrank_dist.untrusted.files import LONGEST_RECORD, read_lines
from lowrank_dist.untrusted.json import parse_json

logger = logging.getLogger(__name__)

# Hugging Face's tags, so that one board can show our runs beside those of other trainers.
TAGS = {
    "loss": "train/loss",
    "eval_loss": "eval/loss",
    **{f"eval_{name}": f"eval/{name}" for name in (*METRICS, "met_length_limit", "mean_tokens")},
    "grad_norm": "train/grad_norm",
    "learning_rate": "train/learning_rate",
    "tokens_per_second": "throughput(tps)",
    "tokens_per_second_per_rank": "throughput_per_rank(tps)",
    "tflops_per_rank": "throughput(tflops)",
    "mfu_percent": "mfu(%)",
    "memory_gib": "memory/peak_gib",
}

# "step" (finished optimizer steps) and "time" (seconds of training so far) first, then the measured values.
Record = Mapping[str, Any]


class Sink:
    """One destination of reports. Subclasses override the methods they need. An error never ends a run (`Reporter`)."""

    def record(self, record: Record) -> None:
        """Keep or show the values measured at one step."""

    def say(self, message: str) -> None:
        """Show one line to the user."""

    def close(self) -> None:
        """Write what is left and close."""


class Reporter:
    """Passes every report on to its sinks. Every rank has a reporter; only rank 0's has sinks.

    A sink may fail, for example on a full disk. The failure is reported once and the run goes on; the sink is tried
    again with the next report.
    """

    def __init__(self, elapsed: float) -> None:
        """elapsed: seconds that the run had trained before the interruption."""
        self._sinks: dict[str, Sink] = {}
        self._failed: set[str] = set()
        self._start = time.monotonic() - elapsed

    def add(self, name: str, open_sink: Callable[[], Sink]) -> None:
        """Add a sink, unless it fails to open. name: its name in messages."""
        with self._going_on(name):
            self._sinks[name] = open_sink()

    def record(self, step: int, values: Mapping[str, float]) -> None:
        """Report the values measured at a step. step: number of finished optimizer steps."""
        record = {"step": step, "time": round(time.monotonic() - self._start, 3), **values}
        for name, sink in self._sinks.items():
            with self._going_on(name):
                sink.record(record)

    def say(self, message: str) -> None:
        """Report one line for the user."""
        for name, sink in self._sinks.items():
            with self._going_on(name):
                sink.say(message)

    def close(self) -> None:
        """Close the sinks in order. If one fails, the others are closed all the same."""
        for name, sink in self._sinks.items():
            with self._going_on(name):
                sink.close()

    @contextlib.contextmanager
    def _going_on(self, name: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # libraries raise different types for a full disk
            if name not in self._failed:
                self._failed.add(name)
                logger.warning("%s failed", name, exc_info=error)
                self.say(f"{name} could not be written: {error}. The run continues")


def open_reporter(run: Run, total_steps: int) -> Reporter:
    """Open the sinks that the configuration asks for; keep an interrupted run's records up to the resumed step.

    Raises UserError where the records that stay cannot be written.
    """
    if not run.writes:
        return Reporter(0.0)
    output, folder, done = run.config.output, run.folder, run.state.step if run.state else 0
    # Records beyond the resumed step are dropped: these steps will be trained and recorded again.
    kept = keep_records(folder.metrics, done)
    reporter = Reporter(kept[-1]["time"] if kept else 0.0)
    # The console is first, so that it can report failures of the others.
    reporter.add("the console", lambda: ConsoleProgress(total_steps, done))
    reporter.add(folder.metrics.name, lambda: MetricsFile(folder))
    if output.tensorboard:
        reporter.add(folder.tensorboard.name, lambda: TensorBoard(folder, done))
    if output.plot:
        reporter.add(folder.plot.name, lambda: LossPicture(folder, kept))
    return reporter


class MetricsFile(Sink):
    """metrics.jsonl: one JSON object per line, appended. Bytes that the disk refuses are kept for the next write."""

    def __init__(self, folder: RunFolder) -> None:
        self._path, self._unwritten = folder.metrics, b""
        open_without_links(self._path, "ab").close()

    def record(self, record: Record) -> None:
        self._unwritten += f"{json.dumps(record)}\n".encode()
        self.close()

    def close(self) -> None:
        # Unbuffered, so that the unwritten rest is known to the byte, even within a line.
        with open_without_links(self._path, "ab") as file:
            while self._unwritten:
                self._unwritten = self._unwritten[file.write(self._unwritten) :]


class TensorBoard(Sink):
    """TensorBoard's event files of the values in TAGS. After a failure they are not continued."""

    def __init__(self, folder: RunFolder, done: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._before = threading.excepthook
        self._board = SummaryWriter(str(folder.tensorboard), purge_step=done + 1 if done else None)
        threading.excepthook = self._in_thread

    def record(self, record: Record) -> None:
        for name in record.keys() & TAGS.keys():
            self._board.add_scalar(TAGS[name], record[name], record["step"])

    def close(self) -> None:
        try:
            self._board.close()
        finally:
            threading.excepthook = self._before

    def _in_thread(self, died: threading.ExceptHookArgs) -> None:
        """Suppress the traceback of TensorBoard's own thread; the next write raises the thread's error."""
        if not type(died.thread).__module__.startswith("tensorboard."):
            self._before(died)


class ConsoleProgress(Sink):
    """Lines on stdout; on a terminal a progress bar below them."""

    def __init__(self, total_steps: int, done: int) -> None:
        """done: the step that the run resumes from."""
        self._total, self._done, self._begun = total_steps, done, time.monotonic()
        self._bar: progress.Progress | None = None
        console = open_console(file=sys.stdout)
        if console.is_terminal:
            self._bar = progress.Progress(
                progress.TextColumn("{task.description}", style="bold", markup=False),
                progress.BarColumn(),
                progress.MofNCompleteColumn(),
                progress.TimeElapsedColumn(),
                progress.TimeRemainingColumn(),
                progress.TextColumn("{task.fields[status]}", markup=False),
                console=console,
            )
            self._task = self._bar.add_task("training", total=total_steps, completed=done, status="")
            self._bar.start()

    def record(self, record: Record) -> None:
        step = record["step"]
        if "eval_loss" in record:
            self.say(f"step {step}/{self._total}  eval loss {record['eval_loss']:.4f}{_generated(record)}")
        if "loss" not in record:
            return
        status = (
            f"loss {record['loss']:.4f}  lr {record['learning_rate']:.2e}  norm {record['grad_norm']:.3f}  "
            f"{record['tokens_per_second']:.0f} tokens/s  {record['memory_gib']:.2f} GiB"
        )
        if self._bar is not None:
            self._bar.update(self._task, completed=step, status=status)
        else:
            left = (time.monotonic() - self._begun) / (step - self._done) * (self._total - step)
            self.say(f"step {step}/{self._total}  {status}  {left:.0f} s left")

    def say(self, message: str) -> None:
        # The reader of stdout may have died with the launcher. The run must not fail before it has saved.
        with contextlib.suppress(OSError):
            if self._bar is None:
                say(message)
            else:
                self._bar.console.print(message)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()


class LossPicture(Sink):
    """loss.png: training and eval loss over steps, drawn at the end of the run."""

    def __init__(self, folder: RunFolder, kept: Sequence[Record]) -> None:
        """kept: records from before the interruption."""
        self._path, self._records = folder.plot, list(kept)

    def record(self, record: Record) -> None:
        self._records.append(record)

    def close(self) -> None:
        if any("loss" in record for record in self._records):
            self._draw()

    def _draw(self) -> None:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        figure = Figure(figsize=(8, 4.5), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot(xlabel="optimizer step", ylabel="loss per target token (nats)")
        for name, label, style in (("loss", "train", "-"), ("eval_loss", "eval", "o-")):
            points = [(record["step"], record[name]) for record in self._records if name in record]
            if points:
                axes.plot(*zip(*points, strict=True), style, label=label, markersize=5)
        axes.legend()
        axes.grid(alpha=0.3)
        with open_without_links(self._path, "wb") as file:
            figure.savefig(file, format="png", dpi=120)


def keep_records(path: Path, done: int) -> list[Record]:
    """Cut metrics.jsonl back to step `done` and return the records that stay.

    The last line of a killed run may be incomplete. Raises UserError where the file cannot be written.
    """
    if not path.exists():
        return []
    kept: list[Record] = []
    for _, line in read_lines(path, "move it away", longest=LONGEST_RECORD):
        with contextlib.suppress(ValueError, TypeError, AttributeError, KeyError):
            record = parse_json(line)
            numbers = all(isinstance(value, int | float) for value in record.values())
            if numbers and record["step"] <= done and done:
                kept.append({**record, "time": float(record["time"])})
    shorter = temporary_name(path)
    try:
        shorter.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")
        shorter.replace(path)
    except OSError as error:
        raise UserError(f"output.dir: cannot write {path}: {error.strerror}; is the disk full?") from error
    return kept


def _generated(record: Record) -> str:
    """Return the metrics of generated texts in a record, as text; empty where none were generated."""
    if "eval_met_length_limit" not in record:
        return ""
    found = "".join(f"  {name} {record[f'eval_{name}']:.4f}" for name in METRICS if f"eval_{name}" in record)
    limited = f"{record['eval_met_length_limit']:.0f} of {record['eval_samples']:.0f} reached their length limit"
    return f"{found}  {record['eval_mean_tokens']:.1f} tokens each, {limited}"
