"""The plan's formulas of ZeRO against DeepSpeed itself, at TP 2 × DP 2 and others: partitions, buffers, messages."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from lowrank_dist.arch.config_json import read_architecture
from lowrank_dist.arch.placement import LoraRules
from lowrank_dist.methods.lora.footprint import LowRank
from lowrank_dist.parallel.counting import count_collectives
from lowrank_dist.planner.factors import low_rank
from lowrank_dist.planner.job import Job, Layout
from lowrank_dist.planner.parameters import bucket_size, partition_elements, theta_on_rank
from lowrank_dist.planner.traffic import step_messages
from tests.dist.ranks import run_ranks
from tests.dist.tiny_runs import MAX_LENGTH, Setting, build, microbatches
from tests.tiny_models import make_tiny

# Scalars of the norm and the overflow flag, which any distributed optimiser exchanges, are below this many bytes.
SCALARS = 64


def zero_step(setting: Setting, reduce_bucket: int | None) -> dict[str, Any]:
    """On one rank: return what DeepSpeed holds after a step, and the step's messages other than scalars."""
    from lowrank_dist.engine.zero import OptimiserRules, ZeroOptimiser
    from tests.dist.whole import theta_of

    model, adapted, masks, topology = build(setting)
    parameters = theta_of(adapted)
    rules = OptimiserRules(setting.zero_stage, 0.5, reduce_bucket, 0.0, (0.9, 0.999), 1e-8)
    optimiser = ZeroOptimiser(parameters, topology, rules)
    zero = optimiser.engine.optimizer
    batches, targets = microbatches(setting, topology.dp_rank, topology.dp_size, topology.tp_size)

    def loss(batch: Any) -> Tensor:
        masks.set(0, batch.dropout_rows)
        return model.loss(batch.input_ids, batch.position_ids, batch.target_index, batch.target_ids, batch.segments)

    with count_collectives() as count:
        for index, batch in enumerate(batches):
            optimiser.accumulate(lambda batch=batch: loss(batch), 1 / targets, index + 1 == len(batches))
        optimiser.step(1e-3)
    data = count.within(topology.dp_group) if topology.dp_size > 1 else None
    return {
        "tp_rank": topology.tp_rank,
        "microbatches": len(batches),
        "partitions": [partition.numel() for partition in zero.single_partition_of_fp32_groups],
        "moments": [
            zero.optimizer.state[p][key].numel()
            for p in zero.single_partition_of_fp32_groups
            for key in ("exp_avg", "exp_avg_sq")
        ],
        "bucket": zero.reduce_bucket_size,
        "data": [(c.kind, c.bytes) for c in data.calls if c.bytes > SCALARS] if data else [],
    }


def planned(folder: str, setting: Setting, reduce_bucket: int | None, microbatch_rows: int) -> Job:
    architecture = read_architecture(Path(folder))
    pattern = {"down_proj": 6} if setting.targets == ("all-linear",) and architecture.gated else {}
    targets = "all-linear" if setting.targets == ("all-linear",) else list(setting.targets)
    data = 4 // setting.tensor
    return Job(
        architecture=architecture,
        name="tiny",
        stored_dtype="fp32",
        footprint=LowRank("lora", low_rank(architecture, LoraRules(4, 8.0, targets, rank_pattern=pattern))),
        layout=Layout(setting.tensor, data, setting.sequence and setting.tensor > 1, microbatch_rows, False),
        global_batch=4,
        length=MAX_LENGTH,
        target_share=1.0,
        dtype="fp32",
        vocab_multiple=setting.vocab_multiple,
        zero_stage=setting.zero_stage,
        reduce_bucket=reduce_bucket,
        device="cpu",
        fuse_factors=False,
        packing=False,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_tiny("llama", tmp_path_factory.mktemp("plan_zero"), num_key_value_heads=1))


@pytest.mark.parametrize(
    ("tensor", "targets", "bucket", "stage"),
    [
        (2, ("all-linear",), None, 1),
        (2, ("all-linear",), None, 2),
        (2, ("q_proj", "v_proj"), None, 1),
        (2, ("v_proj",), None, 1),
        (1, ("v_proj",), None, 1),
        (2, ("o_proj",), 10**6, 2),
        (2, ("all-linear",), 1000, 1),
    ],
)
def test_partitions_and_messages(
    folder: str, tensor: int, targets: tuple[str, ...], bucket: int | None, stage: int
) -> None:
    """Masters, moments, bucket and every data-parallel message; one case has one KV head on two ranks."""
    setting = Setting(folder, tensor, True, zero_b=False, targets=targets, zero_stage=stage, micro_batch=1)
    for found in run_ranks(4, zero_step, setting, bucket):
        job = planned(folder, setting, bucket, 1)
        theta = theta_on_rank(job, found["tp_rank"])
        partitions = [partition_elements(group, job.layout.data) for group in (theta.replicated, theta.sharded)]
        assert found["partitions"] == partitions
        assert found["moments"] == [size for size in partitions for _ in range(2)]
        assert found["bucket"] == bucket_size(job, found["tp_rank"])
        assert found["microbatches"] == job.microbatches
        expected: Counter[tuple[str, int]] = Counter()
        for message in step_messages(job, found["tp_rank"]):
            if message.group == "data" and message.bytes > SCALARS:
                expected[message.kind, message.bytes] += message.count
        assert Counter(found["data"]) == expected


def test_notices_a_formula_without_padding(folder: str) -> None:
    """Negative control: rank 0 holds no row of v_proj, and its two remaining elements are padded to four."""
    setting = Setting(folder, 2, True, zero_b=False, targets=("v_proj",), micro_batch=1)
    found = run_ranks(4, zero_step, setting, None)[0]
    theta = theta_on_rank(planned(folder, setting, None, 1), 0)
    assert (theta.sharded, found["partitions"][1]) == (2, 2)
    assert found["partitions"][1] != theta.sharded // 2
