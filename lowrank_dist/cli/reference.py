"""`lowrank-dist config`, the reference of a run's configuration in the terminal; and the reference of all commands."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lowrank_dist.terminal import open_console

if TYPE_CHECKING:
    from rich.console import RenderableType

    from lowrank_dist.config.reference import KeyReference, SectionReference

_WIDEST = 120


def config_command(
    section: Annotated[
        str | None,
        typer.Argument(help="One section (train, eval.generate, …) or one key (train.lr). Default: all."),
    ] = None,
) -> None:
    """Show every key of a run's configuration with its type, allowed values, default and meaning."""
    from lowrank_dist.config.reference import reference

    sections = reference(section)
    console = open_console()
    if not console.is_terminal or console.width > _WIDEST:
        console = open_console(width=_WIDEST)
    for number, each in enumerate(sections):
        if number:
            console.print()
        for line in _drawn(each):
            console.print(line)


def _drawn(section: SectionReference) -> list[RenderableType]:
    """Return a section as lines: its name and meaning, then two for each key, so that no terminal is too narrow."""
    from rich.padding import Padding
    from rich.text import Text

    lines: list[RenderableType] = [Text.assemble((section.title, "bold underline"), f"  {section.meaning}")]
    for key in section.keys:
        lines.append(Padding(_facts(key), (0, 0, 0, 2), expand=False))
        lines.append(Padding(Text(key.meaning), (0, 0, 0, 6), expand=False))
    return lines


def _facts(key: KeyReference) -> RenderableType:
    from rich.text import Text

    from lowrank_dist.config.reference import REQUIRED

    allowed = f": {key.allowed}" if key.allowed else ""
    facts = Text.assemble((key.name, "bold"), "  ", (f"{key.type}{allowed}".replace("`", ""), "cyan"), "  ")
    if key.default == REQUIRED:
        return facts.append(REQUIRED, "red")
    return facts.append(f"default {key.default}", "green")


def commands_to_markdown(app: typer.Typer) -> str:
    """Return every command as Markdown: a heading, what it does, its usage, and a table of its options."""
    group: Any = typer.main.get_command(app)  # click's Group, which newer versions of typer bring themselves
    return "\n".join(line for name in sorted(group.commands) for line in _command(name, group.commands[name]))


def _command(name: str, command: Any) -> Iterator[str]:
    shown = [each for each in command.params if each.name != "help"]
    arguments = [each for each in shown if each.param_type_name == "argument"]
    options = [each for each in shown if each.param_type_name == "option"]
    required = [f"{each.opts[0]} {each.metavar}" for each in options if each.required]
    usage = [f"lowrank-dist {name}", *(_placeholder(each) for each in arguments), *required]
    yield from (f"## lowrank-dist {name}", "", " ".join(command.help.split()), "")
    yield from ("```text", " ".join([*usage, "[OPTIONS]"] if len(options) > len(required) else usage), "```", "")
    if shown:
        yield from ("| argument or option | default | meaning |", "|---|---|---|")
    for each in (*arguments, *options):
        yield f"| `{_name(each)}` | {_default(each)} | {each.help.replace('|', ' or ')} |"
    yield ""


def _placeholder(argument: Any) -> str:
    name = argument.metavar or argument.name.upper()
    return name if argument.required else f"[{name}]"


def _name(parameter: Any) -> str:
    """Return a parameter as it is written on the command line, without |, which would end a cell of the table."""
    metavar = (parameter.metavar or parameter.name.upper()).replace("|", " or ")
    if parameter.param_type_name == "argument":
        return metavar
    names = ", ".join([*parameter.opts, *parameter.secondary_opts])
    return names if parameter.is_flag else f"{names} {metavar}"


def _default(parameter: Any) -> str:
    if parameter.required:
        return "required"
    if parameter.default is not None and getattr(parameter, "secondary_opts", None):  # a flag for each value
        return f"`{(parameter.opts if parameter.default else parameter.secondary_opts)[0]}`"
    return "" if parameter.default is None or parameter.default is False else f"`{parameter.default}`"
