"""benchmarks/latency.py: its widths, statistics and verdict, and its rows on a tiny model in a world of two ranks.

The other rank is simulated by a fake process group. No time is measured.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch.testing._internal.distributed.fake_pg import FakeStore

from lowrank_dist.arch.config_json import parse_architecture
from lowrank_dist.backend import select
from lowrank_dist.engine.planning import Model

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

import latency  # noqa: E402

LAYERS, HIDDEN, LENGTH, TRIALS = 2, 32, 128, 2
TINY = {
    "model_type": "gpt2",
    "n_embd": HIDDEN,
    "n_layer": LAYERS,
    "n_head": 4,
    "vocab_size": 100,
    "n_positions": LENGTH,
}
SETTING = latency.Setting(2, LENGTH, TRIALS)
WIDTHS = {"unmerged": 3, "adapter_l": 4, "adapter_h": 6}


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[latency.Bench]:
    """Yield the benchmark on rank 0 of two, with a tiny model in place of the real one."""
    tiny = Model("tiny", parse_architecture(TINY, "tiny"), "fp32")
    monkeypatch.setattr(latency, "find_model", lambda name: tiny)

    def join(backend: select.Backend, _: int) -> select.Backend:
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
        return backend

    monkeypatch.setattr(select, "init_process_group", join)
    yield latency.Bench(2, argparse.Namespace(device="cpu", dtype="fp32"))
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


def figures_of(bench: latency.Bench) -> dict[str, Any]:
    facts = bench.measure(SETTING, TRIALS, WIDTHS)
    return latency.judged(SETTING, 2, TRIALS, WIDTHS, [facts, facts])


def test_only_sharded_adapters_add_collectives_and_the_count_is_of_what_was_issued(bench: latency.Bench) -> None:
    result = figures_of(bench)
    rows = {row["name"]: row for row in result["rows"]}
    added = {name: row["added_collectives"] for name, row in rows.items()}
    assert added == {
        **{"base": {}, "merged": {}, "unmerged": {}},
        **{"adapter_l, sharded": {"all-reduce": LAYERS}, "adapter_l, replicated": {}},
        **{"adapter_h, sharded": {"all-reduce": 2 * LAYERS}, "adapter_h, replicated": {}},
    }
    assert rows["base"]["collectives"] == 2 * LAYERS + 1  # and one for the embedding
    assert rows["merged"]["theta"] == rows["unmerged"]["theta"] == LAYERS * 2 * 2 * HIDDEN * 3
    assert rows["adapter_h, sharded"]["theta"] == LAYERS * 2 * (2 * HIDDEN * 6 + 6 + HIDDEN)
    assert latency.verdict(result)[0].startswith("(2, 128), TP 2: merged ")


def test_the_model_is_the_base_again_after_every_row(bench: latency.Bench) -> None:
    before = bench.describe(), [parameter.clone() for parameter in bench.model.parameters()]
    bench.measure(SETTING, TRIALS, WIDTHS)
    assert bench.describe() == before[0]
    assert all(torch.equal(*pair) for pair in zip(bench.model.parameters(), before[1], strict=True))


def test_a_merge_that_is_not_the_update_is_refused(bench: latency.Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    right = latency.merged

    def half(linear: Any, factors: Any) -> latency.Values:
        folded = right(linear, factors)
        return replace(folded, values=(folded.values + folded.own) / 2)

    monkeypatch.setattr(latency, "merged", half)
    with pytest.raises(AssertionError, match="merged computes something else"):
        bench.measure(SETTING, TRIALS, WIDTHS)


def test_a_merged_row_with_modules_of_its_own_is_refused(bench: latency.Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    right = latency.Bench.parts

    def unmerged(bench: latency.Bench, widths: dict[str, int]) -> Any:
        made = right(bench, widths)
        return {**made, latency.Row("merged"): made[latency.Row("unmerged")]}

    monkeypatch.setattr(latency.Bench, "parts", unmerged)
    with pytest.raises(AssertionError, match="not made of the base's modules"):
        bench.measure(SETTING, TRIALS, WIDTHS)


def test_a_row_without_effect_is_refused(bench: latency.Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latency, "SPREAD", 0.0)
    with pytest.raises(AssertionError, match="is the base"):
        bench.measure(SETTING, TRIALS, WIDTHS)


@pytest.mark.parametrize("method", ["unmerged", "adapter_l", "adapter_h"])
@pytest.mark.parametrize("step", [1, 2, 4])
@pytest.mark.parametrize("theta", [0.5e6, 11e6])
def test_no_other_width_has_a_nearer_count(method: str, step: int, theta: float) -> None:
    width = latency.nearest_width(method, theta, step)
    distances = {w: abs(latency.parameters_of(method, w) - theta) for w in range(step, 600, step)}
    assert distances[width] == min(distances.values())


def test_counts_by_the_papers_formulas() -> None:
    assert latency.parameters_of("unmerged", 4) == 24 * 2 * (2 * 1024 * 4)
    assert latency.parameters_of("adapter_l", 64) == 24 * (2 * 1024 * 64 + 64 + 1024) + 24 * 2 * 1024
    assert latency.parameters_of("adapter_h", 64) == 2 * 24 * (2 * 1024 * 64 + 64 + 1024)


def test_every_round_has_every_row_once_in_an_order_of_its_own() -> None:
    orders = [latency.order(7, number) for number in range(200)]
    assert all(sorted(order) == list(range(7)) for order in orders)
    assert orders == [latency.order(7, number) for number in range(200)]
    # Each row follows each other row about equally often: 200 · 6 pairs over 42.
    follows = {(a, b): 0 for a in range(7) for b in range(7) if a != b}
    for order in orders:
        for pair in zip(order, order[1:], strict=False):
            follows[pair] += 1
    assert min(follows.values()) > 10


def test_the_error_is_of_the_paired_differences() -> None:
    base = [1.0, 2.0, 3.0, 10.0]
    found = latency.statistics_of(base, [value + more for value, more in zip(base, (0.1, 0.3, 0.1, 0.3), strict=True)])
    assert found["milliseconds"] == pytest.approx(4200)
    assert found["added"] == pytest.approx(0.2 / 4)
    # Differences of 0.1, 0.3, 0.1, 0.3: standard deviation √(4 · 0.01 / 3), divided by √4 and by the base's mean.
    assert found["standard_error"] == pytest.approx((0.04 / 3) ** 0.5 / 2 / 4)
    assert found["deviation"] > 100 * found["standard_error"]


@pytest.mark.parametrize(
    ("added", "error", "collectives", "says"),
    [
        (0.009, 0.001, {}, "holds"),
        (-0.009, 0.001, {}, "holds"),
        (0.03, 0.016, {}, "holds"),
        (0.03, 0.014, {}, "MISSED"),
        (-0.03, 0.014, {}, "MISSED"),
        (0.0, 0.001, {"all-reduce": 1}, "MISSED"),
        (0.0, 0.001, {}, "holds"),
        (0.5, 0.4, {}, "TOO NOISY"),
        (0.0, 0.026, {}, "TOO NOISY"),
        (0.0, float("nan"), {}, "TOO NOISY"),
    ],
)
def test_the_verdict(added: float, error: float, collectives: dict[str, int], says: str) -> None:
    row = {"method": "merged", "added": added, "standard_error": error, "added_collectives": collectives}
    words, holds = latency.verdict({"batch": 1, "length": 128, "tp": 1, "rows": [row]})
    assert holds == (says == "holds") and f"): {says}" in words


@pytest.mark.parametrize("text", ["1", "1x", "1x127", "1x128:0", "1x128:many", "x:"])
def test_settings_that_are_not_the_tables_are_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="1x128|BATCHxLENGTH"):
        latency.parse_setting(text)


def test_only_a_whole_measurement_is_kept() -> None:
    def args(**changed: Any) -> argparse.Namespace:
        settings = [latency.Setting(1, 128, None)]
        given = {"device": "cpu", "dtype": "fp32", "trials": 100, "tp": [1, 2], "settings": settings}
        return argparse.Namespace(**{**given, **changed})

    assert latency.is_whole(args())
    assert not latency.is_whole(args(trials=99))
    assert not latency.is_whole(args(tp=[1]))
    assert not latency.is_whole(args(dtype="bf16"))
    assert not latency.is_whole(args(device="cuda"))
    assert latency.is_whole(args(settings=[latency.Setting(1, 128, None), latency.Setting(16, 256, 2)]))


def test_the_picture_is_drawn_with_what_was_published(tmp_path: Path) -> None:
    rows = [
        {"name": row.name, "method": row.method, "added": 0.01 * number, "standard_error": 0.001}
        for number, row in enumerate(latency.rows_of(2))
    ]
    latency.draw([{"batch": 1, "length": 128, "tp": 2, "rows": rows}], tmp_path / "latency.png")
    assert (tmp_path / "latency.png").stat().st_size > 5000
