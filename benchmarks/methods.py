"""All fine-tuning methods under the same conditions: |Θ|, bytes, memory, speed and quality, on the quickstart's verbs.

    python benchmarks/methods.py [--only METHOD …] [--list] [--jobs 1] [--threads 2] [--steps N] [--out DIR]

SmolLM2-135M-Instruct learns the inflected forms of English verbs by each `method`, with the same steps, batches and
seed (configs/methods/template.yaml), unsharded. A method has three sizes (full fine-tuning has one). Its learning rate
is the one of three with the lowest eval loss at the middle size. Every run is launch/train.py in a process of its own,
then `lowrank-dist evaluate` on its output: exact match on 200 verbs that training has not seen, decoded greedily.

The most useful runs go first: the middle size of every method, then learning rates, then the other sizes. Each run is
kept under build/methods, identified by its resolved config, the versions of this project, of torch and of this recipe,
and the threads. A finished run is not repeated, and a killed one resumes from its last checkpoint, so the command can
be killed at any time. The table, results/methods.json and docs/methods.png are rewritten after every run from the runs
that exist; a missing value is a dash. A digest of the sources kept with each run shows whether the code has changed
since. A learning rate at which training diverges is a result too. --steps makes other, shorter runs, whose figures go
only to --out.

|Θ| stored is what a user keeps: a prefix is trained through an MLP that is not stored. Tokens/s is the median over the
recorded steps but the first few, of training alone, and of the middle size only. At the end: low-rank over full in
tokens/s at equal sharding, which the paper (Hu et al. 2021, section 4.2) has as 43.1 over 32.5 tokens/s a V100 on GPT-3
175B; and whether quality grows with |Θ|.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import math
import os
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from record import machine, write_result
from rich import box
from rich.console import Console
from rich.table import Table
from spawn import free_port

import lowrank_dist
from lowrank_dist.checkpoint.training_state import KINDS
from lowrank_dist.config import load_config, read_arguments
from lowrank_dist.formats.manifest import OPTIMIZER_FILE
from lowrank_dist.formats.safetensors_file import read_header

ROOT = Path(__file__).parents[1]
TEMPLATE = Path("configs/methods/template.yaml")
PLACE = Path("build/methods")
RECIPE = 1  # version of the recipe; a higher one repeats every run
MAX_NEW_TOKENS, BATCH = 40, 25
FIRST_STEPS = 5  # not counted in the speed
PAPER = (43.1, 32.5)  # tokens/s a V100, low-rank and full
# Estimated seconds of a run without a similar finished one, on two cores of an AMD EPYC; only --list shows them.
SECONDS_PER_STEP, SECONDS_BESIDE = 0.8, 80.0


@dataclass(frozen=True)
class Plan:
    """The runs of a method. size: the key that scales it. sizes and rates: the middle ones run first."""

    size: str | None
    sizes: tuple[int | None, int | None, int | None]
    rates: tuple[float, float, float]

    @property
    def middle(self) -> int | None:
        return self.sizes[1]


PLANS = {
    "lora": Plan("lora.rank", (2, 8, 32), (5e-4, 2e-3, 8e-3)),
    "full": Plan(None, (None, None, None), (1e-5, 5e-5, 2.5e-4)),
    "adapter_h": Plan("adapter.bottleneck", (8, 32, 128), (2.5e-4, 1e-3, 4e-3)),
    "adapter_l": Plan("adapter.bottleneck", (16, 64, 256), (1e-3, 4e-3, 1.6e-2)),
    "prefix": Plan("prefix.length", (8, 64, 256), (2.5e-4, 1e-3, 4e-3)),
    "prompt": Plan("prompt.length", (4, 16, 64), (1e-2, 5e-2, 2.5e-1)),
}


@dataclass(frozen=True)
class Run:
    """One training run; without a method it is the base, which is only evaluated."""

    method: str | None
    size: int | None = None
    rate: float = 0.0

    @property
    def name(self) -> str:
        if self.method is None:
            return "base"
        size = "" if self.size is None else f"-{self.size}"
        return f"{self.method}{size}-lr{self.rate:g}"

    def overrides(self) -> list[str]:
        """Return the arguments of launch/train.py beyond the template."""
        plan = PLANS[self.method]
        chosen = [f"method={self.method}", f"train.lr={self.rate!r}"]
        if plan.size is not None:
            chosen.append(f"{plan.size}={self.size}")
        if self.method == "lora":
            chosen.append(f"lora.alpha={2 * self.size}")  # s = alpha / r stays the quickstart's
        return chosen


Result = dict[str, Any]


class Cache:
    """The runs under build/methods. steps: instead of the template's, or None."""

    def __init__(self, place: Path, threads: int, steps: int | None) -> None:
        self._place, self._threads, self.steps = place, threads, steps

    def arguments(self, run: Run, output: Path) -> list[str]:
        """Return the arguments of launch/train.py."""
        # The same number of saves for all, so that the median speed does not depend on a method's saves.
        steps = [] if self.steps is None else [f"train.steps={self.steps}", f"train.warmup_steps={self.steps // 10}"]
        return [str(TEMPLATE), *run.overrides(), *steps, f"output.dir={output}"]

    def key(self, run: Run) -> str:
        """Return the identity of a run: all of its inputs, and the versions."""
        config = "" if run.method is None else read_arguments(self.arguments(run, Path("run"))).to_yaml()
        versions = {
            "recipe": RECIPE,
            "lowrank_dist": lowrank_dist.__version__,
            "torch": torch.__version__,
            "threads": self._threads,
            "evaluation": [MAX_NEW_TOKENS, BATCH],
        }
        return hashlib.sha256(f"{config}\n{json.dumps(versions, sort_keys=True)}".encode()).hexdigest()

    def folder(self, run: Run) -> Path:
        return self._place / f"{run.name}-{self.key(run)[:12]}"

    def result(self, run: Run) -> Result | None:
        """Return the figures of the finished run, None where it is not done."""
        file = self.folder(run) / "result.json"
        return json.loads(file.read_text(encoding="utf-8")) if file.exists() else None

    def keep(self, run: Run, result: Result) -> None:
        file = self.folder(run) / "result.json"
        partial = file.with_suffix(".partial")
        partial.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        partial.replace(file)

    def done_steps(self, run: Run) -> int:
        """Return the steps that an unfinished run has recorded."""
        return max((int(record["step"]) for record in records(self.folder(run) / "run" / "metrics.jsonl")), default=0)

    def total_steps(self, run: Run) -> int:
        return read_arguments(self.arguments(run, Path("run"))).train.steps


