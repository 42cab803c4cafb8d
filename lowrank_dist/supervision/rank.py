"""The rank's side of supervision: where it is, whether it was told to stop, what ended it."""

from __future__ import annotations

import contextlib
import faulthandler
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import NoReturn

import torch.distributed as dist

from lowrank_dist.backend.select import shutdown
from lowrank_dist.config import ConfigError
from lowrank_dist.errors import ElsewhereError, UserError
from lowrank_dist.supervision.failure import Failure, explains, read, record
from lowrank_dist.supervision.launchers import find_launchers
from lowrank_dist.supervision.page import LEAVING, STARTING, Page
from lowrank_dist.supervision.signals import SIGNALS, StopRequest
from lowrank_dist.supervision.watchdog import Charge

logger = logging.getLogger(__name__)

# Exit codes. PREEMPTED: the run was told to stop, saved, and can go on; a job script requeues it.
FAILURE, USER_ERROR, PREEMPTED, INTERRUPTED = 1, 2, 85, 130
_ASK_SECONDS = 3  # that ranks which lost their peers wait for one that knows why
_NEVER_DELIVERED = {*SIGNALS, signal.SIGINT, signal.SIGHUP}


class Supervision:
    """Entered for as long as a run lasts: a watchdog beside this rank, signals noted, failures recorded."""

    def __init__(self, timeout_seconds: float) -> None:
        """timeout_seconds: that of the collectives. A rank that stands still for longer is ended."""
        self.stop = StopRequest()
        self.rank = int(os.environ.get("RANK", "0"))
        self.host = socket.gethostname()
        self.hosts: Sequence[str] = ()
        self._timeout, self._step, self._folder = timeout_seconds, 0, None

    def __enter__(self) -> Supervision:
        self._page = Page.make()
        self.enter(STARTING[0])
        self._stacks = os.fdopen(os.memfd_create("stacks"), "w")
        self._enabled_before = faulthandler.is_enabled()
        faulthandler.enable(self._stacks)
        self.stop.__enter__()
        self._watchdog = self._start_watchdog()
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
        """Say that the rank goes on, with `phase` (of supervision.page.PHASES); steps count from 1."""
        if step is not None:
            self._step = step
        self._page.enter(phase, self._step)

    def in_folder(self, path: Path) -> None:
        """From now on a failure is recorded in this run folder."""
        self._folder = path.absolute()
        self._page.set_folder(str(self._folder))

    def failed(self, error: BaseException) -> int:
        """Say and record what ended this rank. Returns the exit code: 2 for bad input, 130 for Ctrl-C, else 1."""
        if isinstance(error, KeyboardInterrupt):
            return INTERRUPTED
        mistake = isinstance(error, UserError | ConfigError)
        code = USER_ERROR if mistake else FAILURE
        cause = not (isinstance(error, ElsewhereError) or lost_peers(error))
        state = self._page.state()
        self.enter(LEAVING)
        if mistake:
            logger.error("%s", error)
        else:
            logger.error("rank failed", exc_info=error)
        reason = str(error) if mistake else f"{type(error).__name__}: {error}"
        trace = "" if mistake or not cause else "".join(traceback.format_exception(error))
        announces, silent = self._ask_peers(cause)
        if silent:
            reason += f"; not heard of since: {self._names(silent)}"
        failure = Failure(self.rank, self.host, state.step, state.phase, reason, trace, cause)
        said = record(self._folder, failure) if self._folder else str(failure)
        if announces:
            print(f"lowrank_dist: {error if mistake and cause else said}", file=sys.stderr, flush=True)
        return code

    def leave(self, code: int) -> NoReturn:
        """End this process. Where the run ended well on this rank, all ranks end together: a launcher ends the others
        as soon as one has left with another code than 0, be it that of a run that stopped when it was told to.

        Not by the interpreter's own end, in which the threads of gloo and NCCL abort now and then, or hang.
        """
        self.enter(LEAVING)
        try:
            shutdown(clean=code in (0, PREEMPTED))
        except Exception as error:
            code = self.failed(error)
        logging.shutdown()
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError):
                stream.flush()
        os._exit(code)

    def _ask_peers(self, cause: bool) -> tuple[bool, list[int]]:
        """Whether this rank is to speak, and which ranks have not been heard of.

        A rank that lost its peers waits: who went first may be about to say so. In a thread, because the store may be
        on a host that no longer answers.
        """
        if not dist.is_initialized():
            return os.environ.get("LOCAL_RANK", "0") == "0", []
        answer: list[tuple[bool, list[int]]] = []
        asking = threading.Thread(target=lambda: answer.append(self._ask(cause)), daemon=True)
        asking.start()
        asking.join(2 * _ASK_SECONDS)
        # Better twice than never: the store is gone, with the rank that held it.
        return answer[0] if answer else (True, [])

    def _ask(self, cause: bool) -> tuple[bool, list[int]]:
        store = dist.distributed_c10d._get_default_store()
        store.set_timeout(timedelta(seconds=_ASK_SECONDS))
        try:
            store.set(f"lowrank_dist/left/{self.rank}", self.host)
            if cause:
                announces = store.add("lowrank_dist/failed", 1) == 1
                if self.rank == 0:  # the store ends with it, and whoever asks then takes itself for the first
                    self._await(lambda: not self._silent(store))
                return announces, []
            self._await(lambda: self._folder is not None and explains(read(self._folder)))
            return store.add("lowrank_dist/left behind", 1) == 1, self._silent(store)
        except (RuntimeError, dist.DistError):
            return True, []

    def _silent(self, store: dist.Store) -> list[int]:
        return [rank for rank in range(dist.get_world_size()) if not store.check([f"lowrank_dist/left/{rank}"])]

    def _await(self, condition: Callable[[], bool]) -> None:
        end = time.monotonic() + _ASK_SECONDS
        while not condition() and time.monotonic() < end:
            time.sleep(0.1)

    def _names(self, ranks: Sequence[int]) -> str:
        return ", ".join(f"rank {r} on {self.hosts[r]}" if self.hosts else f"rank {r}" for r in ranks)

    def _start_watchdog(self) -> subprocess.Popen[bytes]:
        launchers = {str(pid): name for pid, name in find_launchers().items()}
        process = os.pidfd_open(os.getpid())
        charge = Charge(
            pid=os.getpid(),
            process=process,
            rank=self.rank,
            host=self.host,
            timeout=self._timeout,
            page=self._page.descriptor,
            stacks=self._stacks.fileno(),
            launchers=launchers,
        )
        package = Path(__file__).parents[2]
        path = os.pathsep.join([str(package), *filter(None, [os.environ.get("PYTHONPATH")])])
        # What a process inherits as blocked stays pending for ever: a watchdog outlives every signal to the job.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _NEVER_DELIVERED)
        try:
            return subprocess.Popen(
                [sys.executable, "-m", "lowrank_dist.supervision.watchdog", json.dumps(asdict(charge))],
                stdin=subprocess.DEVNULL,
                env={**os.environ, "PYTHONPATH": path},
                stdout=subprocess.DEVNULL,
                pass_fds=(charge.process, charge.page, charge.stacks),
            )
        finally:
            os.close(process)
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


def lost_peers(error: BaseException) -> bool:
    """Whether an error only says that another rank, or the network to it, is gone."""
    if isinstance(error, dist.DistError):
        return True
    # gloo and its store raise plain RuntimeErrors.
    signs = ("gloo/", "Connection closed by peer", "Connection reset by peer", "Broken pipe", "NCCL")
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)
