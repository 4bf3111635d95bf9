"""Rounds and how they are looked at: ``fanbu run``, ``fanbu report``, ``fanbu watch``, ``fanbu track``."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fanbu.cli import shared
from fanbu.cli.language import language
from fanbu.cli.shared import Device, Json, Open, RecipePath, Seed, Set, WorkspacePath
from fanbu.cli.timer import Every, again_and_again

if TYPE_CHECKING:
    from fanbu.recipe import Recipe

Number = Annotated[int | None, typer.Option("--round", help="The number of one round; else all finished ones.")]


def run(
    recipe: RecipePath, change: Set = None, seed: Seed = None, device: Device = None,
    workspace: Annotated[str | None, typer.Option(help="Over the recipe's workspace.")] = None,
    count: Annotated[int | None, typer.Option("--rounds", help="Go on until so many rounds are finished.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and train nothing.")] = False,
    track_it: Annotated[bool, typer.Option("--track", help="Track the rounds in MLflow afterwards.")] = False,
    every: Every = None, as_json: Json = False,
) -> None:  # fmt: skip
    """Run rounds to their verdicts; what is finished already is skipped, so it resumes by itself."""
    from fanbu.progress import log
    from fanbu.recipe import load_recipe

    over = {"seed": seed, "device": device, "workspace": workspace, "rounds": count}

    def loaded() -> Recipe:
        return load_recipe(recipe, [*(change or []), *(f"{k}={v}" for k, v in over.items() if v is not None)])

    def once() -> bool:
        record, new = _run(loaded())
        return show_rounds(record, new if every else new or _last(record), track_it, as_json)

    if dry_run:
        _show_plan(loaded(), as_json)
    elif every:
        again_and_again(every, once, log)
    else:
        raise typer.Exit(0 if once() else 3)


def show_rounds(
    record: Mapping[str, Any], new: Sequence[Mapping[str, Any]], track_it: bool, as_json: bool
) -> bool:  # fmt: skip
    """Writes the pages of the new rounds, and prints what came out; whether the last verdict was to promote."""
    accepted = bool(record["verdict"]["accepted"])
    if not new:
        return accepted
    root = Path(record["workspace"])
    page, pages = write_pages(root, new)
    told: dict[str, Any] = {"report": str(page), "pages": [str(p) for p in pages]}
    if track_it:
        from fanbu.track import track as track_rounds

        told["track"] = track_rounds(root)
    if as_json:
        typer.echo(json.dumps({**record, **told}, default=str))
    else:
        _print_rounds(new, told)
    return accepted


def _run(recipe: Recipe) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The last round's record, and the records of all rounds that this run finished."""
    from fanbu.generations import run as run_rounds
    from fanbu.progress import bar
    from fanbu.record import read_records

    root = Path(recipe.workspace)
    before = {r["key"] for r in read_records(root)} if (root / "stages").is_dir() else set()
    with bar(root) as show:
        record = run_rounds(recipe, show, show.log)
    return record, [r for r in read_records(root) if r["key"] not in before]


def _last(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The last round as it was written down."""
    from fanbu.record import read_records

    return [r for r in read_records(Path(record["workspace"])) if r["key"] == record["key"]]


def _print_rounds(records: Sequence[Mapping[str, Any]], told: Mapping[str, Any]) -> None:
    from fanbu.report.text import summary

    t = shared.words()
    typer.echo("\n\n".join(summary(record, t) for record in records))
    typer.echo(f"{t('report')}: {told['report']}")
    for key, value in told.get("track", {}).items():
        typer.echo(f"{key}: {value}")


def _show_plan(recipe: Recipe, as_json: bool) -> None:
    from fanbu.doctor import plan
    from fanbu.doctor.text import plan_page
    from fanbu.progress import bar

    with bar() as show:
        found = plan(recipe, show)
    typer.echo(json.dumps(found) if as_json else plan_page(found, shared.words()))


def write_pages(root: Path, records: Sequence[Mapping[str, Any]]) -> tuple[Path, list[Path]]:
    """(the page of the workspace, the pages of these rounds), written now."""
    from fanbu.ledger import Workspace
    from fanbu.record import read_records, record_folder, with_choices
    from fanbu.report.html import write_report, write_workspace_report

    lang, ledger = language(), Workspace(root)
    pages = [write_report(with_choices(root, r), record_folder(root, r["key"]), lang) for r in records]
    everything = write_workspace_report(read_records(root), ledger.history(), ledger.champion(), root, lang)
    return everything, pages


def report(workspace: WorkspacePath, number: Number = None, show: Open = False, as_json: Json = False) -> None:
    """Write the pages of the finished rounds, and of the workspace, again; print the workspace page's path."""
    from fanbu.errors import UsageError
    from fanbu.record import read_records

    root = shared.workspace_of(workspace)
    records = read_records(root)
    if not records:
        raise shared.no_rounds(root)
    chosen = [r for r in records if number in {None, r["round"]}]
    if not chosen:
        raise UsageError(
            "unknown-round", f"{root} has no such round", allowed=[r["round"] for r in records], got=number,
            remedy="take one of these",
        )  # fmt: skip
    page, pages = write_pages(root, chosen)
    if as_json:
        typer.echo(json.dumps({**chosen[-1], "report": str(page), "pages": [str(p) for p in pages]}))
    else:
        typer.echo(f"{shared.words()('report')}: {page}")
    if show:
        import webbrowser

        webbrowser.open((page if number is None else pages[-1]).resolve().as_uri())


def watch(
    workspace: WorkspacePath,
    port: Annotated[int, typer.Option(min=0, max=65535, help="The local port; 0 takes a free one.")] = 0,
    show: Open = False,
) -> None:
    """Follow a running round on a local page, until Ctrl-C."""
    from fanbu.serve.watch import watch as follow

    follow(shared.named_workspace(workspace), port, show, language())


def track(
    workspace: WorkspacePath,
    uri: Annotated[str | None, typer.Option(help="MLflow's tracking URI; else SQLite in the workspace.")] = None,
    experiment: Annotated[str | None, typer.Option(help="Its experiment; else the recipe's name.")] = None,
    as_json: Json = False,
) -> None:
    """Write the finished rounds and the champion to MLflow."""
    from fanbu.track import track as track_rounds

    shared.print_values(track_rounds(shared.workspace_of(workspace), uri, experiment), as_json)
