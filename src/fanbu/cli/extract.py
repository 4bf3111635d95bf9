"""``fanbu extract``: an adapter of what a model is beyond its base."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fanbu.cli import shared
from fanbu.cli.shared import Device, Json, Seed


def extract(
    model: Annotated[str, typer.Argument(help="The model to take the adapter from.")],
    base: Annotated[str, typer.Argument(help="The model that the adapter will sit on.")],
    out: Annotated[Path, typer.Argument(help="Where the adapter goes (PEFT loads it).")],
    rank: Annotated[int | None, typer.Option(help="Of each matrix.")] = None,
    error: Annotated[
        float | None, typer.Option(help="Instead of a rank: how far each matrix may be off, 0 to 1.")
    ] = None,
    seed: Seed = None, device: Device = None, as_json: Json = False,
) -> None:  # fmt: skip
    """Make a LoRA adapter of what a model is beyond its base."""
    from fanbu.merging import extract as adapters
    from fanbu.model import open_model

    with shared.context_of(seed, device) as context:
        made = adapters.extract(open_model(model), open_model(base), out, context, rank=rank, error=error)
    told = {"adapter": str(made.path), "matrices": len(made.ranks), "bytes": made.bytes, "error": round(made.error, 6)}
    if made.left_out:
        told["left_out"] = sorted(made.left_out)
    shared.print_values(told, as_json)
