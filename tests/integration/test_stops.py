"""Runs that are told to stop, that meet a loss which is not finite, and whose ranks wait for one of them."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from lowrank_dist.data.batches import Loader, order
from lowrank_dist.formats.manifest import STATE_FILE
from lowrank_dist.parallel.linear import LowRankColumnParallelLinear
from tests.dist import ranks
from tests.integration.launching import Outcome, _main, assert_codes, metrics, samples, write_config, write_jsonl
from tests.integration.resuming import SIZES, Layout, curve, gap, make_job, stopped_after, tensors, train

SQUARE, PAIR = Layout(2, 2, 1), Layout(2, 1, 1)
STEPS = 30
LONG = (f"train.steps={STEPS}", "eval.every=7", "output.save_every=null", "train.warmup_steps=0")
STOPPED = re.compile(r"stopped by (.+) at step (\d+) of 30: checkpoint saved (\d+\.\d\d) s after the signal; ")


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_job(tmp_path_factory.mktemp("stops"))


@pytest.fixture(scope="module")
def undisturbed(job: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    assert_codes(train(job, run, SQUARE, *LONG), 0)
    return run


def pids(size: int) -> list[int]:
    """Return the process ids of the pooled ranks, which have trained before."""
    return [process.pid for process in ranks._worlds[size].processes]


def steps_of(run: Path) -> int:
    path = run / "metrics.jsonl"
    return sum('"loss"' in line for line in path.read_text().splitlines()) if path.exists() else 0


def meanwhile(start: Callable[[], list[Outcome]], act: Callable[[], Iterator[None]]) -> list[Outcome]:
    """Run `act`, one part after each `yield`, until it or the run that `start` starts is over."""
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(start)
        for _ in act():
            time.sleep(0.005)
            if running.done():
                break
        return running.result()


@pytest.mark.parametrize(
    ("rank", "numbers"),
    [(0, (signal.SIGUSR1,)), (3, (signal.SIGTERM, signal.SIGTERM)), (1, (signal.SIGUSR2, signal.SIGUSR1))],
    ids=["USR1 to the first", "TERM twice to the last", "USR2 and USR1"],
)
def test_one_rank_is_told_and_all_save_and_stop(
    job: Path, undisturbed: Path, tmp_path: Path, rank: int, numbers: tuple[signal.Signals, ...]
) -> None:
    run = tmp_path / "run"

    def tell() -> Iterator[None]:
        while steps_of(run) < 3:
            yield
        for number in numbers:
            os.kill(pids(4)[rank], number)
            yield

    outcomes = meanwhile(lambda: train(job, run, SQUARE, *LONG), tell)
    assert_codes(outcomes, 85)
    (said,) = STOPPED.findall(outcomes[0].stdout)
    # Of signals that wait together the kernel delivers the one with the smallest number first.
    assert said[0] in {number.name if rank == 0 else f"{number.name} to rank {rank}" for number in numbers}
    step, seconds = int(said[1]), float(said[2])
    assert 3 <= step < STEPS and 0 < seconds < 30
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == sorted({"last", f"step-{step}"} | best(run))
    assert not (run / "adapter").exists() and not (run / "FAILED").exists()
    assert_codes(train(job, run, SQUARE, *LONG), 0)
    assert curve(run) == curve(undisturbed)
    assert gap(tensors(run, STEPS), tensors(undisturbed, STEPS)) == 0


def best(run: Path) -> set[str]:
    """Return the target of the link `best`, which exists where a saved step was evaluated."""
    return {"best"} if (run / "checkpoints" / "best").is_symlink() else set()


def test_told_at_its_last_step_a_run_just_ends(job: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"

    def tell() -> Iterator[None]:
        while not (run / "logs" / "rank-0.log").exists():
            yield
        os.kill(pids(4)[2], signal.SIGUSR1)
        yield

    outcomes = meanwhile(lambda: train(job, run, SQUARE, *LONG, "train.steps=1"), tell)
    assert_codes(outcomes, 0)
    assert (run / "adapter").is_dir()


# --- a loss that is not finite ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def poisoned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a job whose base has a non-finite embedding of the one character that only a single sample has."""
    place = tmp_path_factory.mktemp("poisoned")
    config = make_job(place)
    rows = samples(24)
    rows[5] = {"prompt": "Z:", "completion": "dog"}
    write_jsonl(place / "train.jsonl", rows)
    base = place / "base"
    (token,) = set(AutoTokenizer.from_pretrained(base)("Z", add_special_tokens=False)["input_ids"])
    (path,) = base.glob("*.safetensors")
    weights = load_file(path)
    # Not tied: as a row of the output layer it would be in every loss.
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    weights["model.embed_tokens.weight"][token] = float("nan")
    save_file(weights, path, metadata={"format": "pt"})
    settings = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**settings, "tie_word_embeddings": False}))
    return config


