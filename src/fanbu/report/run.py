"""The second half of the page: the specialists, what crossed, what it cost, and how to do it again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fanbu.report import charts
from fanbu.report import format as f
from fanbu.report.verdict import crossed_bytes
from fanbu.report.words import Say


@dataclass(frozen=True)
class Pair:
    """A quantity of a specialist beside its parent's, each with its bar."""

    own: str
    other: str
    own_svg: str
    other_svg: str
    ratio: str


@dataclass(frozen=True)
class Specialist:
    """One specialist beside its parent."""

    domain: str
    method: str
    digest: f.Hash
    path: str
    parameters: Pair
    latency: Pair
    size: str
    scores: str
    change: str
    forerunner: str


@dataclass(frozen=True)
class Crossing:
    """What one domain let out, and what it allows."""

    domain: str
    what: list[tuple[str, str, str]]
    total: str
    svg: str
    kinds: str
    permissions: list[tuple[str, str]]
    rows: str


@dataclass(frozen=True)
class Stage:
    """One stage of the round and its cost."""

    name: str
    seconds: str
    cpu: str
    peak: str
    reused: bool
    svg: str


@dataclass(frozen=True)
class Costs:
    """Where the time went, longest first; ``rest`` are the short stages that the chart leaves to the details."""

    shown: list[Stage]
    rest: list[Stage]
    total: str
    cpu: str
    energy: str
    reused: int


@dataclass(frozen=True)
class ModelRow:
    """One large model of the round."""

    role: str
    method: str
    digest: f.Hash
    path: str
    parameters: str
    size: str


@dataclass(frozen=True)
class Reproduce:
    """What it takes to do the round again."""

    commands: list[str]
    seed: str
    key: f.Hash
    models: list[ModelRow]
    versions: list[tuple[str, str]]
    recipe: str


BORN = ("born", "reborn", "carried on")


def _most(values: Sequence[object]) -> float:
    return max([got for value in values if (got := f.number(value)) is not None], default=0.0)


def _share(value: object, most: float) -> float | None:
    got = f.number(value)
    return None if got is None or most <= 0 else got / most


def specialists(record: Mapping[str, Any], t: Say) -> list[Specialist]:
    """Every specialist beside its parent; empty where the record has none."""
    domains = f.part(record, "domains")
    known = {str(name): f.part(domains, name) for name in domains if f.part(domains, name, "specialist")}
    both = [f.part(domain, who) for domain in known.values() for who in ("specialist", "parent")]
    most = {what: _most([model.get(what) for model in both]) for what in ("parameters", "latency_ms")}
    return [_specialist(name, domain, most, t) for name, domain in known.items()]


def _specialist(name: str, domain: Mapping[str, Any], most: Mapping[str, float], t: Say) -> Specialist:
    own, other = f.part(domain, "specialist"), f.part(domain, "parent")
    unit = f.unit_of(domain.get("metric"))
    before, after = f.number(other.get("score")), f.number(own.get("score"))
    return Specialist(
        domain=f.text(name),
        method=f.text(own.get("method")),
        digest=f.digest(own.get("digest")),
        path=f.text(own.get("path")),
        parameters=_pair(own, other, "parameters", most, t),
        latency=_pair(own, other, "latency_ms", most, t),
        size=t("{own} (parent {other})", own=f.size(own.get("bytes")), other=f.size(other.get("bytes"))),
        scores=f"{unit.score(before)} → {unit.score(after)}",
        change="" if before is None or after is None else unit.named(after - before, t),
        forerunner=_forerunner(own, unit, f.higher_is_better(domain.get("metric")), t),
    )


def born(word: object, t: Say) -> str:
    """How a specialist came into its round; other words than the three are data."""
    return t(str(word)) if word in BORN else "" if word is None else f.text(word)


def validity(value: object, higher: bool) -> float | None:
    """A specialist's validation value in its metric's own direction (losses are recorded negative)."""
    got = f.number(value)
    return got if got is None or higher else -got


def _forerunner(own: Mapping[str, Any], unit: f.Unit, higher: bool, t: Say) -> str:
    """One line about the specialist of the round before; nothing where the record knows none."""
    before, word = f.part(own, "forerunner"), born(own.get("born"), t)
    if not before:
        return word
    old, new = (validity(row.get("valid"), higher) for row in (before, own))
    score = t("forerunner {old} → {new}", old=unit.score(before.get("score")), new=unit.score(own.get("score")))
    checked = t("on validation rows {old} → {new}", old=unit.score(old), new=unit.score(new))
    return ", ".join(said for said in (word, score, "" if old is None and new is None else checked) if said)


def _pair(own: Mapping[str, Any], other: Mapping[str, Any], what: str, most: Mapping[str, float], t: Say) -> Pair:
    show = f.big if what == "parameters" else f.milliseconds
    mine, theirs = own.get(what), other.get(what)
    return Pair(
        own=show(mine),
        other=show(theirs),
        own_svg=charts.bar(_share(mine, most[what]), "own", t("specialist: {value}", value=show(mine))),
        other_svg=charts.bar(_share(theirs, most[what]), "other", t("parent: {value}", value=show(theirs))),
        ratio=_ratio(theirs, mine, "{times}× smaller" if what == "parameters" else "{times}× faster", t),
    )


