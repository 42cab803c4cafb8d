"""`lowrank-dist plan`: answers at once, prints the requested plan, and names what is wrong with invalid arguments."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from typer.testing import CliRunner

from lowrank_dist.arch.model_files import built_in_config
from lowrank_dist.cli.main import app
from lowrank_dist.planner import memory
from lowrank_dist.planner.report import PART_NAMES, difference, memory_size
from tests.tiny_adapters import random_adapter, save_adapter
from tests.tiny_models import make_tiny

GPT3 = ("gpt3-175b", "lora.rank=4", "lora.targets=[q_proj,v_proj]")
runner = CliRunner()


def plan(*words: object) -> Result:
    return runner.invoke(app, ["plan", *map(str, words)])


def data(*words: object) -> dict[str, Any]:
    done = plan(*words, "--json")
    found: dict[str, Any] = json.loads(done.stdout)
    assert done.exit_code == (0 if found["fits"] else 1), done.output
    return found


def test_answers_in_under_three_seconds_without_torch() -> None:
    code = (
        "import sys; from lowrank_dist.cli.main import app\n"
        f"app(['plan', *{GPT3}], standalone_mode=False)\n"
        "heavy = {'torch', 'transformers', 'deepspeed', 'megatron', 'numpy', 'safetensors'} & set(sys.modules)\n"
        "sys.exit(', '.join(sorted(heavy)) or 0)"
    )
    seconds = []
    for _ in range(3):
        started = time.monotonic()
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
        seconds.append(time.monotonic() - started)
        assert (done.returncode, done.stderr) == (0, "")
    assert min(seconds) < 3


def test_the_other_methods_have_the_sizes_asked_for() -> None:
    found = data("gpt2-medium", "method=full", "--bottleneck", 48, "--virtual-tokens", 5, "--gpus-per-node", 1)
    trained = {row["method"]: row["trained"] for row in found["methods"]}
    hidden, layers, one = 1024, 24, 2 * 1024 * 48 + 48 + 1024
    assert trained["adapter_h"] == layers * 2 * one and trained["adapter_l"] == layers * (one + 2 * hidden)
    assert trained["prompt"] == 5 * hidden and trained["prefix"] == 5 * 2 * layers * hidden
    # r = 8 on the fused qkv, proj, fc1 and fc2.
    assert trained["lora"] == 8 * layers * (4 + 2 + 5 + 5) * hidden


def test_the_tables_of_gpt3() -> None:
    done = plan(*GPT3, "--nodes", 4, "--gpus-per-node", 8, "--gpu-memory", "80GB", "--gpu", "h100")
    assert done.exit_code == 0
    # |Θ| and its share, its 16-bit size against the base's, and the paper's figure.
    for text in ("18,874,368", "0.011 %", "37.7 MB", "349 GB", "350 GB", "1.2 TB", "q_proj", "v_proj"):
        assert text in done.output, text
    titles = ("What is planned", "Memory of a GPU", "Collectives", "modelled, not measured", "Layouts", "Other methods")
    for title in titles:
        assert title in done.output, title
    # A part that is zero in both columns is left out; one that is zero in one column is a dash there.
    held = data(*GPT3, "--nodes", 4)["memory"].values()
    for part in memory.PARTS:
        assert (PART_NAMES[part] in done.output) == any(found["parts"][part] for found in held), part
    assert "–: there is none at that moment" in done.output
    assert "tensor-parallel sizes: 1, 2, 4, 8" in done.output and "attention heads" in done.output
    assert done.output.index("What is planned") < done.output.index("FITS 4 × 8 h100")


def test_json_is_the_same_plan() -> None:
    found = data(*GPT3, "--nodes", 4, "train.global_batch=32")
    assert found["trained"]["parameters"] == 18_874_368 and found["files"]["adapter_16_bit"] == 37_748_736
    assert found["layout"]["tensor"] * found["layout"]["data"] == 32
    assert found["fits"] and found["time"]["modelled"]
    assert {row["method"] for row in found["methods"]} == {"lora", "full", "adapter_h", "adapter_l", "prefix", "prompt"}
    assert found["state"]["planned_bytes_per_parameter"] == pytest.approx(2.0, abs=0.01)
    tensor = [row for row in found["messages"] if row["group"] == "tensor"]
    assert tensor and all(row["calls"] > 0 and row["bytes"] > 0 for row in found["messages"])


def test_overrides_are_followed() -> None:
    found = data("llama-3-8b", "parallel.tensor=4", "engine.recompute=full", "train.micro_batch=2", "lora.rank=8")
    layout = found["layout"]
    assert (layout["tensor"], layout["recompute"], layout["micro_batch"]) == (4, True, 2)
    # The plan's own choice is printed beside it.
    assert found["recommended"]["tensor"] == 1
    assert data("llama-3-8b")["recommended"] is None
    assert data("llama-3-8b", "--target-share", 0.1)["flops"]["model"] < data("llama-3-8b")["flops"]["model"]
    smaller = data("llama-3-8b", "--gpu-memory", "24GB", "parallel.tensor=1")
    assert smaller["cluster"]["memory"] == 24 * 10**9


def test_where_nothing_fits() -> None:
    done = plan("llama-3-405b", "--gpus-per-node", 2)
    assert done.exit_code == 1 and "DOES NOT FIT" in done.output and "What fits: add one of these" in done.output
    assert "too much" in " ".join(done.output.split())
    assert plan("llama-3-405b", "--gpus-per-node", 2, "--json").exit_code == 1
    found = data("llama-3-405b", "--gpus-per-node", 2)
    assert found["fits"] is False and found["remedies"][0]["words"].startswith("--nodes")


def test_what_is_planned_and_who_set_it() -> None:
    """The workload is printed first, with every value that was not given marked as a default."""
    words = ("llama-3-8b", "train.global_batch=64", "lora.rank=4", "parallel.tensor=2", "--target-share", 0.25)
    settings = {found["name"]: (found["value"], found["source"]) for found in data(*words)["workload"]["settings"]}
    assert settings["train.global_batch"] == (64, "given") and settings["data.max_length"] == (1024, "default")
    assert settings["--target-share"] == (0.25, "given") and settings["lora.rank"] == (4, "given")
    assert settings["lora.targets"] == ("all-linear", "default") and settings["parallel.tensor"] == (2, "given")
    assert settings["train.micro_batch"][1] == "plan" and settings["engine.recompute"][1] == "plan"
    text = plan(*words).output
    assert "25 %" in text and "chosen by the plan" in text and "default" in text


def test_config_keys_may_be_written_as_options() -> None:
    written = data("llama-3-8b", "--method", "full", "--train.micro_batch=2")
    assert written == data("llama-3-8b", "method=full", "train.micro_batch=2")


def test_auto_is_the_size_that_the_plan_chooses(tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(
        "model: {path: llama-3-70b}\nparallel: {tensor: auto}\ndata: {train: t.jsonl}\n"
        "train: {global_batch: 32}\noutput: {dir: run}\n"
    )
    found = data(config, "--nodes", 2)
    size = found["auto_tensor"]
    # Without tensor parallelism it does not fit; the rest of the config counts as given.
    assert found["fits"] and not found["tight"] and size > 1 and found["layout"]["tensor"] == size
    assert found["layout"]["micro_batch"] == 1 and not found["layout"]["recompute"]
    settings = {each["name"]: (each["value"], each["source"]) for each in found["workload"]["settings"]}
    assert settings["parallel.tensor"] == (size, "plan") and settings["train.micro_batch"] == (1, "default")
    assert f"parallel.tensor=auto stands for {size} on these GPUs" in plan(config, "--nodes", 2).output
    assert not data(config, "--nodes", 2, "parallel.tensor=1")["fits"]
    # A group crosses nodes only where the config allows it.
    large = ("model.path=llama-3-405b", "--nodes", 2)
    inside, across = data(config, *large), data(config, *large, "parallel.across_nodes=true")
    assert (inside["auto_tensor"], inside["fits"]) == (8, False) and (across["auto_tensor"], across["fits"]) == (
        16,
        True,
    )
    assert inside["remedies"][0]["words"].startswith("parallel.tensor=16") and across["layout"]["crosses_nodes"]


def test_a_comparison_says_what_the_plan_chose() -> None:
    words = ("llama-3-70b", "engine.recompute=none", "--compare", "parallel.tensor=8")
    row = next(line for line in plan(*words).output.splitlines() if "chosen by the plan" in line and "TP" not in line)
    cells = [cell.strip() for cell in row.split("│")[2:4]]
    assert cells == ["parallel.tensor, train.micro_batch", "train.micro_batch"]
    fixed = ("parallel.tensor=8", "train.micro_batch=1", "engine.recompute=none")
    assert "chosen by the plan" not in plan("llama-3-70b", *fixed, "--compare", "train.micro_batch=2").output


@pytest.mark.parametrize(
    ("larger", "smaller", "said"),  # in GiB
    [
        (75.7, 61.5, "14.2 GiB"),
        (75.66, 61.54, "14.2 GiB"),  # shown as 75.7 and 61.5
        (61.54, 9.874, "51.6 GiB"),  # shown as 61.5 and 9.87
        (132.4, 131.4, "1 GiB"),  # shown as 132 and 131: the sizes themselves
        (75.68, 75.66, "20.5 MiB"),
    ],
)
def test_a_difference_is_that_of_the_shown_sizes(larger: float, smaller: float, said: str) -> None:
    assert memory_size(difference(larger * 2**30, smaller * 2**30)) == said


def test_layouts_side_by_side() -> None:
    changes = ["parallel.tensor=4 engine.recompute=full", "parallel.tensor=8"]
    words = ("llama-3-70b", "train.global_batch=16", *(word for text in changes for word in ("--compare", text)))
    done = plan(*words)
    assert done.exit_code == 0, done.output
    for text in (
        "parallel.tensor=4",
        "parallel.tensor=8",
        "as given",
        "TP 4, DP 2",
        "TP 8, DP 1",
        "largest term",
        "tokens per second",
        "to spare",
    ):
        assert text in " ".join(done.output.split()), text
    found = json.loads(plan(*words, "--json").stdout)
    assert found["fits"] and [each["changes"] for each in found["compared"]] == ["as given", *changes]
    alone = data("llama-3-70b", "train.global_batch=16", *changes[0].split())
    assert found["compared"][1]["plan"] == alone
    nothing = plan("llama-3-405b", "--compare", "parallel.tensor=8")
    assert nothing.exit_code == 1 and "does not fit" in nothing.output


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--compare", "parallel.tensor='8"], '--compare: "parallel.tensor=\'8": No closing quotation'),
        (["--compare", "parallel.tensr=8"], "parallel.tensr: unknown key"),
        (["--compare", "parallel.tensor=8", "--verify"], "--compare and --verify"),
    ],
)
def test_a_comparison_that_cannot_be_made(words: list[str], said: str) -> None:
    done = plan("llama-3-8b", *words)
    assert done.exit_code == 2 and said in done.stderr, done.stderr


def test_a_config_as_it_is(tmp_path: Path) -> None:
    """A run's YAML is planned as the run would be: with its layout, defaults included."""
    base = make_tiny("llama", tmp_path / "base")
    config = tmp_path / "run.yaml"
    config.write_text(
        f"model: {{path: {base}}}\nparallel: {{tensor: 2}}\ndata: {{train: t.jsonl, max_length: 64}}\n"
        "train: {global_batch: 4}\noutput: {dir: run}\n"
    )
    found = data(config, "--gpus-per-node", 4)
    assert (found["layout"]["tensor"], found["layout"]["data"], found["layout"]["micro_batch"]) == (2, 2, 1)
    assert found["model"]["dtype"] == "fp32"
    assert data(config, "--gpus-per-node", 4, "parallel.tensor=4")["layout"]["tensor"] == 4
    on_cpu = data(config, "model.device=cpu", "--gpus-per-node", 4)
    assert on_cpu["time"] is None and on_cpu["layout"]["seconds"] is None


