"""``fanbu align``: a model of another initialisation or width, made ready to be merged with a base."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from fanbu.cli import shared
from fanbu.cli.shared import Device, Json, Seed
from fanbu.errors import UsageError


def align(
    model: Annotated[str, typer.Argument(help="The model to put in order; with --zip, the one to add.")],
    base: Annotated[str, typer.Argument(help="The model whose order counts.")],
    out: Annotated[Path, typer.Argument(help="Where the result goes.")],
    by: Annotated[
        str | None,
        typer.Option(
            help="What units are matched by: weights (default) or activations.",
            autocompletion=shared.one_of("weights", "activations"),
        ),
    ] = None,
    texts: Annotated[Path | None, typer.Option(help="Texts for activations and --zip: JSONL, CSV or Parquet.")] = None,
    residual: Annotated[bool, typer.Option("--residual", help="Reorder the hidden channels too.")] = False,
    zipped: Annotated[
        bool, typer.Option("--zip", help="Merge the two into the base's shape; widths may differ.")
    ] = False,
    share: Annotated[float | None, typer.Option(help="What MODEL counts with --zip, 0 to 1; half by default.")] = None,
    until: Annotated[
        float | None, typer.Option(help="With --zip: the share of layers to merge, 0 to 1; all by default.")
    ] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Refuse what matches no better than chance.")] = False,
    seed: Seed = None, device: Device = None, as_json: Json = False,
) -> None:  # fmt: skip
    """Put a model's neurons and heads in a base's order, so that the two can be merged."""
    _check(by, texts, residual, zipped, share is not None or until is not None)
    from fanbu.data.load import load_rows
    from fanbu.merging.rebasin import rebasin
    from fanbu.merging.zip import zip_models
    from fanbu.model import open_model

    rows = [r.text for r in load_rows(str(texts), labelled=False)] if texts else []
    one, other = open_model(model), open_model(base)
    with shared.context_of(seed, device) as context:
        if zipped:
            given = {k: v for k, v in (("share", share), ("until", until)) if v is not None}
            made = zip_models(other, one, out, context, texts=rows, strict=strict, **given)
        else:
            way: Any = by or "weights"  # rebasin checks it
            made = rebasin(one, other, out, context, by=way, texts=rows, residual=residual, strict=strict)
    told = {k: v for k, v in made.manifest["metrics"].items() if k != "correlations"}
    shared.print_values({"model": str(made.path), "digest": made.digest, **told}, as_json)


def _check(by: str | None, texts: Path | None, residual: bool, zipped: bool, has_zip_options: bool) -> None:
    """Raises UsageError for flags that do not go together."""
    if zipped and (by or residual):
        raise UsageError("flag", "--zip matches by activations", got="--by or --residual", remedy="leave it out")
    if not zipped and has_zip_options:
        raise UsageError("flag", "--share and --until belong to --zip", remedy="add --zip, or leave them out")
    if texts is None and (zipped or by == "activations"):
        raise UsageError(
            "flag", "--texts is missing", allowed="a file of texts", remedy="name one: activations are compared on it"
        )
