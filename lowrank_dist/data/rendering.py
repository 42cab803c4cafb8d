"""The one child of this process that renders chat templates within bounds (`render_child`), as the parent has it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

from lowrank_dist.data.render_child import IGNORED
from lowrank_dist.errors import UserError

T = TypeVar("T")
_CHILD = Path(__file__).with_name("render_child.py")
# Of BLAS, which comes with the import and takes address space for each.
_ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


@dataclass(frozen=True)
class Job:
    """A template to render. special: names and texts of special tokens. moment: what the clock says."""

    template: str
    special: Mapping[str, str]
    moment: datetime

    def line(self, bounds: Mapping[str, int]) -> bytes:
        """Return what the child is told."""
        given = {"template": self.template, "special": dict(self.special), "moment": self.moment.isoformat()}
        return _line({**given, **bounds})


class RenderingError(ValueError):
    """Why a chat cannot be rendered. number: its place among those that were asked for."""

    def __init__(self, reason: str, number: int) -> None:
        super().__init__(reason)
        self.number = number


# The messages, the cuts of them, and whether the generation blocks are asked for (`render_child.texts`).
Chat = tuple[Sequence[Mapping[str, str]], Sequence[tuple[int, bool]], bool]


class Renderer:
    """Renders chats in a child, which ends by itself when there is nothing to do and is started again.

    seconds: of CPU, for all texts of a chat. memory: bytes that they take.
    """

    def __init__(self, seconds: int = 5, memory: int = 1 << 30) -> None:
        self.seconds, self.memory = seconds, memory
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = self._ended = 0

    def render(self, job: Job, chats: Sequence[Chat], take: Callable[[Mapping[str, Any]], T]) -> list[T]:
        """Return what `take` makes of each chat's answer (`render_child.texts`), which is let go at once.

        Raises RenderingError for the first chat that has none, after what came before it was taken, and UserError where
        no process can be started.
        """
        with self._lock:
            taken: list[T] = []
            while len(taken) < len(chats):
                with closing(self._ask(job, chats[len(taken) :])) as answers:
                    for found in answers:
                        if "error" in found:
                            raise RenderingError(found["error"], len(taken))
                        taken.append(take(found))
                if self._process is None and (reason := self._reason()):
                    raise RenderingError(reason, len(taken))
            return taken

    def _ask(self, job: Job, chats: Sequence[Chat]) -> Generator[Mapping[str, Any]]:
        """Yield what the child answers, up to its end. Is not left before without ending it."""
        process = self._started()
        assert process.stdout is not None
        # A thread writes: the child would wait for its answers to be read while this one waits to write.
        told = job.line({"seconds": self.seconds, "memory": self.memory})
        data = b"".join([told, *(_line({"messages": m, "cuts": c, "marked": k}) for m, c, k in chats)])
        writer = threading.Thread(target=_write, args=(process, data), daemon=True)
        writer.start()
        answered = 0
        try:
            while answered < len(chats) and (line := process.stdout.readline()).endswith(b"\n"):
                answered += 1
                yield json.loads(line)
        finally:
            # An answer that ends all may be the last one, too.
            if answered < len(chats):
                process.kill()
                self._ended, self._process = process.wait(), None
            writer.join()

    def _started(self) -> subprocess.Popen[bytes]:
        # After a fork the child is another's.
        if self._process is None or self._owner != os.getpid() or self._process.poll() is not None:
            self._owner, self._process = os.getpid(), None
            try:
                self._process = subprocess.Popen(
                    [sys.executable, "-P", str(_CHILD)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,
                    env={**os.environ, **_ONE_THREAD},
                )
            except OSError as error:
                raise UserError(
                    f"chat templates are rendered in a process of their own, which cannot be started ({error}): let "
                    "this job have one more process for each rank (ulimit -u, limits of the container)"
                ) from error
        return self._process

    def _reason(self) -> str | None:
        """Return why the child ended before it had answered; None where that is none of the chat's.

        It had nothing to do for a while, or was sent a signal before it could ignore it.
        """
        if -self._ended in (signal.SIGALRM, *IGNORED):
            return None
        if self._ended == -signal.SIGXCPU:
            return f"it takes more than {self.seconds} s for one chat"
        return (
            f"the process that renders it ended with code {self._ended}; does it take more than {self.memory >> 20} "
            "MiB of memory?"
        )


RENDERER = Renderer()


def _line(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value).encode() + b"\n"


def _write(process: subprocess.Popen[bytes], data: bytes) -> None:
    assert process.stdin is not None
    left = memoryview(data)
    try:
        # Past the buffer, whose rest would be written, and fail once more, when it is closed.
        while left:
            left = left[os.write(process.stdin.fileno(), left) :]
    except BrokenPipeError:  # it has died, and the reader learns why
        pass
