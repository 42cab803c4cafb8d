"""The plan of a step beside the same step, executed on fake tensors (engine/dry_run.py)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from lowrank_dist.config import Config
from lowrank_dist.engine.dry_run import Progress, execute
from lowrank_dist.planner.activations import activations
from lowrank_dist.planner.describe import messages_of
from lowrank_dist.planner.job import Job, head_rows
from lowrank_dist.planner.layouts import Candidate
from lowrank_dist.planner.memory import ACCURACY, memory, microbatch_moments, persistent_bytes
from lowrank_dist.planner.parameters import theta_on_rank
from lowrank_dist.planner.result import Compared, ComparedCalls, Verification
from lowrank_dist.planner.step_time import job_flops
from lowrank_dist.planner.traffic import microbatch_messages, step_messages


def verification(candidate: Candidate, config: Config, progress: Progress | None = None) -> Verification:
    """Run the candidate's step and return the counts beside the values of the formulas.

    Both sides are for CPU operators. CUDA's norms are fused: they save less and need less temporary memory. progress:
    called with the name of each stage of the run as it begins.
    """
    job, tp_rank = replace(candidate.job, device="cpu"), candidate.tp_rank
    executed = execute(job, config, tp_rank, progress)
    rows = {part: _compared(value, executed.parts[part]) for part, value in _parts(job, tp_rank).items()}
    rows["peak"] = _compared(executed_peak(job, tp_rank), executed.peak)
    rows["FLOPs of a microbatch"] = _compared(microbatch_flops(job), executed.flops)
    formulas = {
        "microbatch": microbatch_messages(job),
        "step": [message for message in step_messages(job, tp_rank) if message.group == "tensor"],
    }
    messages = {
        name: ComparedCalls(messages_of(formulas[name]), messages_of(getattr(executed, name))) for name in formulas
    }
    agrees = all(abs(row.difference) <= ACCURACY for row in rows.values()) and all(
        found.formula == found.executed for found in messages.values()
    )
    return Verification(agrees, tp_rank, rows, messages, tuple(_from_plan(candidate.job, tp_rank)))


def _compared(formula: float, executed: float) -> Compared:
    return Compared(formula, executed, formula / executed - 1 if executed else float(formula > 0))


def _from_plan(job: Job, tp_rank: int) -> Iterator[tuple[str, int]]:
    """Yield (reason, bytes) of each difference between the plan's memory and the executed peak's formula, in order."""
    on_cpu = replace(job, device="cpu")
    second = _of_two_microbatches(on_cpu)
    totals = [memory(each, tp_rank).total for each in (job, on_cpu, second)]
    optimizer = persistent_bytes(second, theta_on_rank(second, tp_rank))["masters and moments"]
    yield "CPU operators, which are not fused", totals[1] - totals[0]
    yield "two microbatches, so that the second one runs while the gradients of the first exist", totals[2] - totals[1]
    yield "no optimizer state, since the optimizer does not run", -optimizer
    rest = executed_peak(on_cpu, tp_rank) - (totals[2] - optimizer)
    yield "no reduction bucket and no evaluation, so the peak is within a microbatch", rest


def _parts(job: Job, tp_rank: int) -> dict[str, int]:
    fixed = persistent_bytes(job, theta_on_rank(job, tp_rank))
    del fixed["masters and moments"]
    return fixed | {"activations": activations(job, recompute=job.layout.recompute)}


def executed_peak(job: Job, tp_rank: int) -> int:
    """Return the formula's peak in a second microbatch, without optimiser state and DeepSpeed's buckets."""
    fullest = max(
        sum(value for part, value in moment.parts.items() if part != "DeepSpeed's buckets")
        for moment in microbatch_moments(_of_two_microbatches(job), tp_rank)
    )
    fixed = persistent_bytes(job, theta_on_rank(job, tp_rank))
    return sum(fixed.values()) - fixed["masters and moments"] + fullest


def _of_two_microbatches(job: Job) -> Job:
    return replace(job, global_batch=2 * job.layout.micro_batch * job.layout.data)


def microbatch_flops(job: Job) -> int:
    """Return the formula's FLOPs of a microbatch's matrix products on one rank, without attention.

    The vocabulary is padded before it is sharded, so the first ranks hold more than 1/TP of the real rows.
    """
    layout = job.layout
    flops = job_flops(replace(job, global_batch=layout.micro_batch * layout.data))
    more_rows = head_rows(job) - job.architecture.vocab / layout.tensor
    head = (6 if job.footprint.trains_base else 4) * job.targets * job.architecture.hidden * more_rows
    return round((flops.executed - flops.attention) / layout.ranks + head)
