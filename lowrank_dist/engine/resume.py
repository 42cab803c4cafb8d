"""Resuming from a checkpoint: find it, check that the run is still the same, load Θ into ZeRO's partitions."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from lowrank_dist.backend.devices import restore_generators
from lowrank_dist.checkpoint.folder import newest_checkpoint, read_checkpoint, step_folders
from lowrank_dist.checkpoint.training_state import KINDS, DataState, OptimizerReader, TrainingState, parse_state
from lowrank_dist.config import Config
from lowrank_dist.engine.gathering import BATCH_ELEMENTS
from lowrank_dist.engine.run_folder import RunFolder
from lowrank_dist.engine.zero import ZeroOptimiser
from lowrank_dist.errors import UserError
from lowrank_dist.formats.manifest import OPTIMIZER_FILE
from lowrank_dist.formats.paths import resolve_link
from lowrank_dist.formats.provenance import fingerprint
from lowrank_dist.methods.registry import method_package
from lowrank_dist.parallel.theta import Theta, copy_from_whole
from lowrank_dist.parallel.topology import Topology

# Keys that a resumed run may change freely: it still trains the same Θ on the same samples. Data files and base are
# compared by content, and the tokenizer through its tokens. A section stands for all its keys except engine.clip.
_FREE_SECTIONS = ("parallel", "engine", "eval", "output")
_FREE_KEYS = (
    *("model.path", "model.device", "model.load", "model.vocab_multiple"),
    *("data.train", "data.eval", "data.tokenizer"),
    *("train.micro_batch", "train.log_every", "train.resume", "train.resume_changes"),
    "adapter.placement",
)


@dataclass(frozen=True)
class Resumption:
    """The checkpoint that a run resumes from. messages: the newer checkpoints that were passed over, and why."""

    folder: Path
    state: TrainingState
    messages: tuple[str, ...]


def find_resumption(config: Config, folder: RunFolder, topology: Topology) -> Resumption | None:
    """Return the checkpoint that train.resume asks for; None to start afresh. Collective: rank 0 finds and verifies it.

    Raises UserError on every rank if the named checkpoint does not verify, if the run has newer ones, or if its base is
    not the one in model.path. Where no checkpoint can be resumed, starting afresh would destroy what a run has left:
    checkpoints, where there are some but none verifies, or the entries of `RunFolder.saved_run`. That is a UserError
    too, unless output.overwrite is set.
    """
    if config.train.resume == "never":
        return None
    answer = from_rank_0(lambda: _look(config, folder), topology)
    messages = tuple(f"passed over: {reason}" for reason in answer["skipped"])
    if answer["state"] is None:
        why = None
        if messages:
            why = f"none of the checkpoints in {folder.checkpoints} verifies ({'; '.join(messages)})"
        elif left := answer["saved_run"]:
            why = (
                f"{folder.checkpoints} has no checkpoint, but other files of a run that saved one remain "
                f"({', '.join(left)})"
            )
        if why is not None and not config.output.overwrite:
            raise UserError(
                f"train.resume: {why}; restore a checkpoint, choose another output.dir, or set output.overwrite=true "
                "to remove that run and start from the beginning"
            )
        return None
    return Resumption(Path(answer["folder"]), parse_state(answer["state"].encode()), messages)


def started_at(resumption: Resumption | None, topology: Topology) -> datetime:
    """Return the time at which the run began, the same on every rank and after every resume. Collective.

    A chat template that reads the clock gets this time; otherwise ranks and resumed runs would train different texts.
    It is rank 0's current time where there is no checkpoint, or an old one that does not hold it.
    """
    told = from_rank_0(lambda: {"present": datetime.now().isoformat(timespec="seconds")}, topology)
    kept = None if resumption is None else resumption.state.started_at
    return kept or datetime.fromisoformat(told["present"])


def _look(config: Config, folder: RunFolder) -> dict[str, Any]:
    asked = config.train.resume
    assert asked != "never"
    if asked == "auto":
        found = newest_checkpoint(folder.checkpoints)
        chosen, state, skipped = found.folder, found.state, found.skipped
    else:
        chosen, skipped = resolve_link(asked), ()
        state = read_checkpoint(chosen)
        newer = [step for step in step_folders(folder.checkpoints) if step > state.step]
        if folder.holds(chosen) and newer:
            raise UserError(
                f"train.resume: {folder.checkpoints} has newer checkpoints than {chosen} (step-{newer[0]}), which "
                "would mix with those of this run; remove them, or choose another output.dir"
            )
    if chosen is not None and state is not None and "model.path" not in config.train.resume_changes:
        digest = fingerprint(config.model.path)
        if digest != state.base_fingerprint:
            changed = _changed_keys(complete(config, Resumption(chosen, state, ())), state)
            raise UserError(
                f"train.resume: {chosen} was trained on another base than model.path {config.model.path} "
                f"(fingerprint {state.base_fingerprint[:12]}…, found {digest[:12]}…); give that base, unchanged"
                + (f". Changed as well: {_advice(config, changed)}" if changed else "")
            )
    return {
        "folder": str(chosen),
        "state": state and state.to_json(),
        "skipped": list(skipped),
        "saved_run": [] if state else folder.saved_run(),
    }


def from_rank_0(ask: Callable[[], dict[str, Any] | None], topology: Topology) -> dict[str, Any]:
    """Call `ask` on rank 0 and return its answer, sent as JSON, on every rank. Collective.

    A UserError or OSError of `ask` is raised on every rank, as UserError.
    """
    text = b""
    if topology.world_group.rank() == 0:
        try:
            answer = ask() or {}
        except UserError as error:
            answer = {"error": str(error)}
        except OSError as error:
            answer = {"error": f"train.resume: {error}"}
        text = json.dumps(answer).encode()
    size = torch.tensor([len(text)], dtype=torch.int64)
    dist.broadcast(size, 0, group=topology.host_group)
    data = torch.frombuffer(bytearray(text or bytes(int(size))), dtype=torch.uint8)
    dist.broadcast(data, 0, group=topology.host_group)
    answer = json.loads(data.numpy().tobytes())
    if "error" in answer:
        raise UserError(answer["error"])
    return answer


def complete(config: Config, resumption: Resumption | None) -> Config:
    """Return the config with its method's section completed by the starting adapter or, on resume, the checkpoint.

    A resumed run does not read the adapter that it once started from; it may be gone.
    """
    own, section = method_package(config.method), config.own_section
    if resumption is None:
        return config.with_own_section(own.files.complete(section, config.model.path))
    saved = None if own.section is None else resumption.state.config.get(own.section)
    return config.with_own_section(section.resumed(saved)) if isinstance(saved, dict) else config


def require_same_run(
    config: Config, resumption: Resumption, data: DataState, held_out: DataState | None, steps: int
) -> None:
    """Raise UserError, naming every changed key, where resuming would not give the result of an uninterrupted run.

    Also raises it where the checkpoint's step is beyond the run's last. One error names everything.
    """
    state = resumption.state
    changed = _changed_keys(config, state)
    for key, before, now in (("data.train", state.data, data), ("data.eval", state.held_out, held_out)):
        if (before and before.sha256) != (now and now.sha256) and key not in config.train.resume_changes:
            changed[key] = (_content(before), _content(now))
    faults = [f"belongs to a run with other settings or data: {_advice(config, changed)}"] if changed else []
    if state.step > steps:
        length = "train.epochs" if config.train.steps is None else "train.steps"
        faults.append(f"is at step {state.step}, but the run ends at step {steps}; raise {length}")
    if faults:
        raise UserError(f"train.resume: {resumption.folder} {'. It '.join(faults)}")


def _changed_keys(config: Config, state: TrainingState) -> dict[str, tuple[Any, Any]]:
    """Return key → (value in the checkpoint, value now) for the changed keys that are neither free nor allowed."""
    old, new = flat_keys(state.config), flat_keys(config.read_keys())
    return {
        key: (old[key], new[key])
        for key in new
        if key in old and old[key] != new[key] and not _is_free(key) and key not in config.train.resume_changes
    }


def _advice(config: Config, changed: Mapping[str, tuple[Any, Any]]) -> str:
    """Return the changed keys with their values, those that can never change, and the override that allows the others.

    The override replaces the list that the config has, so it repeats the keys that are allowed already.
    """
    listed = "; ".join(f"{key} was {before} and is now {now}" for key, (before, now) in sorted(changed.items()))
    own = method_package(config.method).section
    shaping = {"method", *(f"{own}.{each}" for each in config.own_section.shaping)}
    never = sorted(shaping & changed.keys())
    others = sorted(changed.keys() - shaping)
    allow = f"'train.resume_changes=[{', '.join(dict.fromkeys([*config.train.resume_changes, *others]))}]'"
    if not never:
        return f"{listed}. Set them back, or allow the change with {allow}"
    fixed = f"{' and '.join(never)} cannot change, since the checkpoint's tensors would not fit"
    allowed = f"; allow the change of {' and '.join(others)} with {allow}" if others else ""
    return f"{listed}. Set them back: {fixed}{allowed}. For a new run, choose another output.dir"


def _is_free(key: str) -> bool:
    return key in _FREE_KEYS or (key.partition(".")[0] in _FREE_SECTIONS and key != "engine.clip")


def _content(data: DataState | None) -> str:
    return "none" if data is None else f"{data.path} ({data.samples} samples, tokens of SHA-256 {data.sha256[:12]}…)"


def flat_keys(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the nested mapping of `Config.read_keys` as "section.key" → value."""
    flat: dict[str, Any] = {}
    for name, values in config.items():
        flat |= (
            {f"{name}.{key}": value for key, value in values.items()} if isinstance(values, dict) else {name: values}
        )
    return flat


