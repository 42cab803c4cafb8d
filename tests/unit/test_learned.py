"""Folders of prefixes, prompts and adapter layers: reading back, export, inspection and refusals."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from lowrank_dist.arch.config_json import read_architecture
from lowrank_dist.cli.main import app
from lowrank_dist.errors import UserError
from lowrank_dist.methods.bottleneck.files import read_bottlenecks, write_bottlenecks
from lowrank_dist.methods.prompt_files import read_prompt_learning, write_prompt_learning
from lowrank_dist.methods.registry import method_package, method_package_of
from tests.tiny_adapters import inspected, random_adapter, save_adapter
from tests.tiny_learned import (
    BOTTLENECK,
    LENGTH,
    layers,
    learned,
    provenance,
    run_of,
    save_checkpoint,
    save_learned,
)
from tests.tiny_models import make_tiny
from tests.unit.test_inspect import assert_reported_broken, facts_of, same_in_text_and_json, show

METHODS = ("prefix", "prompt", "adapter_h", "adapter_l")
VIRTUAL, LAYERS = METHODS[:2], METHODS[2:]
WEIGHTS = {
    **dict.fromkeys(VIRTUAL, "adapter_model.safetensors"),
    **dict.fromkeys(LAYERS, "bottleneck_model.safetensors"),
}
CONFIGS = {**dict.fromkeys(VIRTUAL, "adapter_config.json"), **dict.fromkeys(LAYERS, "bottleneck_config.json")}


def read(folder: Path, method: str) -> object:
    return read_prompt_learning(folder) if method in VIRTUAL else read_bottlenecks(folder)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("qwen3", tmp_path_factory.mktemp("models") / "base")


@pytest.fixture(params=METHODS)
def method(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def folder(base: Path, method: str, tmp_path: Path) -> Path:
    return save_learned(tmp_path / "saved", base, method)


def run(*arguments: object) -> tuple[int, str]:
    done = CliRunner().invoke(app, list(map(str, arguments)))
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done.exit_code, done.output


# --- reading ---------------------------------------------------------------------------------------------------------


def test_what_is_written_is_read(base: Path, method: str, folder: Path) -> None:
    if method in VIRTUAL:
        found, expected = read_prompt_learning(folder), learned(base, method)
        assert torch.equal(found.embeddings, expected.embeddings)
        assert replace(found, embeddings=None) == replace(expected, embeddings=None)
        assert method_package_of(folder) == method_package(method)
    else:
        found, expected = read_bottlenecks(folder), layers(base, method)
        assert found.config == expected.config and found.tensors.keys() == expected.tensors.keys()
        assert all(torch.equal(found.tensors[name], tensor) for name, tensor in expected.tensors.items())
        assert method_package_of(folder) == method_package(method)


def test_published_formulas(base: Path) -> None:
    """|Θ| by Hu et al. 2021, section 5.1, for the H, m, L and heads of the tiny model."""
    sizes = read_architecture(base)
    hidden, depth, m = sizes.hidden, len(sizes.layers), BOTTLENECK
    found = {method: layers(base, method).tensors.values() for method in LAYERS}
    counts = {method: sum(tensor.numel() for tensor in tensors) for method, tensors in found.items()}
    assert counts["adapter_h"] == 2 * depth * (2 * hidden * m + m + hidden)
    assert counts["adapter_l"] == depth * (2 * hidden * m + m + hidden) + 2 * depth * hidden
    assert learned(base, "prefix").embeddings.numel() == LENGTH * 2 * depth * sizes.kv_heads * sizes.head_dim
    assert learned(base, "prompt").embeddings.numel() == LENGTH * hidden


def change(folder: Path, method: str, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / WEIGHTS[method])
    edit(tensors)
    save_file(tensors, folder / WEIGHTS[method], {"format": "pt"})


def first(tensors: dict[str, torch.Tensor]) -> str:
    return min(tensors)


def nan(folder: Path, method: str) -> None:
    change(folder, method, lambda tensors: tensors[first(tensors)].view(-1)[-1:].fill_(torch.nan))


def shape(folder: Path, method: str) -> None:
    change(folder, method, lambda tensors: tensors.update({first(tensors): tensors[first(tensors)][:-1].clone()}))


def missing(folder: Path, method: str) -> None:
    change(folder, method, lambda tensors: tensors.update(other=tensors.pop(first(tensors))))


def integers(folder: Path, method: str) -> None:
    change(folder, method, lambda tensors: tensors.update({first(tensors): tensors[first(tensors)].int()}))


def pickle(folder: Path, method: str) -> None:
    (folder / WEIGHTS[method]).rename(folder / "adapter_model.bin")


def link_out(folder: Path, method: str) -> None:
    path = folder / WEIGHTS[method]
    path.rename(folder.parent / "outside")
    path.symlink_to(folder.parent / "outside")


def half(folder: Path, method: str) -> None:
    path = folder / WEIGHTS[method]
    path.write_bytes(path.read_bytes()[:-8])


def config_of_text(folder: Path, method: str) -> None:
    (folder / CONFIGS[method]).write_text("{")


def config_of_a_list(folder: Path, method: str) -> None:
    (folder / CONFIGS[method]).write_text("[]")


def config_value(folder: Path, method: str) -> None:
    path = folder / CONFIGS[method]
    key = "num_virtual_tokens" if method in VIRTUAL else "bottleneck"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: True}))


def config_size(folder: Path, method: str) -> None:
    path = folder / CONFIGS[method]
    key = "num_virtual_tokens" if method in VIRTUAL else "bottleneck"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: 4}))


def config_of_a_billion(folder: Path, method: str) -> None:
    path = folder / CONFIGS[method]
    key = "token_dim" if method in VIRTUAL else "layers"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: 10**9}))


def no_config(folder: Path, method: str) -> None:
    (folder / CONFIGS[method]).unlink()


DAMAGE = {
    nan: "has NaN or infinity",
    shape: "asks for",
    missing: "asks for",
    integers: "asks for",
    link_out: "a link to a file outside its folder",
    half: "truncated or not a safetensors file",
    config_value: "num_virtual_tokens|bottleneck",
    config_size: "asks for",
    config_of_a_billion: "asks for|layers",
    no_config: " wrote the folder",
}


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.__name__)
def test_damaged_folders_are_refused(folder: Path, method: str, damage: Callable[[Path, str], None]) -> None:
    """Reader and inspect refuse with file and reason; both accept the folder before it is damaged."""
    read(folder, method)
    damage(folder, method)
    with pytest.raises(UserError, match=DAMAGE[damage]) as caught:
        read(folder, method)
    assert str(folder) in str(caught.value)
    assert_reported_broken(
        folder, str(folder), *([] if damage in (config_value, config_of_a_billion) else [DAMAGE[damage]])
    )


@pytest.mark.parametrize("damage", [config_of_text, config_of_a_list], ids=lambda damage: damage.__name__)
def test_a_config_that_is_none(folder: Path, method: str, damage: Callable[[Path, str], None]) -> None:
    damage(folder, method)
    with pytest.raises(UserError, match=CONFIGS[method]):
        read(folder, method)
    assert_reported_broken(folder, CONFIGS[method])


def test_a_pickle_is_never_read(base: Path, tmp_path: Path) -> None:
    for method in VIRTUAL:
        folder = save_learned(tmp_path / method, base, method)
        (folder / "adapter_model.bin").write_bytes(b"beside")
        read(folder, method)
        (folder / "adapter_model.bin").unlink()
        pickle(folder, method)
        with pytest.raises(UserError, match="a pickle file, which is never read"):
            read(folder, method)
        assert_reported_broken(folder, "a pickle file, which is never read")


def test_prefixes_that_are_not_ours_to_read(base: Path, tmp_path: Path) -> None:
    """PEFT's own prefixes with their MLP inside, and those of an encoder-decoder."""
    folder = save_learned(tmp_path / "saved", base, "prefix")
    path = folder / CONFIGS["prefix"]
    good = json.loads(path.read_text())
    path.write_text(json.dumps({**good, "num_transformer_submodules": 2}))
    with pytest.raises(UserError, match="num_transformer_submodules is not 1"):
        read(folder, "prefix")
    path.write_text(json.dumps({**good, "peft_type": "P_TUNING"}))
    with pytest.raises(UserError, match="peft_type is 'P_TUNING'"):
        read(folder, "prefix")
    path.write_text(json.dumps({**good, "peft_type": None}))
    with pytest.raises(UserError, match="peft_type must be text, not None"):
        read(folder, "prefix")
    path.write_text(json.dumps(good))
    change(folder, "prefix", lambda tensors: tensors.update({"transform.0.weight": torch.zeros(2, 2)}))
    with pytest.raises(UserError, match="transform.0.weight"):
        read(folder, "prefix")


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_nothing_that_is_not_finite_is_written(base: Path, method: str, value: float, tmp_path: Path) -> None:
    if method in VIRTUAL:
        drawn = learned(base, method)
        drawn.embeddings[0, -1] = value
        write = write_prompt_learning
    else:
        drawn = layers(base, method)
        drawn.tensors["layers.1.mlp.up.bias"][-1] = value
        write = partial(write_bottlenecks, trained=False)
    with pytest.raises(UserError, match=": not written, because .* has NaN or infinity; lower train.lr"):
        write(tmp_path, drawn, provenance(base, method))
    assert not list(tmp_path.iterdir())