def best_rate(cache: Cache, method: str) -> tuple[float | None, int]:
    """Return the learning rate with the lowest eval loss at the middle size, and how many of the three are done."""
    plan = PLANS[method]
    found = {rate: cache.result(Run(method, plan.middle, rate)) for rate in plan.rates}
    losses = {rate: result["eval_loss"] for rate, result in found.items() if result and not result.get("failed")}
    best = min(losses, key=losses.__getitem__) if losses else None
    return best, sum(result is not None for result in found.values())


def stages(cache: Cache, methods: Sequence[str]) -> Iterator[list[Run]]:
    """Return the runs in stages, most useful first.

    The last stage is known when the learning rates before it are done.
    """
    yield [Run(None), *(Run(method, PLANS[method].middle, PLANS[method].rates[1]) for method in methods)]
    yield [Run(method, PLANS[method].middle, PLANS[method].rates[place]) for place in (0, 2) for method in methods]
    yield other_sizes(cache, methods)


def other_sizes(cache: Cache, methods: Sequence[str]) -> list[Run]:
    """Return each method's smallest and largest run, at the best learning rate, or the middle one where unknown."""
    runs = []
    for place in (0, 2):
        for method in methods:
            plan = PLANS[method]
            if plan.size is not None:
                rate, _ = best_rate(cache, method)
                runs.append(Run(method, plan.sizes[place], plan.rates[1] if rate is None else rate))
    return runs


# --- one run


class Processes:
    """The running child processes, ended with this process so that none outlives it. A training run saves first."""

    def __init__(self) -> None:
        self._live: set[subprocess.Popen[str]] = set()
        self._ending, self._lock = False, threading.Lock()

    def call(self, command: Sequence[str], environment: Mapping[str, str], **streams: Any) -> tuple[int, str]:
        """Return (exit code, stdout where it is a pipe)."""
        with self._lock:
            if self._ending:
                raise SystemExit(1)
            process = subprocess.Popen(command, cwd=ROOT, env=environment, text=True, **streams)
            self._live.add(process)
        output, _ = process.communicate()
        with self._lock:
            self._live.discard(process)
        return process.returncode, output or ""

    def end(self) -> None:
        with self._lock:
            self._ending = True
            for process in self._live:
                process.terminate()