def _ratio(large: object, small: object, words: str, t: Say) -> str:
    above, below = f.number(large), f.number(small)
    if above is None or below is None or below <= 0 or above <= 0 or above < below:
        return ""
    return t("same") if above / below < 1.05 else t(words, times=f"{above / below:.1f}")


def crossings(record: Mapping[str, Any], t: Say) -> list[Crossing]:
    """What crossed from each domain."""
    domains = f.part(record, "domains")
    most = _most([crossed_bytes(f.part(domains, name)) for name in domains])
    return [_crossing(str(name), f.part(domains, name), most, t) for name in domains]


def _crossing(name: str, domain: Mapping[str, Any], most: float, t: Say) -> Crossing:
    share, total = f.part(domain, "share"), crossed_bytes(domain)
    what = [
        (f.text(row.get("what")), f.text(row.get("kind")), f.size(row.get("bytes")))
        for row in f.rows(domain, "crossed")
    ]
    permissions = [(t(word), _allowed(share.get(word), t)) for word in ("texts", "labels", "private") if word in share]
    counted = f.part(domain, "rows")
    return Crossing(
        domain=f.text(name),
        what=what,
        total=f.size(total),
        svg=charts.bar(_share(total, most), "own", f"{f.text(name)}: {f.size(total)}"),
        kinds=", ".join(f.texts(share, "kinds")),
        permissions=permissions,
        rows=", ".join(f"{f.count(counted[split])} {f.text(split)}" for split in counted if counted[split]),
    )


def _allowed(value: object, t: Say) -> str:
    return t("yes" if value else "no") if isinstance(value, bool) else f.text(value)


def costs(record: Mapping[str, Any], at_most: int = 14) -> Costs | None:
    """Where the time went; None where nothing was timed."""
    found = sorted(f.rows(record, "costs"), key=lambda row: -(f.number(row.get("seconds")) or 0.0))
    if not found:
        return None
    most = _most([row.get("seconds") for row in found])
    stages = [_stage(row, most) for row in found]
    fresh = [row for row in found if row.get("reused") is not True]
    total, cpu, energy = (_sum([row.get(what) for row in fresh]) for what in ("seconds", "cpu_seconds", "joules"))
    cut = at_most if len(stages) > at_most + 3 else len(stages)
    return Costs(
        stages[:cut], stages[cut:], f.seconds(total), f.seconds(cpu), f.energy(energy), len(found) - len(fresh)
    )


def _sum(values: Sequence[object]) -> float | None:
    known = [got for value in values if (got := f.number(value)) is not None]
    return sum(known) if known else None


def _stage(row: Mapping[str, Any], most: float) -> Stage:
    name, spent, reused = f.text(row.get("stage")), f.seconds(row.get("seconds")), row.get("reused") is True
    svg = charts.bar(_share(row.get("seconds"), most), "reused" if reused else "own", f"{name}: {spent}")
    return Stage(name, spent, f.seconds(row.get("cpu_seconds")), f.size(row.get("peak_bytes")), reused, svg)


def warnings(record: Mapping[str, Any]) -> list[tuple[str, str]]:
    """All warnings: (domain or nothing, text)."""
    domains = f.part(record, "domains")
    own = [(f.text(name), said) for name in domains for said in f.texts(domains[name], "warnings")]
    return [("", said) for said in f.texts(record, "warnings")] + own


def reproduce(record: Mapping[str, Any], t: Say) -> Reproduce:
    """How to do it again."""
    versions = f.part(record, "versions")
    return Reproduce(
        commands=f.texts(record, "reproduce"),
        seed=f.text(record.get("seed")),
        key=f.digest(record.get("key")),
        models=[
            _model(t(role), f.part(record, role)) for role in ("base", "incumbent", "candidate") if record.get(role)
        ],
        versions=[(f.text(name), f.text(versions[name])) for name in sorted(versions, key=str)],
        recipe=_yaml(f.part(record, "recipe")),
    )


def _model(role: str, model: Mapping[str, Any]) -> ModelRow:
    arguments = f.part(model, "arguments")
    given = ", ".join(f"{f.text(name)}={f.text(arguments[name])}" for name in arguments)
    method = model.get("method")
    return ModelRow(
        role=role,
        method=f.text(method) + (f" ({given})" if given else ""),
        digest=f.digest(model.get("digest")),
        path=f.text(model.get("path") or model.get("source")),
        parameters=f.big(model.get("parameters")),
        size=f.size(model.get("bytes")),
    )


def _yaml(recipe: Mapping[str, Any]) -> str:
    """The resolved recipe, readable."""
    if not recipe:
        return ""
    import yaml

    return f.clean(yaml.safe_dump(dict(recipe), sort_keys=False, allow_unicode=True, width=100))