def test_a_model_folder_and_its_config(tmp_path: Path) -> None:
    base = make_tiny("gpt2", tmp_path / "base")
    folder, file = data(base, "data.max_length=64"), data(base / "config.json", "data.max_length=64")
    assert folder == file and folder["model"]["family"] == "gpt2"


def test_verify_prints_both_sides(tmp_path: Path) -> None:
    base = make_tiny("llama", tmp_path / "base", num_hidden_layers=3)
    done = plan(base, "data.max_length=64", "parallel.tensor=2", "--gpus-per-node", 2, "--verify")
    assert done.exit_code == 0, done.output
    assert "The executed step agrees with the plan" in done.output and "exact" in done.output
    assert "Why that peak is not the plan's total" in done.output
    assert "verifying: forward" in done.stderr and "verifying" not in done.stdout


def test_verify_fails_where_a_formula_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = make_tiny("llama", tmp_path / "base", num_hidden_layers=3)
    monkeypatch.setattr(memory, "frozen_bytes", lambda job: 0)
    done = plan(base, "data.max_length=64", "parallel.tensor=2", "--gpus-per-node", 2, "--verify")
    assert done.exit_code == 1 and "does not agree with the plan" in done.output


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["llama-4-8b"], "'llama-4-8b': not a built-in shape, model folder or file; did you mean llama-3-8b?"),
        (["llama-3-8b", "--gpu-memory", "80"], "--gpu-memory: '80' has no unit"),
        (["llama-3-8b", "--gpu-memory", "lots"], "--gpu-memory: 'lots' is not a size"),
        (["llama-3-8b", "--bottleneck", "9" * 400], "--bottleneck"),
        (["llama-3-8b", "--gpus-per-node", "0"], "--gpus-per-node: 0"),
        (["llama-3-8b", "--nodes", "-1"], "--nodes: -1"),
        (["llama-3-8b", "train.global_batch=4", "parallel.tensor=1"], "--gpus-per-node N and --nodes N (default: one"),
        (["llama-3-8b", "--gpu", "h1000"], "did you mean h100?"),
        (
            ["llama-3-8b", "parallel.tensor=3"],
            "parallel.tensor=3 does not divide this llama model (32 attention heads",
        ),
        (["llama-3-8b", "parallel.tensor=16"], "parallel.tensor: 16 does not divide 1 × 8 = 8 GPUs"),
        (["llama-3-8b", "lora.rnak=4"], "lora.rnak: unknown key; did you mean lora.rank?"),
        (["llama-3-8b", "lora.rank=0"], "lora.rank"),
        (["llama-3-8b", "lora.targets=[c_attn]"], "lora.targets: 'c_attn' matches no linear of this llama model"),
        (["llama-3-8b", "data.max_length=10000"], "data.max_length=10000 is longer than the 8192 positions"),
        (["llama-3-8b", "--target-share", "1.5"], "--target-share: 1.5"),
        (["llama-3-8b", "train.micro_batch=3"], "train.micro_batch"),
        (["no.yaml"], "no.yaml: cannot be read"),
        (["llama-3-8b", "--node", "4"], "--node: no such option: did you mean --nodes?"),
        (["llama-3-8b", "--rank", "4"], "A key of the config is given as section.key=value: lora.rank=8"),
        (["--rank=4", "llama-3-8b"], "--rank=4: no such option"),
    ],
)
def test_bad_input_gets_a_message(words: list[str], said: str) -> None:
    done = plan(*words)
    assert done.exit_code == 2 and said in done.stderr, (done.exit_code, done.stderr)
    assert "Traceback" not in done.stderr + done.stdout


