"""Checks of a configuration that need the assembled parts or the state of the resumed run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lowrank_dist.checkpoint.training_state import DataState, TrainingState
from lowrank_dist.config import Config
from lowrank_dist.engine.evaluator import History, outdated_values
from lowrank_dist.engine.run_method import build_method
from lowrank_dist.engine.setting_notes import notes_on_best, notes_on_settings
from lowrank_dist.errors import UserError
from lowrank_dist.generate.metrics import DEFINITION
from lowrank_dist.model.load import check_model
from tests.tiny_models import make_tiny
from tests.unit.test_checkpoint_folder import state_of


def config_of(**sections: Any) -> Config:
    whole = {"model": {"path": "base"}, "data": {"train": "t", "eval": "e"}, "output": {"dir": "run"}}
    return Config.model_validate({**whole, **sections})


def test_a_dropout_that_would_round_to_everything_is_the_users_mistake(tmp_path: Path) -> None:
    architecture = check_model(make_tiny("qwen2", tmp_path / "base"), 1, 16)
    build_method(config_of(lora={"dropout": 0.9999}), architecture)
    with pytest.raises(UserError, match="lora.dropout: dropout probability 0.999999.*smaller"):
        build_method(config_of(lora={"dropout": 0.999999}), architecture)


@pytest.mark.parametrize(
    ("every", "save_every", "said"),
    [
        (None, None, None),
        (None, 3, None),
        (4, 2, None),
        (4, 4, None),
        (4, 6, "one of 12, 24, … and the last, since eval.every is 4 and output.save_every is 6"),
        (2, 6, "one of 6, 12, … and the last, since eval.every is 2 and output.save_every is 6"),
        (4, None, "the last, since eval.every is 4 and output.save_every is null"),
    ],
)
def test_evaluations_that_cannot_be_the_best(every: int | None, save_every: int | None, said: str | None) -> None:
    output = {"dir": "run", "save_every": save_every}
    lines = notes_on_best(config_of(eval={"every": every}, output=output), None, None)
    announced = "checkpoints/best can only be a step that is both evaluated and saved, "
    assert lines == ([announced + said] if said else [])
    assert not notes_on_best(config_of(eval={"every": every}, output=output, data={"train": "t"}), None, None)


SAVED = {"output": {"dir": "run", "save_every": 4}}


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({**SAVED, "eval": {"every": 4, "patience": 2}, "train": {"warmup_steps": 9}}, []),
        (
            {**SAVED, "eval": {"every": 4}, "train": {"warmup_steps": 20, "lr": 0.1}},
            [
                "train.warmup_steps is 20, but the run has 10 steps, so the learning rate rises until the end "
                "and reaches 0.05"
            ],
        ),
        (
            {"eval": {"every": 4}},
            [
                "output.save_every is null: the only checkpoint is that of the last step, so a run that is killed has "
                "to start from the beginning"
            ],
        ),
        (
            {"eval": {"every": 4}, "output": {"dir": "run", "save_every": 10}},
            [
                "output.save_every is 10 and the run has 10 steps: the only checkpoint is that of the last step, so a "
                "run that is killed has to start from the beginning"
            ],
        ),
        (SAVED, ["eval.every is null: data.eval is evaluated only before the first step and after the last step"]),
        (
            {**SAVED, "eval": {"every": 10, "at_start": False}},
            ["eval.every is 10 and the run has 10 steps: data.eval is evaluated only after the last step"],
        ),
        (
            {**SAVED, "eval": {"every": 4}, "data": {"train": "t"}},
            ["eval.every is 4, but data.eval is null, so nothing is evaluated"],
        ),
        ({**SAVED, "data": {"train": "t"}}, []),
        (
            {**SAVED, "eval": {"every": 4, "patience": 3}},
            ["eval.patience is 3 and has no effect: only 3 evaluations come before the last step"],
        ),
        (
            {**SAVED, "eval": {"every": 9, "patience": 1, "at_start": False}},
            ["eval.patience is 1 and has no effect: only 1 evaluation comes before the last step"],
        ),
    ],
)
def test_settings_without_effect_are_said_at_the_start(sections: dict[str, Any], said: list[str]) -> None:
    assert notes_on_settings(config_of(**sections), 10) == said


def test_a_run_that_goes_on_by_another_measure() -> None:
    asked = {"metrics": ["bleu"], "max_new_tokens": 4}
    config = config_of(eval={"generate": asked, "best": "bleu"})
    state = state_of(2)
    assert "eval.best is bleu, which was not measured up to step 2" in notes_on_best(config, state, None)[0]
    known = state_of_config(config, state)
    assert not notes_on_best(config, known, None)
    for key, value, noted in (("batch", 2, False), ("metrics", ["bleu", "rouge_l"], False), ("stop", ["#"], True)):
        other = config_of(eval={"generate": {**asked, key: value}, "best": "bleu"})
        assert bool(notes_on_best(other, known, None)) == noted


def state_of_config(config: Config, state: TrainingState) -> TrainingState:
    """Return the state of a run with this configuration, as this version saves it."""
    known = {"eval_metrics": {"bleu": {2: 1.0}}, "metric_definition": DEFINITION, "held_out": state.data}
    return state.model_copy(update={**known, "config": config.model_dump(mode="json")})


@pytest.mark.parametrize(
    ("change", "outdated", "said"),
    [
        ({}, (), None),
        ({"held_out": DataState(path="e", sha256="00", samples=3)}, ("loss", "bleu"), "eval loss, bleu up to step 2"),
        (
            {"config": {"eval": {"generate": {"max_new_tokens": 8}}}},
            ("bleu",),
            "measured with eval.generate {'max_new_",
        ),
        ({"metric_definition": 1}, ("bleu",), "by an earlier version of lowrank_dist"),
        ({"metric_definition": 1, "eval_metrics": {}}, (), None),
    ],
    ids=["the same", "another eval set", "other texts", "another definition", "nothing generated"],
)
def test_values_of_another_measure_are_not_held_against_new_ones(
    change: dict[str, Any], outdated: tuple[str, ...], said: str | None
) -> None:
    """Values of an old metric do not count: were they higher, no new step would be the best, and the run would stop."""
    config = config_of(eval={"generate": {"metrics": ["bleu"], "max_new_tokens": 4}, "best": "bleu"})
    state = state_of_config(config, state_of(2)).model_copy(update=change)
    held_out = state_of(2).data
    assert tuple(outdated_values(config, state, held_out)) == outdated
    lines = [line for line in notes_on_best(config, state, held_out) if "no longer count" in line]
    assert (said in lines[0] and lines[0].endswith("start from the next evaluation")) if said else lines == []
    history = History("bleu", state, outdated_values(config, state, held_out))
    history.add(4, {"loss": 9.0, "bleu": 0.5})
    expected = 4 if "bleu" in outdated or not state.eval_metrics else 2
    assert history.best_step == expected and history.without_better == (0 if expected == 4 else 1)
    assert history.values["loss"] == ({4: 9.0} if "loss" in outdated else {**state.eval_losses, 4: 9.0})
