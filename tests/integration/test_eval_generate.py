"""Evaluation by generation during training: its metrics, the best step by them, and early stopping."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import yaml

from lowrank_dist.formats.manifest import STATE_FILE
from lowrank_dist.formats.provenance import read_provenance
from tests.dist.ranks import run_ranks
from tests.integration import launching
from tests.integration.launching import WORDS, Outcome, in_ranks, write_config, write_jsonl
from tests.integration.resuming import Layout, curve, stopped_after, tensors, train
from tests.integration.test_generate_commands import command
from tests.tiny_models import make_tiny

STEPS, SAVED, NEW, BATCH = 12, 2, 10, 3
METRICS = ("exact_match", "rouge_l", "bleu")
RESULTS = (*METRICS, "samples", "met_length_limit", "mean_tokens")
GENERATE = {"metrics": list(METRICS), "max_new_tokens": NEW, "batch": BATCH}
# Eight prompts in batches of three: two data-parallel ranks have two batches and one.
LAYOUTS = {"TP1": Layout(1, 1, 1, 8), "TP2": Layout(2, 1, 1, 8), "DP2": Layout(1, 2, 2, 4)}
EARLY = ("eval.patience=2",)


def rows(count: int, first: int = 0) -> list[dict[str, str]]:
    """Return rows that can be learned in a few steps: words with even and odd numbers have different completions."""
    return [
        {"prompt": f"{WORDS[i % 6]}{'x' * (i % 3)}:", "completion": "the tin" if i % 2 else "er"}
        for i in range(first, first + count)
    ]


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("evaluated")
    sections = {
        "model": {"path": make_tiny("qwen2", place / "base", num_key_value_heads=2), "dtype": "fp32", "device": "cpu"},
        "lora": {"rank": 8, "alpha": 32},
        "data": {
            "train": write_jsonl(place / "train.jsonl", rows(24)),
            "eval": write_jsonl(place / "eval.jsonl", rows(8, 1)),
            "max_length": 32,
        },
        "train": {
            **{"steps": STEPS, "global_batch": 8, "lr": 2e-2, "warmup_steps": 2, "eps": 1e-3, "schedule": "linear"},
            "resume": "auto",
        },
        "eval": {"every": 2, "micro_batch": 4, "generate": GENERATE, "best": "exact_match"},
        "output": {"dir": place / "no", "save_every": SAVED, "keep_last": None, "tensorboard": False, "plot": False},
    }
    return write_config(place / "config.yaml", sections)


@pytest.fixture(scope="module")
def runs(job: Path) -> dict[str, Path]:
    """Train the whole run in every layout."""
    found = {name: job.parent / name for name in LAYOUTS}
    for name, layout in LAYOUTS.items():
        well(train(job, found[name], layout))
    return found


def well(outcomes: list[Outcome]) -> str:
    """Assert that every rank ended with code 0; return rank 0's output."""
    assert all(outcome.code == 0 for outcome in outcomes), outcomes[0].stderr + outcomes[-1].stderr
    return outcomes[0].stdout


def evaluated(run: Path) -> dict[int, dict[str, Any]]:
    return {record["step"]: record for record in curve(run) if "eval_loss" in record}


def results(record: dict[str, Any]) -> dict[str, float]:
    """Return the values of a metrics record that come from generation."""
    return {name: record[f"eval_{name}"] for name in RESULTS}


def best(run: Path) -> int:
    return int((run / "checkpoints" / "best").readlink().name.removeprefix("step-"))


def steps(run: Path) -> set[int]:
    return {int(path.name[5:]) for path in (run / "checkpoints").glob("step-*")}


def state(run: Path, step: int) -> dict[str, Any]:
    return json.loads((run / "checkpoints" / f"step-{step}" / STATE_FILE).read_text())


def same_bits(run: Path, other: Path, step: int) -> bool:
    found, expected = tensors(run, step), tensors(other, step)
    return found.keys() == expected.keys() and all(np.array_equal(found[key], expected[key]) for key in expected)


def evaluate(model: Path, data: Path, *options: object) -> dict[str, float]:
    """Run `lowrank-dist evaluate`; return its figures without notes."""
    words = [word for name in METRICS for word in ("--metric", name)]
    words += ["--max-new-tokens", NEW, "--batch", 8, "--json", *options]
    (done,) = command(1, "evaluate", "--model", model, "--data", data, *words)
    assert done.code == 0, done.stderr
    found = json.loads(done.stdout)
    found.pop("notes", None)
    return found