def test_untrained_layers_are_not_written(base: Path, tmp_path: Path) -> None:
    for method in LAYERS:
        drawn = layers(base, method)
        for name, tensor in drawn.tensors.items():
            if ".up." in name:
                tensor.zero_()
        with pytest.raises(UserError, match="every up-projection is zero"):
            write_bottlenecks(tmp_path, drawn, provenance(base, method), trained=True)
        drawn.tensors["layers.1.mlp.up.bias"][-1] = 1e-30
        write_bottlenecks(tmp_path, drawn, provenance(base, method), trained=True)
        for path in tmp_path.iterdir():
            path.unlink()


# --- inspect ---------------------------------------------------------------------------------------------------------


def test_inspect_an_adapter(base: Path, method: str, folder: Path, tmp_path: Path) -> None:
    facts, report = facts_of(folder), inspected(folder)
    tensors = load_file(folder / WEIGHTS[method])
    assert (report.kind, facts["method"], facts["base"]) == ("adapter", method, str(base))
    assert facts["parameters"] == sum(tensor.numel() for tensor in tensors.values())
    assert facts["bytes"] == (folder / WEIGHTS[method]).stat().st_size and facts["dtypes"] == ["F32"]
    counted = [tensor.double().flatten() for name, tensor in tensors.items() if method in VIRTUAL or ".up." in name]
    assert facts["norm"] == pytest.approx(torch.cat(counted).norm().item(), rel=1e-12)
    assert facts["base_matches"] is True and facts["percent_of_base"] > 0 and facts["config"] == {"method": method}
    same_in_text_and_json(folder)
    # Another base of the same sizes, and one of other sizes.
    twin = make_tiny("qwen3", tmp_path / "twin", seed=1)
    assert_reported_broken(folder, "lowrank_dist.json", "base_fingerprint", "--base", more=("--base", twin))
    deeper = make_tiny("qwen3", tmp_path / "deeper", num_hidden_layers=3)
    assert_reported_broken(folder, CONFIGS[method], "give the model that it was trained on", more=("--base", deeper))


