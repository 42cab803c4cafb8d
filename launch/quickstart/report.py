"""Quickstart, last phase: texts before and after training, one table of results (also as report.json), what to do next.

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

from lowrank_dist.formats.provenance import read_provenance
from lowrank_dist.terminal import open_console, put

LEAST_RISE = 0.15
LEAST_LOSS_RATIO = 2.0
EXAMPLES = 5
NEXT = (
    ("Ask the merged model", "lowrank-dist generate --model {out}/merged --prompt $'Verb: monkey\\nForms:'"),
    ("See which checkpoints the run kept, and that they verify", "lowrank-dist inspect {out}/run"),
    (
        "Score the adapter on the base, without merging",
        "lowrank-dist evaluate --model {out}/base --adapter {out}/run/adapter --data {out}/data/eval.jsonl "
        "--metric exact_match --max-new-tokens 40 --batch 50",
    ),
    (
        'Train on data of your own: put lines {"prompt": …, "completion": …} in place of these',
        "head -n 500 {out}/data/train.jsonl > build/mine.jsonl",
    ),
    ("… look at them as the model will see them", "lowrank-dist data configs/quickstart.yaml {mine}"),
    (
        "… and train",
        "DS_ACCELERATOR=cpu OMP_NUM_THREADS=1 deepspeed --num_gpus 3 launch/train.py configs/quickstart.yaml {mine} "
        "output.dir=build/mine-run",
    ),
    (
        "Plan a larger model, without its weights or a GPU",
        "lowrank-dist plan llama-3-70b --nodes 2 --gpus-per-node 8 parallel.tensor=8",
    ),
)
MINE = "data.train=build/mine.jsonl data.eval=null eval.every=null"


def shortened(text: str, width: int = 48) -> str:
    """Return a text on one line, line feeds as \\n, cut to `width` characters."""
    line = text.strip().replace("\n", "\\n")
    return line if len(line) <= width else f"{line[: width - 1]}…"


def parameters(file: Path) -> int:
    """Return the number of elements in a safetensors file, from its header alone."""
    with safe_open(file, framework="np") as tensors:
        return sum(math.prod(tensors.get_slice(name).get_shape()) for name in tensors.keys())


def collect(out: Path) -> dict[str, Any]:
    """Return all that the table shows. Sizes in bytes, times in seconds, losses in nats per target token."""
    base, merged, proof = (json.loads((out / f"{name}.json").read_text()) for name in ("base", "merged", "proof"))
    base_file, adapter_file = out / "base" / "model.safetensors", out / "run" / "adapter" / "adapter_model.safetensors"
    provenance = read_provenance(out / "run" / "adapter")
    assert provenance is not None, "a run writes it"
    phases = (line.split("\t") for line in (out / "phases.tsv").read_text().splitlines())
    examples = [
        {"prompt": before["prompt"], "reference": before["reference"], "before": before["text"], "after": after["text"]}
        for before, after in zip(base["texts"][:EXAMPLES], merged["texts"], strict=False)
    ]
    return {
        "verbs": base["samples"],
        "published_step": provenance.training["step"],
        "examples": examples,
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
    rows.add_row("file size", f"{size['base'] / 1e6:.1f} MB", f"{size['adapter'] / 1e6:.1f} MB")
    rows.add_row("adapter/ and merged/ are of step", "", f"{report['published_step']}", end_section=True)
    rows.add_row(f"logits against the trained sharded model (at most {proof['tolerance']:.0e})", "", "", style="bold")
    rows.add_row("base + adapter in plain PEFT", "", f"{proof['adapter']:.1e}")
    rows.add_row("merged folder in plain transformers", "", f"{proof['merged']:.1e}")
    rows.add_row("base, for comparison", "", f"{proof['base']:.1e}")
    texts = f"{proof['texts']} of {proof['texts']}"
    rows.add_row("the same text in plain transformers", texts, texts, end_section=True)
    for name, spent in seconds.items():
        rows.add_row(name, "", f"{spent:.0f} s")
    rows.add_row("total", "", f"{sum(seconds.values()):.0f} s", style="bold")
    return rows


def examples_table(report: Mapping[str, Any]) -> Table:
    """Return a table of what the model writes for the first held-out verbs, before and after training."""
    rows = Table("", "what the model writes", title="The first held-out verbs, right or wrong", show_lines=True)
    for one in report["examples"]:
        right = one["after"].strip() == one["reference"].strip()
        lines = {"prompt": one["prompt"], "before": one["before"], "after": one["after"]}
        if not right:
            lines["right is"] = one["reference"]
        rows.add_row("\n".join(lines), "\n".join(shortened(text, 62) for text in lines.values()))
    return rows


def next_steps(out: Path) -> str:
    """Return commands to go on with, as text that can be pasted into a shell in the folder of the clone."""
    commands = [f"# {why}\n{command.format(out=out, mine=MINE)}" for why, command in NEXT]
    path = f"export PATH={Path(sys.executable).parent}:$PATH"
    return "\n".join(["# What next: paste any of these. docs/tutorial.md explains what has just run.", path, *commands])


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
    console.print(examples_table(report), "")
    console.print(table(report))
    console.print(f"loss picture: {out / 'run' / 'loss.png'}\nmerged model: {out / 'merged'}\n", soft_wrap=True)
    put(next_steps(out))
    if missed := shortfalls(report):
        sys.exit("report: " + "; ".join(missed))


if __name__ == "__main__":
    main()
