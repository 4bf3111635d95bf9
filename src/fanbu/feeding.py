"""One way back: each owner contributes, the centre absorbs; once, or so many times over."""

from __future__ import annotations

import json
import math
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, is_dataclass, replace
from pathlib import Path
from typing import Any

from fanbu.catalogue import Method, method
from fanbu.contribution import Contribution
from fanbu.domain import Domain, Specialist
from fanbu.errors import FitError, IntegrityError
from fanbu.files import write_text
from fanbu.fingerprint import code_digest
from fanbu.hierarchy import along
from fanbu.ledger import Workspace
from fanbu.merging.noise import noised, shortened
from fanbu.model import Model, copy_model, open_model, said_anew
from fanbu.private import OwnerNoise
from fanbu.recipe_parts import Step
from fanbu.secure import Session, begun, least_of, summed, tell_keys
from fanbu.turn import Turn
from fanbu.types import CLASSIFYING, Context, Inner

STATE, SAID = "state", "said"  # folders of a stage: what is kept for the next inner round, and told to all owners
_CROSSED, _DONE = "crossed.json", "done.json"


def feed(turn: Turn, step: Step, specialists: Sequence[Specialist], base: Model, name: str | None = None) -> Model:
    """Contribute at each owner, absorb at the centre, as often as the step says; group by group where it has a tree."""
    way, name = method(step.method, "feedback"), name or step.called
    specialists = [s for s in specialists if s.domain.name not in turn.missed]
    if step.tree:
        return along(turn, step, specialists, base, name, feed)
    if step.times > 1:
        return _repeated(turn, step, specialists, base, name)
    sent, _ = _gathered(turn, way, step, [(way, step.arguments, s, base, None) for s in specialists])
    return absorb(turn, way, step.arguments, sent, base, name)


Noise = Mapping[str, Any]  # an ``OwnerNoise``, as plain JSON
Call = tuple[Method, Mapping[str, Any], Specialist, Model, Inner | None]


def _gathered(
    turn: Turn, way: Method, step: Step, calls: Sequence[Call]
) -> tuple[list[Contribution], dict[str, Path]]:  # fmt: skip
    """What crosses, one contribution an owner, or their sum where it is secure; and the folder of each owner."""
    if not step.secure or not calls:
        noise = _noise(step, calls, 0)
        found = [c for _, c in turn.at_owners(contribute, [(*call, noise) for call in calls])]
        return [c for c, _ in found], {c.domain: folder for c, folder in found}
    base, inner = calls[0][3], calls[0][4]
    noise = _noise(step, calls, least_of(len(calls)))
    work = [_work(turn, *call, noise) for call in calls]
    what = {
        "way": way.name, "arguments": plain(way.check(step.arguments)), **turn.settings(probe=True),
        "code": [code_digest(m) for m in (way.module, "fanbu.boundary", "fanbu.secure")],
        "work": [[name, inputs, d.share.as_dict()] for name, _, inputs, d, _ in work],
    }  # fmt: skip
    with begun(turn, what, [call[2].domain.name for call in calls], inner.number if inner else None) as session:
        told = turn.at_owners(prepare, [(*call, noise, session) for call in calls])
        prepared = [(call[2], keys, folder) for call, (keys, folder) in told]
        by_rows = bool(way.own("absorb", step.arguments).get("by_rows"))
        one = summed(turn, way, {"by_rows": by_rows, "noise": noise}, base, session, prepared)
    return [one], {s.domain.name: folder for s, _, folder in prepared if s.domain.name in one.meta["of"]}


def _noise(step: Step, calls: Sequence[Call], among: int) -> Noise | None:
    if step.noise is None or not calls:
        return None
    inner = calls[0][4]
    return OwnerNoise(step.noise, step.times, inner.number if inner else 0, among).as_dict()


def contribute(
    turn: Turn, way: Method, arguments: Mapping[str, Any], s: Specialist, base: Model, inner: Inner | None = None,
    noise: Noise | None = None,
) -> tuple[Contribution, Path]:  # fmt: skip
    """One owner's contribution, through the boundary; and the owner's folder."""
    return turn.contribution(*_work(turn, way, arguments, s, base, inner, noise))


def prepare(
    turn: Turn, way: Method, arguments: Mapping[str, Any], s: Specialist, base: Model, inner: Inner | None,
    noise: Noise | None, session: Session,
) -> tuple[Contribution, Path]:  # fmt: skip
    """The keys of one owner, whose contribution stays in its folder until it is masked; and that folder."""
    folder = turn.kept(*_work(turn, way, arguments, s, base, inner, noise))
    return tell_keys(turn, way, s, session), folder