def restore(
    resumption: Resumption, theta: Theta, optimiser: ZeroOptimiser, topology: Topology, device: torch.device
) -> None:
    """Set masters, moments, step count and random generators from the checkpoint. Collective.

    This works at any topology and ZeRO stage. Rank 0 reads and broadcasts a few tensors at a time, so other nodes need
    not see the run folder. Raises UserError on every rank for a file that cannot be read or does not fit.
    """
    shapes, coordinates = theta.all_shapes(), topology.coordinates
    opened: list[OptimizerReader] = []

    def open_file() -> None:
        opened.append(OptimizerReader(resumption.folder / OPTIMIZER_FILE, shapes))

    from_rank_0(open_file, topology)
    for batch in theta.batches(BATCH_ELEMENTS):
        whole = {
            name: torch.empty(len(KINDS), *shape)
            for number in batch
            for name, shape in theta.trained[number].shapes.items()
        }

        def read(whole: Mapping[str, torch.Tensor] = whole) -> None:
            for name, tensor in whole.items():
                tensor.copy_(opened[0].get(name))

        from_rank_0(read, topology)
        for tensor in whole.values():
            dist.broadcast(tensor, 0, group=topology.host_group)
        for number in batch:
            parameter, slices = theta.trained[number].parameter, theta.trained[number].shard_at(coordinates).slices
            values = torch.zeros(len(KINDS), *parameter.shape, device=parameter.device)
            for kind in range(len(KINDS)):
                copy_from_whole(slices, {name: tensor[kind] for name, tensor in whole.items()}, values[kind])
            optimiser.restore(number, values)
    optimiser.restored(resumption.state.updates_made)
    theta.refresh()
    try:
        restore_generators(resumption.state.rng, device)
    except (ValueError, TypeError, KeyError, RuntimeError) as error:
        raise UserError(
            f"{resumption.folder}: the states of the random number generators cannot be restored ({error}); take "
            "another checkpoint"
        ) from error
