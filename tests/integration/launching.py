"""Runs of launch/train.py for the integration tests: under a launcher, on forked ranks, or on the pooled ones.

A start under a launcher costs 4 s of CPU a rank, so only tests of `deepspeed` and `torchrun` use them.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import os
import runpy
import signal
import socket
import subprocess
import sys
import traceback
import warnings
from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import numpy as np
import yaml

from tests import forked
from tests.dist import ranks
from tests.forked import Outcome

if TYPE_CHECKING:
    from lowrank_dist.backend.select import Backend

ROOT = Path(__file__).parents[2]
TIMEOUT = 180
WORDS = ("cat", "dog", "ant", "hen", "rat", "pig")
LAUNCHER_VARIABLES = tuple("RANK WORLD_SIZE LOCAL_RANK LOCAL_SIZE LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT".split())


def assert_codes(outcomes: Sequence[Outcome], expected: int) -> None:
    """Check the exit code of every rank; a failure shows the last output of each."""
    said = (f"rank {n}, code {one.code}:\n{one.stdout[-2000:]}{one.stderr[-4000:]}" for n, one in enumerate(outcomes))
    assert {outcome.code for outcome in outcomes} == {expected}, "\n".join(said)


def free_port() -> int:
    """Return a free port of this machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def samples(count: int) -> list[dict[str, str]]:
    """Return samples of different lengths with one rule, to repeat the word."""
    return [
        {"prompt": f"{WORDS[i % 6]} {'x' * (i % 5)}:", "completion": f"{WORDS[i % 6]} " * (i % 4 + 1)}
        for i in range(count)
    ]


def write_jsonl(path: Path, rows: Iterable[Any]) -> Path:
    """Write one JSON value a line; text is written unchanged."""
    lines = (row if isinstance(row, str) else json.dumps(row) for row in rows)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def write_config(path: Path, sections: dict[str, Any]) -> Path:
    """Write `sections` as YAML, with paths as text."""
    path.write_text(yaml.safe_dump(json.loads(json.dumps(sections, default=str)), sort_keys=False), encoding="utf-8")
    return path


def snapshot(folder: Path) -> dict[str, str]:
    """Return each entry below `folder` → the hash of a file, the target of a link, "" for a folder."""

    def content(path: Path) -> str:
        if path.is_symlink():
            return f"-> {os.readlink(path)}"
        return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""

    return {str(path.relative_to(folder)): content(path) for path in sorted(folder.rglob("*"))}


