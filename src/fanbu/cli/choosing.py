"""Which way back, and whose: ``fanbu plan``, ``fanbu compare`` and ``fanbu worth``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from fanbu.cli import shared
from fanbu.cli.shared import Device, Json, RecipePath, Seed, Set
from fanbu.errors import UsageError

Ways = Annotated[
    list[str] | None,
    typer.Option("--way", help="This way back alone; repeatable.", autocompletion=shared.ways("feedback")),
]


def plan(
    recipe: RecipePath, way: Ways = None, change: Set = None,
    costs: Annotated[
        bool, typer.Option("--costs/--no-costs", help="Try each way that fits on a few rows, to say what it takes.")
    ] = True,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Which ways back fit these specialists, why the others do not and when they would, and what each takes."""
    from fanbu.doctor import choices as choosing
    from fanbu.doctor.text import costs_page, ways_page
    from fanbu.progress import bar
    from fanbu.recipe import load_recipe

    t, loaded = shared.words(), load_recipe(recipe, change or [])
    found, domains = choosing.choices(loaded, way or [])
    if not as_json:
        typer.echo(ways_page(found, t))
    if costs:
        with bar() as show:
            found["costs"] = dict(choosing.costs(loaded, domains, found, show, show.log))
        if not as_json:
            typer.echo("\n" + costs_page(found["costs"], t))
    if as_json:
        typer.echo(json.dumps(found))


def compare(
    recipe: RecipePath, way: Ways = None,
    seconds: Annotated[float | None, typer.Option(min=0, help="The budget in seconds.")] = None,
    runs: Annotated[
        float | None, typer.Option(min=0, help="The budget in training steps: so often those of the costliest.")
    ] = None,
    change: Set = None, seed: Seed = None, device: Device = None, as_json: Json = False,
) -> None:  # fmt: skip
    """Try ways back side by side on validation rows, within a budget, and judge the best on test rows."""
    from fanbu.cli.rounds import show_rounds
    from fanbu.progress import bar
    from fanbu.recipe import load_recipe
    from fanbu.report.candidates import compared_page
    from fanbu.search.compare import compare as compare_ways

    if seconds is not None and runs is not None:
        raise UsageError(
            "two-budgets", "a comparison has one budget", allowed="--seconds or --runs", got=f"{seconds} and {runs}",
            remedy="leave one of them out",
        )  # fmt: skip
    over = {"seed": seed, "device": device, "compare.seconds": seconds, "compare.runs": runs}
    if runs is not None:
        over["compare.seconds"] = "null"  # the recipe's own
    named = [f"compare.ways=[{', '.join(way)}]"] if way else []
    given = [f"{k}={v}" for k, v in over.items() if v is not None]
    loaded = load_recipe(recipe, [*(change or []), *named, *given])
    with bar(Path(loaded.workspace)) as show:
        found = compare_ways(loaded, show, show.log)
    record = found.pop("record")
    if not as_json:
        typer.echo(compared_page(found, shared.words()) + "\n")
    accepted = show_rounds({**record, "compared": found}, [record], False, as_json)
    raise typer.Exit(0 if accepted else 3)


def worth(
    recipe: RecipePath,
    pairs: Annotated[
        int | None,
        typer.Option("--shapley", min=0, help="Shapley values, by so many pairs of orders; 0: all orders."),
    ] = None,
    change: Set = None, as_json: Json = False,
) -> None:  # fmt: skip
    """What each specialist was worth in the last round: the gain without it."""
    from fanbu.cli.rounds import write_pages
    from fanbu.progress import bar
    from fanbu.recipe import load_recipe
    from fanbu.record import read_records
    from fanbu.report.candidates import worth_page
    from fanbu.search.worth import worth as worth_of

    loaded = load_recipe(recipe, change or [])
    with bar(Path(loaded.workspace)) as show:
        found = worth_of(loaded, pairs, show, show.log)
    write_pages(Path(loaded.workspace), read_records(Path(loaded.workspace))[-1:])
    typer.echo(json.dumps(found) if as_json else worth_page(found, str(recipe), shared.words()))
