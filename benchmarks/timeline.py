"""One call under torch.profiler: the device's kernels, the share of the time it was busy, and the host's time.

Read from the profiler's Chrome trace, whose categories ("kernel", "gpu_memcpy", "cuda_runtime", …) stay the same from
release to release, while the names of its Python attributes do not. Annotations that Kineto projects onto the GPU
("gpu_user_annotation", which torch.optim makes) are no work and are left out. Without CUDA, operators stand for
kernels, each with the time that it spent outside of other operators.
"""

from __future__ import annotations

import json
import re
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from lowrank_dist.backend.devices import synchronize

DEVICE_WORK = {"kernel", "gpu_memcpy", "gpu_memset"}
HOST_CALLS = {"cuda_runtime", "cuda_driver"}
WAITING = re.compile(r"Synchronize$|^cudaMemcpy$")
# A product with a side of at most this many is a thin one: R is 16 to 48 at adapter rank 16.
THIN = 64
# Tried in this order; our kernels are named by function (`group`).
GROUPS = {
    "attention": r"flash|fmha|sdpa|attention",
    "NCCL": r"nccl",
    "GEMM": r"nvjet|gemm|gemv|xmma|cutlass|cublas|splitk|(aten::|mkldnn::_linear)\w*(mm|pointwise)\w*$",
    "copies and fills": r"memcpy|memset|copy|fill|CatArray|aten::(cat|zero_|ones)",
    "elementwise and reductions": r"at::native|aten::|elementwise|reduce|softmax|multi_tensor",
}
_OURS = re.compile(r"lowrank_dist::(?:\(anonymous namespace\)::)?(\w+)")


@dataclass(frozen=True)
class Span:
    """One event: its start and duration, in seconds. shapes: those of its operator's inputs."""

    name: str
    start: float
    seconds: float
    shapes: tuple[tuple[int, ...], ...] = ()


@dataclass(frozen=True)
class Trace:
    """kernels: the device's events, copies and fills included. waits: host calls that last until the device is done.

    launches: host calls that queue a kernel; where more than about a thousand are queued, these wait too. seconds: by
    the host's clock, from the call until the device had finished.
    """

    kernels: list[Span]
    waits: list[Span]
    launches: list[Span]
    seconds: float

    @property
    def busy_share(self) -> float:
        """The share of the time in which at least one kernel ran."""
        return union(self.kernels) / self.seconds

    @property
    def host_seconds(self) -> float:
        """The host's time to issue the work: the time that it did not spend waiting for the device."""
        return self.seconds - union(self.waits)

    def figures(self) -> dict[str, Any]:
        """Return the figures of a trace: times in seconds, number of kernels, and microseconds by group."""
        return {
            "seconds": self.seconds,
            "busy_seconds": union(self.kernels),
            "busy_share": self.busy_share,
            "host_seconds": self.host_seconds,
            "launch_call_seconds": union(self.launches),
            "kernels": len(self.kernels),
            "groups": by_group(self.kernels),
        }


def record(call: Callable[[], object], device: torch.device, *, shapes: bool = False) -> Trace:
    """Run `call` once under the profiler, after `start_profiler`. Raises RuntimeError where no work of a GPU was seen.

    shapes: record the operands of each kernel, at the cost of slower operators.
    """
    events, seconds = _profiled(call, device, shapes)
    return read(events, seconds, cuda=device.type == "cuda")


def start_profiler(device: torch.device) -> None:
    """Use the profiler for the first time in this process, which starts CUPTI and takes seconds."""
    _profiled(lambda: torch.ones(8, device=device) + 1, device, False)


def _profiled(call: Callable[[], object], device: torch.device, shapes: bool) -> tuple[list[dict[str, Any]], float]:
    """The events of one call, and its seconds."""
    cuda = device.type == "cuda"
    activities = [ProfilerActivity.CUDA] if cuda else []
    if shapes or not cuda:
        activities.append(ProfilerActivity.CPU)
    synchronize(device)
    with profile(activities=activities, record_shapes=shapes) as profiler:
        started = time.perf_counter()
        call()
        synchronize(device)
        seconds = time.perf_counter() - started
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(file))
        return json.loads(file.read_text(encoding="utf-8", errors="replace"))["traceEvents"], seconds


