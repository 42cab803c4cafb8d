"""Rank processes of a benchmark, each with a pipe to the parent."""

import multiprocessing
import socket
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any


def free_port() -> int:
    """A port of this machine that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start_ranks(main: Callable[..., None], tp: int, payload: Any) -> tuple[list[BaseProcess], list[Connection]]:
    """Start `main(rank, tp, port, payload, pipe)` for each rank; return the processes and our ends of their pipes."""
    context = multiprocessing.get_context("spawn")
    port = free_port()
    pipes = [context.Pipe() for _ in range(tp)]
    ranks = [
        context.Process(target=main, args=(rank, tp, port, payload, pipes[rank][1]), daemon=True) for rank in range(tp)
    ]
    for process, (_, theirs) in zip(ranks, pipes, strict=True):
        process.start()
        theirs.close()  # so that the wait for a rank ends when the rank dies
    return ranks, [ours for ours, _ in pipes]
