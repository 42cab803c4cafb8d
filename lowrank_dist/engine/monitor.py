"""What rank 0 shows and keeps of a run: progress, metrics.jsonl, TensorBoard scalars, loss.png."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from lowrank_dist.engine.run_folder import RunFolder
from lowrank_dist.formats.atomic import temporary_name
from lowrank_dist.generate.metrics import METRICS

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


class Monitor:
    """Records of a run. Every rank has one; only rank 0's does anything (`active`)."""

    def __init__(
        self, folder: RunFolder, total_steps: int, done: int, *, active: bool, tensorboard: bool, plot: bool
    ) -> None:
        """done: the step that a run goes on from. What an interrupted one recorded beyond it will come again."""
        self._folder, self._active, self._plot = folder, active, plot
        self._records: list[dict[str, float]] = []
        self._file = self._board = self._progress = None
        self._done, self._begun = done, time.monotonic()
        self._start = self._begun
        if not active:
            return
        self._records = _keep_records(folder.metrics, done)
        if self._records:
            self._start -= self._records[-1]["time"]
        self._file = folder.metrics.open("a", buffering=1)
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(folder.tensorboard), purge_step=done + 1 if done else None)
        console = Console(file=sys.stdout)
        if console.is_terminal:
            self._progress = Progress(
                TextColumn("[bold]{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[status]}"),
                console=console,
            )
            self._task = self._progress.add_task("training", total=total_steps, completed=done, status="")
            self._progress.start()
        self._total = total_steps

    def record(self, step: int, values: Mapping[str, float]) -> None:
        """Keep one record and show it. `step` counts finished optimizer steps."""
        if not self._active:
            return
        entry = {"step": step, "time": round(time.monotonic() - self._start, 3), **values}
        self._records.append(entry)
        self._file.write(json.dumps(entry) + "\n")
        if self._board is not None:
            for name in values.keys() & TAGS.keys():
                self._board.add_scalar(TAGS[name], values[name], step)
        self._show(step, values)

    def say(self, message: str) -> None:
        """One line for the person who watches."""
        if not self._active:
            return
        # Whoever reads this may be gone, with the launcher: no reason for a run to fail before it has saved.
        with contextlib.suppress(OSError):
            if self._progress is None:
                print(message, flush=True)
            else:
                self._progress.console.print(message, highlight=False)

    def close(self) -> None:
        """Flush, stop the bar, draw the picture."""
        if not self._active:
            return
        if self._progress is not None:
            self._progress.stop()
        if self._board is not None:
            self._board.close()
        self._file.close()
        if self._plot and any("loss" in entry for entry in self._records):
            draw_losses(self._records, self._folder.plot)

    def _show(self, step: int, values: Mapping[str, float]) -> None:
        if "eval_loss" in values:
            self.say(f"step {step}/{self._total}  eval loss {values['eval_loss']:.4f}{_generated(values)}")
        if "loss" not in values:
            return
        status = (
            f"loss {values['loss']:.4f}  lr {values['learning_rate']:.2e}  norm {values['grad_norm']:.3f}  "
            f"{values['tokens_per_second']:.0f} tokens/s  {values['memory_gib']:.2f} GiB"
        )
        if self._progress is not None:
            self._progress.update(self._task, completed=step, status=status)
        else:
            left = (time.monotonic() - self._begun) / (step - self._done) * (self._total - step)
            self.say(f"step {step}/{self._total}  {status}  {left:.0f} s left")


def _generated(values: Mapping[str, float]) -> str:
    """What an evaluation found in generated texts, where it generated any."""
    if "eval_met_length_limit" not in values:
        return ""
    found = "".join(f"  {name} {values[f'eval_{name}']:.4f}" for name in METRICS if f"eval_{name}" in values)
    limited = f"{values['eval_met_length_limit']:.0f} of {values['eval_samples']:.0f} met their length limit"
    return f"{found}  {values['eval_mean_tokens']:.1f} tokens each, {limited}"


def _keep_records(path: Path, done: int) -> list[dict[str, float]]:
    """Cut metrics.jsonl back to step `done`; the last line of a killed run may be half a record. Its records."""
    if not path.exists():
        return []
    kept = []
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


def draw_losses(records: list[dict[str, float]], path: Path) -> None:
    """Training and eval loss over steps, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(xlabel="optimizer step", ylabel="loss per target token (nats)")
    for name, label, style in (("loss", "train", "-"), ("eval_loss", "eval", "o-")):
        points = [(entry["step"], entry[name]) for entry in records if name in entry]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=label, markersize=5)
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