def environment(threads: int) -> dict[str, str]:
    """Return the environment of a run of one rank, without a launcher."""
    return os.environ | {
        **{"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"},
        **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())},
        **{"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": str(threads)},
        **{"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "TOKENIZERS_PARALLELISM": "false"},
    }


def execute(run: Run, cache: Cache, threads: int, processes: Processes) -> Result:
    """Train, evaluate, collect and keep. Raises SystemExit for any failure but a learning rate that diverges."""
    folder = cache.folder(run)
    folder.mkdir(parents=True, exist_ok=True)
    output, log, settings = folder / "run", folder / "log.txt", environment(threads)
    result: Result = {"name": run.name, "method": run.method, "size": run.size, "rate": run.rate, "source": source()}
    if run.method is not None:
        command = [sys.executable, "launch/train.py", *cache.arguments(run, output)]
        with log.open("a", encoding="utf-8") as stream:
            code, _ = processes.call(command, settings, stdout=stream, stderr=subprocess.STDOUT)
        if code:
            reason = diverged(log.read_text(encoding="utf-8", errors="replace"))
            if reason is None:
                sys.exit(f"{run.name} ended with exit code {code}: see {log}")
            result |= {"failed": reason}
        else:
            # A prompt's own positions are counted with the tokens of every sample.
            result |= collect(output, run.method, run.size if run.method == "prompt" else 0)
    if not result.get("failed"):
        started = time.monotonic()
        found = evaluate(run, output, settings, log, processes)
        spent = time.monotonic() - started
        result |= {"exact_match": found["exact_match"], "met_length_limit": found["met_length_limit"]}
        result["seconds"] = result.get("seconds", 0.0) + spent
    cache.keep(run, result)
    shutil.rmtree(output / "checkpoints", ignore_errors=True)  # two gigabytes of full fine-tuning
    return result


def diverged(log: str) -> str | None:
    """Return the message with which a run stops over non-finite numbers, None where it ended for another reason."""
    lines = [line for line in log.splitlines() if "lower train.lr" in line.lower()]
    return lines[-1] if lines else None


def evaluate(run: Run, output: Path, settings: Mapping[str, str], log: Path, processes: Processes) -> Result:
    """Run `lowrank-dist evaluate` on the base, or on the run's output."""
    template = load_config(TEMPLATE)
    model, adapter = template.model.path, []
    if run.method == "full":
        model = output / "checkpoints" / "last"
    elif run.method is not None:
        adapter = ["--adapter", str(output / "adapter")]
    command = [
        *(sys.executable, "-m", "lowrank_dist.cli", "evaluate", "--model", str(model), *adapter),
        *("--data", str(template.data.eval), "--metric", "exact_match", "--json", "--device", "cpu"),
        *("--max-new-tokens", str(MAX_NEW_TOKENS), "--batch", str(BATCH)),
    ]
    alone = {name: value for name, value in settings.items() if name not in ("RANK", "WORLD_SIZE")}
    with log.open("a", encoding="utf-8") as stream:
        code, text = processes.call(command, alone, stdout=subprocess.PIPE, stderr=stream)
    if code:
        sys.exit(f"the evaluation of {run.name} ended with exit code {code}: see {log}")
    return json.loads(text[text.index("{") :])


def records(file: Path) -> list[dict[str, float]]:
    """Return the records of a metrics.jsonl; the last line of a killed run may be half a record."""
    found = []
    if file.exists():
        for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
            with contextlib.suppress(ValueError):
                found.append(json.loads(line))
    return found


