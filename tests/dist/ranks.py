"""Ranks for the distributed tests: forked once for each world size (tests/forked.py) and reused by every test.

A rank that raises fails the test with its traceback and ends its world. A rank that dies does the same, and the error
says what killed it. A hang ends as an error after TIMEOUT seconds, because every process group carries that timeout.
Ranks that wait for one whose program ended with an exit code end sooner (forked.AFTER_A_FAILURE), with its output.

Ranks run on CPUs unless LOWRANK_DIST_TEST_DEVICE=cuda (tests/gpu/check.sh). Ranks that outnumber the GPUs share them,
over gloo, which stages through the host. A test builds its tensors on `device()`; a rank always returns numpy arrays.
"""

from __future__ import annotations

import atexit
import os
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from multiprocessing.connection import Connection, Pipe, wait
from multiprocessing.process import BaseProcess
from typing import Any

from tests import forked
from tests.forked import DEVICE

TIMEOUT = 90
_device: Any = None
_worlds: dict[int, World] = {}
# Every World that is not closed. The interpreter waits at exit for its processes, and a stopped rank never ends.
_open: set[World] = set()
_topologies: dict[int, tuple[Any, dict[str, Any]]] = {}


class World:
    """`size` ranks that have met and wait for functions to call. fresh: see `forked.start`.

    Between calls they are stopped (SIGSTOP): gloo polls each of its groups a hundred times a second, which took a third
    of two cores for the worlds of one test run.
    """

    def __init__(self, size: int, *, fresh: bool = False) -> None:
        self._rendezvous = tempfile.TemporaryDirectory()
        store = os.path.join(self._rendezvous.name, "store")
        self.pipes: list[Connection] = []
        self.processes: list[BaseProcess] = []
        _open.add(self)
        for rank in range(size):
            ours, theirs = Pipe()
            self.processes.append(forked.start(_serve, theirs, rank, size, store, fresh=fresh))
            theirs.close()  # the rank's end alone, so that the pipe reads as closed once the rank is dead
            self.pipes.append(ours)

    def run(self, function: Callable[..., Any], arguments: tuple[Any, ...], seconds: float = 2 * TIMEOUT) -> list[Any]:
        """Call `function(*arguments)` on every rank. Raises AssertionError where one fails, dies or hangs.

        seconds: a rank that has not answered by then counts as hanging.
        """
        self._signal(signal.SIGCONT)
        size, end = len(self.pipes), time.monotonic() + seconds
        for rank, pipe in enumerate(self.pipes):
            try:
                pipe.send((function, arguments))
            except OSError:
                raise AssertionError(f"rank {rank} of {size}:\n{self._how_it_died(rank)}") from None
        results: dict[int, Any] = {}
        said = ""
        while len(results) < size:
            pending = [pipe for rank, pipe in enumerate(self.pipes) if rank not in results]
            ready = wait(pending, timeout=max(0.0, end - time.monotonic()))
            if not ready:
                raise AssertionError(f"ranks {sorted(set(range(size)) - set(results))} hang{said}")
            for pipe in ready:
                rank = self.pipes.index(pipe)
                try:
                    failed, value = pipe.recv()
                except (EOFError, ConnectionResetError):
                    failed, value = True, self._how_it_died(rank)
                if failed:
                    raise AssertionError(f"rank {rank} of {size}:\n{value}")
                results[rank] = value
                if isinstance(value, forked.Outcome) and value.code and not said:
                    end = min(end, time.monotonic() + forked.AFTER_A_FAILURE)
                    said = f", rank {rank} ended with code {value.code}:\n{value.stdout}{value.stderr}"
        self._signal(signal.SIGSTOP)
        return [results[rank] for rank in range(size)]

    def _signal(self, number: signal.Signals) -> None:
        for process in self.processes:
            if process.is_alive():
                os.kill(process.pid, number)

    def _how_it_died(self, rank: int) -> str:
        process = self.processes[rank]
        process.join()
        return forked.how_it_ended(process)

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()
        self._rendezvous.cleanup()
        _open.discard(self)


def run_ranks(size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Call the module-level `function(*arguments)` on `size` ranks; return their results (arrays, not tensors)."""
    world = _worlds.get(size)
    if world is None:
        world = _worlds[size] = World(size)
    try:
        return world.run(function, arguments)
    except BaseException:
        _worlds.pop(size).close()
        raise


def topology(tensor: int, sequence: bool) -> Any:
    """Inside a rank: return the Topology of this world at a tensor-parallel size. Its groups are built once.

    Every gloo group keeps its threads for good, so groups are reused and Megatron's globals are set back to them.
    """
    import torch.distributed as dist
    from megatron.core import parallel_state

    from lowrank_dist.parallel.topology import Topology

    if tensor not in _topologies:
        # Megatron forgets its groups but does not destroy them: they live on in the topologies made before.
        parallel_state.destroy_model_parallel()
        built = Topology.build(tensor, dist.get_world_size() // tensor, sequence, TIMEOUT)
        _topologies[tensor] = (built, {k: v for k, v in vars(parallel_state).items() if k.startswith("_")})
    built, state = _topologies[tensor]
    vars(parallel_state).update(state)
    return replace(built, sequence_parallel=sequence and tensor > 1)


def device() -> Any:
    """Return the torch device of this rank or, in the process that runs the tests, the device under test."""
    import torch

    return torch.device(DEVICE) if _device is None else _device


@atexit.register
def close_worlds() -> None:
    _worlds.clear()
    for world in list(_open):
        world.close()


def _serve(pipe: Connection, rank: int, size: int, store: str) -> None:
    import torch
    import torch.distributed as dist

    from lowrank_dist.backend.select import select_backend, set_local_rank_to_device

    global _device
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size))
    backend = select_backend(DEVICE, rank)
    _device = backend.device
    if _device.type == "cuda":
        # torch's default, set explicitly: fp32 products in TF32 err by 1e-3, and the tolerances here are those of fp32.
        torch.set_float32_matmul_precision("highest")
    # A world of one needs no communication. NCCL at N = 1 is tested by tests/gpu/short_run.py, not by every reference.
    collective = backend.collective if 1 < size <= torch.cuda.device_count() else "gloo"
    _share_the_device_of_gloo()
    dist.init_process_group(
        collective, init_method=f"file://{store}", rank=rank, world_size=size, timeout=timedelta(seconds=TIMEOUT)
    )
    set_local_rank_to_device(backend)
    while True:
        try:
            function, arguments = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send((False, function(*arguments)))
        except BaseException:
            pipe.send((True, traceback.format_exc()))


def _share_the_device_of_gloo() -> None:
    """Give all groups of this process one gloo device, and so one thread that polls sockets.

    torch makes one device a group, and each polls a hundred times a second: 55 of them in each rank of a world of four.
    """
    from torch.distributed import ProcessGroupGloo, distributed_c10d

    before = set(os.listdir("/proc/self/task"))
    device = ProcessGroupGloo.create_default_device()
    # The thread spins from a message's arrival until its rank asks for it, and more ranks compute than there are cores.
    for thread in set(os.listdir("/proc/self/task")) - before:
        os.setpriority(os.PRIO_PROCESS, int(thread), 5)

    class Sharing(ProcessGroupGloo):
        def __init__(self, store: Any, rank: int, size: int, timeout: timedelta) -> None:
            options = ProcessGroupGloo._Options()
            options._devices, options._timeout, options._threads = [device], timeout, 2
            super().__init__(store, rank, size, options)

    distributed_c10d.ProcessGroupGloo = Sharing
