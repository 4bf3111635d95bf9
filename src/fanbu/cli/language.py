"""The language of a call, and the help texts in it.

Typer binds help texts when a command is defined; here they stay English in the code and are replaced in the finished
tree of commands, before anything is shown.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence

import click
from typer.core import TyperArgument, TyperOption
from typer.utils import get_params_from_function

# Headings of typer's help pages, by the constant that holds them
PANELS = {
    "ARGUMENTS_PANEL_TITLE": "Arguments", "OPTIONS_PANEL_TITLE": "Options", "COMMANDS_PANEL_TITLE": "Commands",
    "DEFAULT_STRING": "[default: {}]", "REQUIRED_LONG_STRING": "[required]",
}  # fmt: skip
LANG_HELP = "Language of help, tables and reports: en or zh (or FANBU_LANG)."


def language(arguments: Sequence[str] | None = None, environment: Mapping[str, str] | None = None) -> str:
    """What ``--lang`` says, wherever it stands; else FANBU_LANG; else English. ``zh_CN`` is ``zh``."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    found = (os.environ if environment is None else environment).get("FANBU_LANG") or "en"
    for argument, following in zip(given, [*given, ""][1:], strict=True):
        if argument == "--":
            break
        if argument == "--lang":
            found = following
        elif argument.startswith("--lang="):
            found = argument.partition("=")[2]
    return found.lower().replace("_", "-").partition("-")[0]


def localised(command: click.Command, t: Callable[[str], str]) -> click.Command:
    """The tree of commands with ``--lang`` everywhere and every help text in the translator's language."""
    for one in every(command):
        one.params.append(_lang_option())
        one.get_help_option(click.Context(one))  # made now, and kept
        if one.help:
            one.help = t(one.help)
        _restore_help(one)
        for parameter in parameters(one):
            parameter.help = t(str(parameter.help or ""))
    if t(LANG_HELP) != LANG_HELP or "typer.rich_utils" in sys.modules:
        from typer import rich_utils

        for name, text in PANELS.items():
            setattr(rich_utils, name, t(text))
    return command


def every(command: click.Command) -> Iterator[click.Command]:
    """A command and all below it."""
    yield command
    for one in getattr(command, "commands", {}).values():
        yield from every(one)


def parameters(command: click.Command) -> list[click.Parameter]:
    """A command's parameters, with its ``--help``."""
    own = command.get_help_option(click.Context(command))
    return [*command.params, *([own] if own else [])]


def _restore_help(command: click.Command) -> None:
    """The help of arguments: click 8.5 gives them an attribute of that name, and so empties what typer had set."""
    bare = [p for p in command.params if isinstance(p, TyperArgument) and not p.help]
    if bare and command.callback:
        known = get_params_from_function(command.callback)
        for parameter in bare:
            parameter.help = known[str(parameter.name)].default.help


def _lang_option() -> TyperOption:
    def complete(context: click.Context, arguments: list[str], incomplete: str) -> list[str]:
        from fanbu.lang import LANGUAGES

        return [name for name in LANGUAGES if name.startswith(incomplete)]

    return TyperOption(
        param_decls=["--lang"], type=str, expose_value=False, help=LANG_HELP, autocompletion=complete,
        show_default=False,
    )  # fmt: skip
