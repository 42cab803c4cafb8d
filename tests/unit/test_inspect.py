"""`lowrank-dist inspect`: correct numbers, every kind of folder, and damage named with exit code 1."""

import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from lowrank_dist.cli.main import app
from lowrank_dist.methods.lora.files import AdapterFactors, LowRankFactor, read_adapter
from lowrank_dist.methods.lora.inspection import update_norm
from tests.tiny_adapters import inspected, random_adapter, save_adapter
from tests.tiny_models import make_tiny
from tests.unit.test_architecture_rules import OUT_OF_MERGE, modules, reachable, under

runner = CliRunner()
WEIGHTS = "adapter_model.safetensors"
QUERY = "model.layers.1.self_attn.q_proj"
KEY = f"base_model.model.{QUERY}.lora_{{}}.weight"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("llama", tmp_path_factory.mktemp("models") / "base", max_shard_size="60KB")


@pytest.fixture
def adapter(base: Path, tmp_path: Path) -> Path:
    return save_adapter(tmp_path / "adapter", base, random_adapter(base))


def show(*arguments: object) -> tuple[int, str]:
    result = runner.invoke(app, ["inspect", *map(str, arguments)])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.output


def facts_of(folder: Path, *more: object) -> dict[str, Any]:
    code, text = show(folder, "--json", *more)
    assert code == 0, text
    return json.loads(text)["facts"]


def assert_reported_broken(folder: Path, *names: str, more: tuple[object, ...] = ()) -> None:
    """Check for exit code 1 and one "broken" line that contains all the names, in text and in JSON."""
    code, text = show(folder, *more)
    lines = [line for line in text.splitlines() if line.startswith("broken: ")]
    assert code == 1 and any(all(name in line for name in names) for line in lines), text
    code, text = show(folder, "--json", *more)
    assert code == 1 and [f"broken: {line}" for line in json.loads(text)["problems"]] == lines


def assert_damage_reported(folder: Path, damage: Callable[[Path], Any], names: list[str]) -> None:
    """Check that a folder passes, and that after `spoil` the report names `names`."""
    assert show(folder)[0] == 0
    damage(folder)
    assert_reported_broken(folder, *names)


def _leaves(value: Any) -> list[Any]:
    if isinstance(value, dict | list):
        return [leaf for inner in (value.values() if isinstance(value, dict) else value) for leaf in _leaves(inner)]
    return [value]


def same_in_text_and_json(folder: Path, *more: object) -> None:
    """Check that every value of the JSON report is in the text report, in its spelling there."""
    text = re.sub(r"(?<=\d),(?=\d{3})", "", show(folder, *more)[1])
    report = json.loads(show(folder, "--json", *more)[1])
    words = set(re.split(r"\s+|=|, ", text))
    for leaf in _leaves([report["facts"], report["tables"], report["path"], report["kind"]]):
        spelled = {True: "yes", False: "no", None: "none"}[leaf] if leaf is None or isinstance(leaf, bool) else leaf
        spelled = f"{leaf:.6g}" if isinstance(leaf, float) else str(spelled)
        assert set(re.split(r"\s+|=|, ", spelled)) - {""} <= words, leaf


def change(folder: Path, edit: Callable[[dict[str, torch.Tensor]], Any], name: str = WEIGHTS) -> None:
    tensors = load_file(folder / name)
    edit(tensors)
    save_file(tensors, folder / name, {"format": "pt"})


@pytest.mark.parametrize("rslora", [False, True])
def test_norms_are_those_of_the_dense_update(base: Path, tmp_path: Path, rslora: bool) -> None:
    sizes = random_adapter(base, lambda module: (1 + len(module) % 4, 0.7 * len(module)), rslora=rslora)
    folder = save_adapter(tmp_path / "adapter", base, sizes)
    code, text = show(folder, "--json", "--modules")
    rows = {row["module"]: row for row in json.loads(text)["tables"]["modules"]}
    assert code == 0 and rows.keys() == sizes.factors.keys()
    dense = {}
    for module, factor in read_adapter(folder).factors.items():
        scale = factor.alpha / (factor.rank**0.5 if rslora else factor.rank)
        dense[module] = torch.linalg.norm(scale * factor.b.double() @ factor.a.double()).item()
        assert rows[module]["norm"] == pytest.approx(dense[module], rel=1e-12)
        assert (rows[module]["rank"], rows[module]["scale"]) == (factor.rank, pytest.approx(scale))
    facts = json.loads(text)["facts"]
    assert facts["update_norm"] == pytest.approx(math.hypot(*dense.values()), rel=1e-12)
    assert facts["parameters"] == sum(f.a.numel() + f.b.numel() for f in sizes.factors.values())
    summary = json.loads(show(folder, "--json")[1])["tables"]["update_norms"]
    queries = sorted(dense[f"model.layers.{layer}.self_attn.q_proj"] for layer in range(2))
    (row,) = [row for row in summary if row["module"] == "model.layers.*.self_attn.q_proj"]
    assert [row["min"], row["median"], row["max"]] == pytest.approx([queries[0], sum(queries) / 2, queries[1]])


