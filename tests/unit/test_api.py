"""The Python API: `import lowrank_dist` loads no heavy package, commands call its functions, errors are UserErrors."""

from __future__ import annotations

import importlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import lowrank_dist
from lowrank_dist.cli.main import app
from tests.tiny_adapters import random_adapter, save_adapter
from tests.tiny_models import make_tiny
from tests.typed_api import largest, learning_rate, merged, message_of, plan_of, problems_of
from tests.unit.test_architecture_rules import ROOT, loaded_by

RUN = """
model: {path: base, device: cpu}
data: {train: train.jsonl}
output: {dir: out}
"""


# Function of the API → its module, and a command that calls it.
COMMANDS = {
    "load_config": ("lowrank_dist.config", ["slurm", "run.yaml", "--nodes", "1", "--gpus-per-node", "1"]),
    "plan": ("lowrank_dist.engine.plan", ["plan", "llama-3-8b"]),
    "inspect": ("lowrank_dist.engine.inspection", ["inspect", "adapter"]),
    "merge": ("lowrank_dist.merging.merge", ["merge", "--base", "base", "--adapter", "adapter", "--out", "out"]),
}


def run(*words: object) -> str:
    """Run a command of lowrank-dist and return what it prints on stdout."""
    done = CliRunner().invoke(app, [*map(str, words)])
    assert done.exit_code == 0, done.output
    return done.stdout


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(RUN)
    return path


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("llama", tmp_path_factory.mktemp("models") / "base")


@pytest.fixture(scope="module")
def adapter(base: Path) -> Path:
    return save_adapter(base.parent / "adapter", base, random_adapter(base))


def test_overrides_that_are_no_list_are_named(config_file: Path) -> None:
    with pytest.raises(lowrank_dist.ConfigError, match="overrides: the text 'lora.rank=4' is no list"):
        lowrank_dist.load_config(config_file, "lora.rank=4")


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
        # A package of the same name would replace the function once it is imported.
        assert not (ROOT / "lowrank_dist" / name).exists()
    with pytest.raises(AttributeError, match="module 'lowrank_dist' has no attribute 'load_confg'"):
        lowrank_dist.load_confg  # noqa: B018


def test_names_for_type_checkers_are_those_at_run_time() -> None:
    """The imports that mypy sees name the same modules as the table of late imports."""
    source = (ROOT / "lowrank_dist" / "__init__.py").read_text()
    for name, module in lowrank_dist._MODULES.items():
        (line,) = [line for line in source.splitlines() if line.lstrip().startswith(f"from lowrank_dist.{module} im")]
        assert name in line.partition(" import ")[2].split(", "), line
    assert {*lowrank_dist._MODULES, "__version__"} == set(lowrank_dist.__all__)
    assert lowrank_dist.__all__ == sorted(lowrank_dist.__all__)


def test_types_go_with_the_package() -> None:
    assert (ROOT / "lowrank_dist" / "py.typed").is_file() and "py.typed" in (ROOT / "pyproject.toml").read_text()