def test_metrics_do_not_depend_on_the_layout(runs: dict[str, Path]) -> None:
    expected = evaluated(runs["TP1"])
    assert list(expected) == list(range(0, STEPS + 1, 2))
    for name in ("TP2", "DP2"):
        found = evaluated(runs[name])
        assert [results(record) for record in found.values()] == [results(record) for record in expected.values()]
        assert np.allclose([r["eval_loss"] for r in found.values()], [r["eval_loss"] for r in expected.values()], 2e-5)
    # The cases differ: nothing, something and everything learned; completions cut at the limit and not.
    matches = {record["eval_exact_match"] for record in expected.values()}
    assert {0.0, 1.0} < matches and {8.0, 0.0} <= {record["eval_met_length_limit"] for record in expected.values()}


def test_completions_of_other_prompts_would_show(job: Path, runs: dict[str, Path], tmp_path: Path) -> None:
    """The control: ranks whose completions are gathered in another order."""
    arguments = [job, f"output.dir={tmp_path / 'run'}", *LAYOUTS["DP2"].overrides, "train.steps=2"]
    well(run_ranks(2, _main_that_mixes_completions_up, [str(argument) for argument in arguments]))
    found, expected = evaluated(tmp_path / "run")[2], evaluated(runs["DP2"])[2]
    assert found["eval_exact_match"] != expected["eval_exact_match"] and found["eval_loss"] == expected["eval_loss"]


def _main_that_mixes_completions_up(arguments: list[str]) -> Outcome:
    from lowrank_dist.generate import decode

    shared = decode._shared
    with mock.patch.object(decode, "_shared", lambda *those: shared(*those)[1:] + shared(*those)[:1]):
        return launching._main(arguments, True)


def test_they_are_those_of_evaluate(job: Path, runs: dict[str, Path]) -> None:
    checkpoints, records = runs["TP2"] / "checkpoints", evaluated(runs["TP2"])
    afterwards = {
        step: evaluate(
            job.parent / "base",
            job.parent / "eval.jsonl",
            *(["--adapter", checkpoints / f"step-{step}"] if step else []),
        )
        for step in (0, 2, 4)
    }
    assert afterwards == {step: results(records[step]) for step in afterwards}
    assert afterwards[0] != afterwards[2] != afterwards[4]


def test_of_several_references_any_is_right(job: Path, runs: dict[str, Path], tmp_path: Path) -> None:
    """Half of the lines have the right reference behind a wrong one; the other half, the control, a wrong one alone."""
    samples = [
        {**row, "completion": ["over", row["completion"]] if i % 2 else ["over"]} for i, row in enumerate(rows(8, 1))
    ]
    data = write_jsonl(tmp_path / "eval.jsonl", samples)
    learnt = runs["TP1"] / "adapter"
    going_on = (f"lora.init_from={learnt}", "train.steps=1", "eval.every=null", f"data.eval={data}")
    well(train(job, tmp_path / "run", LAYOUTS["TP1"], *going_on))
    found = evaluated(tmp_path / "run")[0]
    assert found["eval_exact_match"] == 0.5
    assert evaluate(job.parent / "base", data, "--adapter", learnt) == results(found)
    # The loss is computed on the first reference.
    alone = write_jsonl(tmp_path / "first.jsonl", [{**row, "completion": row["completion"][0]} for row in samples])
    well(train(job, tmp_path / "first", LAYOUTS["TP1"], *going_on, f"data.eval={alone}"))
    assert evaluated(tmp_path / "first")[0]["eval_loss"] == found["eval_loss"]


def test_best_is_the_first_of_the_highest(job: Path, runs: dict[str, Path], tmp_path: Path) -> None:
    """The control: with everything else alike, the eval loss chooses another step."""
    run, records = runs["TP1"], evaluated(runs["TP1"])
    highest = [step for step, record in records.items() if record["eval_exact_match"] == 1]
    lowest = min(records, key=lambda step: records[step]["eval_loss"])
    assert best(run) == highest[0] and len(highest) > 2 and lowest > highest[0]
    well(train(job, tmp_path / "by loss", LAYOUTS["TP1"], "eval.best=loss", "output.keep_last=1"))
    assert best(tmp_path / "by loss") == lowest and steps(tmp_path / "by loss") == {lowest, STEPS}
    # Which checkpoints are kept follows the best step, and they record its values.
    said = well(train(job, tmp_path / "kept", LAYOUTS["TP1"], "output.keep_last=1"))
    assert best(tmp_path / "kept") == highest[0] and steps(tmp_path / "kept") == {highest[0], STEPS}
    assert f"kept/adapter is step {highest[0]} (checkpoints/step-{highest[0]}), the best by exact_match" in said
    assert f"checkpoints/last: step {STEPS}; checkpoints/best: step {highest[0]}, exact_match 1.0" in said
    folder = tmp_path / "kept/checkpoints" / f"step-{highest[0]}"
    assert read_provenance(folder).training["eval_exact_match"] == 1.0
    kept = state(tmp_path / "kept", STEPS)["eval_metrics"]
    assert kept == {name: {str(step): record[f"eval_{name}"] for step, record in records.items()} for name in METRICS}
    line = f"step {STEPS}/{STEPS}  eval loss {records[STEPS]['eval_loss']:.4f}  exact_match 1.0000"
    assert line in said and "0 of 8 reached their length limit" in said and "8 of 8 reached their length limit" in said