def _work(
    turn: Turn, way: Method, arguments: Mapping[str, Any], s: Specialist, base: Model, inner: Inner | None,
    noise: Noise | None,
) -> tuple[str, str, dict[str, Any], Domain, Callable[[Path, Context], Contribution]]:  # fmt: skip
    """An owner's stage: its name, module, inputs, domain and what makes it."""
    inputs = {
        "base": base.digest, "specialist": s.model.digest, "domain": s.domain.digest, **_numbered(inner),
        "arguments": plain(way.own("contribute", arguments)), **turn.settings(probe=way.needs.probe),
        **({} if noise is None else {"noise": dict(noise)}),
    }  # fmt: skip

    def make(out: Path, context: Context) -> Contribution:
        own = None if inner is None else replace(inner, before=_if_there(inner.before), after=out / STATE)
        sent = way.contribute(s, base, replace(context, inner=own), **arguments)
        return sent if noise is None else _noised(sent, base, context, OwnerNoise.of(noise))

    return f"{way.name} contribution {s.domain.name}", way.module, inputs, s.domain, make


def _noised(sent: Contribution, base: Model, context: Context, noise: OwnerNoise) -> Contribution:
    """An owner's contribution, brought down to its length, with noise; in a sum that is added with the masks."""
    if noise.among:
        return shortened(sent, base, noise.privacy.norm)
    assert context.scratch is not None
    return noise.paid(
        noised(sent, base, noise.privacy.norm, noise.deviation, context.scratch / "noised.safetensors")
    )  # fmt: skip


def absorb(
    turn: Turn, way: Method, arguments: Mapping[str, Any], sent: Sequence[Contribution], base: Model, name: str,
    inner: Inner | None = None,
) -> Model:  # fmt: skip
    """The new large model, in the centre's folder."""
    inputs = {
        "base": base.digest, "contributions": sorted(c.digest for c in sent), **_numbered(inner),
        "arguments": plain(way.own("absorb", arguments)), **turn.settings(probe=_asks(turn, way)),
    }  # fmt: skip

    def make(out: Path, context: Context) -> Model:
        own = None if inner is None else replace(inner, after=out.parent / STATE, telling=out.parent / SAID)
        made = way.absorb(base, sent, out, replace(context, inner=own), **arguments)
        if sent and sent[0].owners > 1:  # the method heard of no single one
            said_anew(made, {"parameters": {**made.manifest["parameters"], "domains": sent[0].meta["of"]}})
        return made

    try:
        return turn.model(name, way.module, inputs, make)
    except (FitError, IntegrityError):
        unfit = {} if turn.centre is None else _unfit(turn, way, arguments, sent, base, inner)
        if not unfit or len(unfit) == len(sent):
            raise
    for domain, why in unfit.items():  # of an owner who is elsewhere the others do not depend
        turn.miss(domain, f"absorb: {why}")
    return absorb(turn, way, arguments, [c for c in sent if c.domain not in unfit], base, name, inner)


class _BegunError(Exception):
    """A method found nothing wrong and began its work."""


def _unfit(
    turn: Turn, way: Method, arguments: Mapping[str, Any], sent: Sequence[Contribution], base: Model,
    inner: Inner | None,
) -> dict[str, str]:  # fmt: skip
    """What a method says against contributions that it cannot take even alone, by domain."""

    def begin(*_: Any) -> None:
        raise _BegunError

    found = {}
    for c in sent:
        with tempfile.TemporaryDirectory(dir=turn.workspace.root / "partial") as folder:
            out = Path(folder)
            own = None if inner is None else replace(inner, after=out / STATE, telling=out / SAID)
            try:
                trial = replace(turn.context, progress=begin, scratch=None, inner=own)
                way.absorb(base, [c], out / "model", trial, **arguments)
            except _BegunError:
                pass
            except (FitError, IntegrityError) as error:
                found[c.domain] = f"{error.what} [{error.code}]"
    return found