def test_inspect_a_checkpoint(base: Path, method: str, tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path / "checkpoints/step-7", base, method)
    facts = facts_of(folder)
    assert (inspected(folder).kind, facts["method"], facts["step"]) == ("checkpoint", method, 7)
    assert facts["manifest"] == "verifies" and facts["base_matches"] is True
    (folder / "optimizer.safetensors").write_bytes(b"x")
    assert_reported_broken(folder, "optimizer.safetensors", "1 bytes, the manifest has")


def test_inspect_a_run(base: Path, method: str, tmp_path: Path) -> None:
    run_folder = run_of(tmp_path / "run", base, method, lambda folder: save_checkpoint(folder, base, method))
    save_learned(run_folder / "adapter", base, method)
    report = inspected(run_folder)
    assert report.verifies and not report.warnings, report.problems + report.warnings
    assert report.facts["config"]["method"] == method and report.facts["adapter"] == "written, step 4"
    assert not {"lora", "adapter", "prefix", "prompt"} - {method.split("_")[0]} & report.facts["config"].keys()
    rows = report.tables["adapters"]
    assert [row["folder"] for row in rows] == ["checkpoints/step-5", "checkpoints/step-10", "adapter"]
    assert all(row["parameters"] and row["norm"] and "update_norm" not in row for row in rows)
    assert report.facts["base_matches"] is True
    same_in_text_and_json(run_folder)
    nan(run_folder / "adapter", method)
    assert_reported_broken(run_folder, "adapter", "has NaN or infinity")


