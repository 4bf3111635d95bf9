"""The champion and its history: ``fanbu history``, ``promote``, ``rollback``, ``leave``, ``export`` and ``predict``."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from fanbu.cli import shared
from fanbu.cli.shared import Json, WorkspacePath
from fanbu.types import FORMS, Form

ANY_LENGTH = 2**20  # tokens: what the model and its tokenizer say is what counts


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
    source: Annotated[Path, typer.Argument(help="The workspace, the recipe that names it, or one model's folder.")],
    out: Annotated[Path, typer.Argument(help="The new folder.")],
    domain: Annotated[str | None, typer.Option(help="The specialist of this domain, of the last round.")] = None,
    model: Annotated[str | None, typer.Option(help="A model of the history, by the start of its digest.")] = None,
    to: Annotated[
        Form,
        typer.Option(
            help="copy, or an ONNX file: onnx, onnx-int8, onnx-int8-static, onnx-int4.",
            autocompletion=shared.one_of(*FORMS),
        ),
    ] = "copy",
    texts: Annotated[
        Path | None, typer.Option(help="Texts to check an ONNX file on (.jsonl, .csv, .parquet, or .txt by lines).")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a checkpoint that is there.")] = False,
    as_json: Json = False,
) -> None:
    """Copy the champion, or another model, to a plain Hugging Face folder, or make an ONNX file of it."""
    from fanbu.data.load import load_texts
    from fanbu.export import export as copy
    from fanbu.model import Model

    place = source if (source / "config.json").is_file() else shared.workspace_of(source)
    with shared.context_of(None, "cpu") as context:
        made = copy(
            place,
            out,
            domain=domain,
            model=model,
            force=force,
            to=to,
            texts=load_texts(str(texts)) if texts else (),
            context=replace(context, max_length=ANY_LENGTH),
        )
    if isinstance(made, Model):
        told = {"model": str(made.path), "digest": made.digest, "parameters": made.parameters, "task": made.task}
    else:
        told = {"model": str(made.path), "bytes": made.bytes, **made.manifest["verified"]}
    shared.print_values(told, as_json)


def predict(
    model: Annotated[Path, typer.Argument(help="A model's folder, or one with an ONNX file.")],
    text: Annotated[list[str] | None, typer.Argument(help="Texts; without any, --texts or lines of stdin.")] = None,
    texts: Annotated[
        Path | None, typer.Option(help="A file of texts (.jsonl, .csv, .parquet, or .txt by lines).")
    ] = None,
    int8: Annotated[bool, typer.Option("--int8", help="Quantize a checkpoint's matrices in memory.")] = False,
    threads: Annotated[int, typer.Option(help="0: as many as there are.")] = 0,
    tokens: Annotated[int, typer.Option(help="How far a causal model goes on.")] = 32,
) -> None:
    """Ask a model: one JSON object a text on stdout."""
    import sys

    from fanbu.data.load import load_texts
    from fanbu.deploy.runner import answers_of, open_runner
    from fanbu.types import Context

    asked = [*(text or []), *(load_texts(str(texts)) if texts else [])]
    if not asked:
        asked = [line.rstrip("\n") for line in sys.stdin if line.strip()]
    runner = open_runner(model, Context(threads=threads, max_length=ANY_LENGTH), "int8" if int8 else "as-it-is")
    for answer in answers_of(runner, asked, tokens=tokens) if asked else []:
        typer.echo(json.dumps(answer, ensure_ascii=False))
