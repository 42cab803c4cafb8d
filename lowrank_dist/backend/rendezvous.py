"""The meeting of a job's ranks at MASTER_ADDR and MASTER_PORT, before they form a process group."""

from __future__ import annotations

import errno
import os
import socket
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist

from lowrank_dist.backend import attendance, ports
from lowrank_dist.backend.exhaustion import require_files
from lowrank_dist.backend.launchers import is_first_on_node, run_token
from lowrank_dist.backend.node import host_name
from lowrank_dist.backend.rank_variables import HIGHEST_PORT
from lowrank_dist.errors import RankIdentityError, UserError
from lowrank_dist.terminal import say

_RUN = "lowrank_dist/run"  # key in the job's store: the run token of rank 0
_REMEDY = "give each run its own MASTER_PORT"
# Time that a name may take until it resolves: in Kubernetes a node's name appears after its container.
NAME_SECONDS = 60.0
# A rank that has not reached rank 0 after this time says why.
NOTE_SECONDS = 15.0
# Time that the store that was reached may take to answer.
ANSWER_SECONDS = 30.0
_PAUSE_SECONDS = 0.25
_FILES = 16  # the store and gloo have this many open in a job of one rank


@dataclass(frozen=True)
class MeetingPlace:
    """The place of the job's store, and this rank's number. agent: the launcher keeps the store, not rank 0."""

    host: str
    port: int
    rank: int
    size: int
    agent: bool

    @classmethod
    def of(cls, environment: Mapping[str, str] = os.environ) -> MeetingPlace:
        """Return the place in a launcher's variables, which `require_place` has checked."""
        rank, size, port = (int(environment[name]) for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"))
        agent = environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        return cls(environment["MASTER_ADDR"], port, rank, size, agent)

    @property
    def opens_store(self) -> bool:
        return self.rank == 0 and not self.agent

    def __str__(self) -> str:
        return f"{self.host}, port {self.port}"


def meet(timeout: timedelta, *, nccl: bool = False) -> tuple[dist.Store, int, int]:
    """Return the job's store, this rank and the number of ranks, once this rank is known to belong to rank 0's run.

    Otherwise ranks of two runs that share a port would form one run, and train what neither was asked to. Raises
    RankIdentityError on the rank that belongs to another run; the run that it met goes on. Raises UserError where the
    store cannot be opened or reached, and on every rank where one does not come or cannot meet the others over its
    interface. nccl: the ranks have GPUs.
    """
    place = MeetingPlace.of()
    rank = place.rank
    store = open_store(place, timeout.total_seconds())
    store.set_timeout(timeout)
    token = run_token()
    try:
        theirs = (store.compare_set(_RUN, "", token) if rank == 0 else store.get(_RUN)).decode(errors="replace")
    except dist.DistStoreError as error:
        raise RankIdentityError(
            f"rank {rank}: at {place} no rank 0 of lowrank_dist answered within {timeout.total_seconds():.0f} s; "
            f"{_REMEDY}, and use one version of lowrank_dist on all ranks"
        ) from error
    if theirs != token:
        raise RankIdentityError(
            f"rank {rank} met another run at {place}: this rank belongs to {token}, and the run there is {theirs}; "
            f"{_REMEDY}, and start all ranks with the same launcher"
        )
    if store.add(f"{_RUN}/{rank}", 1) > 1:
        raise RankIdentityError(
            f"RANK: another process at {place} is also rank {rank}; give every rank its own RANK"
            f"{_left_over(rank, os.environ)}"
        )
    attendance.take(store, rank, place.size, timeout.total_seconds(), attendance.arrival(place.host, nccl), str(place))
    return store, rank, place.size


def _left_over(rank: int, environment: Mapping[str, str]) -> str:
    """Return the remedy for a RANK that was exported before srun started the tasks; "" where it was not."""
    task = environment.get("SLURM_PROCID", str(rank))
    return "" if task == str(rank) else f" (task {task} of srun found RANK={rank} set already: unset it before srun)"


def open_store(place: MeetingPlace, seconds: float) -> dist.TCPStore:
    """Return the job's store, which rank 0 opens unless its launcher has. Waits at most `seconds` for rank 0.

    Raises UserError with the cause where it cannot be opened or reached, and RankIdentityError where only rank 0 can
    know the cause.
    """
    require_files(_FILES)
    listener = _listener(place) if place.opens_store else None
    _await_master(place, seconds)
    patience = min(ANSWER_SECONDS, seconds)
    made: list[dist.TCPStore] = []
    errors: list[Exception] = []

    def connect() -> None:
        try:
            store = dist.TCPStore(
                place.host,
                place.port,
                place.size,
                is_master=place.opens_store,
                timeout=timedelta(seconds=patience),
                wait_for_workers=False,  # True would wait for all ranks without saying which are missing
                master_listen_fd=None if listener is None else listener.detach(),
            )
            made.append(store)
        except Exception as error:
            errors.append(error)

    # In a thread: torch waits without a limit for the answer of a service that accepts connections.
    connecting = threading.Thread(target=connect, daemon=True)
    connecting.start()
    connecting.join(patience)
    if made:
        return made[0]
    error = errors[0] if errors else None
    if error is not None and not isinstance(error, dist.DistError):
        raise error
    raise UserError(_stranger(place, ports.describe_service(place.host, place.port))) from error


def _stranger(place: MeetingPlace, what: str) -> str:
    return (
        f"MASTER_PORT: the program that listens at {place} is not rank 0 of this job: {what}; set MASTER_PORT to a "
        f"port that no program on {place.host} uses (`ss -tlnp` there lists those in use)"
    )


def _listener(place: MeetingPlace) -> socket.socket:
    """Return the socket at which rank 0 listens. Raises RankIdentityError where the port cannot be used."""
    try:
        return ports.listen(place.port)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            who = ports.holder(place.port)
            raise RankIdentityError(
                f"rank 0 cannot listen at {place}, which is already in use; {_REMEDY}"
                f"{f'; it is held by {who}' if who else ''}"
            ) from error
        if error.errno == errno.EACCES:
            raise RankIdentityError(
                f"MASTER_PORT: rank 0 may not listen at {place}, which is reserved for root; set it to a free port "
                f"from 1024 to {HIGHEST_PORT}"
            ) from error
        raise


def _await_master(place: MeetingPlace, seconds: float) -> None:
    """Wait until something listens at the place. Raises UserError with the reason where nothing does in time."""
    began, silent = time.monotonic(), True
    while (reason := ports.unreachable(place.host, place.port)) is not None:
        if isinstance(reason, ports.Greeting):
            raise UserError(_stranger(place, str(reason)))
        waited, cause = time.monotonic() - began, _cause(place, reason)
        # Rank 0 listens itself, so waiting longer helps only where names and routes are still being made.
        hopeful = not isinstance(reason, ports.Unresolved) and not place.opens_store
        if waited > (seconds if hopeful else min(seconds, NAME_SECONDS)):
            raise UserError(f"{cause} (waited {waited:.0f} s)")
        if silent and waited > NOTE_SECONDS and is_first_on_node():
            say(f"lowrank_dist: rank {place.rank} still waits for rank 0: {cause}", err=True)
            silent = False
        time.sleep(_PAUSE_SECONDS)


def _cause(place: MeetingPlace, reason: OSError) -> str:
    """Return why this rank does not reach the store: what, where, and the remedy."""
    node = host_name()
    if isinstance(reason, ports.Unresolved):
        return (
            f"MASTER_ADDR: {node} cannot resolve the name {place.host[:80]!r} ({reason}); give an address, or correct "
            "/etc/hosts or DNS"
        )
    if place.opens_store:
        return (
            f"MASTER_ADDR: {place.host} does not lead to rank 0's node, {node}, where rank 0 listens at port "
            f"{place.port} ({ports.why(reason)}); set MASTER_ADDR to a name or an address of {node}"
        )
    if isinstance(reason, ConnectionRefusedError):
        return (
            f"nothing listens at {place}, as seen from {node}: rank 0 is not running or runs elsewhere; see its own "
            f"messages, and set MASTER_ADDR to rank 0's node"
        )
    return (
        f"MASTER_ADDR: {node} does not reach {place} ({ports.why(reason)}); check that {place.host} is rank 0's node "
        f"and is up, the route to it, and that no firewall between the nodes blocks TCP port {place.port}"
    )
