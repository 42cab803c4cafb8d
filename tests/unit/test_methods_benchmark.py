"""benchmarks/methods.py: the runs and their order, how results are kept, and the tables made from them.

No model is trained: the results of runs are written where a run would write them.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file

from lowrank_dist.config import read_arguments
from lowrank_dist.engine.meter import STEP_PHASES

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

import methods  # noqa: E402
from methods import PLANS, Cache, Run  # noqa: E402

pytestmark = pytest.mark.slow

SHOWN = list(PLANS)


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(methods.ROOT)


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path, 2, None)


def keep(cache: Cache, run: Run, loss: float = 1.0, **more: Any) -> None:
    """Keep the result of a finished run."""
    cache.folder(run).mkdir(parents=True, exist_ok=True)
    result = {"eval_loss": loss, "eval_loss_at_start": 3.0, "exact_match": 0.5, "stored": 1000, "seconds": 60.0}
    cache.keep(run, {"source": methods.source(), **result, "tokens_per_second": 100.0, **more})


def keep_failed(cache: Cache, run: Run) -> None:
    cache.folder(run).mkdir(parents=True, exist_ok=True)
    cache.keep(run, {"failed": "step 3: the loss is nan; lower train.lr", "source": "x"})


def at_the_middle(method: str) -> list[Run]:
    return [Run(method, PLANS[method].middle, rate) for rate in PLANS[method].rates]


def test_every_run_is_a_config_that_loads_and_says_what_the_run_is(cache: Cache) -> None:
    for stage in methods.stages(cache, SHOWN):
        for run in (run for run in stage if run.method is not None):
            config = read_arguments(cache.arguments(run, Path("out")))
            assert (config.method, config.train.lr, config.output.dir) == (run.method, run.rate, Path("out"))
            section, _, key = (PLANS[run.method].size or "").partition(".")
            assert not section or getattr(getattr(config, section), key) == run.size
            if run.method == "lora":
                assert config.lora.alpha / config.lora.rank == 2
            # The longest sample has 39 tokens: no method drops a sample.
            assert run.method not in ("prefix", "prompt") or config.data.max_length - run.size >= 39


def test_runs_come_in_order_of_use(cache: Cache) -> None:
    first, second, third = methods.stages(cache, SHOWN)
    assert first == [Run(None), *(at_the_middle(method)[1] for method in SHOWN)]
    assert len(set(second)) == 2 * len(SHOWN) and not set(second) & set(first)
    assert {run.size for run in second if run.method == "prefix"} == {PLANS["prefix"].middle}
    assert len(set(third)) == 2 * (len(SHOWN) - 1) and all(run.method != "full" for run in third)
    assert all(run.size != PLANS[run.method].middle for run in third)


def test_other_sizes_take_the_rate_of_the_lowest_loss_and_a_run_that_diverged_is_none(cache: Cache) -> None:
    low, middle, high = at_the_middle("lora")
    assert methods.best_rate(cache, "lora") == (None, 0)
    keep(cache, low, 2.0)
    assert methods.best_rate(cache, "lora") == (low.rate, 1)
    keep(cache, middle, 1.5)
    keep_failed(cache, high)
    assert methods.best_rate(cache, "lora") == (middle.rate, 3)
    assert {run.rate for run in methods.other_sizes(cache, ["lora"])} == {middle.rate}
    keep(cache, low, 1.0)
    assert {run.rate for run in methods.other_sizes(cache, ["lora"])} == {low.rate}


def test_the_key_is_of_all_that_makes_a_run_what_it_is(
    tmp_path: Path, cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = [run for stage in methods.stages(cache, SHOWN) for run in stage]
    keys = {cache.key(run) for run in runs}
    assert len(keys) == len(set(runs))
    run = at_the_middle("prompt")[0]
    others = [Cache(tmp_path, 1, None), Cache(tmp_path, 2, 7)]
    template = tmp_path / "template.yaml"
    text = (methods.ROOT / methods.TEMPLATE).read_text(encoding="utf-8")
    found = {cache.key(run), *(other.key(run) for other in others)}
    # Comments do not change a run, nor does a former default written out; another value does.
    template.write_text(text + "\n# a comment\n", encoding="utf-8")
    monkeypatch.setattr(methods, "TEMPLATE", template)
    assert cache.key(run) in found
    template.write_text(text.replace("steps: 120", "steps: 120\n  seed: 42"), encoding="utf-8")
    assert cache.key(run) in found
    template.write_text(text.replace("steps: 120", "steps: 120\n  seed: 43"), encoding="utf-8")
    found.add(cache.key(run))
    monkeypatch.setattr(methods, "RECIPE", methods.RECIPE + 1)
    found.add(cache.key(run))
    assert len(found) == 5
    # The location of the runs' folder does not matter.
    assert Cache(tmp_path / "elsewhere", 2, None).key(run) == cache.key(run)


def test_a_run_that_is_there_is_not_repeated_and_half_a_result_is_none(
    cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = [run for stage in methods.stages(cache, ["lora"]) for run in stage]
    for run in done[1:]:
        keep(cache, run, 1.0 if run.rate == PLANS["lora"].rates[1] else 2.0)
    cache.folder(done[0]).mkdir(parents=True)
    (cache.folder(done[0]) / "result.partial").write_text('{"exact', encoding="utf-8")
    called = []

    def execute(run: Run, *_: Any) -> dict[str, Any]:
        called.append(run)
        keep(cache, run)
        return cache.result(run)

    monkeypatch.setattr(methods, "execute", execute)
    monkeypatch.setattr(methods, "publish", lambda *_: None)
    args = methods.argparse.Namespace(only=["lora"], jobs=1, threads=2)
    methods.run_all(cache, args, {}, Console(quiet=True))
    assert called == [done[0]]
    methods.run_all(cache, args, {}, Console(quiet=True))
    assert called == [done[0]]


def test_gaps_are_marked_and_figures_are_where_they_belong(cache: Cache, tmp_path: Path) -> None:
    low, middle, high = at_the_middle("prefix")
    keep(cache, low, 1.25, exact_match=0.125)
    for rate, loss in zip(at_the_middle("full"), (3.0, 2.0, 1.5), strict=True):
        keep(cache, rate, loss, tokens_per_second=50.0)
    rows = {(row["method"], row["size"]): row for row in methods.table_rows(cache)}
    assert len(rows) == 3 * 5 + 1
    assert rows["prefix", 64]["virtual"] == 64 and rows["full", None]["virtual"] == 0
    assert not rows["prefix", 64].get("missing") and rows["prefix", 8]["missing"] and rows["lora", 8]["missing"]
    assert rows["full", None]["rate_at_edge"] and not rows["prefix", 64]["rate_at_edge"]
    console = Console(width=170, record=True, quiet=False, file=(tmp_path / "out").open("w"))
    methods.show(list(rows.values()), methods.rate_rows(cache), None, console)
    lines = console.export_text().splitlines()
    (line,) = [line for line in lines if line.startswith("| prefix ") and " 64 " in line]
    assert "1.250" in line and "0.125" in line and "(1 of 3 tried)" in line and "–" in line
    (line,) = [line for line in lines if line.startswith("| full ") and "edge of the three" in line]
    assert "1.500" in line


def test_low_rank_over_full_is_of_the_middle_sizes(cache: Cache) -> None:
    assert methods.ratio(methods.table_rows(cache)) is None
    keep(cache, at_the_middle("lora")[1], tokens_per_second=120.0)
    keep(cache, Run("lora", PLANS["lora"].sizes[0], PLANS["lora"].rates[1]), tokens_per_second=999.0)
    assert methods.ratio(methods.table_rows(cache)) is None
    keep(cache, at_the_middle("full")[1], tokens_per_second=80.0)
    assert methods.ratio(methods.table_rows(cache)) == 1.5
    # The throughput is that of the row's run, not of a run with a worse learning rate.
    keep(cache, at_the_middle("lora")[2], 2.0, tokens_per_second=160.0)
    assert methods.ratio(methods.table_rows(cache)) == 1.5
    keep(cache, at_the_middle("lora")[2], 0.5, tokens_per_second=160.0)
    assert methods.ratio(methods.table_rows(cache)) == 2.0


@pytest.mark.parametrize(
    ("matches", "losses", "monotonic"),
    [
        ((0.1, 0.2, 0.2), (3.0, 2.0, 2.0), True),
        ((0.1, 0.3, 0.2), (3.0, 2.0, 1.0), False),
        ((0.1, 0.2, 0.3), (3.0, 1.0, 2.0), False),
    ],
)
def test_a_course_that_turns_back_is_told(
    cache: Cache, matches: tuple[float, ...], losses: tuple[float, ...], monotonic: bool
) -> None:
    plan = PLANS["prefix"]
    for size, match, loss in zip(plan.sizes, matches, losses, strict=True):
        assert "prefix" not in methods.courses(methods.table_rows(cache))
        keep(cache, Run("prefix", size, plan.rates[1]), loss, exact_match=match)
    assert methods.courses(methods.table_rows(cache))["prefix"]["monotonic"] is monotonic


def test_speed_leaves_the_first_steps_out_and_is_not_moved_by_a_slow_one() -> None:
    assert methods.speed([1.0] * methods.FIRST_STEPS + [10.0, 12.0, 11.0, 0.5, 11.0]) == 11.0
    assert methods.speed([3.0, 4.0]) == 3.5


def test_only_a_learning_rate_that_diverges_is_a_result() -> None:
    stopped = "step 3: the loss is nan; training stops on every rank. Lower train.lr, add train.warmup_steps, or look"
    assert methods.diverged(f"step 2/3\n{stopped}\n") == stopped
    assert methods.diverged("output.dir: another process trains in build/run; end it first") is None


def test_figures_are_collected_from_a_run_folder(tmp_path: Path) -> None:
    last, adapter = tmp_path / "checkpoints" / "last", tmp_path / "adapter"
    last.mkdir(parents=True)
    adapter.mkdir()
    weights = {"a": torch.zeros(4, 6), "b": torch.zeros(6)}
    for folder in (last, adapter):
        save_file(weights, folder / "adapter_model.safetensors")
    kept = {f"{name}.{kind}": torch.zeros(50) for name in "ab" for kind in methods.KINDS}
    save_file(kept, last / methods.OPTIMIZER_FILE)
    phases = {f"{phase}_seconds": 0.4 for phase in STEP_PHASES} | {"checkpoint_seconds": 100.0}
    steps = [
        {"step": n, "time": n + 0.5, "tokens_per_second": 10.0 + n, "memory_gib": 2.0 + n % 3, **phases}
        for n in range(1, 12)
    ]
    lines = [{"step": 0, "time": 0.1, "eval_loss": 3.0}, *steps, {"step": 11, "time": 13.0, "eval_loss": 0.5}]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "metrics.jsonl").write_text(text + '{"step": 12, "ti', encoding="utf-8")
    found = methods.collect(tmp_path, "prefix", 0)
    assert (found["trained"], found["stored"]) == (100, 30)
    assert found["adapter_bytes"] == (adapter / "adapter_model.safetensors").stat().st_size
    assert found["checkpoint_bytes"] == sum(file.stat().st_size for file in last.iterdir())
    assert (found["eval_loss_at_start"], found["eval_loss"]) == (3.0, 0.5)
    assert (found["peak_memory_gib"], found["tokens_per_second"]) == (4.0, 18.5)
    assert (found["steps"], found["seconds"]) == (11, 13.0)
    # Two prompt positions in each of eight samples, in a step of two seconds.
    assert methods.collect(tmp_path, "prompt", 2)["tokens_per_second"] == pytest.approx(18.5 - 2 * 8 / 2)


def test_children_end_with_the_command() -> None:
    processes = methods.Processes()
    pool = methods.ThreadPoolExecutor(1)
    future = pool.submit(processes.call, [sys.executable, "-c", "import time; time.sleep(60)"], {})
    while not processes._live:
        time.sleep(0.01)
    processes.end()
    assert future.result(timeout=20)[0] == -signal.SIGTERM
    with pytest.raises(SystemExit):
        processes.call([sys.executable, "-c", ""], {}, stdout=subprocess.PIPE)


def test_the_picture_is_drawn_of_what_is_there(cache: Cache, tmp_path: Path) -> None:
    methods.draw(methods.table_rows(cache), None, tmp_path / "empty.png")
    keep(cache, at_the_middle("prompt")[1])
    keep(cache, at_the_middle("full")[1], stored=134_515_008)
    methods.draw(methods.table_rows(cache), {"exact_match": 0.0}, tmp_path / "some.png")
    assert (tmp_path / "some.png").stat().st_size > (tmp_path / "empty.png").stat().st_size
