"""Single steps by themselves: ``fanbu shrink``, ``fanbu judge``, ``fanbu audit``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fanbu.cli import shared
from fanbu.cli.shared import Device, Domains, Json, Seed, Set

if TYPE_CHECKING:
    from fanbu.domain import Domain
    from fanbu.types import Context


def shrink(
    model: Annotated[str, typer.Argument(help="The large model: directory, package:NAME/folder or hub id.")],
    out: Annotated[Path, typer.Argument(help="Where the specialist goes.")],
    domains: Domains, domain: Annotated[str, typer.Option(help="Which of the domains.")],
    method_name: Annotated[
        str, typer.Option("--method", help="A way down.", autocompletion=shared.ways("shrink"))
    ] = "finetune",
    change: Set = None, seed: Seed = None, device: Device = None, as_json: Json = False,
) -> None:  # fmt: skip
    """Make one specialist from a large model."""
    from fanbu.catalogue import method

    way = method(method_name, "shrink")
    arguments = shared.arguments_of(change)
    way.check(arguments)
    chosen = shared.domains_of(domains, [domain])[domain]
    with shared.context_of(seed, device) as context:
        parent = _opened(model, chosen, out, context)
        made = way.shrink(parent, chosen, out, context, **arguments)
    told = {"model": str(made.path), "digest": made.digest, "parameters": made.parameters}
    shared.print_values({**told, **dict(made.manifest["metrics"])}, as_json)


def judge(
    incumbent: Annotated[str, typer.Argument(help="The old large model.")],
    candidate: Annotated[str, typer.Argument(help="The new one.")],
    domains: Domains, change: Set = None, seed: Seed = None, device: Device = None, as_json: Json = False,
) -> None:  # fmt: skip
    """Compare two large models on the domains' test rows; exit 0 if the new one is accepted, 3 if not."""
    from fanbu import api
    from fanbu.model import open_model
    from fanbu.recipe import read_gate
    from fanbu.report.text import verdict_table

    gate = read_gate(shared.arguments_of(change))
    chosen = shared.domains_of(domains, None)
    with shared.context_of(seed, device) as context:
        verdict = api.judge(open_model(candidate), open_model(incumbent), chosen, context, gate)
    typer.echo(json.dumps(verdict) if as_json else verdict_table(verdict, shared.words()))
    raise typer.Exit(0 if verdict["accepted"] else 3)


def audit(
    model: Annotated[str, typer.Argument(help="The model that is to be released.")],
    domains: Domains, seed: Seed = None, device: Device = None, as_json: Json = False,
) -> None:  # fmt: skip
    """Say what an attacker gains from a model: how well its losses tell training rows from test rows."""
    from fanbu.judge.audit import audit as examine
    from fanbu.model import open_model
    from fanbu.report.text import aligned

    opened, chosen = open_model(model), shared.domains_of(domains, None)
    with shared.context_of(seed, device) as context:
        found = {name: examine(opened, d, context) for name, d in chosen.items()}
    if as_json:
        typer.echo(json.dumps(found))
        return
    t = shared.words()
    rows = [[t("domain"), t("training rows"), t("test rows"), "AUC", t("advantage"), t("caught at 1% false alarms")]]
    for name, f in found.items():
        auc = f"{f['auc']:.3f} ({f['low']:.3f} - {f['high']:.3f})"
        counts = [f"{f[k]:.0f}" for k in ("members", "strangers")]
        rows.append([name, *counts, auc, f"{f['advantage']:.3f}", f"{100 * f['caught']:.1f}%"])
    typer.echo("\n".join(aligned(rows)))


def _opened(source: str, domain: Domain, out: Path, context: Context) -> Any:
    """A bare body is opened as a classifier beside OUT first, and said so."""
    from fanbu.heads import open_classifier
    from fanbu.model import load_tokenizer, open_model, provenance, save_network
    from fanbu.progress import log

    model = open_model(source)
    if model.task is not None or domain.task == "causal-lm":
        return model
    log(f"{source} is a bare body: opened as a classifier in {out}.opened")
    network = open_classifier(model, context, task=domain.task)
    return save_network(
        network, load_tokenizer(model), out.with_name(f"{out.name}.opened"), provenance("open", [model], context)
    )
