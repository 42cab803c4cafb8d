"""Inspection of adapters, checkpoints, runs and Hugging Face models: their content, and whether they verify.

This file recognises the kind of a folder and inspects runs: config, progress, checkpoints and adapter. Inspection
changes nothing, reads no pickle and never loads a whole model.
"""

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lowrank_dist.arch.model_files import hub_hint
from lowrank_dist.checkpoint.inspect_trained import inspect_trained, step_number
from lowrank_dist.errors import UserError
from lowrank_dist.formats.atomic import is_temporary
from lowrank_dist.formats.foreign import refuse_foreign_folder
from lowrank_dist.formats.manifest import is_checkpoint
from lowrank_dist.formats.model_folder import INDEX_FILE, SINGLE_FILE
from lowrank_dist.formats.paths import FolderRemoved, detect_removal, real_path, require_copyable, resolve_link
from lowrank_dist.formats.report import Report, inspect_model
from lowrank_dist.methods.registry import METHOD_PACKAGES, method_package, method_package_of
from lowrank_dist.untrusted.files import LINKS, LONGEST_RECORD, read_lines
from lowrank_dist.untrusted.json import parse_json

ReadConfig = Callable[[Path], dict[str, Any]]
CONFIG, METRICS, CHECKPOINTS, ADAPTER = "config.yaml", "metrics.jsonl", "checkpoints", "adapter"
RUN_ENTRIES = (CONFIG, METRICS, CHECKPOINTS)
_SHOWN = ("modules", "parameters", "update_norm", "norm")
_LOOKS = 20  # attempts to read what a running job changes meanwhile
_ADAPTER_CONFIGS = sorted({each.files.published[0] for each in METHOD_PACKAGES if each.files.published})
_MODEL_FILES = ("config.json", SINGLE_FILE, INDEX_FILE, "pytorch_model.bin", "pytorch_model.bin.index.json")


def inspect_folder(folder: Path, base: Path | None = None, *, read_config: ReadConfig) -> Report:
    """Return the report on a folder. Faults in its content are the report's `problems`; they are never raised.

    A link is resolved once, and again only where its target was removed meanwhile, for example by a running job.

    base: the model to check an adapter against, instead of the one that it names. read_config: returns every key of a
    run's config.yaml, or raises ConfigError for errors in it.

    Raises UserError for a path that is no adapter, checkpoint, run or model folder, for a base that is no folder, and
    for a folder that is removed while it is read (FolderRemoved).
    """
    followed = base and resolve_link(base)
    return _retry_while_removed(folder, lambda found: _inspect(found, followed, read_config))


def _retry_while_removed(folder: Path, look: Callable[[Path], Report]) -> Report:
    """Return the report on a folder, read again where it was removed meanwhile.

    Raises FolderRemoved where it stays removed, or after `_LOOKS` attempts.
    """
    removed = None
    for _ in range(_LOOKS):
        try:
            with detect_removal(folder) as found:
                return look(found)
        except FolderRemoved as error:
            removed = error
            if not folder.exists():
                break
    assert removed is not None, "the loop ends without a report only after FolderRemoved"
    raise removed


def _inspect(folder: Path, base: Path | None, read_config: ReadConfig) -> Report:
    try:
        names = {path.name for path in folder.iterdir()}
    except OSError as error:
        raise UserError(f"{folder}: {error.strerror}; give an adapter, checkpoint, run or model folder") from error
    if base is not None and not base.is_dir():
        raise UserError(
            f"--base {base}: no such folder; give the Hugging Face folder of the base model{hub_hint(base)}"
        )
    if len(names & set(RUN_ENTRIES)) < 2:
        refuse_foreign_folder(folder)
    # A checkpoint of full fine-tuning is a model folder as well.
    package = method_package_of(folder)
    if package is not None and package.files.published or names & set(_MODEL_FILES) and is_checkpoint(folder):
        return inspect_trained(folder, base)
    # Two of three entries are enough, so that a run that lost one is still recognised and the loss reported.
    if len(names & set(RUN_ENTRIES)) >= 2:
        return inspect_run(folder, base, read_config)
    if names & set(_MODEL_FILES):
        if base is not None:
            raise UserError(
                f"{folder}: a model folder, but --base applies to an adapter, a checkpoint or a run; leave --base out"
            )
        return inspect_model(folder)
    raise UserError(
        f"{folder}: not an adapter or checkpoint (with {' or '.join(_ADAPTER_CONFIGS)}), a run (with "
        f"{', '.join(RUN_ENTRIES)}) or a Hugging Face model (with config.json); give one of these folders"
    )


def inspect_run(folder: Path, base: Path | None, read_config: ReadConfig) -> Report:
    """Return the report on a run.

    The base is checked for one adapter only: adapter/ if it exists, else that of checkpoints/last.
    """
    report = Report(folder, "run")
    config = report.read(folder / CONFIG, lambda: read_config(_require_in_run(folder / CONFIG, folder)))
    if config is not None:
        report.facts["config"] = config
    report.read(folder / METRICS, _metrics, folder, report)
    report.read(folder / CHECKPOINTS, _checkpoints, folder, report, base)
    return report


def _require_in_run(path: Path, folder: Path) -> Path:
    """Return a path of the run. Raises UserError where it is missing or a link leads out of the run."""
    if not path.exists():
        raise UserError(f"{path}: missing; copy the run completely")
    return require_copyable(path, folder)


