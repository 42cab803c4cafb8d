"""What lies on disk and in host memory: the base, adapters, checkpoints, and a node while it loads."""

from __future__ import annotations

from lowrank_dist.plan.job import ITEMSIZE, Job
from lowrank_dist.plan.methods import stored_parameters, trained_parameters
from lowrank_dist.plan.parameters import frozen_on_rank, frozen_size

# model/load.py converts at most this much at a time; everything else stays in pages of the mapped files.
_CHUNK = 16 * 2**20
# A rank with torch, Megatron, DeepSpeed and transformers loaded: anonymous memory as measured on a CPU. What CUDA's
# driver and NCCL take of the host beside is assumed.
_PROCESS, _CUDA = 330 * 2**20, 1500 * 2**20


def base_bytes(job: Job) -> int:
    """The Hugging Face checkpoint, and a merged model of its dtype."""
    return frozen_size(job.architecture) * ITEMSIZE[job.stored_dtype]


def adapter_bytes(job: Job) -> int:
    """What others load: Θ in fp32 (header and JSON are some tens of kB), or after full fine-tuning a model."""
    return base_bytes(job) if job.tuning.method == "full" else 4 * stored_parameters(job)


def checkpoint_bytes(job: Job) -> int:
    """A checkpoint is what others load with masters and two moments beside it."""
    return adapter_bytes(job) + 12 * trained_parameters(job)


def disk_bytes(job: Job, keep_last: int | None, keep_best: int) -> int:
    """Base, checkpoints that are kept at a time (one more while it is written), and the adapter at the end.

    Where all checkpoints are kept, one is counted: the rest grows with the run.
    """
    kept = (1 if keep_last is None else keep_last) + keep_best + 1
    return base_bytes(job) + kept * checkpoint_bytes(job) + adapter_bytes(job)


def host_bytes(job: Job, ranks_on_node: int) -> int:
    """Anonymous memory of a node while it loads. Pages of the mapped checkpoint come and go, and are not counted.

    On a CPU a rank's shard lies there too. While it saves, rank 0 receives masters and moments of all of Θ.
    """
    beside = job.itemsize * frozen_on_rank(job) if job.device == "cpu" else _CUDA
    return ranks_on_node * (_PROCESS + _CHUNK + beside)


def saving_bytes(job: Job) -> int:
    """What rank 0 holds more of in host memory while a checkpoint is written: masters and moments of all of Θ, or
    where they are streamed of the largest weight.
    """
    if job.tuning.method == "full":
        arch = job.architecture
        return 12 * max(arch.vocab * arch.hidden, *(linear.weights for linear in arch.linears.values()))
    return 12 * trained_parameters(job)
