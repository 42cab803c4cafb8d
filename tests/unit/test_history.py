"""The best evaluation, the number of evaluations since it, and the checkpoints kept by it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lowrank_dist.checkpoint.training_state import LOSS, TrainingState, parse_state
from lowrank_dist.engine.checkpoint_writer import CheckpointWriter, Facts, Retention
from lowrank_dist.engine.evaluator import Evaluator, History, best_first
from lowrank_dist.engine.run_folder import RunFolder
from lowrank_dist.formats.provenance import Provenance
from tests.unit.test_checkpoint_faults import StandIn
from tests.unit.test_checkpoint_folder import SHAPES, state_of, tensors_of

VALUES = {0: 0.0, 2: 0.5, 4: 0.25, 6: 0.5, 8: 0.5}


def measured(step: int, **metrics: dict[int, float]) -> TrainingState:
    return state_of(step).model_copy(update={"eval_losses": {2: 3.0, 4: 2.0, 6: 2.0}, "eval_metrics": metrics})


def test_best_first() -> None:
    assert best_first(VALUES, "exact_match") == [2, 6, 8, 4, 0]
    assert best_first(VALUES, LOSS) == [0, 4, 2, 6, 8]
    assert best_first({}, LOSS) == []


@pytest.mark.parametrize(("name", "best", "without"), [("exact_match", 2, 3), (LOSS, 0, 4), ("bleu", None, 0)])
def test_evaluations_without_a_better(name: str, best: int | None, without: int) -> None:
    """The count is the same whether all values come one by one or some come from the resumed checkpoint."""
    whole = History(name, None)
    counts = []
    for step, value in VALUES.items():
        whole.add(step, {LOSS: value, "exact_match": value})
        counts.append(whole.without_better)
    assert (whole.best_step, counts[-1]) == (best, without)
    state = state_of(4).model_copy(
        update={
            "eval_losses": {step: VALUES[step] for step in (0, 2, 4)},
            "eval_metrics": {"exact_match": {step: VALUES[step] for step in (0, 2, 4)}},
        }
    )
    resumed = History(name, state)
    assert resumed.without_better == counts[2]
    for step in (6, 8):
        resumed.add(step, {LOSS: VALUES[step], "exact_match": VALUES[step]})
    assert (resumed.values, resumed.without_better) == (whole.values, without)
    assert state.eval_losses.keys() == {0, 2, 4}, "what was read is not written to"


def test_checkpoints_from_before_there_were_metrics_load() -> None:
    text = json.loads(measured(6, bleu={6: 1.0}).to_json())
    assert "begun" in text and "started_at" not in text, "a key of the file has another name"
    assert parse_state(json.dumps(text).encode()).evaluations["bleu"] == {6: 1.0}
    del text["eval_metrics"]
    old = parse_state(json.dumps(text).encode())
    assert old.eval_metrics == {} and old.evaluations == {LOSS: old.eval_losses}
    assert old.summary().keys() == measured(6, bleu={4: 1.0}).summary().keys()
    assert measured(6, bleu={6: 1.0}).summary()["eval_bleu"] == 1.0


def test_links_and_folders_follow_what_decides(tmp_path: Path) -> None:
    """After a change of the metric `best` is the best step by the new one; without a value for it there is no link."""
    folder = RunFolder(tmp_path)
    folder.checkpoints.mkdir()
    facts = Facts(Provenance("cd" * 32, "base", {}), state_of(2).data, None)

    def writer(by: str, resumed: TrainingState | None, last: int | None = None) -> CheckpointWriter:
        return CheckpointWriter(folder, StandIn(), SHAPES, facts, Retention(last, 1, by), resumed)

    def write(to: CheckpointWriter, state: TrainingState) -> tuple[str, set[str]]:
        to.write([tensors_of(state.step)], state, final=False)
        names = {path.name for path in folder.checkpoints.iterdir()}
        return (folder.checkpoints / "best").readlink().name if "best" in names else "", names - {"last", "best"}

    first = writer(LOSS, None)
    for step in (2, 4):
        write(first, measured(step))
    assert write(first, measured(6)) == ("step-4", {"step-2", "step-4", "step-6"})  # the earlier of equal values
    assert first.summary == "checkpoints/last: step 6; checkpoints/best: step 4, eval loss 2.0000"
    known = measured(6, rouge_l={2: 0.75, 4: 0.5, 6: 0.5})
    assert write(writer("rouge_l", known), known.model_copy(update={"step": 7}))[0] == "step-2"
    # No saved step has a value: no link, and no dangling link once the old folder is retired.
    unknown = writer("bleu", measured(7), last=1)
    assert write(unknown, measured(8)) == ("", {"step-8"}) and unknown.summary == "checkpoints/last: step 8"
    assert write(unknown, measured(9, bleu={9: 1.0})) == ("step-9", {"step-9"})


def test_an_old_checkpoint_that_is_gone_or_that_stays_fails_no_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = RunFolder(tmp_path)
    folder.checkpoints.mkdir()
    facts = Facts(Provenance("cd" * 32, "base", {}), state_of(2).data, None)
    writer = CheckpointWriter(folder, StandIn(), SHAPES, facts, Retention(1, 0, "bleu"), None)

    def write(step: int) -> set[str]:
        writer.write([tensors_of(step)], measured(step), final=False)
        assert (folder.checkpoints / "last").readlink().name == f"step-{step}"
        return {path.name for path in folder.checkpoints.iterdir()} - {"last"}

    assert write(2) == {"step-2"}
    shutil.rmtree(folder.checkpoints / "step-2")
    assert write(4) == {"step-4"} and writer.remarks == ""
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "rmtree", busy)
        assert "step-6" in write(6) and "step-4" in writer.remarks and "busy" in writer.remarks
    assert "step-8" in write(8) and writer.remarks == ""


def busy(path: Path, ignore_errors: bool = False) -> None:
    if not ignore_errors:
        raise OSError(f"{path} is busy")


def test_an_evaluation_counts_its_samples_by_microbatch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two batches, of seven samples in three microbatches and of three samples in one."""
    one: Any = SimpleNamespace(target_ids=torch.zeros(2))
    batches: Any = [SimpleNamespace(microbatches=[one] * count, samples=held) for count, held in ((3, 7), (1, 3))]
    run: Any = SimpleNamespace(phases=SimpleNamespace(enter=lambda phase: None), topology=SimpleNamespace())
    run.topology.dp_group = run.topology.world_group = None
    for name in ("all_reduce", "broadcast"):
        monkeypatch.setattr(f"lowrank_dist.engine.evaluator.dist.{name}", lambda *_, **__: None)
    evaluator, done = Evaluator.__new__(Evaluator), list[int]()
    evaluator._run, evaluator._engine = run, SimpleNamespace(device="cpu", loss=lambda microbatch: 3.0)  # type: ignore
    assert evaluator._mean_loss(batches, done.append) == 1.5
    assert done == [2, 4, 7, 10]
