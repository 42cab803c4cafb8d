"""The checks of one node in one process: its place in a job, the rows, and a time limit for checks that hang."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from lowrank_dist.backend.launchers import refuse_missing_hostfile, set_rank_variables
from lowrank_dist.backend.node import node_id
from lowrank_dist.doctor import machine, software
from lowrank_dist.doctor.rows import PASSING, Row, run_check
from lowrank_dist.errors import UserError

if TYPE_CHECKING:
    from lowrank_dist.config import Config
    from lowrank_dist.doctor.start import Met
    from lowrank_dist.doctor.storage import Probe

# Longer than any check takes, on a slow network file system.
CHECK_SECONDS = 120.0
Check = Callable[[], Iterable[Row]]


@dataclass(frozen=True)
class Place:
    """A rank of a job. node: this node's identity. agent: the launcher keeps the job's store, not rank 0 (torchrun)."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    node: str
    master: str
    port: int
    agent: bool


def place_in_job() -> Place | None:
    """Return this process's place in its job; None where it was started alone, or torch, which ranks need, is missing.

    Raises UserError where the launcher's variables are incomplete or wrong, or it went on without its hostfile.
    """
    refuse_missing_hostfile()
    set_rank_variables()
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return None
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if missing:
        raise UserError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but {', '.join(missing)} not set; start doctor with "
            "deepspeed, torchrun or srun, or unset WORLD_SIZE to check only this machine"
        )
    rank, size, port = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"))
    try:
        from lowrank_dist.backend.select import local_rank, local_size
    except ImportError:
        return None
    agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return Place(rank, size, local_rank(), local_size(), node_id(), os.environ["MASTER_ADDR"], port, agent)


class TimeLimit:
    """A time limit for checks that hang in a file system or a driver, where Python cannot be interrupted.

    on_hang: called in a thread of its own when `seconds` are over, with the rows found so far and a row on the check
    that hangs. Then the process ends with code 1.
    """

    def __init__(self, on_hang: Callable[[list[Row]], object], seconds: float = CHECK_SECONDS) -> None:
        self._on_hang = on_hang
        self._seconds = seconds

    @contextmanager
    def around(self, what: str, found: Sequence[Row], remedy: str = "check what it depends on") -> Iterator[None]:
        """Limit the time of the block. found: the rows to report if it never ends."""
        timer = threading.Timer(self._seconds, self._end, (what, found, remedy))
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def _end(self, what: str, found: Sequence[Row], remedy: str) -> None:
        try:
            self._on_hang([*found, Row(what, "broken", f"hangs, no answer within {self._seconds:.0f} s; {remedy}")])
        finally:
            os._exit(1)


def diagnose(
    config: Config | None = None,
    place: Place | None = None,
    probe: Probe | None = None,
    limit: TimeLimit | None = None,
    met: Met | None = None,
) -> list[Row]:
    """Return every row of this node, from what training needs to what it can do without.

    config: the run to be trained. place: this rank's place in its job. probe: the probe to write into the run folder.
    met: what this rank knows of the others; None where it has not met them.
    """
    limit = limit or TimeLimit(lambda rows: None)
    rows: list[Row] = []

    def run_checks(checks: Iterable[tuple[str, Check]], needed: bool = True) -> None:
        for what, check in checks:
            with limit.around(what, rows):
                rows.extend(run_check(what, check, needed))

    run_checks(
        (
            ("lowrank_dist", software.own_sources),
            ("packages", software.packages),
            ("PyTorch", software.pytorch),
        )
    )
    has_torch = not any(row.what == "PyTorch" and row.state != "ok" for row in rows)
    if has_torch:
        run_checks((("GPUs", machine.devices), ("compiled operators", machine.operators), ("GEMM", machine.products)))
    gpus = any(row.what == "GPUs" and row.state == "ok" for row in rows)
    run_checks(
        (
            ("host memory", machine.memory),
            ("CPUs", machine.cpus),
            ("/dev/shm", partial(machine.shared_memory, gpus)),
            ("open files", machine.open_files),
            ("temporary folder", machine.temporary_files),
        ),
        needed=False,
    )
    run_checks([("NICs", partial(_network, place, gpus))], needed=place is not None)
    if config is not None and has_torch:
        run_checks(_checks_of_run(config, place, probe, met))
    run_checks(
        (
            ("apex", machine.apex),
            ("build tools", software.build_tools),
            ("build locks", software.build_locks),
            ("launchers", software.launchers),
        ),
        needed=False,
    )
    return rows


def failing(rows: Iterable[Row]) -> list[Row]:
    """Return the rows that prevent training."""
    return [row for row in rows if row.state not in PASSING]


def _network(place: Place | None, gpus: bool) -> list[Row]:
    from lowrank_dist.backend.interfaces import network_facts
    from lowrank_dist.doctor.network import network

    if place is None:
        return network(network_facts(several=False, nccl=gpus, master=None))
    return network(network_facts(place.size > place.local_size, gpus, place.master))


def _checks_of_run(
    config: Config, place: Place | None, probe: Probe | None, met: Met | None
) -> Iterator[tuple[str, Check]]:
    from lowrank_dist.doctor import inputs, start, storage

    yield "configuration", partial(inputs.configuration, config)
    yield "model.device", partial(inputs.device, config)
    yield "engine.kernels", partial(start.kernels, config)
    yield "model folder", partial(inputs.model, config)
    yield "data.max_length", partial(start.length, config)
    yield "tokenizer", partial(inputs.tokenizer, config)
    yield inputs.THETA, partial(inputs.theta, config)
    yield "data files", partial(start.data, config)
    yield "eval.generate", partial(start.generation, config)
    yield "planned memory", partial(start.memory, config, met)
    yield "output.dir", partial(start.output, config)
    yield "train.resume", partial(start.resumed, config)
    if probe is not None:
        yield "run folder", probe.write
    yield "free disk", partial(storage.space, config, writes=place is None or place.rank == 0)