def read(events: Iterable[Mapping[str, Any]], seconds: float, *, cuda: bool) -> Trace:
    """Return the Trace of a Chrome trace's events. Kernels and host calls are matched by their correlation number.

    cuda: the call ran on a GPU. A trace without a kernel is then an error, and operators do not stand for kernels.
    """
    events = [event for event in events if event.get("ph") == "X"]
    work = [event for event in events if event.get("cat") in DEVICE_WORK]
    host = [event for event in events if event.get("cat") in HOST_CALLS]
    operators = [event for event in events if event.get("cat") == "cpu_op"]
    if not cuda:
        return Trace([_span(event, event) for event in exclusive(operators)], [], [], seconds)
    if not work:
        raise RuntimeError(
            f"the profiler saw no kernel of the GPU, {len(host)} CUDA calls and {len(operators)} operators: CUPTI does "
            "not work here (another profiler, a driver that is too old, or no permission)"
        )
    by_id = {event["args"]["External id"]: event for event in operators if "External id" in event.get("args", {})}
    launched = {_correlation(event) for event in work}
    # A copy to the host from memory that is not pinned returns when it is done.
    to_host = {_correlation(event) for event in work if "DtoH" in event["name"]}
    waits = [e for e in host if WAITING.search(e["name"]) or _correlation(e) in to_host]
    launches = [e for e in host if _correlation(e) in launched and e not in waits]
    kernels = [_span(e, by_id.get(e.get("args", {}).get("External id"), {})) for e in work]
    return Trace(kernels, [_span(e) for e in waits], [_span(e) for e in launches], seconds)


def _correlation(event: Mapping[str, Any]) -> object:
    # A number that no other event has, where the event has none.
    return event.get("args", {}).get("correlation", id(event))


def _span(event: Mapping[str, Any], operator: Mapping[str, Any] | None = None) -> Span:
    shapes = (operator or {}).get("args", {}).get("Input Dims", [])
    sizes = tuple(tuple(size) for size in shapes if size and all(isinstance(n, int) for n in size))
    return Span(event["name"], event["ts"] / 1e6, event.get("dur", 0) / 1e6, sizes)


def exclusive(operators: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the operators, thread by thread; the duration of each is the time that it spent outside of the others."""
    found = [dict(operator) for operator in operators]
    ends = [operator["ts"] + operator["dur"] for operator in found]
    order = sorted(range(len(found)), key=lambda i: (str(found[i].get("tid")), found[i]["ts"], -found[i]["dur"]))
    around: list[int] = []
    for i in order:
        while around and (found[around[-1]].get("tid") != found[i].get("tid") or found[i]["ts"] >= ends[around[-1]]):
            around.pop()
        if around:
            found[around[-1]]["dur"] -= ends[i] - found[i]["ts"]
        around.append(i)
    return found


def union(spans: Iterable[Span]) -> float:
    """Return the seconds that at least one of the spans covers."""
    total, until = 0.0, float("-inf")
    for span in sorted(spans, key=lambda span: span.start):
        end = span.start + span.seconds
        total += max(0.0, end - max(span.start, until))
        until = max(until, end)
    return total


def group(span: Span) -> str:
    """Return a kernel's kind: one of GROUPS, "ours: NAME", or "other". GEMMs are thin or not, where known."""
    ours = _OURS.search(span.name)
    if ours:
        return f"ours: {ours[1]}"
    found = next((name for name, words in GROUPS.items() if re.search(words, span.name, re.IGNORECASE)), "other")
    sides = [min(size) for size in span.shapes if len(size) == 2]
    if found == "GEMM" and sides:
        return "GEMM, thin" if min(sides) <= THIN else "GEMM, large"
    return found


def by_group(kernels: Iterable[Span]) -> dict[str, dict[str, float]]:
    """Return launches and microseconds of each group, the longest first."""
    launches: Counter[str] = Counter()
    microseconds: Counter[str] = Counter()
    for kernel in kernels:
        launches[group(kernel)] += 1
        microseconds[group(kernel)] += 1e6 * kernel.seconds
    return {name: {"launches": launches[name], "us": round(us, 2)} for name, us in microseconds.most_common()}


def by_name(kernels: Iterable[Span]) -> list[dict[str, Any]]:
    """Return launches and microseconds of each kernel name within its group, the longest first."""
    launches: Counter[tuple[str, str]] = Counter()
    microseconds: Counter[tuple[str, str]] = Counter()
    for kernel in kernels:
        launches[group(kernel), kernel.name] += 1
        microseconds[group(kernel), kernel.name] += 1e6 * kernel.seconds
    return [
        {"group": key[0], "name": key[1], "launches": launches[key], "us": round(us, 2)}
        for key, us in microseconds.most_common()
    ]