def test_untrained_layers_are_a_warning(base: Path, tmp_path: Path) -> None:
    folder = save_learned(tmp_path / "saved", base, "adapter_h")
    change(folder, "adapter_h", lambda tensors: [t.zero_() for name, t in tensors.items() if ".up." in name])
    code, text = show(folder)
    assert code == 0 and "warning: " in text and "it is untrained and changes nothing" in text


# --- export and merge ------------------------------------------------------------------------------------------------


def test_export_takes_it_out_of_a_checkpoint(base: Path, method: str, tmp_path: Path) -> None:
    source, out = save_checkpoint(tmp_path / "checkpoints/step-7", base, method), tmp_path / "out"
    code, text = run("export", source, "--out", out)
    assert code == 0 and str(out) in text
    names = {CONFIGS[method], WEIGHTS[method], "lowrank_dist.json"}
    assert {path.name for path in out.iterdir()} == names | {"README.md"}
    assert all((out / name).read_bytes() == (source / name).read_bytes() for name in names)
    read(out, method)
    card = (out / "README.md").read_text()
    size = sum(tensor.numel() for tensor in load_file(out / WEIGHTS[method]).values())
    assert f"{size:,} parameters" in card and "lowrank-dist generate" in card and "| Step | 4 |" in card
    assert "vLLM does not serve it" in card and "lowrank-dist merge" not in card and "LoRA adapter" not in card
    assert ("PeftModel" in card) == (method in VIRTUAL)
    front = yaml.safe_load(card.split("---")[1])
    assert front["library_name"] == ("peft" if method in VIRTUAL else "lowrank_dist") and "lora" not in front["tags"]


def test_export_says_what_vllm_does_not_serve(folder: Path, method: str, tmp_path: Path) -> None:
    code, text = run("export", folder, "--out", tmp_path / "out", "--for", "vllm")
    assert code == 2 and "vLLM serves no adapters but LoRA" in " ".join(text.split())
    assert not (tmp_path / "out").exists()


def test_merge_says_why_it_cannot(base: Path, folder: Path, method: str, tmp_path: Path) -> None:
    why = {"prefix": "more keys and values", "prompt": "more embeddings"}.get(
        method, "adapter layers, whose nonlinearity"
    )
    for more in ((), ("--verify",)):
        code, text = run("merge", "--base", base, "--adapter", folder, "--out", tmp_path / "out", *more)
        said = " ".join(text.split())
        assert code == 2 and why in said and "cannot be merged" in said and "missing" not in said, text
    assert not (tmp_path / "out").exists()


def test_a_lora_adapter_is_still_what_it_was(base: Path, tmp_path: Path) -> None:
    """The control: low-rank updates are accepted by the commands that refuse the other methods' folders."""
    folder = save_adapter(tmp_path / "lora", base, random_adapter(base))
    assert method_package_of(folder) == method_package("lora") and method_package_of(tmp_path) is None
    assert method_package_of(base) == method_package("full")
    assert facts_of(folder)["method"] == "lora"
    assert run("export", folder, "--out", tmp_path / "exported", "--for", "vllm")[0] == 0
    assert run("merge", "--base", base, "--adapter", folder, "--out", tmp_path / "merged")[0] == 0
    code, text = run("merge", "--base", base, "--adapter", shutil.copytree(base, tmp_path / "copy"), "--out", "x")
    assert code == 2 and "a whole model, not an adapter" in " ".join(text.split())
