"""``fanbu methods``: what there is to choose from."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from fanbu.cli import shared
from fanbu.cli.shared import Json

app = typer.Typer(help="The ways down and the ways back.", invoke_without_command=True)
Name = Annotated[str, typer.Argument(help="The method's name.", autocompletion=shared.ways(None))]


@app.callback()
def _methods(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        list_methods(as_json=False)


@app.command("list")
def list_methods(as_json: Json = False) -> None:
    """All methods with one line each."""
    from fanbu.catalogue import methods

    rows = [
        {"name": m.name, "family": m.family, "summary": m.summary, "experimental": m.experimental} for m in methods()
    ]
    if as_json:
        typer.echo(json.dumps(rows))
        return
    for row in sorted(rows, key=lambda r: (r["family"] != "shrink", r["family"], r["name"])):
        mark = " (experimental)" if row["experimental"] else ""
        typer.echo(f"{row['family']:<12} {row['name']:<12} {row['summary']}{mark}")


@app.command("show")
def show_method(name: Name, as_json: Json = False) -> None:
    """One method: what it does, what it needs, its parameters."""
    import inspect

    from fanbu.catalogue import method, methods
    from fanbu.report.text import method_page

    # a name may be a way down and a way back: both are shown
    chosen = [m for m in methods() if m.name == name] or [method(name)]
    parameters = [
        {k: {"type": _name(t), "default": _default(d)} for k, (t, d) in m.parameters().items()} for m in chosen
    ]
    if as_json:
        shown = [
            {"name": m.name, "family": m.family, "experimental": m.experimental, "parameters": p}
            for m, p in zip(chosen, parameters, strict=True)
        ]
        typer.echo(json.dumps(shown, default=str))
        return
    for m, p in zip(chosen, parameters, strict=True):
        docs = [inspect.getdoc(f) or "" for f in m.functions]
        docs += [f"Experimental: {m.experimental}"] if m.experimental else []
        typer.echo(method_page(m.name, m.family, docs, p, shared.words()))


def _name(kind: Any) -> str:
    kind = getattr(kind, "__origin__", kind) if hasattr(kind, "__metadata__") else kind
    return kind.__name__ if isinstance(kind, type) else str(kind).replace("typing.", "")


def _default(value: Any) -> Any:
    from dataclasses import asdict, is_dataclass

    return asdict(value) if is_dataclass(value) and not isinstance(value, type) else value