def test_a_config_json_that_lacks_a_field(tmp_path: Path) -> None:
    values = dict(built_in_config("llama-3-8b"))
    del values["intermediate_size"]
    (tmp_path / "config.json").write_text(json.dumps(values))
    done = plan(tmp_path)
    assert done.exit_code == 2 and "config.json: intermediate_size is missing" in done.stderr
    (tmp_path / "config.json").write_text("[]")
    assert "expected a JSON object, found list" in plan(tmp_path).stderr
    (tmp_path / "config.json").write_text("{")
    assert "malformed JSON" in plan(tmp_path).stderr
    (tmp_path / "config.json").unlink()
    assert "config.json: missing" in plan(tmp_path).stderr


def test_a_config_whose_model_is_not_there(tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text("model: {path: /nowhere}\ndata: {train: t}\noutput: {dir: r}\n")
    done = plan(config)
    assert done.exit_code == 2 and "model.path: /nowhere does not exist" in done.stderr
    assert data(config, "model.path=gpt2-medium", "--gpus-per-node", 1)["model"]["name"] == "gpt2-medium"


def test_factors_of_an_adapter_that_a_run_starts_from(tmp_path: Path) -> None:
    base = make_tiny("llama", tmp_path / "base")
    factors = random_adapter(base, lambda module: (3, 6.0) if module.endswith("v_proj") else None)
    adapter = save_adapter(tmp_path / "adapter", base, factors)
    config = tmp_path / "run.yaml"
    config.write_text(
        f"model: {{path: {base}}}\nlora: {{init_from: {adapter}}}\ndata: {{train: t, max_length: 64}}\n"
        "output: {dir: r}\n"
    )
    found = data(config, "--gpus-per-node", 1)
    assert list(found["trained"]["by_module"]) == ["v_proj"]
    assert found["trained"]["parameters"] == 2 * 3 * (64 + 32)
    refused = plan("llama-3-8b", f"lora.init_from={adapter}")
    assert (
        refused.exit_code == 2
        and "lora.init_from: an adapter can only be read together with its model" in refused.stderr
    )
