"""Rank 0's findings from the nodes' answers, the comparison of clocks, and that nothing waits for ever."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from lowrank_dist.backend import devices
from lowrank_dist.backend.devices import Gpu
from lowrank_dist.backend.sharing import Claim
from lowrank_dist.doctor.board import Board, NoAnswer, answer_clock, clock_offset, clock_skew
from lowrank_dist.doctor.local import Place
from lowrank_dist.doctor.machine import gpu_in_use
from lowrank_dist.doctor.member import Attendance
from lowrank_dist.doctor.rows import SHOWN, Results, Row, TableLine, format_size, plural, run_check
from lowrank_dist.doctor.rows import table_lines as table_of
from lowrank_dist.doctor.together import LeaderCheck, take_attendance
from lowrank_dist.errors import UserError

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


def findings(nodes: dict[str, list[Row]], between: list[Row] | None = None) -> list[TableLine]:
    ranks = {node: [rank] for rank, node in enumerate(nodes)}
    return table_of(Results(len(nodes), ranks, nodes, between or []))


def version(value: str, **more: str) -> Row:
    return Row("torch", "ok", f"{value} (supported)", alike=value, **more)


def test_what_all_nodes_have_is_said_once() -> None:
    table = findings({"h1": [version("2.13")], "h2": [version("2.13")]}, [Row("all-reduce", "ok", "fast")])
    assert table == [
        TableLine("torch", "ok", "2.13 (supported)", ("h1", "h2")),
        TableLine("all-reduce", "ok", "fast"),
    ]
    assert all(one.passes for one in table)


def test_what_differs_is_named_with_its_nodes() -> None:
    nodes = {"h1": [version("2.13")], "h2": [version("2.12")], "h3": [version("2.13")]}
    (one,) = findings(nodes)
    assert (one.state, one.passes) == ("differs", False)
    assert one.detail == "2.13 on h1, h3; 2.12 on h2; make it the same on every node"
    # A value that may differ gives a warning, whichever node comes first.
    (one,) = findings({node: [version(row.alike or "", if_unlike="warning")] for node, (row,) in nodes.items()})
    assert (one.state, one.passes) == ("warning", True)


def test_what_is_wrong_on_one_node_is_its_own_line() -> None:
    missing = Row("torch", "missing", "not installed")
    wrong, fine = findings({"h1": [version("2.13")], "h2": [missing]})[::-1]
    assert (wrong.nodes, wrong.state, fine.nodes, fine.state) == (("h2",), "missing", ("h1",), "ok")
    # One node's version is different and too old: both are reported; what is in order is not repeated.
    old = Row("torch", "unsupported", "2.1 is too old", alike="2.1")
    differs, unsupported = findings({"h1": [version("2.13")], "h2": [old]})
    assert (differs.state, unsupported.state, unsupported.nodes) == ("differs", "unsupported", ("h2",))


def test_a_concern_of_one_node_alone_is_no_difference() -> None:
    (one,) = findings({"h1": [version("2.13")], "h2": []})
    assert one == TableLine("torch", "ok", "2.13 (supported)", ("h1",))


def test_many_answers_that_are_in_order_are_cut_and_others_are_not() -> None:
    nodes = {f"n{i}": [Row("host memory", "ok", f"{i} GiB"), Row("GPUs", "broken", f"{i} lost")] for i in range(9)}
    table = findings(nodes)
    memory = [one for one in table if one.what == "host memory"]
    assert len(memory) == SHOWN + 1 and "6 more nodes" in memory[-1].detail
    assert sum(len(one.nodes) for one in memory) == 9
    assert len([one for one in table if one.what == "GPUs"]) == 9


def offsets(ahead: float, wait: float = 0.0) -> tuple[float, float]:
    """Return (offset, error) of a clock that is `ahead`, compared over a store whose answers take `wait` seconds."""
    board = Board(dist.HashStore())

    def late() -> float:
        time.sleep(wait)
        return time.time()

    with ThreadPoolExecutor(1) as pool:
        answering = pool.submit(answer_clock, board, [3], 10.0, late)
        found = clock_offset(board, 3, 10.0, lambda: time.time() + ahead)
        answering.result()
    return found


@pytest.mark.parametrize("ahead", [0.0, 5.0, -5.0])
def test_clocks_are_compared_by_round_trips(ahead: float) -> None:
    found, error = offsets(ahead)
    assert abs(found - ahead) <= error < 0.5
    (row,) = clock_skew({"h2": (found, error), "h3": (0.001, 0.0005)}, "h1")
    if ahead == 0:
        assert row.state == "ok" and "h1" in row.detail
    else:
        assert row.state == "warning" and "chrony" in row.detail
        assert f"h2 is 5 s {'ahead of' if ahead > 0 else 'behind'} h1" in row.detail and "h3" not in row.detail
    assert row.figures["h2_seconds"] == found


def test_a_slow_network_is_no_skew() -> None:
    """In the worst case all delay is one way: the offset is then wrong by half the delay, and the error says so."""
    found, error = offsets(0.0, wait=0.1)
    assert error >= 0.05 and abs(found) <= error
    (row,) = clock_skew({"h2": (2.0, 1.5)}, "h1")
    assert row.state == "ok"
    assert clock_skew({}, "h1") == []


def test_a_board_that_nobody_writes_on() -> None:
    board = Board(dist.HashStore())
    board.put("here", {"host": "h1", "numbers": [1, 2.5, None]})
    assert board.take("here", 1) == {"host": "h1", "numbers": [1, 2.5, None]}
    start = time.monotonic()
    with pytest.raises(NoAnswer, match="nobody"):
        board.take("nobody", 0.2)
    assert 0.2 <= time.monotonic() - start < 5


def test_who_did_not_come_is_known_by_number() -> None:
    board = Board(dist.HashStore())
    for rank, host in ((0, "h1"), (1, "h1"), (4, "h3")):
        board.put(f"here/{rank}", {"node": f"{host}/a", "refused": None})
    board.put("here/2", {"node": "h2/b", "refused": "no config file"})
    attendance = take_attendance(board, 6, 0.1)
    assert attendance.ranks == {"h1": [0, 1], "h2": [2], "h3": [4]} and attendance.absent == [3, 5]
    assert attendance.leaders == {"h1": 0, "h2": 2, "h3": 4} and attendance.refused == {"h2": "no config file"}


def test_nodes_of_one_host_name_are_two() -> None:
    board = Board(dist.HashStore())
    for rank, boot in enumerate(("1f3a-5", "77b0-5", "1f3a-5")):
        board.put(f"here/{rank}", {"node": f"worker/{boot}", "refused": "no config file" if rank == 1 else None})
    attendance = take_attendance(board, 3, 0.1)
    assert attendance.ranks == {"worker (1f3a)": [0, 2], "worker (77b0)": [1]}
    assert attendance.refused == {"worker (77b0)": "no config file"}


def test_a_look_that_hangs_ends_the_process_with_what_was_found() -> None:
    code = """
