"""The error of a run that cannot resume: it names every changed key, and an override that works when it is pasted."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from lowrank_dist.config import Config
from lowrank_dist.config.load import config_of
from lowrank_dist.engine.resumable import Resumption, require_same_run
from lowrank_dist.engine.run_folder import RunFolder
from lowrank_dist.errors import UserError
from tests.unit.test_checkpoint_folder import state_of

REQUIRED: dict[str, dict[str, object]] = {"model": {"path": "b"}, "data": {"train": "t"}, "output": {"dir": "r"}}
BEFORE = config_of({**REQUIRED, "train": {"steps": 4}}, [])


def refusal(config: Config, *, step: int = 2, steps: int = 4, **changes: Any) -> str:
    """Return the error of a run that resumes from a checkpoint of BEFORE; empty where it may resume."""
    state = state_of(2).model_copy(update={"config": BEFORE.read_keys(), "step": step})
    data = state.data.model_copy(update=changes)
    try:
        require_same_run(config, Resumption(Path("run/checkpoints/step-2"), state, ()), data, None, steps)
    except UserError as error:
        return str(error)
    return ""


def changed(*overrides: str) -> Config:
    return config_of({**REQUIRED, "train": {"steps": 4}}, overrides)


def test_the_advised_override_allows_all_changes() -> None:
    """It also lists the keys that were allowed before, since an override replaces the file's list."""
    overrides = ["train.steps=8", "train.lr=0.1", "train.seed=1", "train.resume_changes=[train.seed, train.steps]"]
    for given in (overrides, overrides[:3]):
        said = refusal(changed(*given), steps=8, sha256="other")
        (advised,) = shlex.split(said[said.index("'train.resume_changes") :].split("]'")[0] + "]'")
        assert refusal(changed(*given, advised), steps=8, sha256="other") == ""
        # The control: a key that is left out of it is refused.
        assert "train.lr was" in refusal(changed(*given, advised.replace("train.lr, ", "").replace(", train.lr", "")))


def test_a_key_that_can_never_change_is_named_and_not_advised() -> None:
    said = refusal(changed("lora.rank=4", "lora.targets=[q_proj]", "train.lr=0.1"))
    assert "lora.rank was 8 and is now 4; lora.targets was all-linear and is now ['q_proj']; " in said
    assert "train.lr was 0.0002 and is now 0.1" in said
    assert "lora.rank and lora.targets cannot change, since the checkpoint's tensors would not fit" in said
    assert "allow the change of train.lr with 'train.resume_changes=[train.lr]'" in said
    said = refusal(changed("method=prompt"))
    assert "method cannot change" in said and "train.resume_changes" not in said


def test_an_end_before_the_checkpoint_is_told_with_the_rest() -> None:
    said = refusal(changed("train.steps=1", "train.lr=0.1"), steps=1)
    assert "train.lr was" in said and "It is at step 2, but the run ends at step 1; raise train.steps" in said
    assert re.search(r"step-2 is at step 2, but the run ends at step 1", refusal(BEFORE, steps=1))
    assert refusal(BEFORE) == ""


def test_a_folder_that_holds_a_run_names_what_resumes_it(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").touch()
    with pytest.raises(UserError, match="already has a run .*; resume it with train.resume=auto, choose another"):
        RunFolder.prepare(tmp_path, "never", {}, overwrite=False)


def test_a_folder_whose_run_cannot_be_resumed_says_so(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(changed("lora.rank=4").to_yaml())
    for overrides, said in (
        (["method=prefix"], "which these settings cannot resume (method was lora and is now prefix); choose another"),
        (["lora.rank=8"], "which these settings cannot resume (lora.rank was 4 and is now 8); choose another"),
        (["lora.rank=4", "train.lr=0.1"], "already has a run (config.yaml); resume it with train.resume=auto"),
        (["lora.init_from=adapter"], "already has a run (config.yaml); resume it with train.resume=auto"),
    ):
        with pytest.raises(UserError, match=re.escape(said)):
            RunFolder.prepare(tmp_path, "never", {}, overwrite=False, shaping=changed(*overrides).shaping)
