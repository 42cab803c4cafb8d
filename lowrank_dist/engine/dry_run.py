"""Dry run of the planned step of one rank on fake tensors, to check the plan's memory, FLOPs and messages by counting.

Fake tensors have sizes but no memory, and a fake process group has ranks but no peers. The project's own model,
method, head and deferred sum run forward and backward unchanged, on CPU operators. Only ZeRO's partition is taken from
the formula (tests compare it with DeepSpeed).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lowrank_dist.backend.libraries import quiet_libraries
from lowrank_dist.backend.select import select_backend
from lowrank_dist.config import Config
from lowrank_dist.engine.run_method import build_method
from lowrank_dist.engine.zero import sum_partial_gradients
from lowrank_dist.model.causal_lm import CausalLM
from lowrank_dist.parallel.counting import CollectiveCount, count_collectives
from lowrank_dist.parallel.theta import Theta, is_partial
from lowrank_dist.parallel.topology import Topology
from lowrank_dist.planner.job import Job
from lowrank_dist.planner.parameters import partition_elements
from lowrank_dist.planner.traffic import Message

Progress = Callable[[str], None]

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Executed:
    """Counts of a dry run: bytes by part as in planner/memory.py, messages of a microbatch and of the step's end.

    peak: most bytes alive at once in the second of two microbatches, when gradients exist already. Optimizer state and
    DeepSpeed's buckets are not counted. flops: of a microbatch's matrix products, without attention.
    """

    parts: dict[str, int]
    peak: int
    flops: int
    microbatch: list[Message]
    step: list[Message]


# The stages of `execute`, by the names that `progress` is called with.
STAGES = ("building the model", "forward", "backward", "a second microbatch", "the end of the step")


def execute(job: Job, config: Config, tp_rank: int, progress: Progress | None = None) -> Executed:
    """Build rank `tp_rank` of the job; run two microbatches, the deferred sum and `Theta.refresh`."""
    quiet_libraries()
    stage = iter(STAGES)

    def begin() -> None:
        name = next(stage)
        if progress is not None:
            progress(name)

    with (
        _fake_ranks(job, tp_rank) as topology,
        FakeTensorMode(allow_non_fake_inputs=True),
        _Live() as live,
        _KnownPositions(job, tp_rank),
    ):
        begin()
        model, theta, theta_bytes = _build(job, config, topology)
        built = live.now
        batch = _batch(job)
        theta.masks.set(0, batch["rows"])
        before, flops = live.now, -live.flops
        begin()
        with count_collectives() as forward:
            loss = _loss(model, batch)
        saved = live.now - before
        begin()
        with count_collectives() as backward:
            loss.backward()
        flops += live.flops
        del loss
        begin()
        live.peak = live.now
        _loss(model, batch).backward()
        gradients = sum(_storage_bytes(p.grad) for p in theta.parameters if p.grad is not None)
        peak = live.peak - (before - built)
        begin()
        with count_collectives() as step:
            _deferred_sum(job, topology, theta.parameters)
            theta.refresh()
        microbatch = [*_messages(forward, topology, "forward"), *_messages(backward, topology, "backward")]
        steps = _messages(step, topology, "step")
    parts = {
        "frozen weights": built - theta_bytes,
        "Θ": theta_bytes,
        "gradients of Θ": gradients,
        "activations": saved,
    }
    return Executed(parts, peak, flops, microbatch, steps)


@contextmanager
def _fake_ranks(job: Job, tp_rank: int) -> Iterator[Topology]:
    """Join a fake job of the planned size, in which this process is tensor-parallel rank `tp_rank` of replica 0."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    assert not dist.is_initialized(), "this process is a rank of a real job"
    select_backend("cpu")
    dist.init_process_group("fake", store=FakeStore(), rank=tp_rank, world_size=job.layout.ranks)
    try:
        topology = Topology.build(job.layout.tensor, job.layout.data, job.layout.sequence, timeout_seconds=600)
        yield replace(topology, sequence_parallel=job.layout.sequence and job.layout.tensor > 1)
    finally:
        dist.destroy_process_group()  # the next Topology.build discards Megatron's groups


def _build(job: Job, config: Config, topology: Topology) -> tuple[CausalLM, Theta, int]:
    """Return the model, Θ, and the bytes of Θ and of the buffers that the method added."""
    with _made_in(_DTYPES[job.dtype]):
        model = CausalLM(
            job.architecture,
            topology,
            dtype=_DTYPES[job.dtype],
            device=torch.device("cpu"),
            vocab_multiple=job.vocab_multiple,
        )
    model.set_recompute(job.layout.recompute)
    buffers = set(model.buffers())
    # resumed=True, so that no starting adapter is read. Fused factors as in the plan, whatever device runs this.
    planned = config.engine.model_copy(update={"lanes": "on" if job.fuse_factors else "off"})
    method = build_method(config.model_copy(update={"engine": planned}), job.architecture)
    theta = method.attach(model, topology, resumed=True)
    size = sum(map(_storage_bytes, (*theta.parameters, *(set(model.buffers()) - buffers))))
    return model, theta, size


