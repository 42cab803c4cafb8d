"""Checkpoints of full fine-tuning: complete Hugging Face folders, written a tensor at a time."""

from __future__ import annotations

import gc
import json
import shutil
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from lowrank_dist.arch.config_json import read_architecture
from lowrank_dist.arch.tensors import hf_shapes
from lowrank_dist.checkpoint.folder import read_checkpoint
from lowrank_dist.cli.main import app
from lowrank_dist.errors import UserError
from lowrank_dist.formats.manifest import MANIFEST_FILE, write_manifest
from lowrank_dist.methods.full import files as whole_model
from lowrank_dist.methods.registry import method_package, method_package_of
from tests.tiny_adapters import inspected
from tests.tiny_learned import base_tensors, run_of, save_whole
from tests.tiny_models import FAMILY_NAMES, make_tiny
from tests.unit.test_inspect import assert_reported_broken, facts_of, same_in_text_and_json

INDEX = "model.safetensors.index.json"
IDS = torch.tensor([[7, 50, 3, 99, 12, 31]])


def trained_value(name: str, tensor: Tensor) -> Tensor:
    """Change a tensor by more than bf16's rounding, each tensor differently."""
    generator = torch.Generator().manual_seed(len(name))
    return tensor * 1.1 + 0.02 * torch.randn(tensor.shape, generator=generator)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("llama", tmp_path_factory.mktemp("models") / "base", max_shard_size="60KB")


def logits(folder: Path) -> Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, dtype="auto").eval()
    with torch.no_grad():
        return model(IDS).logits


def expected_logits(base: Path, dtype: torch.dtype) -> Tensor:
    """Return the logits of the base in transformers, with the same change made in place."""
    model = AutoModelForCausalLM.from_pretrained(base, local_files_only=True, dtype=dtype).eval()
    names = dict(model.named_parameters())
    with torch.no_grad():
        for name, tensor in base_tensors(base).items():
            names[name].copy_(trained_value(name, tensor))
        return model(IDS).logits