def test_training_is_the_same_bit_by_bit(job: Path, runs: dict[str, Path], tmp_path: Path) -> None:
    off = ("eval.generate=null", "eval.best=loss")
    for name in ("TP2", "DP2"):
        well(train(job, tmp_path / name, LAYOUTS[name], *off))
        assert all(same_bits(tmp_path / name, runs[name], step) for step in (2, STEPS))
        assert not any("eval_exact_match" in record for record in curve(tmp_path / name))
    # The control: generation leaves the model in decoding mode, without sequence parallelism.
    arguments = [job, f"output.dir={tmp_path / 'left'}", *LAYOUTS["TP2"].overrides, "train.steps=2"]
    well(run_ranks(2, _main_that_leaves_the_model_changed, [str(argument) for argument in arguments]))
    assert not same_bits(tmp_path / "left", runs["TP2"], 2)


def _main_that_leaves_the_model_changed(arguments: list[str]) -> Outcome:
    from dataclasses import replace

    from lowrank_dist.model.causal_lm import CausalLM

    @contextmanager
    def changed(model: CausalLM) -> Iterator[None]:
        model._set_sequence_parallel(replace(model.topology, sequence_parallel=False))
        yield

    with mock.patch.object(CausalLM, "without_sequence_parallelism", changed):
        return launching._main(arguments, True)


METHODS: dict[str, tuple[str, ...]] = {
    "lora": ("engine.lanes=on", "lora.dropout=0.1"),
    "full": ("train.lr=5e-3",),
    "adapter_h": ("adapter.bottleneck=8",),
    "prefix": ("prefix.length=8", "prefix.width=16", "train.lr=0.2", "train.steps=8"),
    "prompt": ("prompt.length=3", "train.lr=0.3"),
}


@pytest.mark.parametrize("method", METHODS)
def test_any_method_is_evaluated_as_it_is(method: str, job: Path, tmp_path: Path) -> None:
    """Results during training at TP 2 equal those from files at TP 1. Evaluation does not change a bit of training."""
    sections = yaml.safe_load(job.read_text())
    del sections["lora"]
    config = write_config(tmp_path / "config.yaml", {**sections, "method": method})
    short = ("train.steps=4", *METHODS[method])
    layout = LAYOUTS["TP2"]
    well(train(config, tmp_path / "run", layout, *short))
    well(
        train(config, tmp_path / "plain", layout, *short, "eval.generate=null", "eval.best=loss", "output.save_every=4")
    )
    records, last = evaluated(tmp_path / "run"), max(steps(tmp_path / "run"))
    assert same_bits(tmp_path / "run", tmp_path / "plain", last)
    base, checkpoint = job.parent / "base", tmp_path / "run/checkpoints/last"
    model = [checkpoint, "--tokenizer", base] if method == "full" else [base, "--adapter", checkpoint]
    assert evaluate(model[0], job.parent / "eval.jsonl", *model[1:]) == results(records[last])
    assert results(records[last]) != results(records[0])


@pytest.fixture(scope="module")
def early(job: Path, runs: dict[str, Path]) -> Path:
    """Train a run that stops early; its output is saved beside it."""
    run = job.parent / "early"
    (job.parent / "said").write_text(well(train(job, run, LAYOUTS["DP2"], *EARLY)))
    return run


