"""The first steps: ``fanbu init`` and ``fanbu doctor``."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import click
import typer

from fanbu.cli import shared
from fanbu.cli.shared import Json

_SHARES = ("open", "texts", "internal")
_COLUMN = "a column's name, or DOMAIN=COLUMN; repeatable."
MaybeRecipe = Annotated[Path | None, typer.Argument(help="A recipe to check; else only what is installed.")]


def init(
    sources: Annotated[
        list[Path] | None, typer.Argument(help="Files (CSV, TSV, JSONL, JSON, Parquet) or folders with them.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="The large model: directory, package:NAME/folder or hub id.")
    ] = None,
    out: Annotated[Path, typer.Option(help="The recipe to write.")] = Path("recipe.yaml"),
    name: Annotated[str | None, typer.Option(help="The recipe's name; else the folder's.")] = None,
    task: Annotated[
        str | None,
        typer.Option(
            help="text-classification or causal-lm; else by model and rows.",
            autocompletion=shared.one_of("text-classification", "causal-lm"),
        ),
    ] = None,
    share: Annotated[
        str | None,
        typer.Option(
            help="What may leave its owner: open, texts (no labels) or internal (neither).",
            autocompletion=shared.one_of(*_SHARES),
        ),
    ] = None,
    public: Annotated[Path | None, typer.Option(help="A file of texts that belong to nobody, to ask about.")] = None,
    count: Annotated[int | None, typer.Option("--rounds", min=1, help="How many rounds to run.")] = None,
    text: Annotated[list[str] | None, typer.Option(help="The text: " + _COLUMN)] = None,
    label: Annotated[list[str] | None, typer.Option(help="The label: " + _COLUMN)] = None,
    row_id: Annotated[list[str] | None, typer.Option("--id", help="The id: " + _COLUMN)] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Ask nothing; take what is usual.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Overwrite the recipe.")] = False,
    as_json: Json = False,
) -> None:
    """Look at your files and write a commented recipe that runs as it is."""
    from fanbu.init import Options, check_out, default_model, legal, write_recipe
    from fanbu.init.files import choose_sources

    t = shared.words()
    check_out(out, force)
    ask = _ask if sys.stdin.isatty() and not yes else None
    if ask:
        sources = sources or [Path(ask(t("Files or a folder with your rows"), (), "."))]
        model = model or ask(t("The large model"), (), default_model())
        name = name or ask(t("The recipe's name"), (), legal(out.absolute().parent.name))
        share = share or ask(t("What may leave its owner"), _SHARES, "texts")
        count = count or typer.prompt(t("How many rounds to run"), default=1, type=click.IntRange(1, 1000), err=True)
    options = Options(
        model or default_model(), out, name, task, share or "texts", count or 1, public,
        {"text": text or [], "label": label or [], "name": row_id or []}, force,
    )  # fmt: skip
    found = write_recipe(choose_sources(sources or []), options, ask)
    typer.echo(json.dumps(found) if as_json else _found(found, t))


def _ask(question: str, choices: Sequence[str], default: str) -> str:
    """Asks on the terminal until the answer is one of the choices (any, where there are none)."""
    shown = f"{question} ({', '.join(choices)})" if choices else question
    while True:
        answer = str(typer.prompt(shown, default=default, err=True)).strip()
        if not choices or answer in choices:
            return answer


def _found(found: dict[str, Any], t: shared.Words) -> str:
    from fanbu.report.text import aligned

    rows = [[t("domain"), t("text"), t("label"), t("train"), t("valid"), t("test"), t("labels")]]
    for name, one in found["domains"].items():
        counts = [str(one["rows"].get(split, t("a share"))) for split in ("train", "valid", "test")]
        rows.append([name, one["text"], one["label"] or "-", *counts, str(one["labels"] or "-")])
    lines = [*aligned(rows, 3), ""]
    lines += [f"{t('warning')}: {name}: {w}" for name, one in found["domains"].items() for w in one["warnings"]]
    lines += [f"{t('warning')}: {w}" for w in found["warnings"]]
    lines.append(f"{t('written')}: {found['recipe']}")
    lines.append(f"{t('next')}: fanbu doctor {found['recipe']}")
    lines.append(f"{t('then')}: fanbu run {found['recipe']}")
    return "\n".join(lines)


def doctor(recipe: MaybeRecipe = None, as_json: Json = False) -> None:
    """What is installed, what a recipe needs, what will not work and why, and how long a round may take."""
    from fanbu.doctor import examine
    from fanbu.doctor.text import doctor_page
    from fanbu.progress import bar

    with bar() as show:
        found = examine(recipe, show)
    typer.echo(json.dumps(found) if as_json else doctor_page(found, shared.words()))
    raise typer.Exit(0 if found["ok"] else 1)
