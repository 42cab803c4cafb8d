"""Quickstart, last phase: one table of what happened, also as report.json, and whether it is what was promised.

    python -m launch.quickstart.report [--out build/quickstart]

Exit code 1 when exact match rose by less than 0.15 or the loss did not at least halve.
"""

import argparse
import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.table import Table
from safetensors import safe_open

from lowrank_dist.terminal import open_console

LEAST_RISE = 0.15
LEAST_LOSS_RATIO = 2.0


def parameters(file: Path) -> int:
    """Return the number of elements in a safetensors file, from its header alone."""
    with safe_open(file, framework="np") as tensors:
        return sum(math.prod(tensors.get_slice(name).get_shape()) for name in tensors.keys())


def collect(out: Path) -> dict[str, Any]:
    """Return all that the table shows. Sizes in bytes, times in seconds, losses in nats per target token."""
    base, merged, proof = (json.loads((out / f"{name}.json").read_text()) for name in ("base", "merged", "proof"))
    base_file, adapter_file = out / "base" / "model.safetensors", out / "run" / "adapter" / "adapter_model.safetensors"
    phases = (line.split("\t") for line in (out / "phases.tsv").read_text().splitlines())
    return {
        "verbs": base["samples"],
        "exact_match": {"base": base["exact_match"], "merged": merged["exact_match"]},
        "loss": {"base": base["loss"], "merged": merged["loss"]},
        "parameters": {"base": parameters(base_file), "trained": parameters(adapter_file)},
        "bytes": {"base": base_file.stat().st_size, "adapter": adapter_file.stat().st_size},
        "logit_difference": proof,
        "seconds": {name: int(milliseconds) / 1000 for name, milliseconds in phases},
    }


def table(report: Mapping[str, Any]) -> Table:
    """Return the report as a table."""
    match, loss, size, count = (report[key] for key in ("exact_match", "loss", "bytes", "parameters"))
    proof, seconds = report["logit_difference"], report["seconds"]
    rows = Table("", "before", "after", title="SmolLM2-135M, tensor parallel 3: an English verb -> its inflected forms")
    rows.add_row(f"exact match, {report['verbs']} held-out verbs", f"{match['base']:.3f}", f"{match['merged']:.3f}")
    rows.add_row("loss per target token, same verbs", f"{loss['base']:.3f}", f"{loss['merged']:.3f}", end_section=True)
    rows.add_row("", "model", "adapter", style="bold")
    share = count["trained"] / count["base"]
    rows.add_row("parameters, trained", f"{count['base']:,}", f"{count['trained']:,} ({share:.2%})")
    rows.add_row("file size", f"{size['base'] / 1e6:.1f} MB", f"{size['adapter'] / 1e6:.1f} MB", end_section=True)
    rows.add_row(f"logits against the trained sharded model (at most {proof['tolerance']:.0e})", "", "", style="bold")
    rows.add_row("base + adapter in plain PEFT", "", f"{proof['adapter']:.1e}")
    rows.add_row("merged folder in plain transformers", "", f"{proof['merged']:.1e}")
    rows.add_row("base, for comparison", "", f"{proof['base']:.1e}", end_section=True)
    for name, spent in seconds.items():
        rows.add_row(name, "", f"{spent:.0f} s")
    rows.add_row("total", "", f"{sum(seconds.values()):.0f} s", style="bold")
    return rows


def shortfalls(report: Mapping[str, Any]) -> list[str]:
    """Return a text for each goal (LEAST_RISE, LEAST_LOSS_RATIO) that the run did not reach."""
    match, loss = report["exact_match"], report["loss"]
    missed = []
    if not match["merged"] - match["base"] >= LEAST_RISE:
        missed.append(f"exact match rose by {match['merged'] - match['base']:.3f}, less than {LEAST_RISE}")
    if not loss["base"] >= LEAST_LOSS_RATIO * loss["merged"]:
        missed.append(f"the loss fell from {loss['base']:.3f} to {loss['merged']:.3f}, less than by half")
    return missed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("build/quickstart"), help="folder of the run")
    out = parser.parse_args().out
    report = collect(out)
    (out / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    console = open_console()
    console.print(table(report))
    console.print(f"loss picture: {out / 'run' / 'loss.png'}\nmerged model: {out / 'merged'}", soft_wrap=True)
    if missed := shortfalls(report):
        sys.exit("report: " + "; ".join(missed))


if __name__ == "__main__":
    main()