def collect(output: Path, method: str, virtual_tokens: int) -> Result:
    """Return the figures of a finished run, from its folder. virtual_tokens: those of every sample."""
    found = records(output / "metrics.jsonl")
    losses = [record["eval_loss"] for record in found if "eval_loss" in record]
    steps = [record for record in found if "tokens_per_second" in record]
    virtual_tokens *= load_config(TEMPLATE).train.global_batch
    last = output / "checkpoints" / "last"
    published = sorted(last.glob("model-*.safetensors") if method == "full" else (output / "adapter").iterdir())
    weights = [entry for file in published if file.suffix == ".safetensors" for entry in read_header(file).entries]
    trained = sum(entry.nbytes for entry in read_header(last / OPTIMIZER_FILE).entries) // (4 * len(KINDS))
    return {
        "trained": trained,
        "stored": sum(math.prod(entry.shape) for entry in weights),
        "checkpoint_bytes": sum(file.stat().st_size for file in last.iterdir()),
        "adapter_bytes": sum(file.stat().st_size for file in published),
        "peak_memory_gib": max(record["memory_gib"] for record in steps),
        "tokens_per_second": speed([sample_tokens_per_second(record, virtual_tokens) for record in steps]),
        "eval_loss_at_start": losses[0],
        "eval_loss": losses[-1],
        "steps": int(steps[-1]["step"]),
        "seconds": found[-1]["time"],
    }


def sample_tokens_per_second(record: Mapping[str, float], virtual_tokens: int) -> float:
    """Return the rate of the tokens that all methods have in common: all of a step but its `virtual_tokens`."""
    from lowrank_dist.engine.meter import STEP_PHASES

    seconds = sum(record[f"{phase}_seconds"] for phase in STEP_PHASES)
    return record["tokens_per_second"] - virtual_tokens / seconds


def speed(rates: Sequence[float]) -> float:
    """Return the median over all steps but the first few, which warm up; a save slows single steps down."""
    return statistics.median(rates[FIRST_STEPS:] or rates)


def source() -> str:
    """Return a digest of the code that trains and decodes."""
    digest = hashlib.sha256()
    files = [*ROOT.glob("lowrank_dist/**/*.py"), *ROOT.glob("csrc/**/*"), ROOT / "launch" / "train.py"]
    for path in sorted(file for file in files if file.is_file()):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


# --- the results


def table_rows(cache: Cache) -> list[Result]:
    """Return a row for each method and size, at the best learning rate known; `missing` where the run is not done."""
    rows = []
    for method, plan in PLANS.items():
        rate, tried = best_rate(cache, method)
        for size in dict.fromkeys(plan.sizes):
            result = None if rate is None else cache.result(Run(method, size, rate))
            known = {"missing": True} if result is None else result
            if size != plan.middle:
                known = {key: value for key, value in known.items() if key != "tokens_per_second"}
            edge = tried == len(plan.rates) and rate in (plan.rates[0], plan.rates[2])
            virtual = size if method in ("prefix", "prompt") else 0
            row = {"method": method, "size": size, "rate": rate, "rates_tried": tried, "rate_at_edge": edge}
            rows.append({**known, **row, "virtual": virtual})
    return rows


def rate_rows(cache: Cache) -> dict[str, dict[str, Any]]:
    """Return, by method and rate at the middle size, the eval loss, or that it diverged, or None where not done."""
    found: dict[str, dict[str, Any]] = {}
    for method, plan in PLANS.items():
        results = {rate: cache.result(Run(method, plan.middle, rate)) for rate in plan.rates}
        found[method] = {
            f"{rate:g}": None if result is None else "diverged" if result.get("failed") else result["eval_loss"]
            for rate, result in results.items()
        }
    return found


def cell(row: Mapping[str, Any], key: str, form: str, scale: float = 1.0) -> str:
    """Format a figure; a dash where there is none."""
    value = row.get(key)
    return "–" if value is None else format(value / scale, form)


def show(rows: Sequence[Result], rates: Mapping[str, Mapping[str, Any]], base: Result | None, console: Console) -> None:
    """Print both tables as Markdown."""
    names = ("method", "r, m or l", "|Θ| stored", "trained", "checkpoint MB", "kept MB", "peak GiB", "tokens/s")
    table = Table(box=box.MARKDOWN)
    for name in (*names, "eval loss", "exact match", "learning rate"):
        table.add_column(name.replace("|", r"\|"), justify="left" if name == "method" else "right")
    if base is not None:
        start = next(
            (row["eval_loss_at_start"] for row in rows if row["method"] == "lora" and "eval_loss" in row), None
        )
        loss = "–" if start is None else f"{start:.3f}"
        table.add_row("base", "", "0", "0", "", "", "", "", loss, cell(base, "exact_match", ".3f"), "")
    for row in rows:
        mark = " (edge of the three)" if row["rate_at_edge"] else f" ({row['rates_tried']} of 3 tried)"
        if row["rates_tried"] == 3 and not row["rate_at_edge"]:
            mark = ""
        table.add_row(
            row["method"],
            "" if row["size"] is None else str(row["size"]),
            *(cell(row, key, ",.0f") for key in ("stored", "trained")),
            *(cell(row, key, ".2f", 1e6) for key in ("checkpoint_bytes", "adapter_bytes")),
            cell(row, "peak_memory_gib", ".2f"),
            cell(row, "tokens_per_second", ".0f"),
            cell(row, "eval_loss", ".3f"),
            cell(row, "exact_match", ".3f"),
            "–" if row["rate"] is None else f"{row['rate']:g}{mark}",
        )
    console.print(table)
    tried = Table("method, middle size", *("eval loss at learning rate",) * 3, box=box.MARKDOWN)
    for method, losses in rates.items():
        shown = [
            f"{rate}: {loss:.3f}" if isinstance(loss, float) else f"{rate}: {loss or '–'}"
            for rate, loss in losses.items()
        ]
        tried.add_row(method, *shown)
    console.print(tried)