@pytest.mark.parametrize("shape", [(40, 3, 50), (3, 40, 50), (50, 40, 3), (1, 1, 1)])
def test_norm_at_any_shape(shape: tuple[int, int, int]) -> None:
    rows, rank, columns = shape
    factor = LowRankFactor(torch.randn(rank, columns), torch.randn(rows, rank), 1.0)
    dense = torch.linalg.norm(-1.5 * factor.b.double() @ factor.a.double()).item()
    assert update_norm(factor, -1.5) == pytest.approx(dense, rel=1e-12)


def test_norms_of_factors_in_half_precision(adapter: Path) -> None:
    change(adapter, lambda t: t.update({name: tensor.bfloat16() for name, tensor in t.items()}))
    tensors = load_file(adapter / WEIGHTS)
    dense = torch.linalg.norm(2 * tensors[KEY.format("B")].double() @ tensors[KEY.format("A")].double()).item()
    (row,) = [row for row in inspected(adapter).tables["modules"] if row["module"] == QUERY]
    assert row["norm"] == pytest.approx(dense, rel=1e-12) and facts_of(adapter)["dtypes"] == ["BF16"]


def test_layers_in_their_order(base: Path, tmp_path: Path) -> None:
    deep = make_tiny("llama", tmp_path / "deep", num_hidden_layers=11)
    only = random_adapter(deep, lambda module: (1, 1.0) if module.endswith("q_proj") else None)
    rows = inspected(save_adapter(tmp_path / "adapter", deep, only)).tables["modules"]
    assert [row["module"] for row in rows] == [f"model.layers.{layer}.self_attn.q_proj" for layer in range(11)]


def test_a_layer_with_a_number_of_any_length_is_shown(adapter: Path) -> None:
    weights = adapter / "adapter_model.safetensors"
    far = QUERY.replace("layers.1", f"layers.{'9' * 5000}")
    tensors = {name.replace(QUERY, far): tensor for name, tensor in load_file(weights).items()}
    save_file(tensors, weights, metadata={"format": "pt"})
    assert far in [row["module"] for row in inspected(adapter).tables["modules"]]


def test_values_of_the_recorded_config_are_shown_as_everywhere(adapter: Path) -> None:
    path = adapter / "lowrank_dist.json"
    said = json.loads(path.read_text())
    said["config"] = {"lora": {"targets": ["q_proj", "v_proj"], "rank_pattern": {}, "init_from": None}}
    path.write_text(json.dumps(said))
    assert facts_of(adapter)["config"] == said["config"]
    line = next(line for line in show(adapter)[1].splitlines() if line.startswith("config lora"))
    assert line.split(None, 2)[2] == "targets=q_proj, v_proj rank_pattern=none init_from=none"


def test_adapter_and_its_base(adapter: Path, base: Path, tmp_path: Path) -> None:
    facts = facts_of(adapter)
    total = AutoModelForCausalLM.from_pretrained(base).num_parameters()
    assert facts["base_matches"] is True and facts["base_parameters"] == total
    assert facts["percent_of_base"] == pytest.approx(100 * facts["parameters"] / total)
    assert facts["config"] == {"lora": {"rank": 2}} and "torch" in facts["versions"]
    other = make_tiny("llama", tmp_path / "other", seed=1)
    assert_reported_broken(adapter, "lowrank_dist.json", "base_fingerprint", "--base", more=("--base", other))
    assert_reported_broken(
        adapter, WEIGHTS, "are not linears of", more=("--base", make_tiny("gpt2", tmp_path / "gpt2"))
    )
    half = Path(shutil.copytree(base, tmp_path / "half"))
    next(half.glob("*.safetensors")).unlink()
    assert_reported_broken(adapter, str(half), "missing", more=("--base", half))
    assert show(adapter, "--base", tmp_path / "none")[0] == show(base, "--base", base)[0] == 2
    # An adapter from elsewhere whose base is not found is shown and is not broken.
    (adapter / "lowrank_dist.json").unlink()
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "who/[red]ever"}))
    facts = facts_of(adapter)
    assert "not found" in facts["base_folder"] and "none" in facts["provenance"]
    assert "who/[red]ever" in show(adapter)[1]
    assert "unknown" in facts_of(adapter, "--base", base)["base_matches"]


def test_zero_b_is_called_out(base: Path, tmp_path: Path) -> None:
    whole = random_adapter(base)
    none = {m: LowRankFactor(f.a, torch.zeros_like(f.b), f.alpha) for m, f in whole.factors.items()}
    for name, factors in (("one", {**whole.factors, QUERY: none[QUERY]}), ("all", none)):
        some = AdapterFactors(factors, whole.dropout, whole.rslora, whole.fan_in_fan_out, whole.base)
        save_adapter(tmp_path / name, base, some, trained=False)
    code, text = show(tmp_path / "one", "--modules")
    noted = [line for line in text.splitlines() if line.startswith("model.") and "B is zero" in line]
    assert code == 0 and [line.split()[0] for line in noted] == [QUERY] and f"B is zero in {QUERY}, so" in text
    assert "B is zero in 1" in show(tmp_path / "one")[1]
    assert "warning:" in show(tmp_path / "all")[1] and "B is zero in every module" in show(tmp_path / "all")[1]
    save_adapter(tmp_path / "trained", base, whole)
    assert "zero in" not in show(tmp_path / "trained")[1] and "warning" not in show(tmp_path / "trained")[1]


