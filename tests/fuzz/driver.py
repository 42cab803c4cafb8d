"""Feeds one reader its mutations in a forked child, and judges the exceptions, time, memory and values.

The child is killed after `SECONDS` of CPU for one input. Any outcome but a value or a UserError is a failure, and so is
a value that the reader's judge does not find in the file.
"""

from __future__ import annotations

import dis
import json
import os
import random
import resource
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

from lowrank_dist.errors import UserError
from lowrank_dist.terminal import escape_all
from tests.fuzz.mutations import mutate_bytes, mutate_tree
from tests.fuzz.readers import Built, Reader

SECONDS = 10.0
MEMORY = 1 << 30
# Branches are traced for every third input, which costs many times the reading itself.
TRACED = 3
ROOT = Path(__file__).parents[2]
# File, first line of the function, offsets of the jump and its target.
Branch = tuple[str, int, int, int]
ENTERED = -1  # entry of the function


@dataclass
class Result:
    """The results of one reader over its inputs. branches: (reached, total) in the functions that it enters."""

    name: str
    structured: int = 0
    inputs: int = 0
    accepted: int = 0
    refused: int = 0
    slowest: float = 0.0
    peak: int = 0
    seconds: float = 0.0
    branches: tuple[int, int] = (0, 0)
    failures: list[str] = field(default_factory=list)


def inputs(reader: Reader, built: Built, structured: int, by_bytes: int) -> Iterator[tuple[str, bytes]]:
    """Yield (label, content), the same contents for the same counts."""
    tree, whole = reader.tree(built), reader.whole(built)
    for number in range(structured):
        label = f"{reader.name}/tree/{number}"
        yield label, reader.encode(mutate_tree(random.Random(label), tree), built)
    for number in range(by_bytes):
        label = f"{reader.name}/bytes/{number}"
        yield label, mutate_bytes(random.Random(label), whole)


def fuzz(reader: Reader, built: Built, structured: int, by_bytes: int, *, branches: bool = False) -> Result:
    """Feed a reader this many mutations of each kind."""
    result = Result(reader.name, structured=structured)
    began = time.monotonic()
    all_inputs = list(inputs(reader, built, structured, by_bytes))
    result.inputs, at, reached = len(all_inputs), 0, set()
    while at < len(all_inputs):
        at = _batch(reader, built, all_inputs, at, result, reached if branches else None)
    if branches:
        entered = {(name, line) for name, line, start, _ in reached if start == ENTERED}
        there = {branch for branch in branches_of(reader.modules) if branch[:2] in entered}
        result.branches = len(reached & there), len(there)
    result.seconds = time.monotonic() - began
    return result


def _batch(
    reader: Reader,
    built: Built,
    all_inputs: list[tuple[str, bytes]],
    at: int,
    result: Result,
    reached: set[Branch] | None,
) -> int:
    """Read in a child until it ends; return the index to continue at, after the input that ended it."""
    source, sink = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(source)
        try:
            _child(reader, built, all_inputs[at:], sink, reached is not None)
        finally:
            os._exit(0)
    os.close(sink)
    at = _listen(child, source, all_inputs, at, result, reached)
    os.close(source)
    _, status = os.waitpid(child, 0)
    if at < len(all_inputs):
        if result.failures and result.failures[-1].startswith(f"{all_inputs[at][0]}: over"):
            return at + 1
        how = f"signal {status & 0x7F}" if status & 0x7F else "it ended"
        result.failures.append(f"{all_inputs[at][0]}: the reader's process died or was ended ({how})")
        return at + 1
    return at


def _listen(
    child: int, source: int, all_inputs: list[tuple[str, bytes]], at: int, result: Result, reached: set[Branch] | None
) -> int:
    rest, used = b"", 0.0
    while True:
        if not select.select([source], [], [], 0.5)[0]:
            if _cpu(child) - used > SECONDS:
                result.failures.append(f"{all_inputs[at][0]}: over {SECONDS:.0f} s")
                os.kill(child, signal.SIGKILL)
            continue
        text = os.read(source, 1 << 16)
        if not text:
            return at
        *lines, rest = (rest + text).split(b"\n")
        for line in lines:
            answer = json.loads(line)
            used = _cpu(child)
            result.slowest = max(result.slowest, answer["seconds"])
            result.peak = max(result.peak, answer["peak"])
            result.accepted += answer["kind"] == "accepted"
            result.refused += answer["kind"] == "refused"
            if answer["failure"]:
                result.failures.append(f"{all_inputs[at][0]}: {answer['failure']}")
            if answer["peak"] > MEMORY:
                result.failures.append(f"{all_inputs[at][0]}: {answer['peak'] >> 20} MiB")
            if reached is not None:
                reached.update(tuple(branch) for branch in answer["branches"])
            at += 1