def ratio(rows: Sequence[Result]) -> float | None:
    """Return low-rank over full in tokens/s, from the rows that have them; None where one is missing."""
    found = {row["method"]: row["tokens_per_second"] for row in rows if "tokens_per_second" in row}
    return found["lora"] / found["full"] if {"lora", "full"} <= found.keys() else None


def courses(rows: Sequence[Result]) -> dict[str, dict[str, Any]]:
    """Return exact match and eval loss by rising |Θ| of each complete method, and whether neither gets worse."""
    found = {}
    for method, plan in PLANS.items():
        mine = [row for row in rows if row["method"] == method and "exact_match" in row]
        if plan.size is None or len(mine) < len(plan.sizes):
            continue
        matches, losses = ([row[key] for row in mine] for key in ("exact_match", "eval_loss"))
        rises = matches == sorted(matches) and losses == sorted(losses, reverse=True)
        found[method] = {"exact_match": matches, "eval_loss": losses, "monotonic": rises}
    return found


def draw(rows: Sequence[Result], base: Result | None, path: Path) -> None:
    """Draw exact match and eval loss against |Θ| as stored, a line for each method."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    for place, (key, label) in enumerate((("exact_match", "exact match"), ("eval_loss", "eval loss (nats)")), start=1):
        axes = figure.add_subplot(1, 2, place, xlabel="|Θ| stored", ylabel=label, xscale="log")
        for method in PLANS:
            points = [(row["stored"], row[key]) for row in rows if row["method"] == method and key in row]
            if points:
                axes.plot(*zip(*points, strict=True), "*" if method == "full" else "o-", label=method, markersize=6)
        if base is not None and key in base:
            axes.axhline(base[key], color="grey", linestyle=":", label="base")
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize="small")
    figure.savefig(path, dpi=90)


def publish(cache: Cache, started_on: dict[str, object], args: argparse.Namespace) -> None:
    """Write the JSON and the picture of the runs that exist."""
    rows, base = table_rows(cache), cache.result(Run(None))
    figures = {
        "model": "SmolLM2-135M-Instruct",
        "threads": args.threads,
        "steps": cache.total_steps(Run("full", None, PLANS["full"].rates[1])),
        "base": base,
        "rows": rows,
        "eval_loss_by_learning_rate": rate_rows(cache),
        "low_rank_over_full_tokens_per_second": ratio(rows),
        "published_ratio": PAPER[0] / PAPER[1],
        "by_size": courses(rows),
        "missing": [f"{row['method']} {row['size'] or ''}".strip() for row in rows if row.get("missing")],
        "sources": sorted({row["source"] for row in rows if "source" in row}),
    }
    if args.steps is None:
        write_result("methods", started_on, figures)
        draw(rows, base, ROOT / "docs" / "methods.png")
    if args.out is not None:
        write_result("methods", started_on, figures, args.out)
        draw(rows, base, args.out / "methods.png")


def conclude(cache: Cache, console: Console) -> None:
    """Print the tables, and the conclusions as sentences."""
    rows = table_rows(cache)
    show(rows, rate_rows(cache), cache.result(Run(None)), console)
    sources = {row["source"] for row in rows if "source" in row}
    if sources - {source()}:
        console.print("some runs are of another state of the code than the present one")
    for method, course in courses(rows).items():
        turns = "grows with |Θ|" if course["monotonic"] else "does not grow with |Θ| throughout"
        matches = " → ".join(f"{value:.3f}" for value in course["exact_match"])
        losses = " → ".join(f"{value:.3f}" for value in course["eval_loss"])
        console.print(f"{method}: quality {turns}: exact match {matches}, eval loss {losses}")
    found, (theirs, full) = ratio(rows), PAPER
    shown = "–" if found is None else f"{found:.2f}"
    console.print(
        f"low-rank over full, tokens/s at equal sharding: {shown} (published {theirs} / {full} = 1.33 on 175B)"
    )


def show_list(cache: Cache, methods: Sequence[str], console: Console) -> None:
    """Print every run with its state, and an estimate of the remaining time."""
    table, left = Table("run", "state", "s", box=box.MARKDOWN), 0.0
    for stage in stages(cache, methods):
        for run in stage:
            result = cache.result(run)
            if result is not None:
                table.add_row(run.name, "diverged" if result.get("failed") else "done", cell(result, "seconds", ".0f"))
                continue
            seconds, steps = estimate(cache, run, methods), 0 if run.method is None else cache.done_steps(run)
            left += seconds
            table.add_row(run.name, f"to do, at step {steps}" if steps else "to do", f"about {seconds:.0f}")
    console.print(table)
    chosen = [method for method in methods if best_rate(cache, method)[1] < 3 and PLANS[method].size is not None]
    if chosen:
        console.print(f"the learning rate of the other sizes is not chosen yet: {', '.join(chosen)}")
    console.print(f"to do: about {left / 60:.0f} minutes of one run at a time")


def estimate(cache: Cache, run: Run, methods: Sequence[str]) -> float:
    """Return seconds: the mean of the method's finished runs, else of all, else a guess."""
    if run.method is None:
        return SECONDS_BESIDE
    done: dict[str, list[float]] = {}
    for stage in stages(cache, methods):
        for other in stage:
            result = cache.result(other)
            if other.method is not None and result and "seconds" in result:
                done.setdefault(other.method, []).append(result["seconds"])
    like = done.get(run.method) or [seconds for several in done.values() for seconds in several]
    return statistics.mean(like) if like else SECONDS_PER_STEP * cache.total_steps(run) + SECONDS_BESIDE


