"""`lowrank-dist verify`: a run's steps beside those of transformers, on the machines of the run."""

from __future__ import annotations

import logging
import os
import signal
import socket
import warnings
from collections.abc import MutableMapping, Sequence
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from lowrank_dist.backend.launchers import refuse_missing_hostfile, set_rank_variables
from lowrank_dist.cli.arguments import keys_as_options, terminable
from lowrank_dist.errors import UserError
from lowrank_dist.terminal import say

if TYPE_CHECKING:
    from lowrank_dist.config import Config

_USER_ERROR, _TERMINATED = 2, 128 + signal.SIGTERM
FAULTS = ("deferred", "qk", "mask", "norm")  # verify/faults.py plants them


def verify_command(
    config: Annotated[
        str,
        typer.Argument(help="YAML file of the run.", metavar="CONFIG", callback=keys_as_options),
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="Changes to CONFIG.", metavar="section.key=value ...", callback=keys_as_options),
    ] = None,
    plant: Annotated[
        str | None,
        typer.Option(help="Break the run's side on purpose, to see that the fault is found.", metavar="FAULT"),
    ] = None,
) -> None:
    """Train one layer of each kind of the model for three steps, and compare with transformers under plain autograd.

    Start it as the run: srun lowrank-dist verify CONFIG, deepspeed --hostfile FILE --module lowrank_dist.cli verify
    CONFIG, or torchrun ... --module lowrank_dist.cli verify CONFIG. --plant FAULT: deferred (the sum of partial
    gradients is dropped), qk (queries and keys swapped), mask (shifted by one) or norm (one is skipped). Exit code 1
    where something differs.
    """
    from lowrank_dist.config import read_arguments
    from lowrank_dist.supervision.rank import should_print_before_meeting

    if plant is not None and plant not in FAULTS:
        raise UserError(f"--plant {plant}: no such fault; give one of {', '.join(FAULTS)}")
    notes: list[str] = []
    try:
        refuse_missing_hostfile()
        set_rank_variables()
        _stand_alone()
        run = read_arguments([config, *(overrides or [])], notes.append, require_data=True)
    except UserError as error:
        if should_print_before_meeting(error):
            raise
        raise typer.Exit(_USER_ERROR) from None
    _verify(run, plant, notes)


def _verify(run: Config, fault: str | None, notes: Sequence[str]) -> NoReturn:
    """Verify the run and end this rank. notes: lines that rank 0 prints first."""
    from lowrank_dist.backend.libraries import exempt_from_gc, quiet_libraries
    from lowrank_dist.supervision.rank import Supervision

    logging.getLogger().addHandler(logging.NullHandler())  # there is no log file; `say` prints
    quiet_libraries()
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers\.")
    with Supervision(run.engine.timeout_seconds) as supervision:
        for line in notes if supervision.rank == 0 else ():
            say(line, err=True)
        try:
            with exempt_from_gc():
                from lowrank_dist.verify.job import verify
            with terminable():  # Supervision would only note the signal
                code = verify(run, fault, supervision)
        except BaseException as error:  # a library's sys.exit and Ctrl-C as well
            ended = isinstance(error, SystemExit) and error.code == _TERMINATED
            code = _TERMINATED if ended else supervision.failed(error)
        supervision.leave(code)


def _stand_alone(environment: MutableMapping[str, str] = os.environ) -> None:
    """Make a process that no launcher started the only rank of a job."""
    if "RANK" in environment or "WORLD_SIZE" in environment:
        return
    with socket.socket() as any_port:
        any_port.bind(("127.0.0.1", 0))
        port = any_port.getsockname()[1]
    environment.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
