"""One rank's part in the check of a job: its node, if it is the lowest rank there, and the links between nodes."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch

from lowrank_dist.backend.devices import device_of_rank
from lowrank_dist.backend.select import Backend
from lowrank_dist.backend.sharing import Claim, claim, share
from lowrank_dist.doctor import links
from lowrank_dist.doctor.board import Board, NoAnswer, clock_offset
from lowrank_dist.doctor.local import CHECK_SECONDS, Place, TimeLimit, diagnose
from lowrank_dist.doctor.machine import gpu_in_use
from lowrank_dist.doctor.rows import Row, one_line
from lowrank_dist.doctor.start import Met
from lowrank_dist.doctor.storage import Probe, unseen_probes
from lowrank_dist.errors import UserError
from lowrank_dist.terminal import say

if TYPE_CHECKING:
    from lowrank_dist.config import Config

# Time that rank 0 waits for the nodes' reports. A node that hangs reports it after CHECK_SECONDS.
REPORT_SECONDS = 2 * CHECK_SECONDS
# Time that a rank waits for a message from rank 0, beyond the time that rank 0 itself waits before it sends it.
GRACE_SECONDS = 15.0
NETWORK_REMEDY = (
    "the nodes must reach each other without a firewall between them; set GLOO_SOCKET_IFNAME (and "
    "NCCL_SOCKET_IFNAME) to the interface of the network that they share"
)


@dataclass(frozen=True)
class Attendance:
    """The ranks that arrived, and those that did not (absent).

    ranks: node → its ranks in order; nodes are in the order of their lowest rank. refused: node → why its input was
    refused.
    """

    ranks: dict[str, list[int]]
    absent: list[int]
    refused: dict[str, str]

    @property
    def leaders(self) -> dict[str, int]:
        """Node → the rank that checks it."""
        return {node: ranks[0] for node, ranks in self.ranks.items()}

    @property
    def hosts(self) -> tuple[str, ...]:
        """The node of each rank, in order; none where a rank is absent."""
        node_of = {rank: node for node, ranks in self.ranks.items() for rank in ranks}
        return () if self.absent else tuple(node_of[rank] for rank in sorted(node_of))


def leave(board: Board, place: Place, attendance: Attendance) -> None:
    """Leave the job, as the last step. Rank 0, which holds the store, waits until the others have left."""
    try:
        if place.rank != 0:
            board.put(f"left/{place.rank}", None)
            return
        end = time.monotonic() + GRACE_SECONDS
        for rank in (rank for ranks in attendance.ranks.values() for rank in ranks if rank != 0):
            board.take(f"left/{rank}", end - time.monotonic())
    except NoAnswer:
        return  # a rank that is gone needs no store


class RankCheck:
    """A rank that arrived. The lowest rank of a node checks the node; all take part in checks between nodes."""

    def __init__(
        self, place: Place, config: Config | None, seconds: float, board: Board, attendance: Attendance
    ) -> None:
        self.place = place
        self.config = config
        self.seconds = seconds
        self.board = board
        self.attendance = attendance
        self.node = next(node for node, ranks in attendance.ranks.items() if place.rank in ranks)
        self.checks_node = place.rank in attendance.leaders.values()
        self.device: torch.device | None = None
        self.probe = Probe(config.output.dir) if self.checks_node and config is not None else None

    def run(self) -> int:
        """Run the part of a rank other than 0, and return the exit code."""
        patience = REPORT_SECONDS + GRACE_SECONDS
        try:
            self._report()
            plan = self.board.take("plan", patience)
            if self.place.rank in plan["leaders"].values():
                self._check_probes(plan["probes"])
                ahead = clock_offset(self.board, self.place.rank, patience)
                self.board.put(f"clock/{self.place.rank}", ahead)
            self.board.take("looked", patience)
        finally:
            self._clean()
        if plan["library"] is not None:
            self._measure_links(plan["library"])
        return int(self.board.take("verdict", patience))

    def _report(self) -> None:
        rows: list[Row] = []
        try:
            with TimeLimit(self._on_hang).around("GPUs", rows):
                device = device_of_rank(self._requested, self.place.local_rank)
                self._send_claim(asdict(claim(self._requested, device)))
                rows += [] if self.checks_node else gpu_in_use(self.place.rank, device)
            self.device = device
        except RuntimeError as error:  # a driver that refuses
            self._send_claim({"error": one_line(str(error))})
        if self.checks_node:
            rows = diagnose(self.config, self.place, self.probe, TimeLimit(self._on_hang), self._met())
        self._send_report(rows, hangs=False)

    @property
    def _requested(self) -> str:
        return self.config.model.device if self.config is not None else "auto"

    def _met(self) -> Met | None:
        """Return what is known of the other ranks once those of this node have told their devices."""
        if self.device is None:
            return None
        claims = {}
        try:
            for rank in self.attendance.ranks[self.node]:
                told = self.board.take(f"claim/{rank}", CHECK_SECONDS)
                if "error" not in told:
                    claims[rank] = Claim(**told)
            shared = share(claims)
        except (NoAnswer, UserError):  # each is a row of rank 0's
            return None
        backend = Backend(
            self.device,
            shared.collective,
            self.device.type,
            shared.ranks_per_device[list(claims).index(self.place.rank)],
        )
        hosts = {rank: node for node, ranks in self.attendance.ranks.items() for rank in ranks}
        return Met(tuple(hosts.get(rank, self.node) for rank in range(self.place.size)), backend)

    def _send_claim(self, values: Mapping[str, Any]) -> None:
        self.board.put(f"claim/{self.place.rank}", values)

    def _send_report(self, rows: Sequence[Row], hangs: bool) -> None:
        probe = self.probe.written if self.probe is not None and not hangs else None
        values = {"rows": [asdict(row) for row in rows], "probe": probe, "hangs": hangs}
        self.board.put(f"report/{self.place.rank}", values)

    def _on_hang(self, rows: Sequence[Row]) -> None:
        """Report to rank 0 and wait for its verdict: if this rank ended first, its launcher would end the others."""
        if self.device is None:
            self._send_claim({"error": "hangs"})
        self._send_report(rows, hangs=True)
        self._wait_and_leave(REPORT_SECONDS + self.seconds)

    def _check_probes(self, probes: Mapping[str, Mapping[str, str]]) -> None:
        """Look for the probes that the other nodes wrote into the run folder, and report those that are not seen."""
        others = {node: probe for node, probe in probes.items() if node != self.node}
        with TimeLimit(_print_hang).around(f"{self.node}: run folder of the other nodes", []):
            missing = unseen_probes(others)
        self.board.put(f"unseen/{self.place.rank}", missing)

    def _clean(self) -> None:
        if self.probe is not None:
            self.probe.remove()

    def _measure_links(self, library: str) -> None:
        name = f"links/{self.place.rank}"

        def on_hang(rows: Sequence[Row]) -> None:
            self.board.put(name, {"error": rows[-1].detail})
            self._on_links_hang()

        try:
            store: Any = self.board.store  # in torch's stubs it has no clone
            with TimeLimit(on_hang, self.seconds + 5).around("all-reduce", [], NETWORK_REMEDY):
                links.join_group(store.clone(), self.place.rank, self.place.size, library, self.seconds)
                device = self.device
                assert device is not None, "every rank has a device where rank 0 names a library"
                values: dict[str, Any] = {"all": asdict(links.measure(None, device, library))}
                group = links.node_group(list(self.attendance.ranks.values()), self.seconds)
                if group is not None:
                    values["node"] = asdict(links.measure(group, device, library))
                links.leave_group()
        except Exception as error:  # of gloo and NCCL: types with no common base
            values = {"error": f"{one_line(str(error))[:300]}; {NETWORK_REMEDY}"}
        self.board.put(name, values)

    def _on_links_hang(self) -> None:
        """Finish where the process group hangs. Runs in a thread of its own, before this process ends."""
        self._wait_and_leave(GRACE_SECONDS + self.seconds)

    def _wait_and_leave(self, seconds: float) -> None:
        self.board.take("verdict", seconds)
        leave(self.board, self.place, self.attendance)


def _print_hang(rows: Sequence[Row]) -> None:
    say(f"doctor: {rows[-1].what}: {rows[-1].detail}", err=True)
