"""Owners on machines of their own: ``fanbu serve-center`` and ``fanbu join``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fanbu.cli.shared import Json, RecipePath, Set
from fanbu.cli.timer import Every, again_and_again

Insecure = Annotated[bool, typer.Option("--insecure", help="Without encryption: for one machine, or a first look.")]


def serve_center(
    recipe: RecipePath, change: Set = None,
    host: Annotated[str, typer.Option(help="Where owners reach this machine; 0.0.0.0 is everywhere.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="The port that owners join at.")] = 8000,
    certificate: Annotated[Path | None, typer.Option(help="The TLS certificate (PEM).")] = None,
    key: Annotated[Path | None, typer.Option(help="Its private key (PEM).")] = None,
    ca: Annotated[Path | None, typer.Option(help="The CA certificate that it is checked by (PEM).")] = None,
    owner: Annotated[list[Path] | None, typer.Option(help="A public key that may join; again for each.")] = None,
    insecure: Insecure = False, every: Every = None, as_json: Json = False,
) -> None:  # fmt: skip
    """Run rounds whose owners hold their rows elsewhere and join over the network; resumes by itself."""
    from fanbu.cli.rounds import show_rounds
    from fanbu.progress import log
    from fanbu.serve.flower import Security, opened

    shown: set[str] = set()

    def once() -> bool:
        record = rounds()
        new = [] if record["key"] in shown else [record]
        shown.add(record["key"])
        return show_rounds(record, new, track_it=False, as_json=as_json)

    security = Security(certificate, key, ca, owner or [], insecure)
    with opened(recipe, change or [], host, port, security) as rounds:
        if every:
            again_and_again(every, once, log)
        accepted = once()
    raise typer.Exit(0 if accepted else 3)


def join(
    centre: Annotated[str, typer.Argument(help="Where the centre is: HOST:PORT.")],
    part: Annotated[Path, typer.Argument(help="A YAML file with `domains:` alone.")],
    workspace: Annotated[Path, typer.Option(help="Where what is made here is kept.")] = Path("runs/owner"),
    ca: Annotated[Path | None, typer.Option(help="The centre's CA certificate (PEM).")] = None,
    key: Annotated[Path | None, typer.Option(help="The private key whose public one the centre knows.")] = None,
    trusted: Annotated[Path | None, typer.Option(help="Whose signed apps are run: Flower's trusted entities.")] = None,
    insecure: Insecure = False,
) -> None:  # fmt: skip
    """Take part in a centre's rounds with rows that stay here, until Ctrl-C."""
    from fanbu.progress import log
    from fanbu.recipe import read_domains
    from fanbu.serve.flower import join as take_part

    for name, load in read_domains(part).items():
        log(f"{name}: {load().counts}")
    take_part(centre, part, workspace, ca, key, trusted, insecure)
