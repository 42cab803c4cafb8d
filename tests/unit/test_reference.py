"""The reference of the configuration and of the commands is complete, and its statements on keys are true."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import yaml
from pydantic import BaseModel
from typer.main import get_command
from typer.testing import CliRunner

from lowrank_dist.cli.main import app
from lowrank_dist.cli.reference import commands_to_markdown
from lowrank_dist.config.load import config_of
from lowrank_dist.config.reference import REQUIRED, KeyReference, reference, to_markdown
from lowrank_dist.config.schema import Config
from lowrank_dist.errors import ConfigError, UserError
from lowrank_dist.sections.scalars import Loader

runner = CliRunner()
REQUIRED_KEYS = {"model": {"path": "m"}, "data": {"train": "d"}, "output": {"dir": "o"}}


def leaves(model: BaseModel, name: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted name, value) of every key of a config."""
    for key in type(model).model_fields:
        value, dotted = getattr(model, key), f"{name}.{key}".lstrip(".")
        if isinstance(value, BaseModel):
            yield from leaves(value, dotted)
        else:
            yield dotted, value


def keys() -> dict[str, KeyReference]:
    return {key.name: key for section in reference() for key in section.keys}


def test_every_key_is_there_with_the_default_that_a_run_gets() -> None:
    found = keys()
    config = config_of(REQUIRED_KEYS, ["eval.generate={}", "data.eval=e", "train.steps=1"])
    given = {"model.path", "data.train", "output.dir", "eval.generate", "data.eval", "train.steps"}
    for name, value in leaves(config):
        key = found.pop(name)
        assert key.meaning
        if name not in given:
            read = yaml.load(key.default, Loader)  # noqa: S506, a SafeLoader
            assert (str(read) if key.type.startswith("path") and read else read) == value, name
    assert set(found) == {"eval.generate"}, "it is a section as well"


def test_what_is_required() -> None:
    assert {key.name for key in keys().values() if key.default == REQUIRED} == {
        "model.path",
        "data.train",
        "output.dir",
    }


@pytest.mark.parametrize(
    ("name", "type_", "allowed"),
    [
        ("method", "text", "`lora`, `full`, `adapter_h`, `adapter_l`, `prefix`, `prompt`"),
        ("lora.rank", "integer", "≥ 1, ≤ 1024"),
        ("lora.dropout", "number", "≥ 0, < 1"),
        ("lora.targets", "list of texts or text", ""),
        ("lora.rank_pattern", "mapping of texts to integers", "≥ 1, ≤ 1024"),
        ("prefix.width", "integer or null", "≥ 1, ≤ 65536"),
        ("engine.zero_stage", "integer", "`1`, `2`"),
        ("output.plot", "boolean", "`true`, `false`"),
        ("train.resume", "text or path", "`never`, `auto`"),
        ("data.eval", "path or null", ""),
        ("eval.generate", "mapping or null", ""),
        ("eval.generate.metrics", "list of texts", "`exact_match`, `bleu`, `rouge_l`"),
    ],
)
def test_type_and_allowed_values(name: str, type_: str, allowed: str) -> None:
    key = keys()[name]
    assert (key.type, key.allowed) == (type_, allowed)


def test_the_bounds_are_those_that_a_run_enforces() -> None:
    checked = 0
    for name, key in keys().items():
        section, _, rest = name.partition(".")
        if key.type.split()[0] not in ("integer", "number") or "." in rest or "≥" not in key.allowed:
            continue
        lowest = int(key.allowed.partition("≥ ")[2].split(",")[0])
        with pytest.raises(ConfigError, match=rest):
            config_of(REQUIRED_KEYS, [f"{section}.{rest}={lowest - 1}"])
        checked += 1
    assert checked > 20


def test_a_section_or_a_key_alone() -> None:
    (section,) = reference("eval.generate")
    assert (section.title, len(section.keys)) == ("eval.generate", 5)
    (section,) = reference("train.lr")
    assert [key.name for key in section.keys] == ["train.lr"]


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("trian", "train?"),
        ("lr", "train.lr?"),
        ("micro-batch", "train.micro_batch or eval.micro_batch?"),
        ("lora_r", "lora.rank"),
        ("zzz", ""),
    ],
)
def test_an_unknown_name_is_told_what_was_meant(name: str, meant: str) -> None:
    with pytest.raises(UserError) as error:
        reference(name)
    assert f"{name}: not a section" in str(error.value) and "the sections are model, lora" in str(error.value)
    assert (f"did you mean {meant}" in str(error.value)) if meant else ("did you mean" not in str(error.value))


def test_the_command() -> None:
    done = runner.invoke(app, ["config"])
    assert done.exit_code == 0
    assert all(name in done.output for name in keys())
    one = runner.invoke(app, ["config", "train.lr"])
    assert "train.lr  number: > 0  default 0.0002\n      peak learning rate above 0\n" in one.output
    assert "train.eps" not in one.output
    wrong = runner.invoke(app, ["config", "trian"])
    assert wrong.exit_code == 2 and wrong.stderr.startswith("error: trian: not a section")


def test_markdown_has_a_row_for_every_key() -> None:
    rows = [line for line in to_markdown(reference()).splitlines() if line.startswith("| `")]
    assert len(rows) == len(keys()) and all(row.count(" | ") == 4 for row in rows)
    assert set(Config.model_fields) - {"method"} <= {line[3:] for line in to_markdown(reference()).splitlines()}


def test_commands_have_a_row_for_every_option() -> None:
    text = commands_to_markdown(app)
    group: Any = get_command(app)
    for name, command in group.commands.items():
        assert f"## lowrank-dist {name}\n" in text
        named = {option for each in command.params for option in each.opts if option.startswith("-")}
        assert [option for option in named if option not in text] == []
    assert all(row.count("|") == 4 for row in text.splitlines() if row.startswith("| `"))