@contextmanager
def _made_in(dtype: torch.dtype) -> Iterator[None]:
    """Create parameters in `dtype` from the start: nn.Module.to would swap them, which fake tensors refuse."""

    def already(module: nn.Module, *args: object, **kwargs: object) -> nn.Module:
        assert all(parameter.dtype == dtype for parameter in module.parameters())
        return module

    patched: Any = nn.Module
    default, to = torch.get_default_dtype(), nn.Module.to
    torch.set_default_dtype(dtype)
    patched.to = already
    try:
        yield
    finally:
        patched.to = to
        torch.set_default_dtype(default)


def _batch(job: Job) -> dict[str, Any]:
    """Return a microbatch of zeros. Packed rows hold two samples each."""
    rows, positions = job.layout.micro_batch, job.sequence_length
    halves = ((0, positions // 2), (positions // 2, positions))
    return {
        "segments": tuple((row, *half) for row in range(rows) for half in halves) if job.packing else None,
        "ids": torch.zeros(rows, positions, dtype=torch.int64),
        "rows": torch.zeros(positions, rows, dtype=torch.int64),
        "targets": torch.zeros(job.targets, dtype=torch.int64),
    }


def _loss(model: CausalLM, batch: dict[str, Any]) -> Tensor:
    return model.loss(batch["ids"], batch["ids"], batch["targets"], batch["targets"], batch["segments"])


def _deferred_sum(job: Job, topology: Topology, parameters: Sequence[nn.Parameter]) -> None:
    """Run the optimiser's own sum on this rank's partition of the partial gradients."""
    partial = sum(parameter.numel() for parameter in parameters if is_partial(parameter))
    if partial and topology.tp_size > 1:
        sum_partial_gradients([torch.zeros(partition_elements(partial, job.layout.data))], topology.tp_group)


def _messages(count: CollectiveCount, topology: Topology, phase: Any) -> list[Message]:
    """Return the calls over the tensor-parallel group; none where it has one rank."""
    if topology.tp_size == 1:
        return []
    found = count.within(topology.tp_group).calls
    assert len(found) == len(count.calls), "a microbatch talks to its tensor-parallel group alone"
    return [Message(call.kind, "tensor", phase, call.bytes) for call in found]


class _KnownPositions(TorchDispatchMode):
    """Replaces the search for a rank's virtual-token positions by their number: fake ids have no values to search."""

    def __init__(self, job: Job, tp_rank: int) -> None:
        super().__init__()
        self._count = job.footprint.virtual_tokens_on_rank(job, tp_rank)

    def __torch_dispatch__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.nonzero.default:
            return torch.zeros(self._count, args[0].dim(), dtype=torch.int64)
        if func is torch.ops.aten.index.Tensor and args[1][0] is not None and args[1][0].dtype == torch.bool:
            there = args[1][0]
            return func(args[0].flatten(0, there.dim() - 1), [torch.zeros(self._count, dtype=torch.int64)])
        return func(*args, **(kwargs or {}))


class _Live(TorchDispatchMode):
    """Counts the bytes of all live storages that any operator returned.

    now: the current number; peak: the largest so far. flops: of the matrix products so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = self.flops = 0
        self._storages: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, func: OpOverload, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.flops += _product_flops(str(func.overloadpacket), args)
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._add(leaf.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, nbytes = id(storage), storage.nbytes()
        if key in self._storages:
            return

        def gone(_: weakref.ref) -> None:
            self.now -= nbytes
            del self._storages[key]

        self._storages[key] = weakref.ref(storage, gone)
        self.now += nbytes
        self.peak = max(self.peak, self.now)


def _storage_bytes(tensor: Tensor) -> int:
    return tensor.untyped_storage().nbytes()


def _product_flops(name: str, args: tuple[Any, ...]) -> int:
    """Return the FLOPs of a matrix product; 0 for any other operator."""
    if name in ("aten.mm", "aten.addmm", "aten.addmm_"):
        left, right = args[-2:]
        return 2 * left.size(0) * left.size(1) * right.size(1)
    if name == "mkldnn._linear_pointwise":
        x, weight = args[:2]
        return 2 * x.size(0) * weight.numel()
    if name == "lowrank_dist.down":
        _, x, a, blocks = args[:4]
        return 2 * x.size(0) * (_block_elements(blocks) or a.numel())
    if name == "lowrank_dist.expand":
        _, u, a, _, blocks = args[:5]
        return 2 * u.size(0) * (_block_elements(blocks) or a.numel())
    if name == "lowrank_dist.grad_a":
        out, u, _, blocks = args[:4]
        return 2 * u.size(0) * (_block_elements(blocks) or out.numel())
    return 0


def _block_elements(blocks: list[int]) -> int:
    return sum(columns * ranks for columns, ranks in zip(blocks[1::4], blocks[3::4], strict=True))