def test_patience(job: Path, runs: dict[str, Path], early: Path) -> None:
    """The run ends at the second evaluation in a row that is no better; until then it equals the longer run."""
    first = best(runs["DP2"])
    end = first + 4
    assert end < STEPS, "patience that ends no run"
    assert steps(early) == set(range(2, end + 1, 2)) and best(early) == first
    assert curve(early) == [record for record in curve(runs["DP2"]) if record["step"] <= end]
    assert same_bits(early, runs["DP2"], end)
    places = ("adapter", f"checkpoints/step-{first}", f"checkpoints/step-{end}")
    adapter, chosen, last = ((early / place / "adapter_model.safetensors").read_bytes() for place in places)
    assert adapter == chosen != last
    said = (job.parent / "said").read_text()
    line = f"stopped early at step {end} of {STEPS}: 2 evaluations in a row no better than exact_match 1.0000 of step"
    assert f"{line} {first} (eval.patience 2)" in said
    assert f"early/adapter is step {first} (checkpoints/step-{first}), the best by exact_match; output.publish" in said
    assert f"checkpoints/last: step {end}; checkpoints/best: step {first}, exact_match 1.0000" in said


def test_patience_survives_a_resume(job: Path, early: Path, tmp_path: Path) -> None:
    end = max(steps(early))
    stopped = stopped_after(early, end - 2, tmp_path / "run")
    assert f"at step {end - 2} of {STEPS}" in well(train(job, stopped, LAYOUTS["DP2"], *EARLY))
    assert curve(stopped) == curve(early) and same_bits(stopped, early, end) and best(stopped) == best(early)
    # The control: without the metrics in the checkpoint the count starts again, and the run continues for longer.
    forgetful = stopped_after(early, end - 2, tmp_path / "forgetful")
    path = forgetful / "checkpoints" / f"step-{end - 2}"
    forgotten = {**state(forgetful, end - 2), "eval_metrics": {}}
    (path / STATE_FILE).write_text(json.dumps(forgotten))
    _manifest(path)
    said = well(train(job, forgetful, LAYOUTS["DP2"], *EARLY))
    assert f"exact_match, which was not measured up to step {end - 2}" in said
    assert max(steps(forgetful)) == STEPS and best(forgetful) == end


def _manifest(checkpoint: Path) -> None:
    from lowrank_dist.formats.manifest import MANIFEST_FILE, write_manifest

    (checkpoint / MANIFEST_FILE).unlink()
    write_manifest(checkpoint)


def test_a_run_that_ended_early_goes_on_only_when_told(
    job: Path, runs: dict[str, Path], early: Path, tmp_path: Path
) -> None:
    copy, end = tmp_path / "run", max(steps(early))
    shutil.copytree(early, copy, symlinks=True)
    said = well(train(job, copy, LAYOUTS["DP2"], *EARLY))
    assert f"the run ends early at step {end} of {STEPS}: 2 evaluations in a row no better than" in said
    assert curve(copy) == curve(early) and steps(copy) == steps(early) and best(copy) == best(early)
    well(train(job, copy, LAYOUTS["DP2"]))
    assert curve(copy) == curve(runs["DP2"]) and same_bits(copy, runs["DP2"], STEPS)


def test_best_is_chosen_anew_by_another_measure(job: Path, runs: dict[str, Path], tmp_path: Path) -> None:
    records = evaluated(runs["TP1"])
    other = stopped_after(runs["TP1"], 10, tmp_path / "other")
    well(train(job, other, LAYOUTS["TP1"], "eval.best=loss"))
    assert best(other) == min(records, key=lambda step: records[step]["eval_loss"]) != best(runs["TP1"])
    # A step that was not measured before the resume cannot be the best, however good it was.
    off = ("eval.generate=null", "eval.best=loss")
    plain = tmp_path / "plain"
    well(train(job, plain, LAYOUTS["TP1"], *off))
    later = stopped_after(plain, 8, tmp_path / "later")
    said = well(train(job, later, LAYOUTS["TP1"]))
    assert "eval.best is exact_match, which was not measured up to step 8" in said
    assert best(later) == 10 and best(runs["TP1"]) < 8
    changed = stopped_after(runs["TP1"], 10, tmp_path / "changed")
    shorter = {**GENERATE, "max_new_tokens": 4}
    assert "with eval.generate {'metrics'" in well(train(job, changed, LAYOUTS["TP1"], f"eval.generate={shorter}"))


