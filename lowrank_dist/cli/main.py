"""The `lowrank-dist` command. Heavy imports wait until a command runs, so that --help answers at once."""

import errno
from collections import Counter
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from lowrank_dist import __version__
from lowrank_dist.backend.exhaustion import name_limits
from lowrank_dist.cli.arguments import KEYS_AS_OPTIONS, did_you_mean
from lowrank_dist.cli.data import data_command
from lowrank_dist.cli.doctor import doctor_command
from lowrank_dist.cli.evaluate import evaluate_command
from lowrank_dist.cli.generate import generate_command
from lowrank_dist.cli.plan import plan_command
from lowrank_dist.cli.reference import config_command
from lowrank_dist.cli.slurm import slurm_command
from lowrank_dist.cli.verify import verify_command
from lowrank_dist.cli.weights import export_command, inspect_command, merge_command
from lowrank_dist.errors import UserError
from lowrank_dist.terminal import say
from lowrank_dist.untrusted.files import short_path

_USER_ERROR = 2
# Errors of the first access to a path on the command line → remedy. Later operations have errors of their own.
_REMEDIES = {
    errno.ENAMETOOLONG: "give a shorter path",
    errno.EACCES: "give a path that you may read and write, or ask its owner",
}


class _PlainFlags:
    """A command whose help shows a flag without the type of a value, which a flag does not take."""

    # Any: newer versions of typer have a copy of click with its own Context.
    def get_params(self, ctx: Any) -> Any:
        params = super().get_params(ctx)  # type: ignore[misc]
        for each in params:
            if getattr(each, "is_flag", False):
                each.metavar = ""
        return params


class _Command(_PlainFlags, TyperCommand):
    """A command that refuses an option given twice, of which click would take the last in silence."""

    def parse_args(self, ctx: Any, args: list[str]) -> Any:
        _, _, order = self.make_parser(ctx).parse_args(args=list(args))
        for each, count in Counter(order).items():
            if (
                count > 1
                and each.param_type_name == "option"
                and not (each.multiple or getattr(each, "is_flag", False))
            ):
                raise UserError(f"{each.opts[0]}: given {count} times, but it takes one value; give it once")
        return super().parse_args(ctx, args)


class _Commands(_PlainFlags, TyperGroup):
    """The commands. A mistake of the user is a message on stderr and exit code 2; a bug keeps its traceback."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        word, names = args[0], self.list_commands(ctx)
        if word in names or word.startswith("-"):
            return super().resolve_command(ctx, args)
        meant = did_you_mean(word, ["train", *names])
        if meant is not None and meant.endswith("train?"):
            meant = "a launcher starts training once for each GPU: deepspeed launch/train.py CONFIG"
        raise UserError(f"{word}: no such command: {meant or 'the commands are ' + ', '.join(names)}")

    def invoke(self, ctx: Any) -> Any:
        try:
            with name_limits():
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
app.command("merge", cls=_Command)(merge_command)
app.command("config", cls=_Command)(config_command)
app.command("data", cls=_Command, context_settings=KEYS_AS_OPTIONS)(data_command)
app.command("doctor", cls=_Command, context_settings=KEYS_AS_OPTIONS)(doctor_command)
app.command("evaluate", cls=_Command)(evaluate_command)
app.command("inspect", cls=_Command)(inspect_command)
app.command("export", cls=_Command)(export_command)
app.command("generate", cls=_Command)(generate_command)
app.command("plan", cls=_Command, context_settings=KEYS_AS_OPTIONS)(plan_command)
app.command("verify", cls=_Command, context_settings=KEYS_AS_OPTIONS)(verify_command)
# slurm names the remedy for an unknown option itself.
app.command("slurm", cls=_Command, context_settings={"ignore_unknown_options": True})(slurm_command)


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