def _cpu(process: int) -> float:
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _child(reader: Reader, built: Built, own: list[tuple[str, bytes]], sink: int, branches: bool) -> None:
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 1)
    os.dup2(nothing, 2)
    held = _resident("VmSize:") + MEMORY + (256 << 20)
    resource.setrlimit(resource.RLIMIT_AS, (held, held))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    tracer = Tracer(reader.modules) if branches else None
    for number, (_, content) in enumerate(own):
        # The peak of resident memory is counted from here on.
        Path("/proc/self/clear_refs").write_text("5")
        before, began = _resident("VmRSS:"), time.process_time()
        traced = tracer is not None and number % TRACED == 0
        answer = _read(reader, built, content, tracer if traced else None)
        answer["seconds"] = 0.0 if traced else time.process_time() - began
        answer["peak"] = max(0, _resident("VmHWM:") - before)
        answer["branches"] = [] if tracer is None else tracer.take()
        os.write(sink, (json.dumps(answer) + "\n").encode())


def _read(reader: Reader, built: Built, content: bytes, tracer: Tracer | None) -> dict[str, Any]:
    try:
        reader.place(built, content)
        if tracer is not None:
            sys.settrace(tracer)
        try:
            value = reader.read(built)
        finally:
            sys.settrace(None)
        wrong = reader.judge(built, content, value)
    except UserError as error:
        try:
            escape_all(str(error)).encode()
        except UnicodeError:
            return {"kind": "refused", "failure": "a message that cannot be printed"}
        return {"kind": "refused", "failure": "" if str(error) else "an error without a message"}
    except BaseException as error:  # a panic in Rust, a RecursionError, or anything else
        frames = traceback.extract_tb(error.__traceback__)
        ours = [f"{Path(f.filename).name}:{f.lineno}" for f in frames if "lowrank_dist" in f.filename]
        return {"kind": "raised", "failure": f"{type(error).__name__}: {str(error)[:120]!a} at {' '.join(ours[-3:])}"}
    return {"kind": "accepted", "failure": "" if wrong is None else f"accepted: {wrong[:200]!a}"}


def _resident(name: str) -> int:
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line for line in status.splitlines() if line.startswith(name)).split()[1])


class Tracer:
    """Traces the conditional jumps of some modules, and which way each went."""

    def __init__(self, modules: tuple[str, ...]) -> None:
        self._files = {str(ROOT / module) for module in modules}
        self._jumps: dict[CodeType, set[int]] = {}
        self._found: set[Branch] = set()

    def __call__(self, frame: FrameType, event: str, arg: object) -> Callable[..., Any] | None:
        code = frame.f_code
        if code.co_filename not in self._files:
            return None
        if code not in self._jumps:
            self._jumps[code] = {start for start, _ in jumps(code)}
        starts, name, line, before = self._jumps[code], Path(code.co_filename).name, code.co_firstlineno, -1
        self._found.add((name, line, ENTERED, ENTERED))
        frame.f_trace_opcodes = True
        frame.f_trace_lines = False

        def follow(frame: FrameType, event: str, arg: object) -> Callable[..., Any]:
            nonlocal before
            if event == "opcode":
                if before in starts:
                    self._found.add((name, line, before, frame.f_lasti))
                before = frame.f_lasti
            return follow

        return follow

    def take(self) -> list[Branch]:
        """Return the branches found since the last call."""
        found, self._found = self._found, set()
        return list(found)


def jumps(code: CodeType) -> Iterator[tuple[int, int]]:
    """Yield (jump, target) for each direction of a conditional jump."""
    instructions = list(dis.get_instructions(code))
    for here, following in zip(instructions, instructions[1:], strict=False):
        if "JUMP" in here.opname and "IF" in here.opname or here.opname == "FOR_ITER":
            yield here.offset, following.offset
            yield here.offset, here.argval


def branches_of(modules: tuple[str, ...]) -> Iterator[Branch]:
    """Yield the branches of all functions in some modules, without those that run at import."""
    for module in modules:
        path = ROOT / module
        waiting = [compile(path.read_text(), str(path), "exec")]
        while waiting:
            code = waiting.pop()
            waiting += [each for each in code.co_consts if isinstance(each, CodeType)]
            if code.co_flags & 0x2:  # a function has its own locals; a module or class does not
                yield from ((path.name, code.co_firstlineno, start, end) for start, end in jumps(code))


def table(results: list[Result]) -> str:
    """Return a line for each reader, and their sum."""
    lines = [
        f"{'reader':24} {'inputs':>7} {'trees':>6} {'taken':>6} {'refused':>8} {'slowest':>8} {'peak':>9} branches"
    ]
    for each in results:
        reached, there = each.branches
        share = f"{reached} of {there}, {100 * reached / there:.0f} %" if there else "not followed"
        lines.append(
            f"{each.name:24} {each.inputs:7} {each.structured:6} {each.accepted:6} {each.refused:8} "
            f"{each.slowest:6.2f} s {each.peak >> 20:5} MiB {share}"
        )
    lines.append(f"{'all':24} {sum(each.inputs for each in results):7}   {sum(each.seconds for each in results):.0f} s")
    return "\n".join(lines)
