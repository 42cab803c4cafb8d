"""The parent's side of the child process that renders chat templates within bounds (`render_child`)."""

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
# The child's imports load BLAS, which takes address space for each of its threads.
_ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


@dataclass(frozen=True)
class Job:
    """A template to render. special: special token's name → text. moment: time that the template's clock returns."""

    template: str
    special: Mapping[str, str]
    moment: datetime

    def line(self, bounds: Mapping[str, int]) -> bytes:
        """Return the line that gives the child this template. bounds: its limits, "seconds" and "memory"."""
        given = {"template": self.template, "special": dict(self.special), "moment": self.moment.isoformat()}
        return _line({**given, **bounds})


class RenderingError(ValueError):
    """A chat that cannot be rendered; the message is the reason. number: its index among the requested chats.

    line, refused: as in `render_child.answer`.
    """

    def __init__(self, reason: str, number: int, line: int | None = None, refused: bool = False) -> None:
        super().__init__(reason)
        self.number, self.line, self.refused = number, line, refused


# (messages, cuts, marked) as `render_child.texts` takes them.
Chat = tuple[Sequence[Mapping[str, str]], Sequence[tuple[int, bool]], bool]


class Renderer:
    """Renders chats in a child process, which exits when idle and is started again when needed.

    seconds: CPU time for all texts of a chat. memory: bytes for rendering.
    """

    def __init__(self, seconds: int = 5, memory: int = 1 << 30) -> None:
        self.seconds, self.memory = seconds, memory
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = self._ended = 0

    def render(self, job: Job, chats: Sequence[Chat], take: Callable[[Mapping[str, Any]], T]) -> list[T]:
        """Return take(answer) for each chat, where the answer is that of `render_child.texts`. Answers are not kept.

        Raises RenderingError for the first chat that fails, once `take` was called for those before it, and UserError
        if no process can be started.
        """
        with self._lock:
            taken: list[T] = []
            while len(taken) < len(chats):
                with closing(self._ask(job, chats[len(taken) :])) as answers:
                    for found in answers:
                        if "error" in found:
                            raise RenderingError(found["error"], len(taken), found["line"], found["refused"])
                        taken.append(take(found))
                if self._process is None and (reason := self._reason()):
                    raise RenderingError(reason, len(taken))
            return taken

    def _ask(self, job: Job, chats: Sequence[Chat]) -> Generator[Mapping[str, Any]]:
        """Yield the child's answers until it ends. Closing the generator before the last answer kills the child."""
        process = self._started()
        assert process.stdout is not None
        # A thread writes. Otherwise parent and child could each wait for the other to read from a full pipe.
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
            # With nothing left to answer the child is kept, even if the caller stopped at the last answer.
            if answered < len(chats):
                process.kill()
                self._ended, self._process = process.wait(), None
            writer.join()

    def _started(self) -> subprocess.Popen[bytes]:
        # After a fork the child belongs to the parent process.
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
                    f"the process that renders chat templates cannot be started ({error}); allow one more process "
                    "for each rank (ulimit -u, limits of the container)"
                ) from error
        return self._process

    def _reason(self) -> str | None:
        """Return the reason why a chat made the child end, None where the chat is not the cause.

        The other causes: the child was idle for too long, or got a signal before it could ignore it.
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
        # Write past the buffer: data left in it would be written when it is closed, and fail again.
        while left:
            left = left[os.write(process.stdin.fileno(), left) :]
    except BrokenPipeError:  # the child has died; the reader finds the reason
        pass
