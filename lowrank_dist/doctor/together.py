"""The check of a job: its ranks check their nodes and the links between them, and rank 0 collects the results."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any

from lowrank_dist.backend.node import node_names
from lowrank_dist.backend.sharing import Claim, share
from lowrank_dist.doctor import links
from lowrank_dist.doctor.board import Board, NoAnswer, answer_clock, clock_skew
from lowrank_dist.doctor.inputs import layout
from lowrank_dist.doctor.local import Place, failing
from lowrank_dist.doctor.member import GRACE_SECONDS, NETWORK_REMEDY, REPORT_SECONDS, Attendance, RankCheck, leave
from lowrank_dist.doctor.rows import SHOWN, Results, Row, plural, run_check
from lowrank_dist.errors import UserError, some_of

if TYPE_CHECKING:
    from lowrank_dist.config import Config

# Checks that a node must pass for its ranks to meet the others.
MEETING = ("MASTER_ADDR", "interface of gloo", "interface of NCCL")


def check_job(
    place: Place, config: Config | None, refused: str | None, seconds: float, publish: Callable[[Results], int]
) -> int:
    """Run one rank's part, and return the exit code, which is the same on every rank.

    config: as this rank read it. refused: the error if this rank could not read it. seconds: how long ranks wait for
    one another to arrive. publish: called on rank 0 to show the results; returns the exit code of all ranks.

    Raises Unreached if the job's store cannot be reached, NoAnswer if rank 0 is gone, and UserError (on rank 0 only)
    if a rank could not read the config.
    """
    start = time.monotonic()
    board = Board.join(place, seconds)
    board.put(f"here/{place.rank}", {"node": place.node, "refused": refused})
    if place.rank == 0:
        attendance = take_attendance(board, place.size, seconds - (time.monotonic() - start))
        board.put("attendance", asdict(attendance))
    else:
        attendance = Attendance(**board.take("attendance", 2 * seconds + GRACE_SECONDS))
    try:
        if attendance.refused:
            if place.rank == 0:
                raise UserError(
                    "\n".join(f"{node}: {text}" for node, text in _nodes_by_error(attendance.refused).items())
                )
            return 2
        if place.rank != 0:
            return RankCheck(place, config, seconds, board, attendance).run()
        return LeaderCheck(place, config, seconds, board, attendance, publish).run_as_leader(time.monotonic() - start)
    finally:
        leave(board, place, attendance)


def take_attendance(board: Board, size: int, seconds: float) -> Attendance:
    """Wait until all ranks have arrived or the time is over, and return who arrived."""
    end = time.monotonic() + seconds
    came: dict[int, dict[str, Any]] = {}
    for rank in range(size):
        with contextlib.suppress(NoAnswer):
            came[rank] = board.take(f"here/{rank}", max(end - time.monotonic(), 0.01))
    ranks: dict[str, list[int]] = {}
    refused: dict[str, str] = {}
    for (rank, said), node in zip(came.items(), node_names([said["node"] for said in came.values()]), strict=True):
        ranks.setdefault(node, []).append(rank)
        if said["refused"] is not None:
            refused.setdefault(node, said["refused"])
    return Attendance(ranks, [rank for rank in range(size) if rank not in came], refused)


class LeaderCheck(RankCheck):
    """Rank 0. publish: shows the results, and returns the exit code of all ranks."""

    def __init__(
        self,
        place: Place,
        config: Config | None,
        seconds: float,
        board: Board,
        attendance: Attendance,
        publish: Callable[[Results], int],
    ) -> None:
        super().__init__(place, config, seconds, board, attendance)
        self._publish = publish
        self._found = Results(place.size, attendance.ranks)

    def run_as_leader(self, met_after: float) -> int:
        """Run rank 0's part, and return the exit code of all ranks."""
        found = self._found
        found.between.append(self._rendezvous(met_after))
        if self.config is not None:
            check = partial(layout, self.config, self.place.size, self.attendance.hosts)
            found.between += run_check("parallel layout", check)
        try:
            self._report()
            reports = self._collect_reports(found)
            plan = self._plan(reports, found)
            self.board.put("plan", plan)
            self._check_probes(plan["probes"])
            self._compare_nodes(plan["leaders"], found)
            self.board.put("looked", None)
        finally:
            self._clean()
        if plan["library"] is not None:
            self._measure_links(plan["library"])
            self._collect_links(found)
        return self._conclude()

    def _conclude(self) -> int:
        code = self._publish(self._found)
        self.board.put("verdict", code)
        return code

    def _on_hang(self, rows: Sequence[Row]) -> None:
        """Publish the rows of rank 0's own node, the only ones that exist where rank 0 itself hangs."""
        self._found.rows[self.node] = list(rows)
        self._conclude()
        leave(self.board, self.place, self.attendance)

    def _on_links_hang(self) -> None:
        self._collect_links(self._found)
        self._conclude()
        leave(self.board, self.place, self.attendance)

    def _rendezvous(self, met_after: float) -> Row:
        where = f"{self.place.master}:{self.place.port}"
        if not self.attendance.absent:
            nodes = plural(len(self.attendance.ranks), "node")
            detail = f"{self.place.size} ranks on {nodes} met at {where} in {met_after:.1f} s"
            return Row("rendezvous", "ok", detail, figures={"seconds": met_after})
        came = "; ".join(f"{_numbers(ranks)} on {node}" for node, ranks in self.attendance.ranks.items())
        detail = (
            f"{_numbers(self.attendance.absent)} of {self.place.size} did not connect to {where} within "
            f"{self.seconds:.0f} s; connected: {came}. See their own messages. If they were not started, check the "
            f"launcher; if they were, check the route to {self.place.master} and firewalls"
        )
        return Row("rendezvous", "broken", detail)

    def _collect_reports(self, found: Results) -> dict[int, dict[str, Any]]:
        """Return the report of every rank that arrived and still answers."""
        end = time.monotonic() + REPORT_SECONDS
        reports: dict[int, dict[str, Any]] = {}
        for node, ranks in self.attendance.ranks.items():
            for rank in ranks:
                try:
                    reports[rank] = self.board.take(f"report/{rank}", max(end - time.monotonic(), 0.01))
                except NoAnswer:
                    detail = f"rank {rank} stopped answering; see its own messages, and check that {node} is alive"
                    found.between.append(Row(f"node {node}", "broken", detail))
            if ranks[0] in reports:
                told = (Row(**row) for rank in ranks if rank in reports for row in reports[rank]["rows"])
                found.rows[node] = _unequal(told)
        return reports

    def _plan(self, reports: Mapping[int, Mapping[str, Any]], found: Results) -> dict[str, Any]:
        """Return the ranks that check across nodes, the probes that they look for, and the library of the all-reduce.

        The library is None where the ranks cannot meet.
        """
        alive = {
            node: rank
            for node, rank in self.attendance.leaders.items()
            if rank in reports and not reports[rank]["hangs"]
        }
        probes = {node: reports[rank]["probe"] for node, rank in alive.items() if reports[rank]["probe"] is not None}
        library = self._devices(reports, found)
        reason = ""
        bad = [node for node, rows in found.rows.items() if any(row.what in MEETING for row in failing(rows))]
        if self.attendance.absent or len(reports) < self.place.size or len(alive) < len(self.attendance.ranks):
            reason = "not every rank has connected"
        elif bad:
            reason = f"{some_of(bad)} cannot meet the others"
        elif library is None:
            reason = "the ranks have no common device"
        if reason:
            found.between.append(Row("all-reduce", "broken", f"not checked, since {reason}"))
        return {"leaders": alive, "probes": probes, "library": None if reason else library}

    def _devices(self, reports: Mapping[int, object], found: Results) -> str | None:
        """Add a row on the devices of the ranks, and return the library of their collectives; None without one."""
        what = "devices of ranks"
        try:
            told = {rank: self.board.take(f"claim/{rank}", GRACE_SECONDS) for rank in reports}
        except NoAnswer:
            return None  # such a rank has a row
        refused = {rank: values["error"] for rank, values in told.items() if "error" in values}
        if refused:
            said = "; ".join(f"rank {rank}: {reason}" for rank, reason in list(refused.items())[:SHOWN])
            found.between.append(Row(what, "broken", f"{said}; see the rows on GPUs"))
            return None
        try:
            shared = share({rank: Claim(**values) for rank, values in told.items()})
        except UserError as error:
            found.between.append(Row(what, "broken", str(error)))
            return None
        for line in shared.notes:
            found.between.append(Row(what, "warning", line))
        if not shared.notes:
            kind = "a GPU of its own" if shared.collective == "nccl" else "the CPU"
            found.between.append(Row(what, "ok", f"each rank uses {kind}, collectives go by {shared.collective}"))
        return shared.collective

    def _compare_nodes(self, leaders: Mapping[str, int], found: Results) -> None:
        """Add rows on probes that other nodes do not see, and on the offsets of the clocks."""
        patience = GRACE_SECONDS + self.seconds
        blind: dict[str, list[str]] = {}
        others = [rank for rank in leaders.values() if rank != 0]
        try:
            for node, rank in leaders.items():
                for other in self.board.take(f"unseen/{rank}", patience):
                    blind.setdefault(other, []).append(node)
            answer_clock(self.board, others, patience)
            offsets = {
                node: tuple(self.board.take(f"clock/{rank}", patience)) for node, rank in leaders.items() if rank != 0
            }
        except NoAnswer as error:
            found.between.append(Row("nodes", "broken", f"one stopped answering ({error}); see its own messages"))
            return
        if self.config is not None and len(leaders) > 1:
            found.between.append(_shared(blind, self.config))
        found.between += clock_skew(offsets, self.node)

    def _collect_links(self, found: Results) -> None:
        answers: dict[int, dict[str, Any]] = {}
        errors: dict[str, list[int]] = {}
        end = time.monotonic() + self.seconds + GRACE_SECONDS
        for rank in range(self.place.size):
            try:
                answers[rank] = self.board.take(f"links/{rank}", max(end - time.monotonic(), 0.01))
            except NoAnswer:
                answers[rank] = {"error": f"stopped answering; {NETWORK_REMEDY}"}
            if "error" in answers[rank]:
                errors.setdefault(answers[rank]["error"], []).append(rank)
        for text, ranks in errors.items():
            found.between.append(Row("all-reduce", "broken", f"{_numbers(ranks)}: {text}"))
        if errors:
            return
        found.between.append(links.all_reduce_row("all-reduce", answers[0]["all"]))
        for node, rank in self.attendance.leaders.items():
            if "node" in answers[rank]:
                found.rows[node].append(links.all_reduce_row("all-reduce in a node", answers[rank]["node"]))


def _shared(blind: Mapping[str, Sequence[str]], config: Config) -> Row:
    if not blind:
        return Row("run folder, shared", "ok", "every node sees what each other node writes")
    said = "; ".join(f"files that {node} writes are not visible on {some_of(list(by))}" for node, by in blind.items())
    detail = (
        f"{said}, so checkpoints would exist only on rank 0's node, and a job on other nodes would not find them; "
        f"set output.dir ({config.output.dir}) to a file system that all nodes share"
    )
    return Row("run folder, shared", "warning", detail)


def _numbers(ranks: Sequence[int]) -> str:
    return ("rank " if len(ranks) == 1 else "ranks ") + some_of([str(rank) for rank in ranks])


def _unequal(rows: Iterable[Row]) -> list[Row]:
    """Return the rows, each once: ranks of a node may find the same."""
    found: list[Row] = []
    for row in rows:
        if row not in found:
            found.append(row)
    return found


def _nodes_by_error(refused: Mapping[str, str]) -> dict[str, str]:
    """Return names of nodes → their error, so that an error that several nodes share is listed once."""
    nodes: dict[str, list[str]] = {}
    for node, text in refused.items():
        nodes.setdefault(text, []).append(node)
    return {some_of(names): text for text, names in nodes.items()}
