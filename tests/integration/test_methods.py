"""The other methods from end to end: train, save, stop, resume at any layout, reload, decode, and refused inputs."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import yaml
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from lowrank_dist.cli.main import app
from lowrank_dist.formats.manifest import MANIFEST_FILE, OPTIMIZER_FILE, write_manifest
from tests.dist import ranks
from tests.dist.ranks import run_ranks
from tests.integration.launching import Outcome, metrics, write_config, write_jsonl
from tests.integration.resuming import (
    SAVED,
    STEPS,
    TOLERANCE,
    Layout,
    curve,
    gap,
    make_job,
    stopped_after,
    tensors,
    train,
)
from tests.integration.test_generate_commands import command
from tests.integration.test_resume import refused, well
from tests.tiny_models import make_tiny

METHODS = ("full", "adapter_h", "adapter_l", "prefix", "prompt")
ADAPTERS = METHODS[1:]
# Variants of low-rank updates that have more than factors are tested like methods.
RUNS = (*METHODS, "dora")
ALONE, SHARDED = Layout(1, 1, 1, 4), Layout(2, 2, 2, 2)
WITHOUT_SEQUENCE = replace(SHARDED, zero=1, sequence=False)
PROBE = "output.probe=3"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("methods")


@pytest.fixture(scope="module")
def jobs(place: Path) -> dict[str, Path]:
    """Return the configuration of each method, on one base and one data set."""
    made = {method: make_job(place / method, method) for method in ("lora", *METHODS)}
    return {**made, "dora": make_job(place / "dora", "lora", dora=True)}


def placed(method: str, how: str) -> list[str]:
    return [f"adapter.placement={how}"] if method.startswith("adapter") else []


@pytest.fixture(scope="module")
def alone(jobs: dict[str, Path], place: Path) -> Any:
    """Return uninterrupted runs on one rank, by method."""

    @cache
    def run(method: str) -> Path:
        folder = place / f"{method}-alone"
        well(train(jobs[method], folder, ALONE, PROBE))
        return folder

    return run


@pytest.fixture(scope="module")
def sharded(jobs: dict[str, Path], place: Path) -> Any:
    """Return the same at TP 2 × DP 2 and ZeRO 2, with sequence parallelism and bottlenecks sharded over the ranks."""

    @cache
    def run(method: str) -> Path:
        folder = place / f"{method}-sharded"
        well(train(jobs[method], folder, SHARDED, *placed(method, "sharded"), PROBE))
        return folder

    return run


# --- resume ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", RUNS)
def test_same_layout_goes_on_bit_by_bit(method: str, jobs: dict[str, Path], sharded: Any, tmp_path: Path) -> None:
    whole, stopped = sharded(method), stopped_after(sharded(method), 4, tmp_path / "run")
    said = well(train(jobs[method], stopped, SHARDED, *placed(method, "sharded"), PROBE))
    assert f"at step 4 of {STEPS}" in said
    expected, found, before = tensors(whole), tensors(stopped), tensors(stopped, 4)
    assert found.keys() == expected.keys() and all(np.array_equal(found[key], expected[key]) for key in expected)
    assert curve(stopped) == curve(whole)
    assert any(np.any(before[key] != expected[key]) for key in expected), "two steps that change nothing"


@pytest.mark.parametrize("method", RUNS)
def test_other_layouts_go_on(method: str, jobs: dict[str, Path], alone: Any, sharded: Any, tmp_path: Path) -> None:
    """Ranks, ZeRO stage, sequence parallelism and the placement of bottlenecks may all change."""
    expected = alone(method)
    assert gap(tensors(sharded(method)), tensors(expected)) < TOLERANCE
    for source, layout, how in ((alone, WITHOUT_SEQUENCE, "replicated"), (sharded, ALONE, "replicated")):
        stopped = stopped_after(source(method), SAVED, tmp_path / source(method).name)
        well(train(jobs[method], stopped, layout, *placed(method, how), PROBE))
        assert gap(tensors(stopped), tensors(expected)) < TOLERANCE
        assert np.allclose(metrics(stopped, "eval_loss"), metrics(expected, "eval_loss"), rtol=TOLERANCE)
    assert metrics(expected, "eval_loss")[-1] < 0.95 * metrics(expected, "eval_loss")[0], "it does not learn"


def test_replicated_layers_go_on_sharded(jobs: dict[str, Path], alone: Any, tmp_path: Path) -> None:
    """A copy of every layer on every rank, under sequence parallelism, trains the same."""
    layout = replace(SHARDED, zero=1)
    run = tmp_path / "run"
    well(train(jobs["adapter_l"], run, layout, "adapter.placement=replicated", PROBE))
    assert gap(tensors(run), tensors(alone("adapter_l"))) < TOLERANCE
    stopped = stopped_after(run, SAVED, tmp_path / "stopped")
    well(train(jobs["adapter_l"], stopped, layout, "adapter.placement=sharded", PROBE))
    assert gap(tensors(stopped), tensors(alone("adapter_l"))) < TOLERANCE


@pytest.mark.parametrize("method", METHODS)
def test_the_comparison_can_fail(method: str, jobs: dict[str, Path], alone: Any, tmp_path: Path) -> None:
    """Without its moments a resumed run ends at other values."""
    stopped = stopped_after(alone(method), SAVED, tmp_path / "run")
    folder = stopped / "checkpoints" / f"step-{SAVED}"
    held = load_file(folder / OPTIMIZER_FILE)
    save_file({k: v * (0 if "exp_avg" in k else 1) for k, v in held.items()}, folder / OPTIMIZER_FILE)
    (folder / MANIFEST_FILE).unlink()
    write_manifest(folder)
    well(train(jobs[method], stopped, ALONE, PROBE))
    assert gap(tensors(stopped), tensors(alone(method))) > 100 * TOLERANCE


def test_another_method_or_size_is_refused_by_name(jobs: dict[str, Path], alone: Any, tmp_path: Path) -> None:
    stopped = {m: stopped_after(alone(m), SAVED, tmp_path / m) for m in ("lora", *ADAPTERS)}
    cases = (
        ("prefix", "prompt", (), "method was prefix and is now prompt. Set them back"),
        ("lora", "prefix", (), "method was lora and is now prefix. Set them back"),
        ("lora", "full", (), "method was lora and is now full. Set them back"),
        ("adapter_h", "adapter_l", (), "method was adapter_h and is now adapter_l. Set them back"),
        ("adapter_h", "lora", (), "method was adapter_h and is now lora. Set them back"),
        ("lora", "prefix", ("train.resume_changes=[method]",), "the checkpoint and this run do not both train "),
        (
            "lora",
            "lora",
            ("lora.dora=true", "train.resume_changes=[lora.dora]"),
            "use the same method, lora.targets and lora.dora",
        ),
        ("adapter_h", "adapter_h", ("adapter.bottleneck=4",), "adapter.bottleneck was 8 and is now 4"),
        ("prefix", "prefix", ("prefix.length=4",), "prefix.length was 5 and is now 4"),
        ("prefix", "prefix", ("prefix.width=null",), "prefix.width was 12 and is now None"),
        ("prompt", "prompt", ("prompt.init=random",), "prompt.init was vocabulary and is now random"),
        (
            "adapter_l",
            "adapter_l",
            ("adapter.bottleneck=4", "train.resume_changes=[adapter.bottleneck]"),
            "the same sizes of the method (such as lora.rank)",
        ),
    )
    for trained, asked, overrides, wanted in cases:
        assert wanted in refused(train(jobs[asked], stopped[trained], ALONE, *overrides)), (trained, asked, overrides)


# --- reload ----------------------------------------------------------------------------------------------------------


def trained(run: Path, method: str) -> tuple[Path, list[object]]:
    """Return the final step, and the command-line options that name it for decoding."""
    base = Path(yaml.safe_load((run / "config.yaml").read_text())["model"]["path"])
    final = run / "checkpoints" / f"step-{STEPS}"
    return final, ["--model", final] if method == "full" else ["--model", base, "--adapter", final]


def _reloaded_loss(config: str, model: str, adapter: str | None, tensor: int) -> float:
    """Return the eval loss in nats a target token, of a model loaded from files."""
    from lowrank_dist.config import load_config
    from lowrank_dist.engine.datasets import build_data
    from lowrank_dist.engine.run_method import build_method
    from lowrank_dist.generate.session import load_for_generation

    told, topology = load_config(config), ranks.topology(tensor, False)
    loaded = load_for_generation(Path(model), adapter and Path(adapter), topology, ranks.device(), dtype="fp32")
    architecture = loaded.model.architecture
    data = build_data(told, build_method(told, architecture), architecture, topology)
    total = count = 0.0
    with torch.no_grad():
        for step in data.evaluation():
            for batch in step.microbatches:
                indices = (batch.target_index, batch.target_ids, batch.segments)
                total += loaded.model.loss(batch.input_ids, batch.position_ids, *indices).item()
                count += batch.target_ids.numel()
    return total / count


@pytest.mark.parametrize("method", RUNS)
def test_the_eval_loss_of_what_is_reloaded(method: str, jobs: dict[str, Path], sharded: Any, place: Path) -> None:
    """Trained sharded, reloaded at both TP sizes: the loss is training's own last eval loss, and not the base's."""
    run = sharded(method)
    final, _ = trained(run, method)
    base = str(place / method / "base")
    model, adapter = (str(final), None) if method == "full" else (base, str(final))
    losses = metrics(run, "eval_loss")
    for size in (1, 2):
        for found in run_ranks(size, _reloaded_loss, str(jobs[method]), model, adapter, size):
            assert found == pytest.approx(losses[-1], rel=2e-6)
    if method != "prompt":  # a base without the prompt has no embedding for the prompt's ids
        (before,) = run_ranks(1, _reloaded_loss, str(jobs[method]), base, None, 1)
        assert before > 1.05 * losses[-1]


@pytest.mark.parametrize("method", METHODS)
def test_generate_and_evaluate(method: str, sharded: Any, place: Path, tmp_path: Path) -> None:
    """From the checkpoint itself: the same completions and figures at TP 1 and TP 2, other than the base's."""
    asked = write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": f"{word}:"} for word in ("cat", "dog xx", "pig x")])
    scored = write_jsonl(tmp_path / "scored.jsonl", [{"prompt": "cat:", "completion": ["cat cat", "cat"]}])
    _, options = trained(sharded(method), method)
    made, figures = [], []
    for size in (1, 2):
        sized = (*options, "--tensor", size, "--max-new-tokens", 10)
        done = command(size, "generate", *sized, "--prompts", asked)
        assert [outcome.code for outcome in done] == [0] * size, done[0].stderr
        made.append(done[0].stdout)
        measured = command(size, "evaluate", *sized, "--data", scored, "--metric", "bleu", "--json")
        assert [outcome.code for outcome in measured] == [0] * size, measured[0].stderr
        figures.append(json.loads(measured[0].stdout))
    plain = command(1, "generate", "--model", place / method / "base", "--prompts", asked, "--max-new-tokens", 10)
    assert made[0] == made[1] != plain[0].stdout
    assert figures[0] == figures[1] and figures[0]["samples"] == 1


