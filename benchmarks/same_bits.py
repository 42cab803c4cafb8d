"""Hold this tree against another commit: every number and file that a user sees must be the same bits.

    python benchmarks/same_bits.py [--commit HEAD~1] [--families llama ...] [--methods lora ...] [--layouts tp2 ...]
                                   [--parts train plan before] [--allow PATTERN=REASON ...]

The commit is checked out and built in a worktree under build/. Both trees are driven through what a user calls,
launch/train.py and `python -m lowrank_dist.cli`, on the same tiny models and data. The parts:

- train: three steps of every family × method × layout, with dropout where the method has it. Compared are metrics.jsonl
  (loss and gradient norm of each step, evaluation loss), every file of the run folder (adapter, checkpoint with its
  optimizer moments, logits of the probe) and the dropout masks.
- plan: `plan --json` of the same runs, and of every built-in shape × method.
- before: a run of each method that the commit has written is resumed (at step 2 of 4), inspected, merged and exported
  by both trees.

A value is allowed to differ only by --allow, a pattern of CASE/VALUE with the reason. The exit code is 1 where another
one differs. --plant KEY=VALUE gives this tree alone an override: a comparison that finds nothing then is broken.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from record import machine, write_result
from rich.console import Console
from rich.table import Table
from run_bits import Difference, Values, compare, flat, folder_values, mask_values, replaced, text_values
from spawn import free_port
from trees import ROOT, checked_out

WORK = ROOT / "build" / "same_bits"
SECONDS = 180  # limit for one run of both trees at once, which takes about two
STEPS = 3
# tests/tiny_models.py
FAMILIES = (
    *("llama", "llama2", "granite", "mistral", "qwen2", "qwen3", "gpt2", "opt"),
    *("smollm3", "phi3", "seed_oss", "ministral3", "olmo2", "olmo3", "glm4", "gemma3_text"),
)
SHAPES = (
    *("gpt2-medium", "gpt2-large", "gpt3-175b", "llama-3-8b", "llama-3-70b", "llama-3-405b"),
    *("qwen2.5-7b", "qwen2.5-72b", "qwen3-32b", "ministral-3-14b", "gemma-3-27b", "olmo-3-32b"),
)
# Method → its config overrides.
METHODS = {
    "lora": ("lora.rank=4", "lora.alpha=8", "lora.dropout=0.1"),
    "full": (),
    "adapter_h": ("adapter.bottleneck=8",),
    "adapter_l": ("adapter.bottleneck=8", "adapter.placement=replicated"),
    "prefix": ("prefix.length=5", "prefix.width=12"),
    "prompt": ("prompt.length=5",),
}
# Layout → tensor- and data-parallel size; sequence parallelism is on where the first is above 1.
LAYOUTS = {"tp1": (1, 1), "tp2": (2, 1), "tp2_dp2": (2, 2)}
WORDS = ("cat", "dog", "ant", "hen", "rat", "pig")
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "DS_ACCELERATOR": "cpu",
    "TORCHDYNAMO_DISABLE": "1",
    "HF_HUB_OFFLINE": "1",
    "PYTHONHASHSEED": "0",
    "COLUMNS": "140",
}


class Side:
    """One of the two trees: its fork server, and the folder in which its programs run."""

    def __init__(self, name: str, tree: Path, plants: Sequence[str]) -> None:
        self.tree, self.folder, self.plants = tree, WORK / name, tuple(plants)
        self.folder.mkdir(parents=True)
        self.places = {str(self.folder): "FOLDER", str(WORK): "WORK", str(tree): "TREE"}
        self._log = (self.folder / "server.log").open("w")
        self._server = subprocess.Popen(
            [sys.executable, "-P", str(ROOT / "benchmarks" / "fork_server.py")],
            cwd=self.folder,
            env={**os.environ, **ENVIRONMENT, "PYTHONPATH": str(tree)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )

    def check_package(self) -> None:
        """Exit unless the server has imported this tree's package, not one that is installed."""
        package = Path(self._answer())
        if package != self.tree / "lowrank_dist":
            sys.exit(f"{self.folder.name}: the package of {package} was imported, not that of {self.tree}")

    def send(self, programs: Sequence[Mapping[str, Any]]) -> None:
        assert self._server.stdin is not None
        job = {"folder": str(self.folder), "seconds": SECONDS, "programs": list(programs)}
        self._server.stdin.write(json.dumps(job) + "\n")
        self._server.stdin.flush()

    def codes(self) -> list[int]:
        """Wait for the programs of the last job; return their exit codes."""
        codes: list[int] = self._answer()["codes"]
        return codes

    def close(self) -> None:
        assert self._server.stdin is not None
        self._server.stdin.close()
        self._server.wait()
        self._log.close()

    def _answer(self) -> Any:
        assert self._server.stdout is not None
        line = self._server.stdout.readline()
        if not line:
            sys.exit(f"the fork server of {self.tree} ended with code {self._server.wait()}: see {self._log.name}")
        return json.loads(line)


