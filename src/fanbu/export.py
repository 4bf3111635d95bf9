"""A model of a workspace as a plain Hugging Face folder somewhere else, copied file by file and verified."""

from __future__ import annotations

import shutil
from pathlib import Path

from fanbu.errors import IntegrityError, UsageError
from fanbu.files import file_sha256, write_text
from fanbu.ledger import Workspace
from fanbu.model import CARD, Model, copy_model, model_card, open_model
from fanbu.record import read_records


def export(
    workspace: Path, out: Path, *, domain: str | None = None, model: str | None = None, force: bool = False
) -> Model:
    """Copies the champion to ``out``, or a domain's specialist of the last round, or a model by its digest's start.

    Raises UsageError where there is no such model and where ``out`` holds something already (``force`` replaces a
    checkpoint, and nothing else); IntegrityError where a file is not what its manifest says, before or after.
    """
    if domain is not None and model is not None:
        raise UsageError("flag", "--domain and --model name two models", remedy="give one of them")
    ledger = Workspace(workspace)
    if domain:
        source = _specialist(ledger, domain)
    else:
        source = ledger.root / ledger.find(model)["path"] if model else _champion(ledger)
    chosen = open_model(source)
    _make_room(out, force)
    made = copy_model(chosen, out)
    for name, expected in chosen.files.items():
        if file_sha256(made.path / name) != expected:
            raise IntegrityError(
                "file-changed", f"{made.path / name} is not what was copied", allowed=expected,
                remedy="check the disk, and export again",
            )  # fmt: skip
    if not (made.path / CARD).exists():
        write_text(made.path / CARD, _card(chosen))
    return open_model(out)


def _champion(ledger: Workspace) -> Path:
    champion = ledger.champion()
    if not champion or not champion["path"]:
        raise UsageError("no-champion", f"{ledger.root} has no champion", remedy="run a round first")
    return ledger.root / champion["path"]


def _specialist(ledger: Workspace, domain: str) -> Path:
    """The specialist of the last round that the domain took part in."""
    grown = {
        name: entry["specialist"]
        for record in read_records(ledger.root)
        for name, entry in record["domains"].items()
        if entry.get("specialist")
    }
    if domain not in grown:
        raise UsageError(
            "unknown-domain", f"no specialist of this domain in {ledger.root}", allowed=sorted(grown), got=domain,
            remedy="check the name",
        )  # fmt: skip
    return ledger.locate(grown[domain]["path"])


def _make_room(out: Path, force: bool) -> None:
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    checkpoint = out.is_dir() and (out / "config.json").is_file()
    if not (force and checkpoint):
        raise UsageError(
            "out-exists", f"{out} is there already", allowed="a new or empty folder", got=out,
            remedy="name another, or use --force" if checkpoint else "name another: this is no checkpoint",
        )  # fmt: skip
    shutil.rmtree(out)


def _card(model: Model) -> str:
    """What a model that fanbu did not make is called by."""
    loader = (model.config.get("architectures") or [None])[0]
    facts = {"parents": [], "seed": None, "parameters": {}, "data": {}, "metrics": {}, "loader": loader}
    return model_card({**facts, "method": "export", **model.manifest})
