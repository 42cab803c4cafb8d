"""parallel.tensor=auto: all ranks take one size, the run records it, and a resume chooses again for its ranks."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from lowrank_dist.engine.plan import plan
from lowrank_dist.planner.hardware import GPUS
from lowrank_dist.planner.layouts import Cluster
from tests.dist import ranks
from tests.integration.launching import Outcome, _main, assert_codes
from tests.integration.resuming import SAVED, STEPS, make_job, stopped_after

PLENTY = 2**50


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_job(tmp_path_factory.mktemp("job"))


def with_memory(arguments: list[str], memory: list[int]) -> Outcome:
    """Inside a rank: run where this rank may use `memory[rank]` bytes."""
    from unittest import mock

    import torch.distributed as dist

    from lowrank_dist.backend.select import Backend

    own = memory[dist.get_rank()]
    with mock.patch.object(Backend, "memory_for_a_rank", lambda self: own):
        return _main(arguments, True)


def train(job: Path, run: Path, *memory: int) -> str:
    """Train with parallel.tensor=auto, one rank for each memory size; return rank 0's output."""
    arguments = [str(job), f"output.dir={run}", "parallel.tensor=auto", "train.micro_batch=4"]
    outcomes = ranks.run_ranks(len(memory), with_memory, arguments, list(memory))
    assert_codes(outcomes, 0)
    said: str = outcomes[0].stdout
    return said


def recorded(run: Path) -> int:
    size: int = yaml.safe_load((run / "config.yaml").read_text())["parallel"]["tensor"]
    return size


def needed(job: Path, tensor: int) -> int:
    """Return the bytes that the plan gives one rank of two."""
    cluster = Cluster(1, 2, GPUS["h100"], PLENTY, PLENTY)
    return plan(job, cluster, [f"parallel.tensor={tensor}", "train.micro_batch=4"]).layout.memory


def test_one_size_for_all_ranks_recorded_and_chosen_anew_by_a_resume(job: Path, tmp_path: Path) -> None:
    whole, half = needed(job, 1), needed(job, 2)
    scarce = int(1.06 * half)
    assert scarce < whole
    first = tmp_path / "first"
    # Rank 0 has room for a whole model, rank 1 for half of one.
    said = train(job, first, PLENTY, scarce)
    assert "parallel.tensor=auto: 2, the plan's choice for 2 ranks on 1 host " in said
    assert "2 tensor × 1 data parallel" in said and recorded(first) == 2
    for memory, size in (((PLENTY,), 1), ((PLENTY, PLENTY), 1), ((scarce, scarce), 2)):
        resumed = stopped_after(first, SAVED, tmp_path / "-".join(map(str, memory)))
        said = train(job, resumed, *memory)
        assert f"at step {SAVED} of {STEPS}" in said and f"parallel.tensor=auto: {size}, " in said
        assert recorded(resumed) == size and (resumed / "checkpoints" / f"step-{STEPS}").is_dir()