def _metrics(folder: Path, report: Report) -> None:
    path = folder / METRICS
    if not path.exists():
        report.warnings.append(f"{path}: missing, because the run has not finished its first step")
        return
    last: dict[str, dict[str, Any]] = {}
    best: dict[str, Any] | None = None
    for record in _records(_require_in_run(path, folder), report):
        for name in ("loss", "eval_loss"):
            if name in record:
                last[name] = record
        if "eval_loss" in record and math.isfinite(record["eval_loss"]):
            best = record if best is None or record["eval_loss"] < best["eval_loss"] else best
    for name in ("loss", "eval_loss"):
        if name in last:
            report.facts.update({f"last_{name}": last[name][name], f"last_{name}_step": last[name]["step"]})
            if not math.isfinite(last[name][name]):
                report.warnings.append(f"{path}: the last {name} is {last[name][name]}; lower train.lr")
    if best is not None:
        report.facts.update({"best_eval_loss": best["eval_loss"], "best_eval_loss_step": best["step"]})


def _records(path: Path, report: Report) -> Iterator[dict[str, Any]]:
    """Yield the valid records. The first invalid line is a problem and ends them; a cut-off last line is a warning."""
    for number, line in read_lines(path, "remove the line", longest=LONGEST_RECORD):
        try:
            record = parse_json(line)
            for name in {"step", "loss", "eval_loss"} & record.keys() | {"step"}:
                if isinstance(record[name], bool) or not isinstance(record[name], int | float):
                    raise ValueError(f"{name} is not a number")
        except (ValueError, KeyError, AttributeError) as error:
            where = f"{path}:{number}"
            if line.endswith(b"\n"):
                report.problems.append(f"{where}: not a record of a run ({error!r}); remove the line")
                return
            report.warnings.append(f"{where}: the last line is cut off, because the run was killed while writing it")
            continue
        yield record


def _checkpoints(folder: Path, report: Report, base: Path | None) -> None:
    held = folder / CHECKPOINTS
    children, links = _listed(_require_in_run(held, folder))
    pointers = _pointers(links, children, report)
    for child in children:
        if is_temporary(child):
            report.warnings.append(
                f"{child}: being written, or left unfinished by a run that was killed; remove it if no run is "
                "training here"
            )
    numbered = [
        (step, child) for child in children if not child.is_symlink() and (step := step_number(child)) is not None
    ]
    steps = [child for _, child in sorted(numbered)]
    newest = steps[-1].name if steps else None
    if newest is not None and not os.path.lexists(held / "last"):
        report.warnings.append(f"{held / 'last'}: missing (killed while saving?); link it to {newest}")
    elif "last" in pointers and pointers["last"] != newest:
        report.warnings.append(f"{held / 'last'}: points to {pointers['last']}, but {newest} is newer")
    for name in LINKS:
        report.facts[name] = pointers[name] if name in pointers else "none"
    final = folder / ADAPTER
    report.facts["adapter"] = _final(final, report)
    chosen = final if final.exists() else held / (pointers["last"] if "last" in pointers else "")
    rows = []
    for path in [*steps, *([_require_in_run(final, folder)] if final.exists() else [])]:
        found = _trained(path, base, check_base=path == chosen)
        if found is None:
            continue
        report.problems.extend(found.problems)
        report.warnings.extend(found.warnings)
        facts = found.facts
        rows.append(
            {
                "folder": str(path.relative_to(folder)),
                "is": ", ".join(name for name, target in pointers.items() if path == held / target),
                **{key: facts[key] if key in facts else None for key in _SHOWN},
                "verifies": found.verifies,
            }
        )
        if path == final and "step" in facts:
            report.facts["adapter"] = f"written, step {facts['step']}"
        if path == chosen:
            labels = ("base_folder", "base_matches", "base_verifies", "base_parameters", "percent_of_base")
            report.facts.update({label: facts[label] for label in labels if label in facts})
    if rows:
        # Leave out columns that are empty for this method.
        empty = {key for key in _SHOWN if all(row[key] is None for row in rows)}
        report.tables["adapters"] = [{key: row[key] for key in row if key not in empty} for row in rows]


def _listed(held: Path) -> tuple[list[Path], dict[Path, Path]]:
    """Return the children of a folder of checkpoints, and link → target as they were while the folder was listed."""

    def links() -> dict[Path, Path]:
        return {held / name: resolve_link(held / name) for name in LINKS if os.path.lexists(held / name)}

    for _ in range(_LOOKS):
        before, children = links(), sorted(held.iterdir())
        if links() == before:
            break
    return children, before


def _trained(path: Path, base: Path | None, *, check_base: bool) -> Report | None:
    """Return the report on an adapter or a checkpoint of a run; None where the run has removed it meanwhile."""
    try:
        found = _retry_while_removed(path, lambda folder: inspect_trained(folder, base, check_base=check_base))
    except FolderRemoved:
        return None
    return found if path.exists() else None


def _final(adapter: Path, report: Report) -> str:
    if adapter.exists():
        return "written"
    config = report.facts.get("config")
    if config is not None and not method_package(config["method"]).files.published:
        return "none: every checkpoint of full fine-tuning is a model folder"
    return "not written: the run has not finished"


def _pointers(links: Mapping[Path, Path], children: Sequence[Path], report: Report) -> dict[str, str]:
    """Return `last` and `best` → the name of the step folder that each points to.

    A link to anything else than a step folder beside it is a problem. A folder in its place is a warning: it is a copy,
    made by a program that follows links.
    """
    beside = {real_path(child) for child in children if not child.is_symlink() and not child.is_file()}
    found = {}
    for link, target in links.items():
        if target == link and link.is_dir():
            report.warnings.append(
                f"{link}: a folder instead of a link, so it was copied with links followed and does not move with the "
                "run; remove it"
            )
        elif real_path(target) not in beside or step_number(target) is None:
            report.problems.append(f"{link}: points to {target}, which is not a step folder next to it; link it to one")
        else:
            found[link.name] = target.name
    return found
