"""An owner who works elsewhere: it answers its centre, with its own rows and rules, in a workspace of its own."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from fanbu.domain import Domain
from fanbu.errors import FanbuError, IntegrityError, UsageError
from fanbu.feeding import contribute, prepare
from fanbu.ledger import STAGE, Workspace
from fanbu.model import Model, open_model
from fanbu.probe_set import domain_texts, held_out
from fanbu.recipe import Recipe, read_domains
from fanbu.round import bear, look
from fanbu.secure import mask, share_out, unmask
from fanbu.transport.centre import Message, code, crossing
from fanbu.transport.parcel import Unpacking, broken, card, card_of, taken_from, unpacked, wanted
from fanbu.turn import Log, Turn
from fanbu.types import ProbeRow, ProbeSet, Progress, silent

_WORK: dict[str, Callable[..., Any]] = {
    f.__name__: f for f in (domain_texts, held_out, bear, contribute, prepare, share_out, mask, unmask, look)
}
_MODEL = re.compile(r"[^/]+\.(safetensors|json|txt|model|jinja|tiktoken)")
_SAID = re.compile(r"[^/]+\.(safetensors|json)")
_PATHS = {"teacher", "history", "cache", "table"}  # arguments that name places on a machine


def answer(
    request: Message, part: Path, root: Path, progress: Progress = silent, log: Log = lambda text: None
) -> dict[str, Message]:  # fmt: skip
    """What the owner of the domains in the file ``part`` says to a centre, by domain; ``root`` is its workspace.

    To a greeting: what its domains are like, and which models it has. To work: what crossed its boundary. What goes
    wrong here is told, not raised: no text of the owner's is in it.
    """
    said, files = request
    found = read_domains(part)

    def told(name: str) -> Message:
        try:
            if name not in found:
                raise broken("this owner has no such domain", name)
            domain = found[name](number=_number(said))
            if said.get("about") == "greeting":
                return _greeted(domain, root), {}
            return _worked(said, files, domain, root, progress, log)
        except FanbuError as error:
            log(str(error))
            return {"error": f"{error.what} [{error.code}]"}, {}
        except Exception as error:  # of what a call that is none, or a library, may raise: its words may be an owner's
            log(f"{type(error).__name__}: {error}")
            return {"error": f"its work failed ({type(error).__name__}); its log says more"}, {}

    names = list(found) if said.get("about") == "greeting" else [str(said.get("domain"))]
    return {name: told(name) for name in names}


def _greeted(domain: Domain, root: Path) -> dict[str, Any]:
    has = [m.digest for m in _models(root)] + [p.name for p in root.glob("probes/*")]
    return {"card": card(domain), "code": code(), "has": has}


def _number(said: Mapping[str, Any]) -> int:
    number = said.get("round")
    if not isinstance(number, int) or not 0 < number <= 1000:
        raise broken("the centre does not say which round it is", number)
    return number


def _worked(
    said: Mapping[str, Any], files: Mapping[str, bytes], domain: Domain, root: Path, progress: Progress, log: Log
) -> Message:
    call, probe = said.get("call"), str(said.get("probe"))
    ledger = Workspace(root)
    _keep(files, root)
    models = {m.digest: m for m in _models(root)}
    lacks = wanted(call, "model") - models.keys()
    lacks |= {sha for sha in wanted(call, "inner") if not (root / "said" / sha).is_dir()}
    if lacks or not (root / "probes" / probe).is_dir():
        return {"lacks": sorted(lacks) or [probe]}, {}
    recipe = _told(said.get("recipe"), domain)
    context = replace(recipe.context(progress), probe=_probe(root / "probes" / probe, probe))
    turn = Turn(
        ledger, recipe, context, {domain.name: domain}, cast(Model, None), None, [], log, spent=root / "privacy"
    )  # fmt: skip
    function = _WORK.get(str(said.get("function")))
    if function is None or not isinstance(call, list):
        raise broken("the centre asks for what no owner does", said.get("function"))
    unpacking = Unpacking(ledger.root, domain, lambda sha: models[sha], lambda sha: root / "said" / sha)
    function(turn, *unpacking.decoded(call))
    stages = list(dict.fromkeys(turn.used))
    _forget(root, stages, wanted(call, "inner"))
    cards = {
        stage: card_of(open_model(stage / "model", verify=False)) for stage in stages if (stage / "model").is_dir()
    }
    return crossing(stages, cards)


def _told(plain: Any, domain: Domain) -> Recipe:
    """The centre's recipe, as far as an owner needs it. UsageError where it names places on a machine."""
    if not isinstance(plain, dict):
        raise broken("the centre sends no recipe", plain)
    recipe = Recipe.model_validate({**plain, "model": "elsewhere", "domains": {domain.name: {}}})
    for step in [*recipe.shrink, *recipe.ways]:
        if named := _named_paths(step.arguments):
            raise UsageError(
                "path-of-centre", f"{step.method}: an owner elsewhere reads and writes no path that its centre names",
                allowed="recipes without them", got=named, remedy="leave them out of the centre's recipe",
            )  # fmt: skip
    return recipe