def test_the_published_folder_decodes_as_the_checkpoint(alone: Any) -> None:
    run = alone("prefix")
    final, options = trained(run, "prefix")
    texts = [
        command(1, "generate", *options[:-1], folder, "--prompt", "cat:", "--max-new-tokens", 8)[0].stdout
        for folder in (final, run / "adapter")
    ]
    assert texts[0] == texts[1]
    assert {path.name for path in (run / "adapter").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "lowrank_dist.json",
        *("tokenizer.json", "tokenizer_config.json", "generation_config.json"),
    }


@pytest.mark.parametrize("method", METHODS)
def test_inspect_the_run(method: str, sharded: Any) -> None:
    done = CliRunner().invoke(app, ["inspect", str(sharded(method)), "--json"])
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert report["facts"]["config"]["method"] == method and report["facts"]["base_matches"] is True
    sizes = {row["parameters"] for row in report["tables"]["adapters"]}
    masters = sum(value.size for name, value in tensors(sharded(method)).items() if name.endswith(".master"))
    # A prefix's MLP is trained but not stored.
    assert len(sizes) == 1 and (method == "prefix" or sizes == {masters})


# --- full fine-tuning ------------------------------------------------------------------------------------------------


def _main_with(arguments: list[str], batch: int, shard: int) -> tuple[Outcome, int]:
    """On one rank: run with so many elements gathered at a time and shards of so many bytes.

    Returns the outcome and the largest batch of elements.
    """
    from lowrank_dist.engine import gathering, resume
    from lowrank_dist.methods.full import files as whole_model
    from tests.integration.launching import _main

    largest, join = 0, gathering.Gathering._join

    def watched(self: Any, *rest: Any) -> Any:
        nonlocal largest
        found = join(self, *rest)
        largest = max(largest, sum(tensor[0].numel() for tensor in found.values()))
        return found

    with (
        mock.patch.object(gathering.Gathering, "_join", watched),
        mock.patch.object(gathering, "BATCH_ELEMENTS", batch),
        mock.patch.object(resume, "BATCH_ELEMENTS", batch),
        mock.patch.object(whole_model, "SHARD_BYTES", shard),
    ):
        return _main(arguments, True), largest