@pytest.mark.parametrize("name", COMMANDS)
def test_the_command_calls_the_function(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, words = COMMANDS[name]
    assert getattr(importlib.import_module(module), name) is getattr(lowrank_dist, name)

    def refuse(*_: object, **__: object) -> None:
        raise lowrank_dist.UserError(f"{name} was called")

    monkeypatch.setattr(f"{module}.{name}", refuse)
    done = CliRunner().invoke(app, words)
    assert (done.exit_code, done.stderr) == (2, f"error: {name} was called\n")


# --- load_config -----------------------------------------------------------------------------------------------------


def test_load_config(config_file: Path) -> None:
    config = lowrank_dist.load_config(str(config_file), ["train.lr=1e-3", "method=prefix"])
    assert (config.train.lr, config.method, config.model.path) == (1e-3, "prefix", Path("base"))
    assert config == importlib.import_module("lowrank_dist.config").read_arguments(
        ["train.lr=1e-3", str(config_file), "--method", "prefix"]
    )
    assert learning_rate(config_file) == 1e-3


def test_a_path_is_no_override(tmp_path: Path) -> None:
    """A folder named like an override, such as `lr=1`, is a path here. The command line takes it for an override."""
    folder = tmp_path / "train.lr=1"
    folder.mkdir()
    (folder / "run.yaml").write_text(RUN)
    assert lowrank_dist.load_config(folder / "run.yaml").train.lr == 2e-4


def test_a_wrong_config_says_what_and_where(config_file: Path, tmp_path: Path) -> None:
    config_file.write_text(RUN + "train: {learning_rate: 1}\n")
    assert f"{config_file}:5: train.learning_rate: unknown key" in message_of(str(config_file))
    assert "nowhere.yaml" in message_of(str(tmp_path / "nowhere.yaml"))
    config_file.write_text(RUN)
    with pytest.raises(lowrank_dist.ConfigError, match="command line: other.yaml is not section.key=value; give over"):
        lowrank_dist.load_config(config_file, ["other.yaml"])


# --- plan ------------------------------------------------------------------------------------------------------------


def test_plan_is_what_the_command_prints(base: Path, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(RUN.replace("path: base", f"path: {base}").replace("train.jsonl", "train.jsonl, max_length: 64"))
    told = json.loads(run("plan", path, "--gpus-per-node", 2, "--json"))
    fits, tensor, values = plan_of(path)
    assert json.loads(json.dumps(values)) == told and told["fits"] is fits is True
    assert tensor == 1 == told["layout"]["tensor"]
    # A loaded config gives the same plan.
    config = lowrank_dist.load_config(path)
    assert lowrank_dist.plan(config, lowrank_dist.Cluster.of(gpus_per_node=2)) == lowrank_dist.plan(
        str(path), lowrank_dist.Cluster.of(gpus_per_node=2)
    )
    told = json.loads(run("plan", "llama-3-8b", "lora.rank=4", "--gpu", "a100", "--gpu-memory", "40GB", "--json"))
    cluster = lowrank_dist.Cluster.of(gpu="a100", gpu_memory="40GB")
    assert json.loads(json.dumps(lowrank_dist.plan("llama-3-8b", cluster, ["lora.rank=4"]).to_json())) == told


def test_a_plan_that_does_not_fit_is_returned() -> None:
    found = lowrank_dist.plan("llama-3-70b", lowrank_dist.Cluster.of(gpus_per_node=1), ["parallel.tensor=1"])
    assert not found.fits and found.layout.short > 0 and found.remedies


def test_a_wrong_plan_says_what_and_the_remedy(config_file: Path) -> None:
    cluster = lowrank_dist.Cluster.of()
    config = lowrank_dist.load_config(config_file)
    for wrong, told in (
        (lambda: lowrank_dist.Cluster.of(gpu="h1000"), "did you mean h100"),
        (lambda: lowrank_dist.Cluster.of(gpu_memory="80"), "write a number above 0 with a unit"),
        (lambda: lowrank_dist.Cluster.of(nodes=0), "--nodes: 0 .* at least 1"),
        (lambda: lowrank_dist.plan("llama-3-8b", cluster, target_share=0.0), "above 0 and at most 1"),
        (lambda: lowrank_dist.plan("llama-3-8b", cluster, ["lora.rnak=4"]), "did you mean lora.rank"),
        (lambda: lowrank_dist.plan("llama-4-8b", cluster), "did you mean llama-3-8b"),
        (lambda: lowrank_dist.plan(config, cluster, ["lora.rank=4"]), "lora.rank=4: .* give overrides to load_config"),
        (lambda: lowrank_dist.plan(config, cluster), "base"),
    ):
        with pytest.raises(lowrank_dist.UserError, match=told):
            wrong()


def test_planning_loads_no_torch() -> None:
    code = "import lowrank_dist as api; api.plan('llama-3-8b', api.Cluster.of())"
    assert loaded_by(code, "torch", "transformers", "numpy") == []
    assert loaded_by(f"{code}\nimport torch", "torch") == ["torch"], "the control"


# --- merge -----------------------------------------------------------------------------------------------------------


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_merge_writes_what_the_command_writes(base: Path, adapter: Path, tmp_path: Path) -> None:
    report = merged(base, adapter, tmp_path / "api")
    words = ["--base", base, "--adapter", f"{adapter}=0.5", "--out", tmp_path / "command", "--dtype", "fp32"]
    printed = run("merge", *words, "--shard-size", "100KB").splitlines()
    assert content(tmp_path / "api") == content(tmp_path / "command") and len(content(tmp_path / "api")) > 3
    assert printed[0].startswith(f"{tmp_path / 'command'}: {report.tensors} tensors, {report.changed} changed")
    (part,) = report.adapters
    assert printed[1] == f"  {adapter} × 0.5: {part.changed} of {part.adapted} tensors changed"
    assert report.verification is None and report.warnings == ()
    assert report.nbytes == sum(path.stat().st_size for path in (tmp_path / "api").glob("*.safetensors"))


def test_adapters_are_paths_or_have_weights(base: Path, adapter: Path, tmp_path: Path) -> None:
    one, several = (
        lowrank_dist.merge(base, given, tmp_path / name) for name, given in (("a", str(adapter)), ("b", [adapter]))
    )
    assert one == several and content(tmp_path / "a") == content(tmp_path / "b")
    assert one != merged(base, adapter, tmp_path / "half") != several


def test_a_verified_merge_says_how_far_it_is_from_peft(base: Path, adapter: Path, tmp_path: Path) -> None:
    stages: list[str] = []
    report = lowrank_dist.merge(base, adapter, tmp_path / "out", verify=stages.append)
    assert stages == ["loading base, adapters and merged model whole, in fp32"]
    assert report.verification is not None and report.verification.difference <= report.verification.tolerance


def test_a_wrong_merge_says_what_and_leaves_nothing(base: Path, adapter: Path, tmp_path: Path) -> None:
    text = tmp_path / "text"
    for wrong, told in (
        (lambda: lowrank_dist.merge(base, base, tmp_path / "out"), "whole model"),
        (
            lambda: lowrank_dist.merge(base, [adapter, adapter], tmp_path / "out"),
            "given twice as adapter; give it once",
        ),
        (lambda: lowrank_dist.merge(base, [], tmp_path / "out"), "no adapter to merge; give at least one"),
        (lambda: lowrank_dist.merge(tmp_path / "none", adapter, tmp_path / "out"), "none"),
        (lambda: lowrank_dist.merge(base, tmp_path, tmp_path / "out"), "adapter_config.json.*give a PEFT"),
        (lambda: lowrank_dist.merge(base, adapter, base / "out"), "give an output path outside"),
        (lambda: lowrank_dist.merge(base, adapter, tmp_path / "out", verify_text=text), "add --verify"),
        (lambda: lowrank_dist.OutputFormat(dtype="bf16"), "dtype bf16: give one of F32, BF16, F16"),
        (lambda: lowrank_dist.OutputFormat(shard_size=0), "shard_size 0: give the bytes"),
        (lambda: lowrank_dist.WeightedAdapter(adapter, 0), "weight 0 is zero"),
    ):
        with pytest.raises(lowrank_dist.UserError, match=told):
            wrong()
    assert list(tmp_path.iterdir()) == []


# --- inspect ---------------------------------------------------------------------------------------------------------


def test_inspect_is_what_the_command_prints(base: Path, adapter: Path) -> None:
    report = lowrank_dist.inspect(str(adapter), base)
    assert report.verifies and report.kind == "adapter" and problems_of(adapter) == []
    whole = report.to_json()
    # The command shows one of the two tables: a row for each module, or for each kind of module.
    for option, other in (("--modules", "update_norms"), ("--json", "modules")):
        told = json.loads(run("inspect", adapter, "--base", base, "--json", *{option} - {"--json"}))
        expected = {**whole, "tables": {name: rows for name, rows in whole["tables"].items() if name != other}}
        assert told == json.loads(json.dumps(expected)) and told["tables"]
    assert lowrank_dist.inspect(base).to_json() == json.loads(run("inspect", base, "--json"))


def test_inspect_reports_faults_and_raises_for_what_is_no_folder(adapter: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "adapter_config.json").write_bytes((adapter / "adapter_config.json").read_bytes())
    assert not lowrank_dist.inspect(broken).verifies and "adapter_model.safetensors" in problems_of(broken)[0]
    for wrong, told in (
        (lambda: lowrank_dist.inspect(tmp_path), "give one of these folders"),
        (lambda: lowrank_dist.inspect(tmp_path / "none"), "none.*give an adapter, checkpoint, run or model folder"),
        (lambda: lowrank_dist.inspect(adapter, tmp_path / "none"), "none.*give the Hugging Face folder of the base"),
    ):
        with pytest.raises(lowrank_dist.UserError, match=told):
            wrong()


# --- load_adapter ----------------------------------------------------------------------------------------------------

RANKS = {"q_proj": (2, 4.0), "down_proj": (5, 4.0), "lm_head": (3, 9.0)}


@pytest.mark.parametrize(("rslora", "dora"), [(False, False), (True, False), (False, True)])
def test_an_adapter_is_what_peft_reads(base: Path, tmp_path: Path, rslora: bool, dora: bool) -> None:
    """Modules, ranks, scales and tensors, with rank and alpha patterns."""
    trained = random_adapter(base, lambda module: RANKS.get(module.split(".")[-1], (4, 8.0)), rslora=rslora, dora=dora)
    folder = save_adapter(tmp_path / "adapter", base, trained)
    adapter = lowrank_dist.load_adapter(str(folder))
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), folder)
    layers = {
        name.removeprefix("base_model.model."): layer
        for name, layer in model.named_modules()
        if isinstance(layer, LoraLayer)
    }
    assert adapter.ranks == {name: layer.r["default"] for name, layer in layers.items()}
    assert adapter.scales == {name: layer.scaling["default"] for name, layer in layers.items()}
    assert len(set(adapter.ranks.values())) > 2 and len(set(adapter.scales.values())) > 2
    expected = {}
    for name, layer in layers.items():
        expected[f"{name}.lora_A.weight"] = layer.lora_A["default"].weight
        expected[f"{name}.lora_B.weight"] = layer.lora_B["default"].weight
        if dora:
            expected[f"{name}.lora_magnitude_vector"] = layer.lora_magnitude_vector["default"].weight
    assert set(adapter.tensors) == expected.keys() and len(adapter.tensors) == len(expected)
    assert all(torch.equal(adapter.tensors[name], tensor) for name, tensor in expected.items())
    told = model.peft_config["default"]
    assert (adapter.rank, adapter.alpha, adapter.rslora, adapter.dora) == (told.r, told.lora_alpha, rslora, dora)
    assert set(adapter.target_modules) == set(told.target_modules) and adapter.base == str(base)
    assert adapter.scale == told.lora_alpha / (told.r**0.5 if rslora else told.r)
    assert largest(folder) == (max(adapter.scales.values()), max(float(x.abs().max()) for x in expected.values()))