def write(name: str, text: str) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).write_text(text)


def cut(name: str) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-5])


def elsewhere(name: str) -> Callable[[Path], Any]:
    def move(folder: Path) -> None:
        (folder / name).rename(folder.parent / "moved")
        (folder / name).symlink_to(folder.parent / "moved")

    return move


def _header(folder: Path) -> None:
    data = bytearray((folder / WEIGHTS).read_bytes())
    data[20] ^= 0xFF
    (folder / WEIGHTS).write_bytes(data)


ADAPTER_FAULTS = {
    "header": (_header, [WEIGHTS]),
    "cut": (cut(WEIGHTS), [WEIGHTS, "safetensors"]),
    "empty": (write(WEIGHTS, ""), [WEIGHTS]),
    "no weights": (lambda folder: (folder / WEIGHTS).unlink(), [WEIGHTS, "missing"]),
    "no config": (lambda folder: (folder / "adapter_config.json").unlink(), ["adapter_config.json", "missing"]),
    "config": (write("adapter_config.json", "[" * 100000), ["adapter_config.json"]),
    "provenance": (write("lowrank_dist.json", '{"format": 1}'), ["lowrank_dist.json"]),
    "link": (elsewhere(WEIGHTS), [WEIGHTS, "link to a file outside"]),
    "linked provenance": (elsewhere("lowrank_dist.json"), ["lowrank_dist.json", "link to a file outside"]),
    "foreign key": (lambda folder: change(folder, lambda t: t.update(other=torch.ones(2))), [WEIGHTS, "'other'"]),
    "half a pair": (
        lambda folder: change(folder, lambda t: t.pop(KEY.format("B"))),
        [WEIGHTS, QUERY, "lacks lora_A or"],
    ),
    "a pair less": (
        lambda folder: change(folder, lambda t: [t.pop(KEY.format(side)) for side in "AB"]),
        [WEIGHTS, "no factors for", QUERY],
    ),
    "nan": (lambda folder: change(folder, lambda t: t[KEY.format("B")].fill_(math.nan)), [KEY.format("B"), "NaN"]),
    "infinity": (lambda folder: change(folder, lambda t: t[KEY.format("A")].fill_(math.inf)), [KEY.format("A"), "NaN"]),
    "dtype": (
        lambda folder: change(folder, lambda t: t.update({KEY.format("A"): torch.ones(3, 64, dtype=torch.int32)})),
        [KEY.format("A"), "I32"],
    ),
    "no matrix": (lambda folder: change(folder, lambda t: t.update({KEY.format("A"): torch.ones(())})), ["[]"]),
    "rank": (lambda folder: change(folder, lambda t: t.update({KEY.format("A"): torch.ones(4, 64)})), [QUERY, "rank"]),
    "width": (lambda folder: change(folder, lambda t: t.update({KEY.format("A"): torch.ones(3, 65)})), [QUERY, "65"]),
    "pickle": (lambda folder: (folder / WEIGHTS).rename(folder / "adapter_model.bin"), ["pickle"]),
}


@pytest.mark.parametrize("fault", ADAPTER_FAULTS)
def test_broken_adapter(adapter: Path, fault: str) -> None:
    assert_damage_reported(adapter, *ADAPTER_FAULTS[fault])


def test_neither_of_these(tmp_path: Path, adapter: Path) -> None:
    for path in (tmp_path, tmp_path / "none", adapter / WEIGHTS):
        code, text = show(path)
        assert code == 2 and text.startswith(f"error: {path}") and "give" in text


@pytest.mark.parametrize("more", [(), ("--modules",)])
def test_text_and_json_say_the_same(adapter: Path, more: tuple[str, ...]) -> None:
    same_in_text_and_json(adapter, *more)


def test_tables_on_a_terminal(adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "who/[red]ever"}))
    assert "\x1b" not in show(adapter)[1]
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "200")
    code, text = show(adapter)
    assert code == 0 and "\x1b[" in text and "│" in text and "who/[red]ever" in text and "it verifies" in text


def test_terminal_codes_from_a_file_are_spelled_out(adapter: Path) -> None:
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(
        json.dumps({**config, "base_model_name_or_path": "a\x1b[2Jb", "target_modules": ".*"})
    )
    code, text = show(adapter, "--base", adapter)
    assert code == 1 and "a\\x1b[2Jb" in text and "\x1b" not in text


def test_inspection_starts_no_process_group() -> None:
    start = "lowrank_dist.checkpoint.inspection"
    reached = reachable(start, dict(modules("lowrank_dist")))
    assert start in reached and "lowrank_dist.checkpoint.inspect_trained" in reached
    assert [x for found in reached.values() for x in found if any(under(x, out) for out in OUT_OF_MERGE)] == []
