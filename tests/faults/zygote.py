"""The process behind `Zygote`: python -m tests.faults.zygote MODULE:FUNCTION; a line of JSON in, a line of JSON out."""

import importlib
import json
import os
import select
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests import faults


def main(name: str) -> None:
    commands, replies = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    # The function's output must not be taken for a reply, nor a command for its input.
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    module, _, attribute = name.partition(":")
    function = getattr(importlib.import_module(module), attribute)
    if "torch" in sys.modules:
        # A child of a process with OpenMP threads would wait for threads that it does not have.
        sys.modules["torch"].set_num_threads(1)
    for line in commands:
        replies.write(json.dumps(_serve(function, json.loads(line))) + "\n")
        replies.flush()


def _serve(function: Callable[..., Any], command: dict[str, Any]) -> dict[str, Any]:
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        try:
            report = _call(function, command)
        except BaseException:
            # The injector could not be armed.
            report = {"failure": traceback.format_exc()}
        _write_all(writing, json.dumps(report).encode())
        # Not sys.exit: nothing that the zygote owns may be flushed or closed twice.
        os._exit(0)
    os.close(writing)
    report = _read_all(reading, command["timeout"])
    os.close(reading)
    if report is None:
        os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    # In shared memory, so that the child's count outlives it.
    seen = {"count": faults.disarm(), "trace": faults.trace()}
    if report is None:
        return {"failure": f"hangs for {command['timeout']} s", **seen}
    killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    if status != 0 and not killed:
        return {"failure": f"ends with {os.waitstatus_to_exitcode(status)}", **seen}
    return {"killed": killed, **(json.loads(report) if report else {}), **seen}


def _call(function: Callable[..., Any], command: dict[str, Any]) -> dict[str, Any]:
    root = Path(command["root"])
    faults.arm(root, command["nth"], faults.Action(command["action"]))
    try:
        value = function(root, *command["arguments"])
    except BaseException as error:
        faults.disarm()
        return {
            "error": f"{type(error).__name__}: {error}",
            "classes": [base.__name__ for base in type(error).__mro__],
            "traceback": traceback.format_exc(),
        }
    faults.disarm()
    return {"value": value}


def _write_all(descriptor: int, data: bytes) -> None:
    while data:
        data = data[os.write(descriptor, data) :]


def _read_all(descriptor: int, timeout: float) -> bytes | None:
    """Read until the other end is closed. Returns return None when nothing arrives for `timeout` seconds."""
    data = b""
    while select.select([descriptor], [], [], timeout)[0]:
        part = os.read(descriptor, 1 << 16)
        if not part:
            return data
        data += part
    return None


if __name__ == "__main__":
    main(sys.argv[1])