def plain(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments as JSON has them."""
    return {k: asdict(v) if is_dataclass(v) and not isinstance(v, type) else v for k, v in arguments.items()}


def _asks(turn: Turn, way: Method) -> bool:
    """Whether the probe set matters to what a way makes: classifiers' label rows are aligned on it."""
    return way.needs.probe or any(d.task in CLASSIFYING for d in turn.domains.values())


def _numbered(inner: Inner | None) -> dict[str, int]:
    return {} if inner is None else {"inner": inner.number}


@dataclass
class _Stand:
    """How far the inner rounds have come: the model, and folders of stages, relative to their workspace."""

    number: int = 0
    centre: str = ""
    owners: dict[str, str] = field(default_factory=dict)
    crossed: dict[str, list[dict[str, Any]]] = field(default_factory=dict)


def _repeated(turn: Turn, step: Step, specialists: Sequence[Specialist], base: Model, name: str) -> Model:
    """All inner rounds of a way, as one stage: each on what the one before made, and with what it left.

    Inner rounds are stages of a workspace in the stage's scratch folder, which is gone afterwards, so that a round that
    was killed goes on where it was, and what lies on disk does not grow with their number.
    """
    way = method(step.method, "feedback")
    inputs = {
        "base": base.digest, "times": step.times, "participation": step.participation, "secure": step.secure,
        "arguments": plain(way.check(step.arguments)),
        "owners": [[s.model.digest, s.domain.name, s.domain.digest, s.domain.share.as_dict()] for s in specialists],
        "boundary": code_digest("fanbu.boundary"), **turn.settings(probe=_asks(turn, way)),
    }  # fmt: skip

    def produce(out: Path, context: Context) -> None:
        assert context.scratch is not None
        inside = Workspace(context.scratch / "inner")
        apart = replace(turn, workspace=inside, costs=[], crossed={}, log=_quiet, live=None)
        stand = _read(apart.workspace.root / _DONE)
        model = open_model(apart.workspace.root / stand.centre / "model", verify=False) if stand.centre else base
        while stand.number < step.times:
            turn.log(f"{name}: inner round {stand.number + 1} of {step.times}")
            model = _inner_round(apart, way, step, specialists, model, stand)
        made = copy_model(model, out / "model")
        if made.digest != base.digest:
            told = {**made.manifest["parameters"], "times": step.times}
            said_anew(made, {"parents": [base.digest], "parameters": told})
        write_text(out / _CROSSED, json.dumps(stand.crossed))

    done = turn.stage(name, way.module, inputs, produce)
    for domain, sent in json.loads((done.path / _CROSSED).read_text()).items():
        known = turn.crossed.setdefault(domain, {})
        known.update({done.path / str(number): each for number, each in enumerate(sent)})
    return open_model(done.path / "model", verify=False)


def _inner_round(
    apart: Turn, way: Method, step: Step, specialists: Sequence[Specialist], base: Model, stand: _Stand
) -> Model:
    """One inner round; ``stand`` is brought up to it, and what only the one before needed is removed."""
    root, number = apart.workspace.root, stand.number
    said = _if_there(root / stand.centre / SAID if stand.centre else None)
    heard = [s for s in specialists if s.domain.name not in apart.missed]
    taking = _taking_part(apart.context, step, heard, number)
    share = len(taking) / len(specialists)
    calls: list[Call] = []
    for s in taking:
        known = stand.owners.get(s.domain.name)
        before = root / known / STATE if known else None
        calls.append((way, step.arguments, s, base, Inner(number, before, said=said, share=share, of=step.times)))
    sent, folders = _gathered(apart, way, step, calls)
    owners = {**stand.owners, **{d: str(folder.relative_to(root)) for d, folder in folders.items()}}
    before = _if_there(root / stand.centre / STATE if stand.centre else None)
    made = absorb(
        apart, way, step.arguments, sent, base, way.name, Inner(number, before, said=said, share=share, of=step.times)
    )
    stand.number, stand.centre, stand.owners = number + 1, str(made.path.parent.relative_to(root)), owners
    for d, crossed in apart.crossed.items():
        stand.crossed.setdefault(d, []).extend(crossed.values())
    apart.crossed = {}
    write_text(root / _DONE, json.dumps(asdict(stand)))
    kept = {root / stand.centre, *(root / o for o in owners.values())}
    for folder in set((root / "stages").iterdir()) - kept:
        shutil.rmtree(folder, ignore_errors=True)
        (root / "locks" / f"{folder.name}.lock").unlink(missing_ok=True)
    return made


def _taking_part(context: Context, step: Step, specialists: Sequence[Specialist], number: int) -> list[Specialist]:
    """A share of the owners, at least one, drawn anew in each inner round, whatever their order."""
    count = math.ceil(step.participation * len(specialists))
    drawn = sorted(specialists, key=lambda s: context.seeded("participation", number, s.domain.name))
    names = {s.domain.name for s in drawn[:count]}
    return [s for s in specialists if s.domain.name in names]


def _if_there(folder: Path | None) -> Path | None:
    return folder if folder and folder.is_dir() else None


def _read(path: Path) -> _Stand:
    return _Stand(**json.loads(path.read_text())) if path.exists() else _Stand()


def _quiet(text: str) -> None:
    """Inner stages are not told one by one."""
