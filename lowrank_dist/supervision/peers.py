"""Detection of lost peers, and the exchange of failure messages between ending ranks through the job's store."""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist

# Time that a rank which lost its peers waits for one that knows the cause.
ASK_SECONDS = 3
_EVERY_SECONDS = 0.2
_FAILED, _BEHIND = "lowrank_dist/failed", "lowrank_dist/left behind"


@dataclass(frozen=True)
class Answer:
    """The other ranks' answer about a failure.

    should_print: this rank prints the failure; others in the same situation do not. silent: ranks that sent nothing
    within ASK_SECONDS; empty once the cause is known. cause: the message of the rank that failed first, if one did.
    reached: the store answered.
    """

    should_print: bool
    silent: Sequence[int] = ()
    cause: str | None = None
    reached: bool = True


def lost_peers(error: BaseException) -> bool:
    """Return True for an error that only says that another rank, or the network to it, is gone."""
    if isinstance(error, dist.DistError):
        return True
    # gloo and its store raise plain RuntimeErrors.
    signs = ("gloo/", "Connection closed by peer", "Connection reset by peer", "Broken pipe", "NCCL")
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)


def ask(store: dist.Store, rank: int, size: int, said: str | None, known: Callable[[], bool]) -> Answer:
    """Tell the other ranks that this one ends, and return their answer. Takes at most 2 · ASK_SECONDS.

    said: this rank's message if it failed first, else None. known: returns True once the cause is known from elsewhere.
    """
    answers: list[Answer] = []

    def run() -> None:
        try:
            answers.append(_ask(store, rank, size, said, known))
        except (RuntimeError, dist.DistError):
            answers.append(Answer(should_print=True, reached=False))

    # In a thread: a store on a host that is gone blocks for longer than its timeout.
    asking = threading.Thread(target=run, daemon=True)
    asking.start()
    asking.join(2 * ASK_SECONDS)
    # Without the store, gone with its rank, every rank prints: better twice than never.
    return answers[0] if answers else Answer(should_print=True, reached=False)


def _ask(store: dist.Store, rank: int, size: int, said: str | None, known: Callable[[], bool]) -> Answer:
    end = time.monotonic() + ASK_SECONDS
    store.set_timeout(timedelta(seconds=ASK_SECONDS))
    store.set(_left(rank), "")
    everyone = range(size)
    if said is not None:
        # With a random prefix, since several ranks may have the same message.
        signed = f"{secrets.token_hex(8)} {said}".encode()
        first = store.compare_set(_FAILED, "", signed.decode()) == signed
        _let_answer(store, rank, everyone, end)
        return Answer(should_print=first)
    _await(lambda: known() or store.check([_FAILED]), end)
    if rank == 0:
        _await(lambda: store.check(list(map(_left, everyone))), end)
    cause = store.get(_FAILED).decode(errors="replace").partition(" ")[2] if store.check([_FAILED]) else None
    # Once the cause is known the wait ends early, so ranks that have sent nothing yet are not named as silent.
    explained = cause is not None or known()
    silent = [] if explained else [other for other in everyone if not store.check([_left(other)])]
    should_print = store.add(_BEHIND, 1) == 1
    _let_answer(store, rank, everyone, end)
    return Answer(should_print, silent, cause)


def _let_answer(store: dist.Store, rank: int, everyone: Sequence[int], end: float) -> None:
    """Tell the others that this rank has its answer. Rank 0 waits until they have theirs, since the store ends with it.

    Without the store a rank would believe that it failed first. end: the time until which rank 0 waits for ranks that
    have not asked. Ranks that have asked get ASK_SECONDS / 2 more.
    """
    store.set(_answered(rank), "")
    if rank == 0:
        _await(lambda: store.check(list(map(_left, everyone))), end)
        asked = [other for other in everyone if store.check([_left(other)])]
        _await(lambda: store.check(list(map(_answered, asked))), end + ASK_SECONDS / 2)


def _left(rank: int) -> str:
    return f"lowrank_dist/left/{rank}"


def _answered(rank: int) -> str:
    return f"lowrank_dist/answered/{rank}"


def _await(condition: Callable[[], bool], end: float) -> None:
    while not condition() and time.monotonic() < end:
        time.sleep(_EVERY_SECONDS)
