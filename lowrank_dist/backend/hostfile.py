"""What deepspeed does not refuse: without the hostfile that it was given it trains on this machine alone."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from lowrank_dist.backend.processes import DEEPSPEED, ancestors, words
from lowrank_dist.errors import UserError

_OPTIONS = ("-H", "--hostfile")


def refuse_missing_hostfile() -> None:
    """Raise UserError where this rank was started by `deepspeed --hostfile FILE` and there is no FILE.

    The launcher warns and starts its ranks here, which see nothing of it: neither FILE nor the number of hosts that was
    meant is passed on. It is their ancestor, though, and Linux shows its command line.
    """
    for process in ancestors():
        named = named_hostfile(words(process))
        if named is None:
            continue
        # As the launcher saw it: relative to where that was started.
        path = Path(os.readlink(process / "cwd")) / named
        if not path.is_file():
            raise UserError(
                f"deepspeed --hostfile: {path} is not a file, and the launcher went on without it, on this machine "
                "alone; correct the path, or leave --hostfile out to train here"
            )


def named_hostfile(command: Sequence[str]) -> str | None:
    """The FILE of a command line `[python] deepspeed --hostfile FILE … SCRIPT …`; None for any other command."""
    programs = [at for at, word in enumerate(command) if os.path.basename(word) in DEEPSPEED]
    if not programs:
        return None
    rest = iter(command[programs[0] + 1 :])
    for word in rest:
        name, given, value = word.partition("=")
        if name in _OPTIONS:
            return value if given else next(rest, None)
        if word.endswith(".py"):  # what follows is the script's own
            return None
    return None
