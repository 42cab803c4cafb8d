"""A program that uses the Python API, for mypy: types are those documented, and a wrong call is a type error.

`make types` checks it as strictly as mypy can. Each `type: ignore` covers a wrong call: where mypy no longer objects to
it, the comment is itself an error (warn_unused_ignores). tests/unit/test_api.py runs the valid calls.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, assert_type

from torch import Tensor

import lowrank_dist
from lowrank_dist import (
    Adapter,
    Cluster,
    Config,
    ConfigError,
    MergeReport,
    OutputFormat,
    Plan,
    Report,
    UserError,
    WeightedAdapter,
)


def learning_rate(path: Path) -> float:
    config = assert_type(lowrank_dist.load_config(path, ["train.lr=1e-3"]), Config)
    return assert_type(config.train.lr, float)


def message_of(path: str) -> str:
    try:
        lowrank_dist.load_config(path)
    except ConfigError as error:
        refused: UserError = error
        return str(refused)
    return ""


def plan_of(path: Path) -> tuple[bool, int, dict[str, Any]]:
    plan = assert_type(lowrank_dist.plan(path, Cluster.of(nodes=1, gpus_per_node=2)), Plan)
    return assert_type(plan.fits, bool), assert_type(plan.layout.tensor, int), plan.to_json()


def merged(base: Path, adapter: Path, out: Path) -> MergeReport:
    half = WeightedAdapter(adapter, 0.5)
    stored = OutputFormat(dtype="F32", shard_size=100_000)
    return assert_type(lowrank_dist.merge(str(base), [half], out, output_format=stored), MergeReport)


def problems_of(folder: Path) -> list[str]:
    report = assert_type(lowrank_dist.inspect(folder), Report)
    return report.problems if not report.verifies else []


def largest(folder: Path) -> tuple[float, float]:
    adapter = assert_type(lowrank_dist.load_adapter(folder), Adapter)
    tensors = assert_type(dict(adapter.tensors), dict[str, Tensor])
    return max(adapter.scales.values()), max(float(tensor.abs().max()) for tensor in tensors.values())


def wrong_calls(path: Path) -> None:
    lowrank_dist.load_config([path])  # type: ignore[arg-type]
    print(lowrank_dist.load_config(path).train.speed)  # type: ignore[attr-defined]
    lowrank_dist.plan(path)  # type: ignore[call-arg]
    lowrank_dist.plan(path, Cluster.of(gpu=8))  # type: ignore[arg-type]
    lowrank_dist.merge(path, [path])  # type: ignore[call-arg]
    lowrank_dist.merge(path, [0.5], path)  # type: ignore[list-item]
    print(lowrank_dist.merge(path, path, path).changes)  # type: ignore[attr-defined]
    lowrank_dist.inspect(path, base=1)  # type: ignore[arg-type]
    print(lowrank_dist.load_adapter(path).factors)  # type: ignore[attr-defined]
    lowrank_dist.load_confg(path)  # type: ignore[attr-defined]