@dataclass(frozen=True)
class Case:
    """One thing that both trees do: training on `ranks` ranks (above 0), or a command (0).

    leaves: the output folder, below the side's. as_json: the output is a JSON value. planted: --plant applies to it.
    """

    name: str
    words: tuple[str, ...]
    ranks: int = 0
    leaves: str | None = None
    as_json: bool = False
    planted: bool = False
    watched: bool = False

    def programs(self, side: Side) -> list[dict[str, Any]]:
        """Return the processes of the case, one a rank."""
        out = side.folder / "said" / self.name
        out.parent.mkdir(parents=True, exist_ok=True)
        words = [*self.words, *(side.plants if self.planted else ())]
        if not self.ranks:
            command = ["-m", "lowrank_dist.cli", *words]
            return [{"words": command, "environment": {}, "output": f"{out}-0", "masks": None}]
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        meeting |= {"WORLD_SIZE": str(self.ranks), "LOCAL_WORLD_SIZE": str(self.ranks)}
        return [
            {
                "words": [str(side.tree / "launch" / "train.py"), *words],
                "environment": {**meeting, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                "output": f"{out}-{rank}",
                "masks": f"{out}-{rank}.masks" if self.watched else None,
            }
            for rank in range(self.ranks)
        ]

    def values(self, side: Side, codes: Sequence[int]) -> Values:
        """Return the values of the case's output. Of training's stdout only an error counts: the rest reports speed."""
        out = side.folder / "said" / self.name
        values = {f"exit code {rank}": str(code) for rank, code in enumerate(codes)}
        said = {suffix: replaced(Path(f"{out}-0{suffix}").read_text(), side.places) for suffix in (".out", ".err")}
        if self.as_json and codes == [0]:
            values |= {f"json{name}": value for name, value in flat(json.loads(said[".out"]))}
        elif not self.ranks:
            values |= {f"stdout{name}": value for name, value in text_values(said[".out"])}
        if not self.ranks or any(codes):
            values |= {f"stderr{name}": value for name, value in text_values(said[".err"])}
        if self.leaves is not None:
            values |= folder_values(side.folder / self.leaves, side.places)
        if self.watched:
            values |= mask_values([Path(f"{out}-{rank}.masks") for rank in range(self.ranks)])
        return values


def prepare(families: Sequence[str]) -> None:
    """Write the models, once for both trees, their data, and a configuration for each family."""
    sys.path.append(str(ROOT))
    from transformers.utils.logging import disable_progress_bar

    from tests.tiny_models import make_tiny

    disable_progress_bar()
    for name, count in (("train", 22), ("eval", 9)):
        rows = [
            {"prompt": f"{WORDS[i % 6]} {'x' * (i % 5)}:", "completion": f"{WORDS[i % 6]} " * (i % 4 + 1)}
            for i in range(count)
        ]
        (WORK / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for family in families:
        sections = {
            "model": {"path": str(make_tiny(family, WORK / "models" / family)), "device": "cpu"},
            "data": {"train": str(WORK / "train.jsonl"), "eval": str(WORK / "eval.jsonl"), "max_length": 48},
            "train": {"steps": STEPS, "global_batch": 8, "micro_batch": 2, "lr": 1e-2, "weight_decay": 0.01},
            "eval": {"micro_batch": 4},
            "output": {"dir": "runs/unnamed", "tensorboard": False, "plot": False, "probe": 3},
        }
        (WORK / f"{family}.yaml").write_text(yaml.safe_dump(sections, sort_keys=False))


def job(family: str, method: str, layout: str) -> tuple[str, ...]:
    """Return the configuration and overrides of a run."""
    tensor, data = LAYOUTS[layout]
    size = (f"parallel.tensor={tensor}", f"parallel.data={data}")
    return (str(WORK / f"{family}.yaml"), f"method={method}", *METHODS[method], *size)


def train_case(family: str, method: str, layout: str, dtype: str) -> Case:
    name = f"train/{family}/{method}/{layout}"
    words = (*job(family, method, layout), f"model.dtype={dtype}", f"output.dir=runs/{name}")
    tensor, data = LAYOUTS[layout]
    return Case(name, words, tensor * data, f"runs/{name}", planted=True, watched=True)


def plan_cases(families: Sequence[str], methods: Sequence[str], layouts: Sequence[str]) -> Iterator[Case]:
    """Return plans of the runs that are trained, and of every built-in shape on four nodes."""
    for layout in layouts:
        tensor, data = LAYOUTS[layout]
        machines = ("--gpus-per-node", str(tensor * data), "--target-share", "0.5")
        for family in families:
            for method in methods:
                words = ("plan", *job(family, method, layout), *machines, "--json")
                yield Case(f"plan/{family}/{method}/{layout}", words, as_json=True)
    for shape in SHAPES:
        for method in methods:
            words = ("plan", shape, f"method={method}", "--nodes", "4", "--json")
            yield Case(f"plan/{shape}/{method}", words, as_json=True)


def before_cases(method: str) -> Iterator[Case]:
    """Return the cases on the commit's run in runs/before/METHOD; the copy that stopped at step 2 is in …-resumed."""
    run = f"runs/before/{method}"
    yield Case(f"before/{method}/resume", before_words(method, f"{run}-resumed"), 2, f"{run}-resumed", planted=True)
    for what in ("", "/adapter", "/checkpoints/last"):
        yield Case(f"before/{method}/inspect{what}", ("inspect", run + what, "--modules", "--json"), as_json=True)
    base, out = str(WORK / "models" / "llama"), f"made/{method}"
    merge = ("merge", "--base", base, "--adapter", f"{run}/adapter", "--out", f"{out}-merged")
    yield Case(f"before/{method}/merge", merge, leaves=f"{out}-merged")
    export = ("export", f"{run}/checkpoints/last", "--out", f"{out}-exported")
    yield Case(f"before/{method}/export", export, leaves=f"{out}-exported")


def before_words(method: str, folder: str) -> tuple[str, ...]:
    length = ("train.steps=4", "output.save_every=2", "output.keep_last=null", "train.resume=auto")
    return (*job("llama", method, "tp2"), *length, f"output.dir={folder}")


def write_before(ours: Side, commit: Side, method: str) -> None:
    """Let the commit train a run of four steps; copy it to both sides, whole and as it was after step 2."""
    case = Case(f"before/{method}/written", before_words(method, f"runs/before/{method}"), 2)
    commit.send(case.programs(commit))
    if any(commit.codes()):
        sys.exit(f"the commit cannot train {method}: see {commit.folder / 'said' / case.name}-0.err")
    run = commit.folder / "runs" / "before" / method
    for side in (ours, commit):
        whole = side.folder / "runs" / "before" / method
        if not whole.exists():
            shutil.copytree(run, whole, symlinks=True)
        stopped = whole.with_name(f"{method}-resumed")
        shutil.copytree(run, stopped, symlinks=True)
        shutil.rmtree(stopped / "checkpoints" / "step-4")
        shutil.rmtree(stopped / "adapter", ignore_errors=True)
        for link in ("last", "best"):
            (stopped / "checkpoints" / link).unlink(missing_ok=True)
            (stopped / "checkpoints" / link).symlink_to("step-2")


def hold(case: Case, ours: Side, commit: Side) -> tuple[Values, Values]:
    """Let both trees run the case at the same time; return the values of each."""
    sides = (ours, commit)
    for side in sides:
        side.send(case.programs(side))
    codes = [side.codes() for side in sides]
    mine, theirs = (case.values(side, ended) for side, ended in zip(sides, codes, strict=True))
    if case.ranks and any(map(any, codes)):
        # Two trees that fail alike have shown nothing.
        for values, ended in ((mine, codes[0]), (theirs, codes[1])):
            values["trained"] = f"no: exit codes {ended}, see {WORK}/*/said/{case.name}-0.err"
    if case.watched and "lora.dropout=0.1" in case.words and not any("/rank 0: seed" in name for name in mine):
        theirs["masks"], mine["masks"] = "drawn", "none was seen: benchmarks/fork_server.py does not know the class"
    return mine, theirs


def unmet(values: Values) -> bool:
    """Return whether a run that should have trained did not."""
    return values.get("trained", "").startswith("no")


def refused(name: str, values: Values) -> str | None:
    """Return the last line of a command's error, where it ended with one; None where it succeeded."""
    if values.get("exit code 0") == "0" or name.endswith("/resume") or name.startswith("train/"):
        return None
    lines = [value for key, value in values.items() if key.startswith("stderr")]
    return lines[-1] if lines else "no message"


def shown(value: str | None) -> str:
    return "absent" if value is None else value if len(value) <= 60 else f"{value[:28]} … {value[-28:]}"


def print_differences(console: Console, found: Sequence[Difference], limit: int) -> None:
    table = Table("what differs", "ours", "commit", "allowed because", title=f"{len(found)} values differ")
    for difference in found[:limit]:
        table.add_row(difference.name, shown(difference.ours), shown(difference.theirs), difference.reason or "—")
    console.print(table)
    if len(found) > limit:
        console.print(f"… and {len(found) - limit} more, in the result file")


def allowances(texts: Sequence[str]) -> dict[str, str]:
    """Return pattern → reason of each PATTERN=REASON."""
    allowed = {}
    for text in texts:
        pattern, _, reason = text.partition("=")
        if not pattern or not reason.strip():
            raise argparse.ArgumentTypeError(f"--allow {text}: give PATTERN=REASON; a difference needs its reason")
        allowed[pattern] = reason.strip()
    return allowed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--commit", default="HEAD~1")
    parser.add_argument("--families", nargs="+", default=list(FAMILIES), choices=FAMILIES)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--layouts", nargs="+", default=list(LAYOUTS), choices=list(LAYOUTS))
    parser.add_argument("--parts", nargs="+", default=["train", "plan", "before"], choices=["train", "plan", "before"])
    parser.add_argument("--dtype", default="fp32", choices=["fp32", "bf16"])
    parser.add_argument("--allow", nargs="+", default=[], metavar="PATTERN=REASON")
    parser.add_argument("--plant", nargs="+", default=[], metavar="KEY=VALUE")
    parser.add_argument("--out", type=Path, default=None, help="folder for the result (default: benchmarks/results)")
    args = parser.parse_args()
    try:
        allowed = allowances(args.allow)
    except argparse.ArgumentTypeError as error:
        parser.error(str(error))
    started_on, started, console = machine(), time.monotonic(), Console(width=160)
    tree, commit_name = checked_out(args.commit)
    shutil.rmtree(WORK, ignore_errors=True)
    ours, commit = Side("ours", ROOT, args.plant), Side("commit", tree, ())
    prepare(sorted({*args.families, "llama"}))
    for side in (ours, commit):
        side.check_package()

    results: tuple[dict[str, Values], dict[str, Values]] = ({}, {})
    for case in cases(args, ours, commit):
        results[0][case.name], results[1][case.name] = hold(case, ours, commit)
        same = results[0][case.name] == results[1][case.name] and not unmet(results[0][case.name])
        print(f"{time.monotonic() - started:6.1f} s  {'same' if same else 'DIFFERS'}  {case.name}", flush=True)
    for side in (ours, commit):
        side.close()
    count, found = compare(*results, allowed)
    failed = [name for name, values in results[0].items() if unmet(values)]
    bad = [difference for difference in found if not difference.reason]
    if found:
        print_differences(console, bad + [difference for difference in found if difference.reason], 40)
    for name in failed:
        console.print(f"{name}: {results[0][name]['trained']}", soft_wrap=True)
    # Equal refusals show less than equal results, so they are listed.
    refusals = {name: said for name, values in results[0].items() if (said := refused(name, values)) is not None}
    for name, said in refusals.items():
        console.print(f"refused: {name}: {shown(said)}", soft_wrap=True)
    facts = {
        **{"commit": commit_name, "parts": args.parts, "dtype": args.dtype, "planted": args.plant},
        **{"cases": len(results[0]), "values": count, "seconds": round(time.monotonic() - started, 1)},
        "not_trained": failed,
        "refused": refusals,
        "differences": [vars(difference) for difference in found],
    }
    write_result("same_bits", started_on, facts, *([args.out] if args.out else []))
    print(f"same_bits={'no' if bad or failed else 'yes'} cases={len(results[0])} values={count} differ={len(bad)}")
    return 1 if bad or failed else 0


def cases(args: argparse.Namespace, ours: Side, commit: Side) -> Iterator[Case]:
    """Yield every case that was asked for, in order; the commit's runs are written when their turn comes."""
    if "before" in args.parts:
        for method in args.methods:
            write_before(ours, commit, method)
            yield from before_cases(method)
    if "plan" in args.parts:
        yield from plan_cases(args.families, args.methods, args.layouts)
    if "train" in args.parts:
        for layout in args.layouts:
            for family in args.families:
                for method in args.methods:
                    yield train_case(family, method, layout, args.dtype)


if __name__ == "__main__":
    sys.exit(main())
