"""Reports of a run on rank 0: metrics.jsonl, TensorBoard scalars, the console and loss.png, a sink each.

The log is none of them: every rank keeps its own, with what every module says in it (`RunFolder.open`).
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import progress

from lowrank_dist.engine.run import Run
from lowrank_dist.engine.run_folder import RunFolder
from lowrank_dist.formats.atomic import temporary_name
from lowrank_dist.generate.metrics import METRICS
from lowrank_dist.terminal import open_console, say

# Hugging Face's tags, so that runs lie beside those of other trainers in one board.
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

# "step" (finished optimizer steps) and "time" (seconds of training so far) first, then what was measured.
Record = Mapping[str, Any]


class Sink:
    """One place that reports go to. A subclass overrides what concerns it; what it raises ends the run."""

    def record(self, record: Record) -> None:
        """Keep or show what was measured at one step."""

    def say(self, message: str) -> None:
        """Show one line to the person who watches."""

    def close(self) -> None:
        """Finish what the run leaves here."""


class Reporter:
    """Passes every report on to its sinks. Every rank has one; only rank 0's has sinks."""

    def __init__(self, sinks: Sequence[Sink], elapsed: float) -> None:
        """elapsed: seconds that the run had trained before it was interrupted."""
        self._sinks, self._start = tuple(sinks), time.monotonic() - elapsed

    def record(self, step: int, values: Mapping[str, float]) -> None:
        """Report what was measured at a step. `step` counts finished optimizer steps."""
        record = {"step": step, "time": round(time.monotonic() - self._start, 3), **values}
        for sink in self._sinks:
            sink.record(record)

    def say(self, message: str) -> None:
        """Report one line for the person who watches."""
        for sink in self._sinks:
            sink.say(message)

    def close(self) -> None:
        """Close the sinks in their order, each whatever becomes of the others."""
        with contextlib.ExitStack() as closing:
            for sink in reversed(self._sinks):
                closing.callback(sink.close)


def open_reporter(run: Run, total_steps: int) -> Reporter:
    """Open the sinks that the configuration asks for; an interrupted run's records up to the resumed step stay."""
    if not run.writes:
        return Reporter([], 0.0)
    output, folder, done = run.config.output, run.folder, run.state.step if run.state else 0
    # What the interrupted run recorded beyond the step that was resumed will come again.
    kept = keep_records(folder.metrics, done)
    sinks: list[Sink] = [MetricsFile(folder)]
    if output.tensorboard:
        sinks.append(TensorBoard(folder, done))
    sinks.append(ConsoleProgress(total_steps, done))
    if output.plot:
        sinks.append(LossPicture(folder, kept))
    return Reporter(sinks, kept[-1]["time"] if kept else 0.0)


class MetricsFile(Sink):
    """metrics.jsonl: a JSON object a line, appended."""

    def __init__(self, folder: RunFolder) -> None:
        self._file = folder.metrics.open("a", buffering=1)

    def record(self, record: Record) -> None:
        self._file.write(json.dumps(record) + "\n")

    def close(self) -> None:
        self._file.close()


class TensorBoard(Sink):
    """TensorBoard's event files, of the values that TAGS names."""

    def __init__(self, folder: RunFolder, done: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._board = SummaryWriter(str(folder.tensorboard), purge_step=done + 1 if done else None)

    def record(self, record: Record) -> None:
        for name in record.keys() & TAGS.keys():
            self._board.add_scalar(TAGS[name], record[name], record["step"])

    def close(self) -> None:
        self._board.close()


class ConsoleProgress(Sink):
    """Lines on stdout; on a terminal a progress bar below them."""

    def __init__(self, total_steps: int, done: int) -> None:
        """done: the step that the run goes on from."""
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
        # Whoever reads this may be gone, with the launcher: no reason for a run to fail before it has saved.
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
        """kept: records from before the run was interrupted."""
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
        figure.savefig(self._path, dpi=120)


def keep_records(path: Path, done: int) -> list[Record]:
    """Cut metrics.jsonl back to step `done` and return the records that stay.

    The last line of a killed run may be half of one.
    """
    if not path.exists():
        return []
    kept: list[Record] = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
            if record["step"] <= done and done:
                kept.append({**record, "time": float(record["time"])})
        except (ValueError, TypeError, KeyError):
            continue
    shorter = temporary_name(path)
    shorter.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")
    shorter.replace(path)
    return kept


def _generated(record: Record) -> str:
    """Return what an evaluation found in generated texts; nothing where it generated none."""
    if "eval_met_length_limit" not in record:
        return ""
    found = "".join(f"  {name} {record[f'eval_{name}']:.4f}" for name in METRICS if f"eval_{name}" in record)
    limited = f"{record['eval_met_length_limit']:.0f} of {record['eval_samples']:.0f} met their length limit"
    return f"{found}  {record['eval_mean_tokens']:.1f} tokens each, {limited}"
