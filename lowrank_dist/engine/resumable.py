"""The checkpoint that a run can resume from, and what must not have changed since. One process, without DeepSpeed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from lowrank_dist.checkpoint.folder import newest_checkpoint, read_checkpoint, step_folders
from lowrank_dist.checkpoint.training_state import DataState, TrainingState
from lowrank_dist.config import Config
from lowrank_dist.engine.run_folder import RunFolder
from lowrank_dist.errors import UserError
from lowrank_dist.formats.paths import resolve_link
from lowrank_dist.formats.provenance import fingerprint
from lowrank_dist.methods.registry import method_package

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


def checkpoint_to_resume(config: Config, folder: RunFolder, *, verify: bool = True) -> Resumption | None:
    """Return the checkpoint that train.resume asks for; None to start afresh.

    verify: compare its files with its manifest, which reads all of them.

    Raises UserError if the named checkpoint does not verify, if the run has newer ones, or if its base is not the one
    in model.path. Unless output.overwrite is set, also raises it if no checkpoint can be resumed and starting afresh
    would destroy a run: checkpoints of which none verifies, or the entries of `RunFolder.saved_run`.
    """
    read = partial(read_checkpoint, verify=verify)
    asked = config.train.resume
    if asked == "never":
        return None
    if asked == "auto":
        newest = newest_checkpoint(folder.checkpoints, read)
        messages = tuple(f"passed over: {reason}" for reason in newest.skipped)
        if newest.folder is None or newest.state is None:
            _require_fresh_start(config, folder, messages)
            return None
        found = Resumption(newest.folder, newest.state, messages)
    else:
        chosen = resolve_link(asked)
        found = Resumption(chosen, read(chosen), ())
        newer = [step for step in step_folders(folder.checkpoints) if step > found.state.step]
        if folder.holds(chosen) and newer:
            raise UserError(
                f"train.resume: {folder.checkpoints} has newer checkpoints than {chosen} (step-{newer[0]}), which "
                "would mix with those of this run; remove them, or choose another output.dir"
            )
    _require_same_base(config, found)
    return found


def _require_fresh_start(config: Config, folder: RunFolder, messages: tuple[str, ...]) -> None:
    """Raise UserError where starting afresh would destroy a run. messages: on the checkpoints passed over."""
    why = None
    if messages:
        why = f"none of the checkpoints in {folder.checkpoints} verifies ({'; '.join(messages)})"
    elif left := folder.saved_run():
        why = (
            f"{folder.checkpoints} has no checkpoint, but other files of a run that saved one remain "
            f"({', '.join(left)})"
        )
    if why is not None and not config.output.overwrite:
        raise UserError(
            f"train.resume: {why}; restore a checkpoint, choose another output.dir, or set output.overwrite=true "
            "to remove that run and start from the beginning"
        )


def _require_same_base(config: Config, resumption: Resumption) -> None:
    """Raise UserError where the checkpoint's base is not that of the run, unless resume_changes allows it."""
    state = resumption.state
    if "model.path" in config.train.resume_changes:
        return
    digest = fingerprint(config.model.path)
    if digest != state.base_fingerprint:
        changed = _changed_keys(complete(config, resumption), state)
        raise UserError(
            f"train.resume: {resumption.folder} was trained on another base than model.path {config.model.path} "
            f"(fingerprint {state.base_fingerprint[:12]}…, found {digest[:12]}…); give that base, unchanged"
            + (f". Changed as well: {_advice(config, changed)}" if changed else "")
        )


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
    _refuse_changes(config, resumption, changed, steps)


def require_same_settings(config: Config, resumption: Resumption) -> None:
    """Raise UserError as `require_same_run` does, but without comparing data, which would read all samples."""
    _refuse_changes(config, resumption, _changed_keys(config, resumption.state), config.train.steps)


def _refuse_changes(
    config: Config, resumption: Resumption, changed: Mapping[str, tuple[Any, Any]], steps: int | None
) -> None:
    """Raise UserError with the changed keys, and if the checkpoint is beyond `steps`, the end of the run."""
    state = resumption.state
    faults = [f"belongs to a run with other settings or data: {_advice(config, changed)}"] if changed else []
    if steps is not None and state.step > steps:
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