SKIP = ("train.nonfinite=skip", "train.steps=6", "data.eval=null", "train.schedule=constant", "train.warmup_steps=0")


def test_a_step_that_is_not_finite_is_skipped_by_all(poisoned: Path, tmp_path: Path) -> None:
    """The sample comes once in three steps. If it is in the last step, the weights are those of the step before."""
    run = tmp_path / "run"
    outcomes = train(poisoned, run, SQUARE, *SKIP)
    assert_codes(outcomes, 0)
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    skipped = [record["step"] for record in records if record.get("skipped_in_a_row") == 1]
    assert len(skipped) == 2 and skipped[1] > 2 and len(records) == 6 and all(np.isfinite(metrics(run, "loss")))
    said = re.findall(
        r"^step (\d): the loss is nan \((.*)\); the step is skipped on every rank$", outcomes[0].stdout, re.M
    )
    assert [int(step) for step, _ in said] == skipped
    # Only the data-parallel group that had the sample saw it, on both of its tensor-parallel ranks.
    host = socket.gethostname()
    pairs = {f"rank {first} on {host}, rank {first + 1} on {host}" for first in (0, 2)}
    assert {ranks for _, ranks in said} <= pairs
    end = skipped[1]
    before, until = tmp_path / "before", tmp_path / "until"
    for folder, steps in ((before, end - 1), (until, end)):
        assert_codes(train(poisoned, folder, SQUARE, *SKIP, f"train.steps={steps}"), 0)
    masters = [
        {name: value for name, value in tensors(folder, steps).items() if name.endswith("master")}
        for folder, steps in ((before, end - 1), (until, end), (run, 6))
    ]
    assert masters[0] and gap(masters[1], masters[0]) == 0
    assert gap(masters[2], masters[0]) > 1e-3, "the run did not go on after the step"


@pytest.mark.parametrize("method", ["lora", "prefix"])
def test_a_run_whose_first_step_is_skipped_goes_on_from_there(poisoned: Path, tmp_path: Path, method: str) -> None:
    """With this seed the sample is in the first batch: the first checkpoint holds untrained parameters."""
    seed = next(seed for seed in range(99) if 5 in order(seed, 24, 0, 8))
    changes = ("train.steps=3", f"train.seed={seed}", "output.save_every=1")
    if method == "prefix":
        sections = {**yaml.safe_load(poisoned.read_text()), "method": method, method: SIZES[method][method]}
        poisoned = write_config(tmp_path / "prefix.yaml", {key: sections[key] for key in sections if key != "lora"})
    whole = tmp_path / "whole"
    assert_codes(train(poisoned, whole, PAIR, *SKIP, *changes), 0)
    assert [len(metrics(whole, name)) for name in ("skipped_in_a_row", "loss")] == [1, 2]
    first = json.loads((whole / "checkpoints/step-1" / STATE_FILE).read_text())
    assert first["loss"] is None
    stopped = stopped_after(whole, 1, tmp_path / "run")
    assert_codes(train(poisoned, stopped, PAIR, *SKIP, *changes), 0)
    assert curve(stopped) == curve(whole) and gap(tensors(stopped, 3), tensors(whole, 3)) == 0