def run_all(cache: Cache, args: argparse.Namespace, started_on: dict[str, object], console: Console) -> None:
    """Run all runs that are not finished."""
    processes, lock = Processes(), threading.Lock()

    def one(run: Run) -> None:
        result = execute(run, cache, args.threads, processes)
        with lock:
            publish(cache, started_on, args)
            says = "diverged" if result.get("failed") else f"exact match {result['exact_match']:.3f}"
            loss = f", eval loss {result['eval_loss']:.3f}" if "eval_loss" in result else ""
            console.print(f"{run.name}: {says}{loss}, {result.get('seconds', 0):.0f} s")

    pool = ThreadPoolExecutor(args.jobs)
    try:
        for stage in stages(cache, args.only):
            list(pool.map(one, [run for run in stage if cache.result(run) is None]))
    finally:
        processes.end()
        pool.shutdown(cancel_futures=True)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PLANS, default=list(PLANS), metavar="METHOD")
    parser.add_argument(
        "--list", action="store_true", help="list runs done, missing, with estimated times; run nothing"
    )
    parser.add_argument(
        "--jobs", type=int, default=1, help="simultaneous runs; with more than one, tokens/s means little"
    )
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="threads of each run")
    parser.add_argument("--steps", type=int, help="steps instead of the template's; figures go to --out only")
    parser.add_argument("--out", type=Path, metavar="DIR", help="write JSON and picture there, even of a partial run")
    args = parser.parse_args()
    if min(args.jobs, args.threads, args.steps or 1) < 1:
        parser.error("--jobs, --threads and --steps must be at least 1")
    return args


def main() -> None:
    args, started_on, console = parse(), machine(), Console(width=170)
    os.chdir(ROOT)
    cache = Cache(PLACE, args.threads, args.steps)
    if args.list:
        return show_list(cache, args.only, console)
    template = load_config(TEMPLATE)
    if not template.model.path.is_dir():
        sys.exit(f"{template.model.path} is missing: python -m launch.quickstart.prepare makes it")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        run_all(cache, args, started_on, console)
    finally:
        publish(cache, started_on, args)
        conclude(cache, console)


if __name__ == "__main__":
    main()
