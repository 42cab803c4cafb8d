"""The Python API: `import lowrank_dist` loads nothing, the commands go through its functions, errors are UserErrors."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

import lowrank_dist
from tests.typed_api import learning_rate, message_of
from tests.unit.test_architecture_rules import ROOT, loaded_by

RUN = """
model: {path: base, device: cpu}
data: {train: train.jsonl}
output: {dir: out}
"""


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(RUN)
    return path


# --- the package -----------------------------------------------------------------------------------------------------


def test_importing_it_loads_nothing() -> None:
    code = """
import lowrank_dist
assert lowrank_dist.__version__
assert [name for name in sys.modules if name.startswith("lowrank_dist")] == ["lowrank_dist"]
"""
    heavy = ("torch", "transformers", "pydantic", "yaml", "numpy", "safetensors", "rich")
    assert loaded_by(code, *heavy) == []
    assert loaded_by(f"{code}\nlowrank_dist.load_config", *heavy) == ["pydantic", "yaml"], "the control"


def test_every_public_name_is_there() -> None:
    for name in lowrank_dist.__all__:
        value = getattr(lowrank_dist, name)
        assert value is getattr(lowrank_dist, name) and name in dir(lowrank_dist)
        assert name == "__version__" or value.__doc__ and value.__module__.startswith("lowrank_dist."), name
        # A room of the same name would take its place when it is imported.
        assert not (ROOT / "lowrank_dist" / name).exists()
    with pytest.raises(AttributeError, match="module 'lowrank_dist' has no attribute 'load_confg'"):
        lowrank_dist.load_confg  # noqa: B018


def test_names_for_type_checkers_are_those_at_run_time() -> None:
    """`from lowrank_dist.config import load_config` for mypy, and the same module in the table of late imports."""
    source = (ROOT / "lowrank_dist" / "__init__.py").read_text()
    for name, module in lowrank_dist._MODULES.items():
        (line,) = [line for line in source.splitlines() if line.lstrip().startswith(f"from lowrank_dist.{module} im")]
        assert name in line.partition(" import ")[2].split(", "), line
    assert {*lowrank_dist._MODULES, "__version__"} == set(lowrank_dist.__all__)
    assert lowrank_dist.__all__ == sorted(lowrank_dist.__all__)


def test_types_go_with_the_package() -> None:
    assert (ROOT / "lowrank_dist" / "py.typed").is_file() and "py.typed" in (ROOT / "pyproject.toml").read_text()


# --- load_config -----------------------------------------------------------------------------------------------------


def test_load_config(config_file: Path) -> None:
    config = lowrank_dist.load_config(str(config_file), ["train.lr=1e-3", "method=prefix"])
    assert (config.train.lr, config.method, config.model.path) == (1e-3, "prefix", Path("base"))
    assert config == importlib.import_module("lowrank_dist.config").read_arguments(
        ["train.lr=1e-3", str(config_file), "--method", "prefix"]
    )
    assert learning_rate(config_file) == 1e-3


def test_a_path_is_no_override(tmp_path: Path) -> None:
    """A folder such as `lr=1` is a path, where a command line takes it for an override."""
    folder = tmp_path / "train.lr=1"
    folder.mkdir()
    (folder / "run.yaml").write_text(RUN)
    assert lowrank_dist.load_config(folder / "run.yaml").train.lr == 2e-4


def test_a_wrong_config_says_what_and_where(config_file: Path, tmp_path: Path) -> None:
    config_file.write_text(RUN + "train: {learning_rate: 1}\n")
    assert f"{config_file}:5: train.learning_rate: unknown key" in message_of(str(config_file))
    assert "nowhere.yaml" in message_of(str(tmp_path / "nowhere.yaml"))
    config_file.write_text(RUN)
    with pytest.raises(lowrank_dist.ConfigError, match="command line: other.yaml is not section.key=value — give over"):
        lowrank_dist.load_config(config_file, ["other.yaml"])
