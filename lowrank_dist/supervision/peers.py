"""Ranks that lost others, and what those that end for a failure tell one another, through the store where they met."""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist

# That ranks which lost their peers wait for one that knows why.
ASK_SECONDS = 3
_EVERY_SECONDS = 0.2
_FAILED, _BEHIND = "lowrank_dist/failed", "lowrank_dist/left behind"


@dataclass(frozen=True)
class Answer:
    """What the other ranks answered about a failure.

    speaks: this rank is to say what happened, the others of its kind need not. silent: ranks that said nothing
    within ASK_SECONDS, where nobody knows the cause. cause: what a rank said that went first. reached: whether the
    store answered.
    """

    speaks: bool
    silent: Sequence[int] = ()
    cause: str | None = None
    reached: bool = True


def lost_peers(error: BaseException) -> bool:
    """Return whether an error only says that another rank, or the network to it, is gone."""
    if isinstance(error, dist.DistError):
        return True
    # gloo and its store raise plain RuntimeErrors.
    signs = ("gloo/", "Connection closed by peer", "Connection reset by peer", "Broken pipe", "NCCL")
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)


def ask(store: dist.Store, rank: int, size: int, said: str | None, known: Callable[[], bool]) -> Answer:
    """Tell the others that this rank ends, with what it has to say where it went first, and ask them.

    known: whether the cause is known by other means. At most 2 · ASK_SECONDS, be the store on a host that is gone.
    """
    answers: list[Answer] = []

    def run() -> None:
        try:
            answers.append(_ask(store, rank, size, said, known))
        except (RuntimeError, dist.DistError):
            answers.append(Answer(speaks=True, reached=False))

    # In a thread: a store on a host that no longer answers blocks for longer than it is told to.
    asking = threading.Thread(target=run, daemon=True)
    asking.start()
    asking.join(2 * ASK_SECONDS)
    # Better twice than never: the store is gone, with the rank that held it.
    return answers[0] if answers else Answer(speaks=True, reached=False)


def _ask(store: dist.Store, rank: int, size: int, said: str | None, known: Callable[[], bool]) -> Answer:
    end = time.monotonic() + ASK_SECONDS
    store.set_timeout(timedelta(seconds=ASK_SECONDS))
    store.set(_left(rank), "")
    everyone = [_left(other) for other in range(size)]
    if said is not None:
        # Signed: several ranks may have the same to say.
        signed = f"{secrets.token_hex(8)} {said}".encode()
        first = store.compare_set(_FAILED, "", signed.decode()) == signed
        if rank == 0:  # the store ends with it, and whoever asks then takes itself for the first
            _await(lambda: store.check(everyone), end)
        return Answer(speaks=first)
    _await(lambda: known() or store.check([_FAILED]), end)
    if rank == 0:
        _await(lambda: store.check(everyone), end)
    cause = store.get(_FAILED).decode(errors="replace").partition(" ")[2] if store.check([_FAILED]) else None
    # Once the cause is known nobody has been waited for, and nobody need be named.
    explained = cause is not None or known()
    silent = [] if explained else [other for other in range(size) if not store.check([_left(other)])]
    return Answer(speaks=store.add(_BEHIND, 1) == 1, silent=silent, cause=cause)


def _left(rank: int) -> str:
    return f"lowrank_dist/left/{rank}"


def _await(condition: Callable[[], bool], end: float) -> None:
    while not condition() and time.monotonic() < end:
        time.sleep(_EVERY_SECONDS)
