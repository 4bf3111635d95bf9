"""What the commands share: their options, their words, how they print, and how they find a workspace."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fanbu.cli.language import language
from fanbu.errors import FanbuError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from fanbu.domain import Domain
    from fanbu.types import Context

Words = Callable[[str], str]


def ways(way: str | None) -> Callable[[str], list[tuple[str, str]]]:
    """Shell completion of method names: ways down (``shrink``), ways back (``feedback``), or both."""

    def complete(incomplete: str) -> list[tuple[str, str]]:
        from fanbu.catalogue import methods

        known = methods()
        fitting = [m for m in known if way is None or (m.family == "shrink") == (way == "shrink")]
        # a name that is a way down and a way back is offered once
        return list({m.name: (m.name, m.summary) for m in fitting if m.name.startswith(incomplete)}.values())

    return complete


def one_of(*names: str) -> Callable[[str], list[str]]:
    """Shell completion of fixed words."""
    return lambda incomplete: [name for name in names if name.startswith(incomplete)]


RecipePath = Annotated[Path, typer.Argument(help="The recipe (YAML).")]
WorkspacePath = Annotated[Path, typer.Argument(help="The workspace (runs/NAME), or the recipe that names it.")]
Domains = Annotated[Path, typer.Option(help="YAML with `domains:` as in a recipe (a recipe will do).")]
Json = Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")]
Set = Annotated[
    list[str] | None, typer.Option("--set", help="key.key=value over the recipe or the method; repeatable.")
]
Seed = Annotated[int | None, typer.Option(help="Over the recipe's seed.")]
Device = Annotated[
    str | None,
    typer.Option(
        help="auto, cpu, cuda or mps, over the recipe's.", autocompletion=one_of("auto", "cpu", "cuda", "mps")
    ),
]
Open = Annotated[bool, typer.Option("--open", help="Open the page in the browser.")]


def words() -> Words:
    """The translator of this call's language."""
    from fanbu.lang import translator

    return translator("cli", language())


def workspace_of(path: Path) -> Path:
    """The workspace that a path names: itself, or the one of a recipe. UsageError where nothing was run in it."""
    root = named_workspace(path)
    if not (root / "stages").is_dir():
        raise no_rounds(root)
    return root


def named_workspace(path: Path) -> Path:
    """The same, whether or not it is there yet."""
    if not path.is_file():
        return path
    from fanbu.recipe import load_recipe

    return Path(load_recipe(path).workspace)


def no_rounds(path: Path) -> FanbuError:
    """The error where nothing was run yet."""
    from fanbu.errors import UsageError

    return UsageError(
        "no-rounds", f"no finished round in {path}", got=path, remedy="run a recipe first, or give its workspace"
    )


def print_values(values: Mapping[str, Any], as_json: bool) -> None:
    """Plain values: a line each, or one JSON object."""
    if as_json:
        typer.echo(json.dumps(values, default=str))
    else:
        for key, value in values.items():
            typer.echo(f"{key}: {value}")


def arguments_of(changes: list[str] | None) -> dict[str, Any]:
    """What ``--set`` says, as a mapping."""
    from fanbu.recipe_text import apply_change

    value: dict[str, Any] = {}
    for change in changes or []:
        apply_change(value, change)
    return value


def domains_of(path: Path, names: list[str] | None) -> dict[str, Domain]:
    """Domains of a YAML file by name (None: all), loaded."""
    from fanbu.errors import UsageError
    from fanbu.recipe import read_domains

    known = read_domains(path)
    unknown = set(names or []) - set(known)
    if unknown:
        raise UsageError("unknown-domain", f"{path}", allowed=list(known), got=unknown, remedy="check the name")
    return {n: known[n]() for n in (names or known)}


@contextmanager
def context_of(seed: int | None, device: str | None) -> Iterator[Context]:
    """What a single step works with, while its progress shows."""
    from fanbu.machine import resolve_machine
    from fanbu.progress import bar
    from fanbu.types import Context

    precision: Any
    where, precision, threads = resolve_machine(device or "auto", "auto", 0)
    with bar() as progress:
        yield Context(seed=seed or 0, device=where, precision=precision, threads=threads, progress=progress)
