"""The rank's side of supervision: it reports its phase, notes stop signals and records the failure that ends it."""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import os
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import NoReturn

import torch.distributed as dist

from lowrank_dist.backend.exhaustion import explain, name_limits
from lowrank_dist.backend.launchers import find_launchers, is_first_on_node, start_time
from lowrank_dist.backend.node import host_name
from lowrank_dist.backend.select import shutdown
from lowrank_dist.errors import LimitError, OtherRankError, RankIdentityError, UserError
from lowrank_dist.supervision.failure import Failure, explains, read, record
from lowrank_dist.supervision.peers import Answer, ask, lost_peers
from lowrank_dist.supervision.status import ENDING, LEAVING, STARTING, Page, State, StopRequest
from lowrank_dist.supervision.watchdog import WatchedRank, start
from lowrank_dist.terminal import say

logger = logging.getLogger(__name__)

# Exit codes. PREEMPTED: the run was told to stop, has saved and can be resumed; a job script requeues it.
FAILURE, USER_ERROR, PREEMPTED, INTERRUPTED = 1, 2, 85, 130
# Seconds that a rank waits for another to print the error.
_SPOKEN_BY_THEN = 5.0


class Supervision:
    """Context of a run on one rank: it starts a watchdog, notes signals and records failures."""

    def __init__(self, timeout_seconds: float) -> None:
        """timeout_seconds: that of the collectives. The watchdog kills a rank that makes no progress for longer."""
        self.stop = StopRequest()
        self.rank = int(os.environ.get("RANK", "0"))
        self.hosts: Sequence[str] = ()
        self._timeout, self._step = timeout_seconds, 0
        self._folder: Path | None = None
        self._left: State | None = None

    @property
    def host(self) -> str:
        """The name of this rank's node: its host name until the ranks have met, and then its name among all nodes."""
        return self.hosts[self.rank] if self.hosts else host_name()

    @name_limits()
    def __enter__(self) -> Supervision:
        self._page = Page.make()
        self.enter(STARTING[0])
        self._stacks = os.fdopen(os.memfd_create("stacks"), "w")
        self._enabled_before = faulthandler.is_enabled()
        faulthandler.enable(self._stacks)
        self.stop.__enter__()
        self._watchdog = start(self._watched())
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.enter(LEAVING)
        self.stop.__exit__(kind, error, at)
        faulthandler.disable()
        if self._enabled_before:
            faulthandler.enable()
        self._watchdog.kill()
        self._watchdog.wait()
        self._stacks.close()
        self._page.close()

    def enter(self, phase: str, step: int | None = None) -> None:
        """Report progress: the rank enters `phase` (of supervision.status.PHASES). step: counted from 1."""
        if step is not None:
            self._step = step
        if phase == LEAVING and self._left is None:
            self._left = self._page.state()
        self._page.enter(phase, self._step)

    def record_failures_in(self, path: Path) -> None:
        """Record failures in this run folder from now on. Rank 0 must have locked it for this job."""
        self._folder = path.absolute()
        self._page.set_folder(str(self._folder))

    def failed(self, error: BaseException) -> int:
        """Print and record the error that ended this rank. Returns the exit code: 2 bad input, 130 Ctrl-C, else 1."""
        if isinstance(error, KeyboardInterrupt):
            return INTERRUPTED
        self.enter(LEAVING)
        if not isinstance(error, UserError) and (limit := explain(error)) is not None:
            error = LimitError(limit)
        mistake = isinstance(error, UserError)
        if mistake:
            logger.error("%s", error)
        else:
            logger.error("rank failed", exc_info=error)
        cause = not (isinstance(error, OtherRankError) or lost_peers(error))
        trace = "" if mistake or not cause else "".join(traceback.format_exception(error))
        reason = str(error) if mistake else f"{type(error).__name__}: {error}"
        failure = self._failure(reason, trace, cause)
        # Record first: peers that are told of the failure may read FAILED at once.
        said = record(self._folder, failure) if cause and self._folder else str(failure)
        answer = self._ask_peers(said if cause else None, error)
        if not cause:
            said = self._left_behind(failure, answer)
        if answer.should_print:
            with contextlib.suppress(OSError):  # the reader of stderr may be gone
                say(f"lowrank_dist: {error if mistake and cause else said}", err=True)
        return USER_ERROR if mistake else FAILURE

    def leave(self, code: int) -> NoReturn:
        """End this process with exit code `code`.

        Where the run ended well on this rank, all ranks end together: a launcher kills the others as soon as one exits
        with a code other than 0, PREEMPTED included. The interpreter's own shutdown is skipped, since threads of gloo
        and NCCL sometimes abort or hang in it.
        """
        clean = code in (0, PREEMPTED)
        self.enter(ENDING if clean else LEAVING)
        try:
            shutdown(clean=clean)
        except Exception as error:
            code = self.failed(error)
        self.enter(LEAVING)
        logging.shutdown()
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError):
                stream.flush()
        os._exit(code)

    def _failure(self, reason: str, trace: str, cause: bool, silent: Sequence[str] = ()) -> Failure:
        assert self._left is not None, "a failure is made of a rank that leaves"
        return Failure(self.rank, self.host, self._left.step, self._left.phase, reason, trace, cause, silent)

    def _left_behind(self, failure: Failure, answer: Answer) -> str:
        """Record that this rank lost its peers. Returns the text to print: the cause where it is known."""
        silent = [self._name(rank) for rank in answer.silent]
        reason = failure.reason
        if not answer.reached:
            reason += f"; the job's store on {os.environ.get('MASTER_ADDR', 'rank 0')} does not answer either"
        failure = self._failure(reason, "", False, silent)
        # A known cause is recorded instead of this failure: the rank that failed first may have had no disk space.
        said = record(self._folder, answer.cause or failure) if self._folder else str(failure)
        return said if explains(said) or answer.cause is None else answer.cause

    def _ask_peers(self, said: str | None, error: BaseException) -> Answer:
        """Exchange messages with the other ranks. said: this rank's, None where it only lost its peers.

        error: that of this rank.
        """
        if not dist.is_initialized():
            return Answer(should_print=should_print_before_meeting(error))
        try:
            store = dist.distributed_c10d._get_default_store()
            return ask(store, self.rank, dist.get_world_size(), said, self._cause_recorded)
        except Exception:  # no thread, no memory, …: the failure must still be printed
            logger.exception("the other ranks could not be asked")
            return Answer(should_print=True, reached=False)

    def _cause_recorded(self) -> bool:
        return self._folder is not None and explains(read(self._folder))

    def _name(self, rank: int) -> str:
        return f"rank {rank} on {self.hosts[rank]}" if self.hosts else f"rank {rank}"

    def _watched(self) -> WatchedRank:
        thread = threading.main_thread().ident
        assert thread is not None, "it runs"
        return WatchedRank(
            pid=os.getpid(),
            started=start_time(Path("/proc/self")),
            thread=thread,
            rank=self.rank,
            host=self.host,
            timeout=self._timeout,
            page=self._page.descriptor,
            stacks=self._stacks.fileno(),
            launchers=find_launchers(),
        )


def should_print_before_meeting(error: BaseException) -> bool:
    """Return whether this rank prints an error before the ranks have met.

    An error that all ranks find is printed by one rank per node. A LimitError may concern this rank alone, so the
    others print it too, some seconds later.
    """
    if not isinstance(error, UserError) or isinstance(error, RankIdentityError):
        return True
    return should_print_for_node() or isinstance(error, LimitError)


def should_print_for_node() -> bool:
    """Return True on local rank 0, which prints an error that every rank of its node finds. For use before they meet.

    Other ranks return False after some seconds: a launcher kills all ranks as soon as one has exited.
    """
    if is_first_on_node():
        return True
    time.sleep(_SPOKEN_BY_THEN)
    return False
