"""What DeepSpeed's ZeRO 1 and 2 do with Θ (deepspeed 0.19, runtime/zero/stage_1_and_2.py): partitions and buckets.

Parameters with partial gradients and the others are two groups, each flattened and cut evenly over data parallelism.
"""

from __future__ import annotations

import math

from lowrank_dist.plan.job import Job
from lowrank_dist.plan.parameters import parameter_sizes, theta_on_rank

# nccl_start_alignment_factor: a flat group is padded to a multiple of this times the data-parallel size.
_ALIGNMENT = 2
# engine/zero.py: the most elements of a bucket that was not asked for.
_LARGEST_BUCKET = 5 * 10**8


def partition_elements(group: int, data: int) -> int:
    """Elements of one data-parallel rank's share of a parameter group of `group` elements, padding included."""
    return math.ceil(group / (_ALIGNMENT * data)) * _ALIGNMENT


def bucket_size(job: Job, tp_rank: int) -> int:
    """Elements of the buffer that DeepSpeed allocates in every backward."""
    return job.reduce_bucket or min(_LARGEST_BUCKET, theta_on_rank(job, tp_rank).elements)


def bucket_elements(job: Job, tp_rank: int) -> list[int]:
    """Elements of each reduction over data parallelism: parameters are copied together until the next does not fit."""
    size, buckets = bucket_size(job, tp_rank), [0]
    replicated, sharded = parameter_sizes(job, tp_rank)
    for elements in replicated + sharded:
        if buckets[-1] and buckets[-1] + elements > size:
            buckets.append(0)
        buckets[-1] += elements
    return buckets