def test_a_run_that_skips_every_step_fails_by_name(poisoned: Path, tmp_path: Path) -> None:
    every = write_jsonl(tmp_path / "every.jsonl", [{"prompt": "Z:", "completion": "dog"}] * 24)
    outcomes = train(poisoned, tmp_path / "run", PAIR, *SKIP, "train.steps=2", f"data.train={every}")
    assert_codes(outcomes, 2)
    assert "all steps were skipped" in "".join(outcome.stderr for outcome in outcomes)
    assert not (tmp_path / "run/adapter").exists()


def test_it_stops_by_default_and_after_too_many_in_a_row(poisoned: Path, tmp_path: Path) -> None:
    by_default = train(poisoned, tmp_path / "first", SQUARE, *SKIP, "train.nonfinite=stop")
    assert_codes(by_default, 2)
    # With every sample like it no step is finite.
    rows = [{"prompt": "Z:", "completion": "dog"}] * 24
    every = write_jsonl(tmp_path / "every.jsonl", rows)
    too_many = train(poisoned, tmp_path / "second", SQUARE, *SKIP, f"data.train={every}", "train.max_skips=2")
    assert_codes(too_many, 2)
    assert too_many[0].stdout.count("the step is skipped on every rank") == 2
    (said,) = [outcome.stderr for outcome in too_many if outcome.stderr]
    assert "step 3: the loss is nan" in said and "train.max_skips (2) steps in a row were skipped" in said


# --- a slow rank that all others wait for ----------------------------------------------------------------------------


def slowed(slow_rank: int, what: str, arguments: list[str]) -> Outcome:
    """Inside a rank: run, while one rank sleeps in every batch, or in every column-parallel linear."""

    def late(function: Callable[..., object]) -> Callable[..., object]:
        def wrapped(*given: object, **named: object) -> object:
            if os.environ["RANK"] == str(slow_rank):
                time.sleep(seconds)
            return function(*given, **named)

        return wrapped

    # Far above the delay that a busy machine adds to a step of these models.
    owner, name, seconds = {"data": (Loader, "batch", 1.0), "layers": (LowRankColumnParallelLinear, "forward", 0.1)}[
        what
    ]
    with mock.patch.object(owner, name, late(getattr(owner, name))):
        return _main(arguments, True)


@pytest.mark.parametrize(
    ("layout", "slow_rank", "what"),
    [
        pytest.param(PAIR, 1, "data", id="data"),
        pytest.param(SQUARE, 2, "layers", id="layers"),
        pytest.param(
            Layout(2, 1, 1, sequence=False),
            0,
            "layers",
            id="layers without sequence parallelism",
            marks=pytest.mark.nightly,
        ),
    ],
)
def test_a_straggler_is_named(job: Path, tmp_path: Path, layout: Layout, slow_rank: int, what: str) -> None:
    arguments = [str(job), f"output.dir={tmp_path / 'run'}", *layout.overrides, "train.steps=4", "data.eval=null"]
    outcomes = ranks.run_ranks(layout.tensor * layout.data, slowed, slow_rank, what, arguments)
    assert_codes(outcomes, 0)
    named = set(re.findall(r"rank (\d) on \S+ is a straggler", outcomes[0].stdout))
    assert named == {str(slow_rank)}, outcomes[0].stdout


def test_no_factor_no_straggler(job: Path, tmp_path: Path) -> None:
    options = ["engine.straggler_factor=null", "train.steps=4", "data.eval=null"]
    arguments = [str(job), f"output.dir={tmp_path / 'run'}", *PAIR.overrides, *options]
    outcomes = ranks.run_ranks(2, slowed, 1, "data", arguments)
    assert_codes(outcomes, 0)
    assert "is a straggler" not in outcomes[0].stdout
