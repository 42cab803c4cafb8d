"""The `lowrank-dist` command. Heavy imports wait until a command runs, so that --help answers at once."""

import errno
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from lowrank_dist import __version__
from lowrank_dist.cli.data import data_command
from lowrank_dist.cli.doctor import doctor_command
from lowrank_dist.cli.evaluate import evaluate_command
from lowrank_dist.cli.generate import generate_command
from lowrank_dist.cli.plan import plan_command
from lowrank_dist.cli.reference import config_command
from lowrank_dist.cli.slurm import slurm_command
from lowrank_dist.cli.weights import export_command, inspect_command, merge_command
from lowrank_dist.errors import UserError
from lowrank_dist.terminal import say
from lowrank_dist.untrusted.files import short_path

_USER_ERROR = 2
# Refusals that meet a path that was given wherever it is first looked at; what is done to it has errors of its own.
_REMEDIES = {
    errno.ENAMETOOLONG: "give a shorter path",
    errno.EACCES: "give a path that you may read and write, or ask its owner",
}


class _Commands(TyperGroup):
    """The commands. A mistake of the user is a message on stderr and exit code 2; a bug keeps its traceback."""

    def invoke(self, ctx: Any) -> Any:  # click's Context, which newer versions of typer bring themselves
        try:
            return super().invoke(ctx)
        except UserError as error:
            say(f"error: {error}", err=True)
            raise typer.Exit(_USER_ERROR) from error
        except OSError as error:
            if error.filename is None or error.errno not in _REMEDIES:
                raise
            say(f"error: {short_path(str(error.filename))}: {error.strerror}: {_REMEDIES[error.errno]}", err=True)
            raise typer.Exit(_USER_ERROR) from error


app = typer.Typer(cls=_Commands, no_args_is_help=True, pretty_exceptions_enable=False, add_completion=False)
app.command("merge")(merge_command)
app.command("config")(config_command)
app.command("data")(data_command)
app.command("doctor")(doctor_command)
app.command("evaluate")(evaluate_command)
app.command("inspect")(inspect_command)
app.command("export")(export_command)
app.command("generate")(generate_command)
# As in training, a key of the config may be written as an option: --lora.rank 8.
app.command("plan", context_settings={"ignore_unknown_options": True})(plan_command)
app.command("slurm")(slurm_command)


def _print_version(wanted: bool) -> None:
    if wanted:
        say(f"lowrank-dist {__version__}")
        raise typer.Exit()


@app.callback()
def lowrank_dist(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Commands around training (launch/train.py): check, plan and submit a run, merge and evaluate its adapter."""