def test_evaluations_without_a_checkpoint_are_announced(job: Path, tmp_path: Path) -> None:
    shared = ("train.steps=2", "eval.at_start=false", "eval.generate={samples: 1, max_new_tokens: 1}")
    said = {
        save: well(train(job, tmp_path / save, LAYOUTS["TP1"], *shared, f"output.save_every={save}"))
        for save in ("3", "1", "null")
    }
    announced = "checkpoints/best can only be a step that is both evaluated and saved, "
    assert f"{announced}one of 6, 12, … and the last, since eval.every is 2 and output.save_every is 3" in said["3"]
    assert f"{announced}the last, since eval.every is 2 and output.save_every is null" in said["null"]
    assert announced not in said["1"] and "1 of 1 reached their length limit" in said["1"]


def test_a_run_notes_references_without_a_word(job: Path, tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "eval.jsonl", [{"prompt": "the cat", "completion": text} for text in ("er", "!")])
    shared = (f"data.eval={data}", "train.steps=1", "eval.at_start=false", "eval.best=loss")
    said = {
        name: well(
            train(
                job, tmp_path / name, LAYOUTS["TP1"], *shared, f"eval.generate={{metrics: [{name}], max_new_tokens: 1}}"
            )
        )
        for name in ("rouge_l", "exact_match")
    }
    assert "rouge_l: the references of 1 of 2 samples have no word" in said["rouge_l"]
    assert "have no word" not in said["exact_match"]


def test_the_watchdog_sees_life_at_every_batch(job: Path, tmp_path: Path) -> None:
    arguments = [job, f"output.dir={tmp_path / 'run'}", *LAYOUTS["DP2"].overrides, "train.steps=1"]
    seen = run_ranks(2, _signs_of_life, [str(argument) for argument in arguments])
    # Two evaluations: one sign at each start of evaluation and of generation, at each microbatch, after each batch.
    assert seen == [2 * (2 + 1 + 2), 2 * (2 + 1 + 1)]


def _signs_of_life(arguments: list[str]) -> int:
    from lowrank_dist.supervision.rank import Supervision

    entered: list[str] = []
    with ExitStack() as stack:
        enter = Supervision.enter
        stack.enter_context(
            mock.patch.object(
                Supervision, "enter", lambda self, phase, step=None: (entered.append(phase), enter(self, phase, step))
            )
        )
        assert launching._main(arguments, True).code == 0
    return entered.count("evaluation")


LONG = "a" * 64
BAD: dict[str, tuple[list[dict[str, Any]] | None, tuple[str, ...], str]] = {
    "metric": (None, ("eval.generate={metrics: [accuracy]}",), "eval.generate.metrics[0]: 'accuracy' is not valid"),
    "best": (None, ("eval.generate={metrics: [bleu]}",), "eval.generate.metrics has only bleu"),
    "best of nothing": (None, ("eval.generate=null",), "eval.generate is null, so nothing is generated"),
    "no data": (None, ("data.eval=null",), "eval.generate is given, but data.eval is null"),
    "never": (
        None,
        ("eval.every=null", "eval.patience=2"),
        "eval.every is null, so there is no evaluation after which",
    ),
    "unknown key": (
        None,
        ("eval.generate={max_tokens: 3}",),
        "unknown key; did you mean eval.generate.max_new_tokens?",
    ),
    "empty prompt": ([{"prompt": "", "completion": "er"}], (), "eval.generate: EVAL:1: key 'prompt' is empty"),
    "no reference": ([{"prompt": "cat"}], (), "EVAL:1"),
    "long prompt": (
        [{"prompt": LONG, "completion": "er"}, *rows(1)],
        ("data.max_length=64",),
        "eval.generate: EVAL:1 (64 tokens): longer than the model's 64 positions with its completion; shorten it",
    ),
    "long prompt behind a prefix": (
        [{"prompt": LONG[3:], "completion": "er"}, *rows(1)],
        ("data.max_length=64", "method=prefix", "prefix.length=3"),
        "eval.generate: EVAL:1 (61 tokens): longer than the model's 61 positions with its completion; shorten it",
    ),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input_is_one_message_before_training(what: str, job: Path, tmp_path: Path) -> None:
    samples, overrides, said = BAD[what]
    sections = yaml.safe_load(job.read_text())
    del sections["lora"]
    config = write_config(tmp_path / "config.yaml", sections)
    data = write_jsonl(tmp_path / "eval.jsonl", samples) if samples else job.parent / "eval.jsonl"
    arguments = (config, f"output.dir={tmp_path / 'run'}", f"data.eval={data}", *overrides)
    (outcome,) = in_ranks(1, *arguments)
    assert outcome.code == 2 and said.replace("EVAL", str(data)) in outcome.stderr, outcome.stderr
    assert "Traceback" not in outcome.stderr and not (tmp_path / "run").exists()
