"""export: the adapter unchanged beside a card, and what vLLM would serve wrongly refused with every reason at once."""

from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from lowrank_dist.checkpoint.folder import export
from lowrank_dist.cli.main import app
from lowrank_dist.errors import UserError
from lowrank_dist.formats.manifest import write_manifest
from tests.tiny_adapters import random_adapter, save_adapter
from tests.tiny_models import make_tiny


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("llama", tmp_path_factory.mktemp("llama"))


def test_exports_the_adapter_unchanged_and_nothing_else(base: Path, tmp_path: Path) -> None:
    source = save_adapter(tmp_path / "run/checkpoints/step-2", base, random_adapter(base))
    (source / "optimizer.safetensors").write_bytes(b"large")
    write_manifest(source)
    result = CliRunner().invoke(app, ["export", str(source), "--out", str(tmp_path / "out"), "--for", "vllm"])
    assert result.exit_code == 0, result.output
    names = {"adapter_config.json", "adapter_model.safetensors", "lowrank_dist.json"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names | {"README.md"}
    assert all((tmp_path / "out" / name).read_bytes() == (source / name).read_bytes() for name in names)
    with pytest.raises(UserError, match="already exists"):
        export(source, tmp_path / "out")
    with pytest.raises(UserError, match="checkpoints/best or .*checkpoints/last"):
        export(tmp_path / "run", tmp_path / "other")


def test_an_adapter_from_elsewhere(base: Path, tmp_path: Path) -> None:
    source = save_adapter(tmp_path / "adapter", base, random_adapter(base))
    (source / "lowrank_dist.json").unlink()
    export(source, tmp_path / "out")
    assert not (tmp_path / "out/lowrank_dist.json").exists()
    assert "## Training" not in (tmp_path / "out/README.md").read_text()


def test_vllm_reasons_come_together(base: Path, tmp_path: Path) -> None:
    sizes = random_adapter(base, lambda module: (40, 8.0) if "q_proj" in module else (2, 4.0))
    source = save_adapter(tmp_path / "adapter", base, replace(sizes, dropout=0.1))
    with pytest.raises(UserError) as caught:
        export(source, tmp_path / "out", vllm=True)
    for part in ("rank is 40", "--max-lora-rank 64", "rank_pattern", "alpha_pattern", "lowrank-dist merge"):
        assert part in str(caught.value)
    with pytest.raises(UserError, match="--max-rank 48: vLLM takes one of 8, 16"):
        export(source, tmp_path / "out", vllm=True, max_rank=48)
    assert not (tmp_path / "out").exists()
    alike = save_adapter(tmp_path / "alike", base, random_adapter(base, lambda module: (20, 8.0)))
    export(alike, tmp_path / "out", vllm=True, max_rank=32)
    assert "--max-lora-rank 32" in (tmp_path / "out/README.md").read_text()


@pytest.mark.parametrize("options", [["--for", "tgi"], ["--max-rank", "32"]])
def test_options_that_make_no_sense(base: Path, tmp_path: Path, options: list[str]) -> None:
    result = CliRunner().invoke(app, ["export", str(base), "--out", str(tmp_path / "out"), *options])
    assert result.exit_code == 2 and "error: --" in result.output