def shards(run: Path, step: int = STEPS) -> dict[str, bytes]:
    folder = run / "checkpoints" / f"step-{step}"
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.safetensors"))}


def test_the_same_files_a_few_tensors_at_a_time(jobs: dict[str, Path], sharded: Any, tmp_path: Path) -> None:
    """Written and read back in small batches: at most a batch, or one parameter, is whole at a time."""
    layout = [str(jobs["full"]), *SHARDED.overrides, PROBE]
    found = run_ranks(4, _main_with, [*layout, f"output.dir={tmp_path / 'small'}"], 5000, 40_000)
    assert not any(outcome.code for outcome, _ in found), found[0][0].stderr
    sizes = sorted(value.size for name, value in tensors(sharded("full")).items() if name.endswith(".master"))
    assert max(largest for _, largest in found) <= max(5000, 3 * sizes[-1]) < sum(sizes) / 2
    small, whole = shards(tmp_path / "small"), shards(sharded("full"))
    assert small[OPTIMIZER_FILE] == whole[OPTIMIZER_FILE] and len(small) > 4 > len(whole)
    held = [{}, {}]
    for place, files in zip(held, (tmp_path / "small", sharded("full")), strict=True):
        for path in (files / "checkpoints" / f"step-{STEPS}").glob("model-*.safetensors"):
            place.update(load_file(path))
    assert held[0].keys() == held[1].keys() and all(np.array_equal(held[0][k], held[1][k]) for k in held[0])
    stopped = stopped_after(tmp_path / "small", 4, tmp_path / "stopped")
    again = run_ranks(4, _main_with, [*layout, f"output.dir={stopped}"], 5000, 40_000)
    assert not any(outcome.code for outcome, _ in again), again[0][0].stderr
    assert shards(stopped) == small
    # The control: at the default size everything is one batch.
    one = run_ranks(4, _main_with, [*layout, f"output.dir={tmp_path / 'one'}", "train.steps=1"], 2**24, 40_000)
    assert max(largest for _, largest in one) == sum(sizes)