def test_values_are_read_when_they_are_used(base: Path, tmp_path: Path) -> None:
    """The folder may be moved after loading, and NaN is refused when its tensor is read, not before."""
    trained = random_adapter(base)
    folder = save_adapter(tmp_path / "adapter", base, trained)
    name = "model.layers.0.self_attn.q_proj"
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-4] + b"\x00\x00\xc0\x7f")  # NaN in the last tensor of the file
    link = tmp_path / "link"
    link.symlink_to(folder)
    loaded = lowrank_dist.load_adapter(link)
    assert loaded.path == folder
    assert torch.equal(loaded.tensors[f"{name}.lora_A.weight"], trained.factors[name].a)
    with pytest.raises(lowrank_dist.UserError, match="adapter_model.safetensors: .* has NaN or infinity; take an earl"):
        list(loaded.tensors.values())
    with pytest.raises(KeyError):
        loaded.tensors[name]
    folder.rename(tmp_path / "moved")
    assert torch.equal(loaded.tensors[f"{name}.lora_B.weight"], trained.factors[name].b)


def test_what_is_no_adapter_says_what_and_the_remedy(base: Path, adapter: Path, tmp_path: Path) -> None:
    def changed(name: str, **keys: object) -> Path:
        folder = tmp_path / name
        shutil.copytree(adapter, folder)
        values = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps(values | keys))
        return folder

    pickled = changed("pickled")
    (pickled / "adapter_model.safetensors").rename(pickled / "adapter_model.bin")
    for folder, told in (
        (tmp_path / "none", "none: no such folder"),
        (base, "adapter_config.json.* give a PEFT adapter folder"),
        (pickled, "adapter_model.bin.* safe_serialization=True"),
        (changed("prefix", peft_type="PREFIX_TUNING"), "adapter_config.json: peft_type is 'PREFIX_TUNING'"),
        (changed("rank", r=7), "adapter_model.safetensors: .*gives it"),
        (changed("bias", bias="all"), "adapter_config.json: .*bias"),
    ):
        with pytest.raises(lowrank_dist.UserError, match=told):
            lowrank_dist.load_adapter(folder)
