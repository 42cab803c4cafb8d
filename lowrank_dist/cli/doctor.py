"""`lowrank-dist doctor`: check that a run can start on this machine or on all nodes of a job."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from lowrank_dist import __version__
from lowrank_dist.backend.launchers import is_first_on_node
from lowrank_dist.backend.node import host_name
from lowrank_dist.cli.arguments import keys_as_options, terminable
from lowrank_dist.doctor.local import Place, TimeLimit, diagnose, place_in_job
from lowrank_dist.doctor.rows import Results, Row, TableLine, one_line, plural, table_lines
from lowrank_dist.errors import RankIdentityError, UserError, some_of
from lowrank_dist.terminal import escape_all, put, say

if TYPE_CHECKING:
    from lowrank_dist.config import Config


def doctor_command(
    config: Annotated[
        str | None,
        typer.Argument(
            help="YAML file of the run. Without it, only the machine is checked.",
            metavar="CONFIG",
            callback=keys_as_options,
        ),
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="Changes to CONFIG.", metavar="section.key=value ...", callback=keys_as_options),
    ] = None,
    timeout: Annotated[
        float, typer.Option(help="Seconds to wait for the other ranks of the job.", metavar="SECONDS", min=1)
    ] = 60,
    as_json: Annotated[bool, typer.Option("--json", help="Print all results as JSON.")] = False,
) -> None:
    """Check that training can run here or on all nodes of a job; name the remedy for each problem.

    On all nodes of a job: srun lowrank-dist doctor CONFIG (in a container: srun CONTAINER_OPTIONS python3 -m
    lowrank_dist.cli doctor CONFIG), deepspeed --hostfile FILE --module lowrank_dist.cli doctor
    CONFIG, or torchrun ... --module lowrank_dist.cli doctor CONFIG. Exit code 1 where training cannot run.
    """
    arguments = [*([config] if config is not None else []), *(overrides or [])]
    with terminable():
        try:
            place = place_in_job()
        except UserError as error:
            if isinstance(error, RankIdentityError) or is_first_on_node():
                raise
            raise typer.Exit(2) from None
        code = _alone(arguments, as_json) if place is None else _in_job(place, arguments, timeout, as_json)
    if code:
        raise typer.Exit(code)


def _alone(arguments: Sequence[str], as_json: bool) -> int:
    host = host_name()
    run, rows = _read(arguments) if arguments else (None, [])

    def show(found: Sequence[Row]) -> int:
        return _show(Results(1, {host: [0]}, {host: [*rows, *found]}), "here", as_json)

    probe = None
    try:
        if run is not None:
            from lowrank_dist.doctor.storage import Probe

            probe = Probe(run.output.dir)
        return show(diagnose(run, None, probe, TimeLimit(show)))
    finally:
        if probe is not None:
            probe.remove()


def _read(arguments: Sequence[str]) -> tuple[Config | None, list[Row]]:
    """Return the run's configuration, or None and a row on why it cannot be read here. Raises ConfigError."""
    try:
        from lowrank_dist.config import read_arguments
    except ImportError as error:
        return None, [Row("configuration", "missing", f"{error}; install what is missing below")]
    return read_arguments(arguments), []


def _in_job(place: Place, arguments: Sequence[str], timeout: float, as_json: bool) -> int:
    from lowrank_dist.doctor.board import NoAnswer
    from lowrank_dist.doctor.together import check_job
    from lowrank_dist.errors import ConfigError

    run, refused = None, None
    try:
        run, _ = _read(arguments) if arguments else (None, [])
    except ConfigError as error:
        refused = str(error)

    def publish(found: Results) -> int:
        came = sum(map(len, found.ranks.values()))
        where = f"on {plural(len(found.ranks), 'node')} ({came} of {found.size} ranks)"
        return _show(found, where, as_json)

    try:
        return check_job(place, run, refused, timeout, publish)
    except (NoAnswer, RuntimeError) as error:
        return _show_unreachable(place, run, timeout, error, as_json)


def _show_unreachable(place: Place, run: Config | None, timeout: float, error: Exception, as_json: bool) -> int:
    """Show the results of a node that does not reach the others, from its first rank. Return the exit code."""
    if not is_first_on_node():
        return 1
    from lowrank_dist.doctor.board import Unreached

    detail = f"rank {place.rank} does not reach the others at {place.master}:{place.port} within {timeout:.0f} s: "
    detail += one_line(str(error))
    if not isinstance(error, Unreached):
        detail += "; see the messages of the other ranks, and check that the nodes are alive"
    rows, host = [*diagnose(run, place), Row("rendezvous", "broken", detail)], host_name()
    found = Results(place.size, {host: [place.rank]}, {host: rows})
    return _show(found, f"on {host}", as_json, err=place.rank != 0)


def _show(found: Results, where: str, as_json: bool, err: bool = False) -> int:
    """Print the results and return the exit code."""
    table = table_lines(found)
    bad = list(dict.fromkeys(one.what for one in table if not one.passes))
    if as_json:
        report = {
            "version": __version__,
            "can_train": not bad,
            "rows": [asdict(one) for one in table],
            # What the table leaves out: every row of every node, and the figures.
            "size": found.size,
            "nodes": {
                node: {"ranks": ranks, "rows": [asdict(row) for row in found.rows.get(node, [])]}
                for node, ranks in found.ranks.items()
            },
            "between": [asdict(row) for row in found.between],
        }
        text = json.dumps(report, indent=2)
    else:
        verdict = f"training cannot run {where}: {', '.join(bad)}" if bad else f"training can run {where}"
        text = "\n".join([*_lines(table, set(found.ranks)), verdict])
    (put if as_json else say)(text, err=err)
    return int(bool(bad))


def _lines(table: Sequence[TableLine], nodes: set[str]) -> Iterator[str]:
    """Yield a line for each result; it begins with the names of its nodes where it does not concern all of them."""
    width = max(len(one.what) for one in table)
    for one in table:
        named = f"{some_of(one.nodes)}: " if one.nodes and set(one.nodes) != nodes else ""
        yield f"{one.what:<{width}}  {one.state:<11}  {escape_all(named + one.detail)}"