@pytest.mark.parametrize(
    ("family", "dtype"), [("llama", "fp32"), ("gpt2", "fp32"), ("opt", "fp32"), ("qwen2", "bf16"), ("qwen3", "fp32")]
)
def test_transformers_gives_the_logits_of_the_sharded_model(family: str, dtype: str, tmp_path: Path) -> None:
    base = make_tiny(family, tmp_path / "base", dtype={"fp32": torch.float32, "bf16": torch.bfloat16}[dtype])
    told = yaml.safe_load(make_job(tmp_path / "job", "full").read_text())
    told["model"] |= {"path": str(base), "dtype": dtype}
    told["train"] |= {"steps": 2, "warmup_steps": 0}
    config, run = write_config(tmp_path / "config.yaml", told), tmp_path / "run"
    well(train(config, run, Layout(2, 1, 1, 4), PROBE))
    probe, final = load_file(run / "probe.safetensors"), run / "checkpoints" / "step-2"

    def logits(folder: Path, kind: torch.dtype) -> np.ndarray:
        model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, dtype=kind).eval()
        with torch.no_grad():
            return model(torch.from_numpy(probe["input_ids"])).logits.float().numpy()

    reference = logits(final, torch.float32)
    error = np.abs(probe["logits"] - reference).max()
    if dtype == "fp32":
        assert error < 2e-5 * np.abs(reference).max()
    else:  # at most twice what transformers loses in bf16
        assert error < 2 * np.abs(logits(final, torch.bfloat16) - reference).max()
    assert np.abs(logits(base, torch.float32) - reference).max() > 100 * error / (1 if dtype == "fp32" else 20)
    if family == "opt":
        name = "model.decoder.embed_positions.weight"
        stored, before = (load_file(next(path.glob("model*.safetensors")))[name] for path in (final, base))
        assert np.array_equal(stored[:2], before[:2]) and before[:2].any() and not np.array_equal(stored, before)


