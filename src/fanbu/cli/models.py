"""The champion and its history: ``fanbu history``, ``promote``, ``rollback``, ``leave`` and ``export``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from fanbu.cli import shared
from fanbu.cli.shared import Json, WorkspacePath


def history(workspace: WorkspacePath, as_json: Json = False) -> None:
    """What happened: promotions, refusals, rollbacks, and the tree of models."""
    from fanbu.ledger import Workspace
    from fanbu.report.text import history_tree

    ledger = Workspace(shared.workspace_of(workspace))
    if as_json:
        typer.echo(json.dumps({"champion": ledger.champion(), "events": ledger.history()}))
    else:
        typer.echo(history_tree(ledger.history(), ledger.champion(), shared.words()))


def promote(
    workspace: WorkspacePath, model: Annotated[str, typer.Argument(help="First characters of its digest.")],
    as_json: Json = False,
) -> None:  # fmt: skip
    """Make a model of the history the champion, whatever the gate said."""
    from fanbu.ledger import Workspace

    shared.print_values(Workspace(shared.workspace_of(workspace)).promote(model), as_json)


def rollback(workspace: WorkspacePath, as_json: Json = False) -> None:
    """Go back to the champion before this one; nothing is trained."""
    from fanbu.ledger import Workspace

    shared.print_values(Workspace(shared.workspace_of(workspace)).rollback(), as_json)


def leave(
    workspace: WorkspacePath, domain: Annotated[str, typer.Argument(help="The domain's name.")],
    forget: Annotated[
        bool, typer.Option("--forget", help="Go back to a champion that had learned nothing from it.")
    ] = False,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Let a domain leave: its label rows go, and it takes no part in later rounds."""
    from fanbu.generations import leave as let_leave

    shared.print_values(let_leave(shared.workspace_of(workspace), domain, forget=forget), as_json)


def export(
    workspace: WorkspacePath,
    out: Annotated[Path, typer.Argument(help="The new folder.")],
    domain: Annotated[str | None, typer.Option(help="The specialist of this domain, of the last round.")] = None,
    model: Annotated[str | None, typer.Option(help="A model of the history, by the start of its digest.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a checkpoint that is there.")] = False,
    as_json: Json = False,
) -> None:
    """Copy the champion, or another model, to a plain Hugging Face folder."""
    from fanbu.export import export as copy

    made = copy(shared.workspace_of(workspace), out, domain=domain, model=model, force=force)
    told = {"model": str(made.path), "digest": made.digest, "parameters": made.parameters, "task": made.task}
    shared.print_values(told, as_json)