def unused_rows(base: Path) -> dict[str, int]:
    return {rule.hf: rule.row_offset for rule in read_architecture(base).tensors if rule.row_offset}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_transformers_loads_it(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Every family (tied and untied, GPT-2's transposed linears, OPT's positions) gives the trained model's bits."""
    base = make_tiny(family, tmp_path / "base", dtype=dtype)
    folder = save_whole(tmp_path / "step-3", base, trained_value, dtype)
    found = logits(folder)
    assert found.dtype == dtype and torch.equal(found, expected_logits(base, dtype))
    assert not torch.allclose(found, logits(base), atol=0.05), "nothing was trained"
    assert json.loads((folder / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (folder / name).read_bytes() == (base / name).read_bytes()
    assert read_checkpoint(folder).step == 3


def test_rows_that_no_position_uses_are_the_bases(tmp_path: Path) -> None:
    """No rank trains OPT's first two position rows: the stream has zeros there, which are not stored."""
    base = make_tiny("opt", tmp_path / "base")
    ((table, rows),) = unused_rows(base).items()

    def trained(name: str, tensor: Tensor) -> Tensor:
        changed = trained_value(name, tensor)
        if name == table:
            changed[:rows] = 0
        return changed

    folder = save_whole(tmp_path / "step-3", base, trained)
    found, before = (load_file(next(path.glob("model*.safetensors")))[table] for path in (folder, base))
    assert rows == 2 and before[:rows].any() and torch.equal(found[:rows], before[:rows])
    assert torch.equal(found[rows:], trained_value(table, base_tensors(base)[table])[rows:])


def test_shards_and_their_index(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = save_whole(tmp_path / "whole/step-1", base, trained_value)
    monkeypatch.setattr(whole_model, "SHARD_BYTES", 60_000)
    sharded = save_whole(tmp_path / "sharded/step-1", base, trained_value)
    shards = sorted(sharded.glob("model-*.safetensors"))
    assert len(shards) > 3 and shards[0].name == f"model-00001-of-{len(shards):05d}.safetensors"
    assert all(path.stat().st_size < 70_000 for path in shards)
    index = json.loads((sharded / INDEX).read_text())
    held = {name: path.name for path in shards for name in load_file(path)}
    assert index["weight_map"] == held and held.keys() == hf_shapes(read_architecture(base)).keys()
    assert index["metadata"]["total_size"] == sum(t.nbytes for path in shards for t in load_file(path).values())
    assert torch.equal(logits(sharded), logits(whole))
    # vLLM reads every file of a folder without an index, also the optimizer's.
    assert (whole / INDEX).is_file() and (whole / "optimizer.safetensors").is_file()


def most_alive(base: Path, folder: Path, hold: bool) -> int:
    """Return the most elements of streamed tensors that were alive at once while a checkpoint was written."""
    alive: dict[int, int] = {}
    most, held = 0, []

    def watched(stream: Iterator[Mapping[str, Tensor]]) -> Iterator[Mapping[str, Tensor]]:
        nonlocal most
        for batch in stream:
            for tensor in batch.values():
                alive[id(tensor)] = tensor.numel()
                weakref.finalize(tensor, alive.pop, id(tensor))
                if hold:
                    held.append(tensor)
            most = max(most, sum(alive.values()))
            yield batch
            del batch, tensor
            gc.collect()

    save_whole(folder, base, trained_value, wrap=watched)
    return most


def test_no_one_holds_it_whole(base: Path, tmp_path: Path) -> None:
    """The stream has one tensor at a time, freed when the next arrives: at most the two largest are alive."""
    sizes = [3 * torch.Size(shape).numel() for shape in hf_shapes(read_architecture(base)).values()]
    assert most_alive(base, tmp_path / "step-1", hold=False) <= 2 * max(sizes) < sum(sizes) / 2
    # The control: a writer that keeps every tensor.
    assert most_alive(base, tmp_path / "step-2", hold=True) == sum(sizes)


def test_what_rounding_loses_is_no_training(tmp_path: Path) -> None:
    base = make_tiny("qwen2", tmp_path / "base", dtype=torch.bfloat16)

    def little(name: str, tensor: Tensor) -> Tensor:
        return tensor * (1 + 1e-6)

    with pytest.raises(UserError, match="every weight in BF16 equals the base's, so training did not change the model"):
        save_whole(tmp_path / "step-1", base, little, torch.bfloat16)
    assert not (tmp_path / "step-1").exists() and {path.name for path in tmp_path.iterdir()} == {"base"}
    save_whole(tmp_path / "step-1", base, little, torch.float32)

    def one(name: str, tensor: Tensor) -> Tensor:
        return tensor * (2 if name == "model.norm.weight" else 1)

    save_whole(tmp_path / "step-2", base, one, torch.bfloat16)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_nothing_that_is_not_finite_is_written(base: Path, value: float, tmp_path: Path) -> None:
    def spoiled(name: str, tensor: Tensor) -> Tensor:
        changed = trained_value(name, tensor)
        if name == "model.norm.weight":
            changed[-1] = value
        return changed

    with pytest.raises(UserError, match=r"step-1: not written, because model.norm.weight has NaN or infinity; lower"):
        save_whole(tmp_path / "step-1", base, spoiled)
    assert not list(tmp_path.iterdir())


# --- the commands on such a checkpoint -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(base: Path) -> Path:
    return save_whole(base.parent / "checkpoints/step-7", base, trained_value)


def run(*arguments: object) -> tuple[int, str]:
    done = CliRunner().invoke(app, list(map(str, arguments)))
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done.exit_code, " ".join(done.output.split())


def test_inspect(base: Path, checkpoint: Path, tmp_path: Path) -> None:
    facts, report = facts_of(checkpoint), inspected(checkpoint)
    size = sum(torch.Size(shape).numel() for shape in hf_shapes(read_architecture(base)).values())
    assert (report.kind, facts["method"], facts["step"], facts["parameters"]) == ("checkpoint", "full", 7, size)
    assert facts["manifest"] == "verifies" and facts["base_matches"] is True and facts["percent_of_base"] == 100
    assert facts["family"] == "llama" and facts["dtypes"] == {"F32": size} and not report.warnings
    same_in_text_and_json(checkpoint)
    other = make_tiny("llama", tmp_path / "other", seed=1)
    assert_reported_broken(checkpoint, "lowrank_dist.json", "base_fingerprint", more=("--base", other))


def test_inspect_finds_what_is_broken(base: Path, checkpoint: Path, tmp_path: Path) -> None:
    spoiled = Path(shutil.copytree(checkpoint, tmp_path / "checkpoints/step-7"))
    path = next(spoiled.glob("model-*.safetensors"))
    tensors = load_file(path)
    tensors["model.norm.weight"][3] = torch.nan
    save_file(tensors, path, {"format": "pt"})
    assert_reported_broken(spoiled, path.name, "take another checkpoint")
    (spoiled / MANIFEST_FILE).unlink()
    write_manifest(spoiled)
    assert_reported_broken(spoiled, path.name, "model.norm.weight has NaN or infinity; take an earlier checkpoint")
    path.unlink()
    assert_reported_broken(spoiled, path.name, "missing")


def test_inspect_a_run(base: Path, tmp_path: Path) -> None:
    folder = run_of(tmp_path / "run", base, "full", lambda step: save_whole(step, base, trained_value))
    report = inspected(folder)
    assert report.verifies and not report.warnings, report.problems + report.warnings
    assert report.facts["adapter"] == "none: every checkpoint of full fine-tuning is a model folder"
    assert [row["folder"] for row in report.tables["adapters"]] == ["checkpoints/step-5", "checkpoints/step-10"]
    assert report.facts["base_matches"] is True and report.facts["config"]["method"] == "full"
    same_in_text_and_json(folder)


def test_export_and_merge_say_that_it_is_a_model_already(base: Path, checkpoint: Path, tmp_path: Path) -> None:
    assert method_package_of(checkpoint) == method_package("full")
    code, text = run("export", checkpoint, "--out", tmp_path / "out")
    assert code == 2 and "it is a whole model and already a Hugging Face folder; use it as it is" in text
    code, text = run("merge", "--base", base, "--adapter", checkpoint, "--out", tmp_path / "out")
    assert code == 2 and ": a whole model, not an adapter, so there is nothing to merge" in text
    assert not (tmp_path / "out").exists()
