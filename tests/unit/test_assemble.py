"""What a configuration says that only the parts, or the run that it goes on from, can judge."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lowrank_dist.config import Config
from lowrank_dist.engine.assemble import build_method
from lowrank_dist.engine.evaluator import notes_on_best
from lowrank_dist.errors import UserError
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
        (4, 6, "one of 12, 24, … and the last: eval.every is 4, output.save_every 6"),
        (2, 6, "one of 6, 12, … and the last: eval.every is 2, output.save_every 6"),
        (4, None, "the last: eval.every is 4, output.save_every null"),
    ],
)
def test_evaluations_that_cannot_be_the_best(every: int | None, save_every: int | None, said: str | None) -> None:
    output = {"dir": "run", "save_every": save_every}
    lines = notes_on_best(config_of(eval={"every": every}, output=output), None)
    announced = "checkpoints/best can only be a step that is both evaluated and saved, "
    assert lines == ([announced + said] if said else [])
    assert not notes_on_best(config_of(eval={"every": every}, output=output, data={"train": "t"}), None)


def test_a_run_that_goes_on_by_another_measure() -> None:
    asked = {"metrics": ["bleu"], "max_new_tokens": 4}
    config = config_of(eval={"generate": asked, "best": "bleu"})
    state = state_of(2)
    assert "eval.best is bleu, which was not measured up to step 2" in notes_on_best(config, state)[0]
    known = state.model_copy(update={"eval_metrics": {"bleu": {2: 1.0}}, "config": config.model_dump(mode="json")})
    assert not notes_on_best(config, known)
    for key, value, noted in (("batch", 2, False), ("metrics", ["bleu", "rouge_l"], False), ("stop", ["#"], True)):
        other = config_of(eval={"generate": {**asked, key: value}, "best": "bleu"})
        assert bool(notes_on_best(other, known)) == noted
