"""A model as a plain Hugging Face folder somewhere else, copied and verified file by file, or as an ONNX file."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fanbu.errors import IntegrityError, UsageError
from fanbu.files import file_sha256, write_text
from fanbu.ledger import Workspace
from fanbu.model import CARD, Model, copy_model, open_model
from fanbu.model_card import model_card
from fanbu.record import read_records
from fanbu.types import FORMS, Context, Form

if TYPE_CHECKING:
    from fanbu.deploy.to_onnx import Numbers, OnnxModel


_NUMBERS: dict[Form, Numbers] = {
    "onnx": "float32", "onnx-int8": "int8", "onnx-int8-static": "int8-static", "onnx-int4": "int4",
}  # fmt: skip


def export(
    source: Path, out: Path, *, domain: str | None = None, model: str | None = None, force: bool = False,
    to: Form = "copy", texts: Sequence[str] = (), context: Context | None = None,
) -> Model | OnnxModel:  # fmt: skip
    """Copies the champion of the workspace ``source`` to ``out``, or a domain's specialist of the last round, or a
    model by its digest's start, or the model folder that ``source`` is.

    With ``to`` it becomes an ONNX file instead (``deploy.to_onnx``), held against torch on ``texts``; without texts on
    bodies of functions of Python's standard library, which will not do for the ranges of ``onnx-int8-static``.

    Raises UsageError where there is no such model and where ``out`` holds something already (``force`` replaces a
    checkpoint, and nothing else); IntegrityError where a file is not what its manifest says, before or after.
    """
    if domain is not None and model is not None:
        raise UsageError("flag", "--domain and --model name two models", remedy="give one of them")
    if to not in FORMS:
        raise UsageError("flag", "--to", allowed=FORMS, got=to, remedy="take one of these")
    chosen = open_model(_source(source, domain, model))
    _make_room(out, force)
    if to != "copy":
        return _as_onnx(chosen, out, to, texts, context or Context())
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


def _source(source: Path, domain: str | None, model: str | None) -> Path:
    if (source / "config.json").is_file():
        if domain or model:
            raise UsageError("flag", f"{source} is one model", allowed="--domain and --model with a workspace",
                             got=domain or model, remedy="leave the flag out")  # fmt: skip
        return source
    ledger = Workspace(source)
    if domain:
        return _specialist(ledger, domain)
    return ledger.root / ledger.find(model)["path"] if model else _champion(ledger)


def _as_onnx(model: Model, out: Path, to: Form, texts: Sequence[str], context: Context) -> OnnxModel:
    from fanbu.data.standard_library import function_bodies
    from fanbu.deploy.to_onnx import to_onnx

    if to == "onnx-int8-static" and not texts:
        raise UsageError("no-texts", "ranges of activations are measured on texts", allowed="the domain's own texts",
                         got=0, remedy="name a file with --texts, or take onnx-int8")  # fmt: skip
    known = list(texts) or [row.text for row in function_bodies("numbers")[:64]]
    return to_onnx(model, out, context, known, _NUMBERS[to])


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
