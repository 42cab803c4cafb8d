"""Everything that is looked at on one node, in one process."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import TYPE_CHECKING

from lowrank_dist.doctor import machine, packages, programs
from lowrank_dist.doctor.place import Place
from lowrank_dist.doctor.rows import PASSING, Row, guarded
from lowrank_dist.doctor.watch import Watch

if TYPE_CHECKING:
    from lowrank_dist.config import Config
    from lowrank_dist.doctor.storage import Probe

Concern = Callable[[], Iterable[Row]]


def diagnose(
    config: Config | None = None,
    place: Place | None = None,
    probe: Probe | None = None,
    watch: Watch | None = None,
) -> list[Row]:
    """Every row of this node, from what training stands on to what it does without.

    config: the run that is to be trained. place: this rank's in its job. probe: what is written into the run folder.
    """
    watch = watch or Watch(lambda rows: None)
    rows: list[Row] = []

    def look(concerns: Iterable[tuple[str, Concern]], needed: bool = True) -> None:
        for what, concern in concerns:
            with watch.looking(what, rows):
                rows.extend(guarded(what, concern, needed))

    look(
        (
            ("lowrank_dist", packages.own_sources),
            ("packages", packages.packages),
            ("PyTorch", packages.pytorch),
        )
    )
    has_torch = not any(row.what == "PyTorch" and row.state != "ok" for row in rows)
    if has_torch:
        look((("GPUs", machine.devices), ("compiled operators", machine.operators), ("GEMM", machine.products)))
    gpus = any(row.what == "GPUs" and row.state == "ok" for row in rows)
    look((("host memory", machine.memory), ("/dev/shm", partial(machine.shared_memory, gpus))), needed=False)
    look([("NICs", partial(_network, place, gpus))], needed=place is not None)
    if config is not None and has_torch:
        look(_of_the_run(config, place, probe))
    look(
        (
            ("apex", machine.apex),
            ("build tools", programs.build_tools),
            ("build locks", programs.build_locks),
            ("launchers", programs.launchers),
        ),
        needed=False,
    )
    return rows


def failing(rows: Iterable[Row]) -> list[Row]:
    """The rows for which training cannot run."""
    return [row for row in rows if row.state not in PASSING]


def _network(place: Place | None, gpus: bool) -> list[Row]:
    from lowrank_dist.doctor.network import look_around, network

    if place is None:
        return network(look_around(several=False, nccl=gpus, master=None))
    return network(look_around(place.size > place.local_size, gpus, place.master))


def _of_the_run(config: Config, place: Place | None, probe: Probe | None) -> Iterator[tuple[str, Concern]]:
    from lowrank_dist.doctor import inputs, storage

    yield "configuration", partial(inputs.configuration, config)
    yield "model.device", partial(inputs.device, config)
    yield "model folder", partial(inputs.model, config)
    yield "tokenizer", partial(inputs.tokenizer, config)
    yield inputs.THETA, partial(inputs.theta, config)
    yield "data files", partial(inputs.data, config)
    if place is not None:
        yield "parallel layout", partial(inputs.layout, config, place.size, place.local_size)
    if probe is not None:
        yield "run folder", probe.write
    yield "free disk", partial(storage.space, config, writes=place is None or place.rank == 0)
