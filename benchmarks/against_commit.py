"""Training speed of this tree over that of another commit, step by step in turns, as a ratio.

    python benchmarks/against_commit.py [--commit HEAD~1] [--pairs 30] [--threads 2] [--settings fp32:0.5 ...]

The commit is checked out and built in a worktree under build/. One process a tree loads the model of
benchmarks/throughput.py and makes our training step, each with its own tree's code; a pair is one step of each, in
alternating order, the other process waiting meanwhile. A setting's figure is the median over its pairs of (the commit's
seconds / our seconds). The last line is `ratio_vs_commit=…`, the lowest over the settings.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

from record import machine, write_result
from rich.console import Console
from rich.table import Table
from trees import ROOT, checked_out

# Run by each process, with its tree first on the path: for each input line it makes one step and prints the seconds.
WORKER = """
import json, sys, time
import torch
import throughput
torch.set_num_threads(int(sys.argv[1]))
throughput.QUICKSTART = throughput.Path(sys.argv[2])
throughput.quiet_libraries()
throughput.join_alone()
dtype, share = sys.argv[3].split(":")
side = throughput.our_side(throughput.QUICKSTART / "base", dtype, 128)
batch = throughput.make_batch(throughput.read_tokens(4, 128), float(share))
for _ in sys.stdin:
    started = time.perf_counter()
    loss = side.step(batch)
    print(json.dumps([time.perf_counter() - started, loss]), flush=True)
"""


def start(tree: Path, threads: int, setting: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": f"{tree}:{tree / 'benchmarks'}", "OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, "-c", WORKER, str(threads), str(ROOT / "build" / "quickstart"), setting]
    return subprocess.Popen(
        command, cwd=tree, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def step(worker: subprocess.Popen[str]) -> tuple[float, float]:
    """Return (seconds, loss) of the worker's next step. Other output before it is skipped."""
    worker.stdin.write("\n")
    worker.stdin.flush()
    for line in worker.stdout:
        if line.startswith("["):
            return tuple(json.loads(line))
    sys.exit(f"a worker ended with code {worker.wait()}")


def compare(trees: tuple[Path, Path], threads: int, setting: str, pairs: int) -> dict[str, object]:
    """Return seconds of ours and of the commit's over interleaved pairs, after two warm-up pairs."""
    workers = [start(tree, threads, setting) for tree in trees]
    seconds, losses = ([], []), ([], [])
    for pair in range(pairs + 2):
        for which in (0, 1) if pair % 2 else (1, 0):
            spent, loss = step(workers[which])
            losses[which].append(loss)
            if pair > 1:
                seconds[which].append(spent)
    for worker in workers:
        worker.stdin.close()
        worker.wait()
    ratios = [theirs / mine for mine, theirs in zip(*seconds, strict=True)]
    low, median, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return {
        "setting": setting,
        "ours_seconds": statistics.median(seconds[0]),
        "commit_seconds": statistics.median(seconds[1]),
        "ratio": median,
        "ratio_quartiles": [low, high],
        "losses": [losses[0][-1], losses[1][-1]],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--commit", default="HEAD~1")
    parser.add_argument("--pairs", type=int, default=30)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--settings", nargs="+", default=["fp32:0.5", "bf16:0.5"], metavar="DTYPE:SHARE")
    args = parser.parse_args()
    started_on = machine()
    subprocess.run([sys.executable, "-m", "launch.quickstart.prepare"], cwd=ROOT, check=True)
    tree, name = checked_out(args.commit)
    rows = [compare((ROOT, tree), args.threads, setting, args.pairs) for setting in args.settings]
    table = Table("base : prompt share", "ours, s", "commit, s", "ratio", "quartiles", "losses after as many steps")
    for row in rows:
        low, high = row["ratio_quartiles"]
        seconds = (f"{row[key]:.4f}" for key in ("ours_seconds", "commit_seconds"))
        losses = " ".join(f"{loss:.5f}" for loss in row["losses"])
        table.add_row(row["setting"], *seconds, f"{row['ratio']:.3f}", f"{low:.3f} to {high:.3f}", losses)
    Console().print(table)
    worst = min(row["ratio"] for row in rows)
    facts = {"commit": name, "pairs": args.pairs, "threads": args.threads}
    write_result("against_commit", started_on, {**facts, "settings": rows, "ratio_vs_commit": worst})
    print(f"ratio_vs_commit={worst:.3f}")


if __name__ == "__main__":
    main()