def metrics(run: Path, name: str) -> np.ndarray:
    """Return all values of one name in metrics.jsonl, in order."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return np.array([record[name] for record in records if name in record])


def deepspeed(size: int, *arguments: object) -> Outcome:
    """Run `deepspeed --num_gpus size launch/train.py …`, as in the README."""
    port = str(free_port())
    return program(["deepspeed", "--num_gpus", str(size), "--master_port", port, "launch/train.py", *arguments])


def torchrun(size: int, *arguments: object) -> Outcome:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size)]
    return program([*launcher, "launch/train.py", *arguments])


def forked_ranks(size: int, *arguments: object) -> Outcome:
    """Run launch/train.py on forked ranks in the environment that torchrun would set: the whole program, no launcher.

    The code of the outcome is the first rank's that is not 0. Output is in the order of ranks.
    """
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    meeting |= {"WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)}
    environments = [{**environment(), **meeting, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(size)]
    ended = forked.run_programs([ROOT / "launch/train.py", *arguments], environments, seconds=TIMEOUT)
    code = next((one.code for one in ended if one.code), 0)
    return Outcome(code, "".join(one.stdout for one in ended), "".join(one.stderr for one in ended))


def environment() -> dict[str, str]:
    """Return this process's environment without launcher variables, with this interpreter's programs on PATH."""
    inherited = {name: value for name, value in os.environ.items() if name not in LAUNCHER_VARIABLES}
    beside = Path(sys.executable).parent
    return {**inherited, "DS_ACCELERATOR": "cpu", "PATH": f"{beside}{os.pathsep}{os.environ['PATH']}"}


def program(command: Sequence[object]) -> Outcome:
    """Run a command from the root of the repository, in `environment()`."""
    process = subprocess.Popen(
        [str(word) for word in command],
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        errors="replace",  # a stray byte must not replace the result
        start_new_session=True,  # so that a hang ends with the launcher's workers, not with the launcher alone
    )
    try:
        stdout, stderr = process.communicate(timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=10)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        raise
    return Outcome(process.returncode, stdout, stderr)


def in_ranks(size: int, *arguments: object, launcher: bool = True) -> list[Outcome]:
    """Run launch/train.py as the main program of `size` pooled ranks.

    All of it is the program's own but the process group and its subgroups, which the ranks already have and keep.
    launcher=False: nothing is replaced, and the environment is one that no launcher has prepared.
    """
    return ranks.run_ranks(size, _main, [str(argument) for argument in arguments], launcher)


def _main(arguments: list[str], launcher: bool) -> Outcome:
    import torch.distributed as dist

    from lowrank_dist.backend import select
    from lowrank_dist.parallel.topology import Topology
    from lowrank_dist.supervision import rank as supervision
    from lowrank_dist.supervision.rank import Supervision

    build = Topology.build

    def kept(
        tensor: int,
        data: int | None,
        sequence: bool | None,
        timeout_seconds: int,
        *,
        across_nodes: bool,
        fitting: Collection[int],
    ) -> Topology:
        if dist.get_world_size() != tensor * (data or dist.get_world_size() // tensor):
            build(tensor, data, sequence, timeout_seconds, fitting=fitting)
            raise AssertionError("a layout that does not fit the ranks was accepted")
        with mock.patch.object(Topology, "build", build):
            return ranks.topology(tensor, sequence is not False)

    # Ranks that fail record it in the job's store; no rank of this run has failed yet.
    if dist.get_rank() == 0:
        store = dist.distributed_c10d._get_default_store()
        own = [f"{name}/{rank}" for name in ("left", "answered") for rank in range(dist.get_world_size())]
        for name in ("failed", "left behind", *own):
            store.delete_key(f"lowrank_dist/{name}")
    dist.barrier()
    stdout, stderr, code = io.StringIO(), io.StringIO(), 0
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(sys, "argv", ["launch/train.py", *arguments]))
        stack.enter_context(mock.patch.dict(os.environ))
        stack.enter_context(mock.patch.object(Supervision, "leave"))  # it would end the process
        stack.enter_context(mock.patch.object(supervision, "_SPOKEN_BY_THEN", 0.0))  # no launcher ends the others
        if launcher:
            stack.enter_context(mock.patch.object(Topology, "build", kept))
            stack.enter_context(mock.patch.object(select, "init_process_group", _met))
        else:
            for name in LAUNCHER_VARIABLES:
                os.environ.pop(name, None)
        stack.enter_context(warnings.catch_warnings())
        stack.callback(_restore_logging, logging.getLogger().level, list(logging.getLogger().handlers))
        stack.enter_context(contextlib.redirect_stdout(stdout))
        stack.enter_context(contextlib.redirect_stderr(stderr))
        try:
            runpy.run_path(str(ROOT / "launch" / "train.py"), run_name="__main__")
        except SystemExit as end:
            code = end.code
        except Exception:
            traceback.print_exc()
            code = 1
    return Outcome(code, stdout.getvalue(), stderr.getvalue())


def _met(backend: Backend, _: int) -> Backend:
    """Stand in for init_process_group on ranks that have met: they share this machine's memory, or its only GPU."""
    import torch.distributed as dist

    dist.barrier()
    return replace(backend, ranks_per_device=dist.get_world_size())


def _restore_logging(level: int, handlers: list[logging.Handler]) -> None:
    root = logging.getLogger()
    root.setLevel(level)
    for handler in [handler for handler in root.handlers if handler not in handlers]:
        root.removeHandler(handler)
        handler.close()
