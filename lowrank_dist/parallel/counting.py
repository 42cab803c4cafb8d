"""Count the collective calls of this process, whoever issues them: this package, Megatron or DeepSpeed.

Calls are counted in torch's dispatcher instead of by patching functions of torch.distributed. Megatron binds some of
those functions at import and newer releases of torch rename them, so a patch could miss calls silently.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch._ops import OpOverload
from torch.distributed import ProcessGroup
from torch.distributed.distributed_c10d import _resolve_process_group
from torch.utils._python_dispatch import TorchDispatchMode

# Operator of the c10d namespaces → kind of collective. An operator that is not listed is its own kind.
_KINDS = {
    "allreduce": "all-reduce",
    "all_reduce": "all-reduce",
    "allgather": "all-gather",
    "allgather_base": "all-gather",
    "all_gather_into_tensor": "all-gather",
    "reduce_scatter": "reduce-scatter",
    "reduce_scatter_base": "reduce-scatter",
    "reduce_scatter_tensor": "reduce-scatter",
}


@dataclass(frozen=True)
class Call:
    """One collective call. `bytes` is the size of the whole message: a gather's output, a reduction's input."""

    kind: str
    bytes: int
    group: tuple[int, ...]


class CollectiveCount:
    """The calls seen so far, in order."""

    def __init__(self, calls: Iterable[Call] = ()) -> None:
        self.calls = list(calls)

    def within(self, group: ProcessGroup) -> CollectiveCount:
        """Return only the calls over the ranks of `group`."""
        ranks = _ranks(group)
        return CollectiveCount(call for call in self.calls if call.group == ranks)

    def calls_by_kind(self) -> Counter[str]:
        return Counter(call.kind for call in self.calls)

    def bytes_by_kind(self) -> Counter[str]:
        total: Counter[str] = Counter()
        for call in self.calls:
            total[call.kind] += call.bytes
        return total


@contextmanager
def count_collectives() -> Iterator[CollectiveCount]:
    """Count every collective issued inside the block, including those of backward and recomputation.

    Use one block per phase. Each call counts once, when it is issued, whether it is waited for or not. Autograd carries
    the dispatch mode to the threads that run backward.
    """
    count = CollectiveCount()
    with _Recorder(count):
        yield count


class _Recorder(TorchDispatchMode):
    def __init__(self, count: CollectiveCount) -> None:
        super().__init__()
        self._count = count

    def __torch_dispatch__(
        self, func: OpOverload, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.namespace in ("c10d", "_c10d_functional"):
            names = (argument.name for argument in func._schema.arguments)
            arguments = dict(zip(names, args, strict=False)) | dict(kwargs or {})
            group = _group(arguments)
            if group is not None:
                name = func._opname.strip("_")
                message = max(_nbytes(value) for value in (*arguments.values(), result))
                self._count.calls.append(Call(_KINDS.get(name, name), message, _ranks(group)))
        return result


def _group(arguments: Mapping[str, Any]) -> ProcessGroup | None:
    """Return the group of an operator; None for wait_tensor and the like, which are no collectives."""
    if "process_group" in arguments:
        return ProcessGroup.unbox(arguments["process_group"])
    if "group_name" in arguments:
        return _resolve_process_group(arguments["group_name"])
    return None


def _ranks(group: ProcessGroup) -> tuple[int, ...]:
    return tuple(dist.get_process_group_ranks(group))


def _nbytes(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.nbytes
    return sum(map(_nbytes, value)) if isinstance(value, list | tuple) else 0