import time
from lowrank_dist.doctor.rows import Row
from lowrank_dist.doctor.local import TimeLimit
limit = TimeLimit(lambda rows: print(*(f"{row.what}|{row.state}" for row in rows), flush=True), seconds=0.3)
with limit.around("model folder", [Row("torch", "ok", "2.13")]):
    time.sleep({pause})
time.sleep(0.6)
print("went on")
"""
    for pause, expected in (("0", (0, "went on\n")), ("60", (1, "torch|ok model folder|broken\n"))):
        command = [sys.executable, "-c", code.replace("{pause}", pause)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=50, check=False)
        assert (done.returncode, done.stdout) == expected, done.stderr


@pytest.mark.parametrize(
    ("error", "said"), [(UserError("x: missing;\n download"), "x: missing; download"), (OSError("x"), "OSError: x")]
)
def test_a_check_that_fails_is_a_row(error: Exception, said: str) -> None:
    def failing() -> list[Row]:
        raise error

    check: Callable[[], list[Row]] = failing
    assert run_check("x", check) == [Row("x", "broken", said)] and run_check("x", check, needed=False)[0].state == "off"


def test_sizes_and_counts() -> None:
    assert [format_size(x) for x in (0, 1023, 1024, 2**20, 3 * 2**30, 2**42)] == [
        *("0 bytes", "1023 bytes", "1.0 KiB", "1.0 MiB", "3.0 GiB", "4096.0 GiB")
    ]
    assert (plural(1, "node"), plural(2, "node")) == ("1 node", "2 nodes")


def leader(told: Sequence[Claim | str]) -> LeaderCheck:
    """Return rank 0's part in the check of a job of one node. told: the ranks' devices, or why they have none."""
    board = Board(dist.HashStore())
    for rank, one in enumerate(told):
        board.put(f"claim/{rank}", {"error": one} if isinstance(one, str) else asdict(one))
    place = Place(0, len(told), 0, len(told), "h1/a", "h1", 1, agent=False)
    return LeaderCheck(place, None, 1, board, Attendance({"h1": [*range(len(told))]}, [], {}), lambda found: 0)


CPU = Claim("h1/a", "auto", "CUDA_VISIBLE_DEVICES=0")
X, Y = (replace(CPU, unit=unit, gpu=unit, visible=(unit,)) for unit in "xy")


@pytest.mark.parametrize(
    ("told", "library", "state", "said"),
    [
        ([X, Y], "nccl", "ok", "each rank uses a GPU of its own, collectives go by nccl"),
        ([X, X], "gloo", "warning", "ranks 0, 1 on h1 share one GPU"),
        ([CPU, CPU], "gloo", "ok", "each rank uses the CPU, collectives go by gloo"),
        ([X, CPU], None, "broken", "rank 1 on h1 uses no GPU (CUDA_VISIBLE_DEVICES=0), but rank 0 on h1 does"),
        ([X, "the driver is too old"], None, "broken", "rank 1: the driver is too old; see the rows on GPUs"),
    ],
    ids=["one each", "shared", "CPU", "one without", "a driver that refuses"],
)
def test_the_devices_of_the_ranks(told: list[Claim | str], library: str | None, state: str, said: str) -> None:
    check, found = leader(told), Results(2, {})
    assert check._devices({0: {}, 1: {}}, found) == library
    (row,) = found.between
    assert row.what == "devices of ranks" and row.state == state and said in row.detail


def test_a_gpu_in_use_is_found_where_the_rank_that_checks_the_node_cannot_see_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    free = {0: 80 * 2**30, 1: 2**30}
    monkeypatch.setattr(devices, "gpu", lambda index: Gpu("H100", 80 * 2**30, free[index], "sm_90"))
    assert gpu_in_use(3, torch.device("cuda", 0)) == gpu_in_use(3, torch.device("cpu")) == []
    (row,) = gpu_in_use(3, torch.device("cuda", 1))
    assert row.what == "GPU of rank 3" and row.state == "warning" and "only 1.0 GiB free" in row.detail
    check, found = leader([X, Y, X]), Results(3, {})
    memory = Row("host memory", "ok", "1 GiB")
    for rank, rows in enumerate(([memory], [row, memory], [row])):
        report = {"rows": [asdict(one) for one in rows], "probe": None, "hangs": False}
        check.board.put(f"report/{rank}", report)
    check._collect_reports(found)
    assert found.rows == {"h1": [memory, row]}


@pytest.mark.parametrize(("told", "sharing"), [([X, Y], 1), ([X, X], 2)], ids=["one each", "shared"])
def test_memory_is_checked_for_the_share_of_a_rank(told: list[Claim | str], sharing: int) -> None:
    """Each rank sees one GPU: whether it is the same one decides how much memory a rank has."""
    check = leader(told)
    assert check._met() is None, "a rank without a device"
    check.device = torch.device("cuda", 0)
    met = check._met()
    assert met is not None and met.hosts == ("h1", "h1") and met.backend.ranks_per_device == sharing