def test_a_step_that_rounding_loses_is_not_saved(tmp_path: Path) -> None:
    told = yaml.safe_load(make_job(tmp_path, "full").read_text())
    make_tiny("qwen2", tmp_path / "half", dtype=torch.bfloat16)
    told["model"] |= {"path": str(tmp_path / "half"), "dtype": "auto"}
    config = write_config(tmp_path / "config.yaml", told)
    said = refused(train(config, tmp_path / "run", ALONE, "train.lr=1e-12", "train.weight_decay=0"))
    assert "every weight in BF16 equals the base's, so training did not change the model" in said
    assert not list((tmp_path / "run/checkpoints").iterdir())


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "overrides", "wanted"),
    [
        ("adapter_h", ["adapter.bottleneck=7"], "adapter.bottleneck=7 is not a multiple of parallel.tensor=2; give a"),
        ("adapter_h", ["adapter.bottleneck=0"], "command line: adapter.bottleneck: 0 is not valid"),
        ("prefix", ["prefix.length=47"], "prefix.length=47 leaves no room in data.max_length=48 for a"),
        ("prefix", ["prefix.length=100"], "give a length of at most 46, or a larger data.max_length"),
        ("prompt", ["prompt.length=48"], "prompt.length=48 leaves no room in data.max_length=48 for a"),
        ("prefix", ["data.max_length=65"], "data.max_length=65 is longer than the model's 64 positions"),
        ("prefix", ["prefix.length=44"], "0 of 22 samples kept; 22 over 4 tokens dropped"),
        ("full", ["lora.rank=4"], "command line: lora.rank: not read by method full; remove it, or set method to"),
        ("lora", ["method=full", "lora.alpha=4"], "command line: lora.alpha: not read by method full"),
        ("prompt", ["method=promt"], "command line: method: 'promt' is not valid"),
    ],
)
def test_bad_input(method: str, overrides: list[str], wanted: str, jobs: dict[str, Path], tmp_path: Path) -> None:
    said = refused(train(jobs[method], tmp_path / "run", Layout(2, 1, 1, 4), *overrides))
    assert wanted in said, said
    assert not (tmp_path / "run").exists(), "a refused start leaves nothing behind"


def test_a_bottleneck_that_the_ranks_do_not_divide_decodes(jobs: dict[str, Path], tmp_path: Path) -> None:
    """A bottleneck trained as copies is the same function at every TP size."""
    arguments = ("adapter.bottleneck=7", "adapter.placement=replicated", "train.steps=1")
    well(train(jobs["adapter_h"], tmp_path / "run", Layout(2, 1, 1, 4), *arguments))
    options = ("--model", jobs["adapter_h"].parent / "base", "--adapter", tmp_path / "run/adapter")
    made = [command(n, "generate", *options, "--prompt", "cat:", "--tensor", n)[0] for n in (1, 2)]
    assert made[0].code == 0 and made[0].stdout == made[1].stdout


def test_samples_that_no_longer_fit_are_counted(jobs: dict[str, Path], tmp_path: Path) -> None:
    said = well(train(jobs["prompt"], tmp_path / "run", ALONE, "prompt.length=30", "train.steps=1"))
    assert "30 virtual positions leave 18 of data.max_length 48 for a sample" in said
    assert "of 22 samples kept; " in said and " over 18 tokens dropped" in said


def test_adapters_that_do_not_belong(jobs: dict[str, Path], alone: Any, tmp_path: Path) -> None:
    """One message each: another base by its fingerprint or its sizes, damage, a model, no room for the prompt."""
    twin = make_tiny("qwen2", tmp_path / "twin", seed=1)
    deeper = make_tiny("qwen2", tmp_path / "deeper", num_hidden_layers=3)
    cases: list[tuple[Path, Path, str, str]] = []
    for method in ADAPTERS:
        base, adapter = (
            jobs[method].parent / "base",
            Path(shutil.copytree(alone(method) / "adapter", tmp_path / method)),
        )
        cases.append((twin, adapter, "a", "give the base that the adapter was trained on, unchanged"))
        unknown = Path(shutil.copytree(adapter, tmp_path / f"{method}-unknown"))
        (unknown / "lowrank_dist.json").unlink()
        cases.append((deeper, unknown, "a", "give the model that it was trained on"))
        spoiled = Path(shutil.copytree(adapter, tmp_path / f"{method}-spoiled"))
        path = next(spoiled.glob("*.safetensors"))
        save_file({name: value * np.float32("nan") for name, value in load_file(path).items()}, path)
        cases.append((base, spoiled, "a", "has NaN or infinity"))
    final = alone("full") / "checkpoints" / f"step-{STEPS}"
    cases.append(
        (
            jobs["full"].parent / "base",
            final,
            "a",
            ": a whole model, not an adapter; give it as the model, instead of the",
        )
    )
    room = "positions with its completion"
    cases.append((jobs["prefix"].parent / "base", alone("prefix") / "adapter", "x" * 60, room))
    cases.append((jobs["prompt"].parent / "base", alone("prompt") / "adapter", "x" * 59, room))
    for base, adapter, prompt, wanted in cases:
        (done,) = command(1, "generate", "--model", base, "--adapter", adapter, "--prompt", prompt)
        assert done.code == 2 and wanted in done.stderr and not done.stdout, (adapter, done.stderr)
    # The control: a prompt that just fits.
    options = ("--model", jobs["prefix"].parent / "base", "--adapter", alone("prefix") / "adapter")
    assert command(1, "generate", *options, "--prompt", "x" * 58)[0].code == 0
