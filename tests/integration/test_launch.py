"""Whole runs under the launchers people use: the content of the run folder, and that other programs can read it."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM

from lowrank_dist.config import load_config
from tests.integration.launching import (
    Outcome,
    deepspeed,
    in_ranks,
    metrics,
    program,
    samples,
    snapshot,
    torchrun,
    write_config,
    write_jsonl,
)
from tests.tiny_models import make_tiny

STEPS = 12
TOLERANCE = 1e-4  # of the largest |logit|, in fp32
FAR = 1e-2
TAGS = {
    "train/loss",
    "eval/loss",
    "train/grad_norm",
    "train/learning_rate",
    "throughput(tps)",
    "throughput_per_rank(tps)",
    "throughput(tflops)",
    "memory/peak_gib",
}


@dataclasses.dataclass(frozen=True)
class Run:
    """One finished run: its folders, and how the program ended."""

    folder: Path
    base: Path
    config: Path
    outcome: Outcome

    def probe(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return input_ids [b, s] and the trained, sharded model's logits [b, s, V]."""
        kept = load_file(self.folder / "probe.safetensors")
        return kept["input_ids"], kept["logits"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("llama", tmp_path_factory.mktemp("models") / "base")


@pytest.fixture(scope="module")
def run(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Train the run that most tests inspect: TP 2, sequence parallel, dropout, every kind of output."""
    place = tmp_path_factory.mktemp("run")
    # Line 25 is too long; line 26 has no target: its only token is the first one.
    rows = [*samples(24), {"prompt": "too long", "completion": "z" * 60}, {"prompt": "", "completion": "<|eos|>"}]
    sections = {
        "model": {"path": base, "dtype": "fp32", "device": "cpu"},
        "lora": {"rank": 4, "alpha": 8, "dropout": 0.1},
        "parallel": {"tensor": 2},
        "data": {
            "train": write_jsonl(place / "train.jsonl", rows),
            "eval": write_jsonl(place / "eval.jsonl", samples(9)),
            "max_length": 48,
        },
        "train": {"steps": STEPS, "global_batch": 8, "micro_batch": 4, "lr": 1e-2, "warmup_steps": 2},
        "eval": {"every": 4, "micro_batch": 4},
        "output": {"dir": place / "not this one", "save_every": 5, "probe": 3},
    }
    config = write_config(place / "config.yaml", sections)
    folder = place / "run"
    return Run(folder, base, config, deepspeed(2, config, f"output.dir={folder}", "--train.seed", 7))


def logits(model: torch.nn.Module, input_ids: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return model.eval()(input_ids=input_ids, use_cache=False).logits


def plain(folder: Path, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, dtype=dtype)


def gap(found: torch.Tensor, expected: torch.Tensor) -> float:
    assert found.shape == expected.shape
    return ((found - expected).abs().max() / expected.abs().max()).item()


def test_ends_well(run: Run) -> None:
    assert run.outcome.code == 0, run.outcome.stderr
    assert run.outcome.stderr == ""
    assert "--local_rank=1" in run.outcome.stdout, "deepspeed no longer passes what --local_rank is accepted for"
    assert "2 tensor × 1 data parallel, sequence parallel on" in run.outcome.stdout
    assert len(re.findall(rf"^step \d+/{STEPS}  loss ", run.outcome.stdout, re.MULTILINE)) == STEPS


def test_samples_left_out_are_counted(run: Run) -> None:
    train = run.config.parent / "train.jsonl"
    (line,) = re.findall(rf"^{re.escape(str(train))}: (.*)$", run.outcome.stdout, re.MULTILINE)
    assert line.startswith("24 of 26 samples kept; 1 over 48 tokens dropped (longest 6")
    assert "line 25)" in line and "1 without target tokens dropped (line 26)" in line
    assert line.endswith("1 have the end of the completion in their text, so no second end is added")


def test_run_folder(run: Run) -> None:
    entries = {name for name in snapshot(run.folder) if not name.startswith("tensorboard/")}
    files = {"adapter_config.json", "adapter_model.safetensors", "lowrank_dist.json"}
    files |= {"tokenizer.json", "tokenizer_config.json", "generation_config.json"}
    checkpoint = files | {"optimizer.safetensors", "trainer_state.json", "manifest.json"}
    folders = {"adapter": files, **{f"checkpoints/step-{step}": checkpoint for step in (5, 10, STEPS)}}
    assert entries == {
        *("config.yaml", "metrics.jsonl", "loss.png", "probe.safetensors", "tensorboard", "SAVED"),
        *("logs", "logs/rank-0.log", "logs/rank-1.log", "checkpoints", "checkpoints/last", "checkpoints/best"),
        *folders,
        *(f"{folder}/{file}" for folder, held in folders.items() for file in held),
    }
    assert not (run.config.parent / "not this one").exists()


def test_config_comes_back(run: Run) -> None:
    kept = load_config(run.folder / "config.yaml")
    assert kept == load_config(run.config, [f"output.dir={run.folder}", "train.seed=7"])
    assert kept != load_config(run.config, [f"output.dir={run.folder}"])


def test_metrics(run: Run) -> None:
    losses = metrics(run.folder, "loss")
    assert len(losses) == STEPS and np.isfinite(losses).all()
    assert losses[-3:].mean() < 0.7 * losses[0]
    evaluated = metrics(run.folder, "eval_loss")
    assert len(evaluated) == 1 + STEPS // 4 and np.isfinite(evaluated).all() and evaluated[-1] < 0.7 * evaluated[0]
    rates = metrics(run.folder, "learning_rate")
    assert rates[:3].tolist() == [5e-3, 1e-2, 1e-2] and (np.diff(rates[2:]) < 0).all()
    assert (metrics(run.folder, "step") == [0, 1, 2, 3, 4, 4, 5, 6, 7, 8, 8, 9, 10, 11, 12, 12]).all()


def test_every_rank_logs_the_same_losses(run: Run) -> None:
    found = [
        re.findall(r"step (\d+): loss (\S+), gradient norm (\S+)$", (run.folder / "logs" / name).read_text(), re.M)
        for name in ("rank-0.log", "rank-1.log")
    ]
    assert found[0] == found[1] and len(found[0]) == STEPS
    assert np.allclose([float(loss) for _, loss, _ in found[0]], metrics(run.folder, "loss"), atol=1e-5)


def test_picture_and_tensorboard(run: Run) -> None:
    with Image.open(run.folder / "loss.png") as picture:
        assert picture.format == "PNG" and len(picture.convert("RGB").getcolors(1 << 20)) > 3
    board = EventAccumulator(str(run.folder / "tensorboard"))
    board.Reload()
    assert set(board.Tags()["scalars"]) == TAGS
    losses = [event.value for event in board.Scalars("train/loss")]
    assert np.allclose(losses, metrics(run.folder, "loss"), rtol=1e-6)


def test_links(run: Run) -> None:
    checkpoints = run.folder / "checkpoints"
    assert (checkpoints / "last").readlink() == Path(f"step-{STEPS}")
    assert (checkpoints / "best").resolve().parent == checkpoints
    final = (run.folder / "adapter" / "adapter_model.safetensors").read_bytes()
    assert (checkpoints / "last" / "adapter_model.safetensors").read_bytes() == final
    assert (checkpoints / "step-10" / "adapter_model.safetensors").read_bytes() != final


def test_adapter_in_plain_peft(run: Run) -> None:
    input_ids, expected = run.probe()
    assert input_ids.shape[0] == 3 and torch.isfinite(expected).all()
    adapted = PeftModel.from_pretrained(plain(run.base), run.folder / "adapter")
    assert gap(logits(adapted, input_ids), expected) <= TOLERANCE
    assert gap(logits(plain(run.base), input_ids), expected) >= FAR
    earlier = PeftModel.from_pretrained(plain(run.base), run.folder / "checkpoints" / "step-5")
    assert gap(logits(earlier, input_ids), expected) >= FAR, "another step's adapter would have passed"


def test_merged_in_plain_transformers(run: Run, tmp_path: Path) -> None:
    untouched = snapshot(run.base)
    merged = tmp_path / "merged"
    command = ["lowrank-dist", "merge", "--base", run.base, "--adapter", run.folder / "adapter", "--out", merged]
    outcome = program(command)
    assert (outcome.code, outcome.stderr) == (0, "")
    input_ids, expected = run.probe()
    assert gap(logits(plain(merged), input_ids), expected) <= TOLERANCE
    assert gap(logits(plain(run.base), input_ids), expected) >= FAR
    assert snapshot(run.base) == untouched and snapshot(merged).keys() == untouched.keys() | {"lowrank_dist.json"}


def test_torchrun_gives_the_same_losses(run: Run, tmp_path: Path) -> None:
    outcome = torchrun(2, run.config, f"output.dir={tmp_path / 'run'}", "train.seed=7", "output.tensorboard=false")
    assert outcome.code == 0, outcome.stderr
    for name in ("loss", "grad_norm", "eval_loss"):
        assert (metrics(tmp_path / "run", name) == metrics(run.folder, name)).all()


def test_another_seed_gives_other_losses(run: Run, tmp_path: Path) -> None:
    """Negative control of the test above: dropout and order affect the losses."""
    for outcome in in_ranks(2, run.config, f"output.dir={tmp_path / 'run'}", "output.tensorboard=false"):
        assert outcome.code == 0, outcome.stderr
    assert (metrics(tmp_path / "run", "loss") != metrics(run.folder, "loss")).all()


def test_bf16_packed(tmp_path: Path) -> None:
    """A bf16 base stays bf16 (dtype auto), and packed rows train.

    The eval data follow another rule, so the eval loss rises and the best step is not the last.
    """
    base = make_tiny("llama", tmp_path / "base", dtype=torch.bfloat16)
    other = [{"prompt": row["prompt"], "completion": "0123456789"} for row in samples(6)]
    config = write_config(
        tmp_path / "config.yaml",
        {
            "model": {"path": base, "device": "cpu"},
            "lora": {"rank": 4, "alpha": 8},
            "parallel": {"tensor": 2},
            "data": {
                "train": write_jsonl(tmp_path / "train.jsonl", samples(24)),
                "eval": write_jsonl(tmp_path / "eval.jsonl", other),
                "max_length": 48,
                "packing": True,
            },
            "train": {"steps": 10, "global_batch": 12, "micro_batch": 2, "lr": 1e-2, "schedule": "constant"},
            "eval": {"every": 1},
            "output": {"dir": tmp_path / "run", "save_every": 1, "probe": 2},
        },
    )
    for outcome in in_ranks(2, config):
        assert outcome.code == 0, outcome.stderr
    run = Run(tmp_path / "run", base, config, outcome)
    losses, evaluated = metrics(run.folder, "loss"), metrics(run.folder, "eval_loss")
    assert np.isfinite(losses).all() and losses[-3:].mean() < 0.7 * losses[0]
    lowest = 1 + int(np.argmin(evaluated[1:]))
    assert lowest < 10, "the eval loss was to rise"
    assert (run.folder / "checkpoints" / "best").readlink() == Path(f"step-{lowest}")
    assert (run.folder / "checkpoints" / "last").readlink() == Path("step-10")
    published, best, last = (
        (run.folder / place / "adapter_model.safetensors").read_bytes()
        for place in ("adapter", f"checkpoints/step-{lowest}", "checkpoints/step-10")
    )
    assert published == best != last
    factors = load_file(run.folder / "adapter" / "adapter_model.safetensors").values()
    assert {factor.dtype for factor in factors} == {torch.float32}
    # The probe is plain rows of tokens, whatever the batches were: an unpacked model gives its logits. In bf16 the
    # error may be twice PEFT's. The probe belongs to the published step, not to the last.
    input_ids, found = run.probe()
    exact = logits(PeftModel.from_pretrained(plain(base), run.folder / "adapter"), input_ids)
    in_bf16 = logits(PeftModel.from_pretrained(plain(base, torch.bfloat16), run.folder / "adapter"), input_ids)
    assert 0 < gap(found, exact) <= 2 * gap(in_bf16, exact)
    assert gap(logits(plain(base), input_ids), exact) > 5 * gap(in_bf16, exact)  # an early step
    of_last = logits(PeftModel.from_pretrained(plain(base), run.folder / "checkpoints" / "step-10"), input_ids)
    assert gap(of_last, exact) > 20 * gap(in_bf16, exact)