def _named_paths(arguments: Mapping[str, Any]) -> list[str]:
    inner = [name for value in arguments.values() if isinstance(value, Mapping) for name in _named_paths(value)]
    return [*(name for name, value in arguments.items() if name in _PATHS and value), *inner]


def _models(root: Path) -> Iterator[Model]:
    """The models that lie here whole: those that the centre sent, and the owner's own."""
    for config in [*root.glob("models/*/config.json"), *root.glob("stages/*/model/config.json")]:
        yield open_model(config.parent, verify=False)


def _keep(files: Mapping[str, bytes], root: Path) -> None:
    """Writes what the centre sent, each under its digest, which is looked at."""
    for name in {"/".join(n.split("/")[:2]) for n in files}:
        kind, _, sha = name.partition("/")
        if kind not in {"models", "said", "probes"} or not re.fullmatch(r"[0-9a-f]{64}", sha):
            raise broken("the centre sends a file that no owner keeps", name)
        place = root / kind / sha
        unpacked(taken_from(files, f"{name}/"), place, _MODEL if kind == "models" else _SAID)
        try:
            if kind == "models" and open_model(place).digest != sha:
                raise broken("a model is not the one that it is called", sha)
            if kind == "probes":
                _probe(place, sha)
        except FanbuError:
            shutil.rmtree(place, ignore_errors=True)
            raise


def _probe(folder: Path, sha: str) -> ProbeSet:
    """The probe set that the centre sent."""
    try:
        rows = json.loads((folder / "rows.json").read_text(encoding="utf-8"))
        probe = ProbeSet(tuple(ProbeRow(str(i), str(text), d if d is None else str(d)) for i, text, d in rows))
    except (OSError, ValueError, TypeError) as error:
        raise broken(f"a probe set cannot be read: {error}", sha) from None
    if probe.digest != sha:
        raise IntegrityError("message-broken", "a probe set is not the one that it is called", got=sha, remedy="again")
    return probe


def _forget(root: Path, stages: list[Path], said: set[str]) -> None:
    """Removes what inner rounds left that no later one needs: of each stage of the same name all but two, and what the
    centre told but for what is ``said`` now."""
    for folder in root.glob("said/*") if said else ():
        if folder.name not in said:
            shutil.rmtree(folder, ignore_errors=True)
    for stage in stages:
        inputs = json.loads((stage / STAGE).read_text())
        if "inner" not in inputs["inputs"]:
            continue
        for other in root.glob(f"stages/{stage.name[:-20]}*"):
            made = json.loads((other / STAGE).read_text())
            if made["stage"] == inputs["stage"] and made["inputs"].get("inner", 0) < inputs["inputs"]["inner"] - 1:
                shutil.rmtree(other, ignore_errors=True)
