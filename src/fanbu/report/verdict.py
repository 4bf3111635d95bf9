"""The first half of the page: the verdict, the paired changes behind it, and what the test could not have seen."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fanbu.report import charts
from fanbu.report import format as f
from fanbu.report.words import Say, counted


@dataclass(frozen=True)
class Check:
    """One condition of the gate."""

    name: str
    state: str
    detail: str


@dataclass(frozen=True)
class Fact:
    """One number in the banner."""

    name: str
    value: str
    note: str


@dataclass(frozen=True)
class Banner:
    """The verdict in words."""

    state: str
    word: str
    reason: str
    checks: list[Check]
    facts: list[Fact]


@dataclass(frozen=True)
class ForestRow:
    """One domain's paired change."""

    name: str
    metric: str
    scores: str
    change: str
    interval: str
    pairs: str
    rows: str
    detectable: str
    p: str
    outcome: str
    sign: str
    svg: str


@dataclass(frozen=True)
class Forest:
    """The paired changes of all domains: groups of rows, the average, and the axis under them."""

    groups: list[tuple[str, list[ForestRow]]]
    average: ForestRow | None
    axis_svg: str
    unit: str
    tested: bool
    kinds: list[str]


_WORDS = {True: ("accepted", "Promoted"), False: ("refused", "Kept the old one")}


# Where no domain has any of these, the forest leaves out their columns.
_TESTED = ("holds", "worse", "improved", "wins", "losses", "n", "smallest_detectable", "p", "p_holm")


def banner(record: Mapping[str, Any], t: Say) -> Banner:
    """The verdict's banner."""
    verdict = f.part(record, "verdict")
    accepted = verdict.get("accepted")
    state, word = _WORDS[accepted] if isinstance(accepted, bool) else ("unknown", "No verdict")
    checks = [
        Check(f.text(row.get("name")), _passed(row.get("passed")), f.text(row.get("detail")))
        for row in f.rows(verdict, "checks")
    ]
    return Banner(state, t(word), f.text(verdict.get("reason")), checks, _facts(record, t))


def _passed(value: object) -> str:
    return {True: "passed", False: "failed"}[value] if isinstance(value, bool) else "not checked"


def _facts(record: Mapping[str, Any], t: Say) -> list[Fact]:
    verdict = f.part(record, "verdict")
    average, kept, unit = f.part(verdict, "average"), f.part(verdict, "gain_kept"), average_unit(record)
    stages = f.rows(record, "costs")
    fresh = [row for row in stages if row.get("reused") is not True]
    spent = [got for row in fresh if (got := f.number(row.get("seconds"))) is not None]
    peaks = [got for row in stages if (got := f.number(row.get("peak_bytes"))) is not None]
    crossed = [got for d in f.part(record, "domains").values() if (got := crossed_bytes(d)) is not None]
    reused = len(stages) - len(fresh)
    time_note = [t("peak memory {size}", size=f.size(max(peaks)))] if peaks else []
    time_note += [t("{n} of {all} stages reused", n=reused, all=len(stages))] if reused else []
    return [
        Fact(t("Average change"), unit.named(average.get("delta"), t), unit.interval(*_ends(average), t)),
        Fact(t("Gain kept"), f.percent(kept.get("value")), percents(*_ends(kept), t)),
        Fact(t("Time"), f.seconds(sum(spent)) if spent else f.DASH, ", ".join(time_note)),
        Fact(t("Left its owners"), f.size(sum(crossed)) if crossed else f.DASH, _from(len(crossed), t)),
    ]


def _ends(interval: Mapping[str, Any]) -> tuple[object, object]:
    return interval.get("low"), interval.get("high")


def percents(low: object, high: object, t: Say) -> str:
    """An interval of shares in whole percent; nothing where it is not known."""
    if f.number(low) is None and f.number(high) is None:
        return ""
    return f.between(f.percent(low), f.percent(high), t)


def _from(domains: int, t: Say) -> str:
    return counted(t, domains, "from {n} domain", "from {n} domains") if domains else ""


def crossed_bytes(domain: object) -> float | None:
    """All that crossed from one domain, in bytes; None where nothing is recorded."""
    known = [got for row in f.rows(domain, "crossed") if (got := f.number(row.get("bytes"))) is not None]
    return sum(known) if known else None


def average_unit(record: Mapping[str, Any]) -> f.Unit:
    """The unit of the average change."""
    judged = f.part(record, "verdict", "domains")
    return f.common_unit([f.unit_of(f.part(judged, name).get("metric")) for name in judged])


def forest(record: Mapping[str, Any], t: Say) -> Forest | None:
    """The paired changes with the domain told; None where the record has none."""
    verdict = f.part(record, "verdict")
    judged = {str(name): f.part(f.part(verdict, "domains"), name) for name in f.part(verdict, "domains")}
    fed = {name: row for name, row in judged.items() if row.get("role") != "guard"}
    guards = {name: row for name, row in judged.items() if row.get("role") == "guard"}
    groups = [
        (t("Domains that fed back"), fed),
        (t("Guards: nobody fed these, and they must not get worse"), guards),
    ]
    return _forest(groups, f.part(verdict, "average"), average_unit(record), t)


def untold_forest(record: Mapping[str, Any], t: Say) -> Forest | None:
    """The paired changes where the model finds the domain itself."""
    verdict = f.part(record, "verdict")
    untold = f.part(verdict, "untold")
    found = {
        str(name): {**_only(f.part(verdict, "domains", str(name)), ("metric", "role")), **f.part(untold, name)}
        for name in untold
    }
    return _forest([("", found)], {}, average_unit(record), t)


def _only(row: Mapping[str, Any], keys: Sequence[str]) -> dict[str, Any]:
    return {key: row[key] for key in keys if key in row}


def _forest(
    groups: Sequence[tuple[str, Mapping[str, Mapping[str, Any]]]], average: Mapping[str, Any], unit: f.Unit, t: Say
) -> Forest | None:
    every = [row for _, group in groups for row in group.values()]
    if not every:
        return None
    scale = _scale([*every, average])
    most = max([f.number(row.get("n")) or 0.0 for row in every])
    drawn = [
        (title, [_row(name, row, scale, most, t) for name, row in group.items()]) for title, group in groups if group
    ]
    axis = charts.axis(
        scale, lambda tick: _tick(unit, tick), t("axis: change in {unit}", unit=t(unit.name or "the metric"))
    )
    tested = any(row.get(what) is not None for row in every for what in _TESTED)
    middle = _average(average, scale, unit, any(row.get("role") == "guard" for row in every), t) if average else None
    return Forest(drawn, middle, axis, unit.name, tested, _kinds(every, middle))


def _kinds(every: Sequence[Mapping[str, Any]], average: ForestRow | None) -> list[str]:
    """What the legend has to explain."""
    present = {"guard" if row.get("role") == "guard" else "feeds" for row in every}
    present |= {"average"} if average else set()
    present |= {what for what in ("floor", "margin") if any(f.number(row.get(what)) is not None for row in every)}
    return [kind for kind in ("feeds", "guard", "average", "floor", "margin") if kind in present]


def _tick(unit: f.Unit, tick: float) -> str:
    value = tick * unit.scale
    return "0" if abs(value) < 1e-9 else f"{value:+.6g}".replace("-", f.MINUS)


def _scale(every: Sequence[Mapping[str, Any]]) -> charts.Scale:
    ends = [f.number(row.get(side)) for row in every for side in ("delta", "low", "high", "floor")]
    margins = [-margin for row in every if (margin := f.number(row.get("margin"))) is not None]
    return charts.scale_of([0.0, *ends, *margins])


def _row(name: str, row: Mapping[str, Any], scale: charts.Scale, most: float, t: Say) -> ForestRow:
    metric = row.get("metric")
    unit = f.unit_of(metric)
    delta, low, high, n = (f.number(row.get(side)) for side in ("delta", "low", "high", "n"))
    margin, floor = f.number(row.get("margin")), f.number(row.get("floor"))
    change, interval = unit.change(delta), unit.interval(low, high, t)
    label = t("{name}: change {change}, interval {interval}", name=f.text(name), change=change, interval=interval)
    label += t(", one-sided bound {bound}", bound=unit.change(floor)) if floor is not None else ""
    label += t(", margin {margin}", margin=unit.change(-margin)) if margin is not None else ""
    weight = math.sqrt(n / most) if n and most and n > 0 else 0.5
    sign, outcome = _outcome(row, t)
    return ForestRow(
        name=f.text(name),
        metric="" if metric is None else f.text(metric).replace("_", " "),
        scores=f"{unit.score(row.get('incumbent'))} → {unit.score(row.get('candidate'))}",
        change=change,
        interval=interval,
        pairs=_pairs(row),
        rows="" if n is None else t("of {n}", n=f.count(n)),
        detectable=unit.score(row.get("smallest_detectable")),
        p=_p(row),
        outcome=outcome,
        sign=sign,
        svg=charts.forest_row(
            scale, delta, low, high, floor=floor, margin=margin, role=str(row.get("role")), weight=weight, label=label
        ),
    )


def _pairs(row: Mapping[str, Any]) -> str:
    wins, losses = f.number(row.get("wins")), f.number(row.get("losses"))
    return f.DASH if wins is None and losses is None else f"{f.count(wins)} : {f.count(losses)}"


def _p(row: Mapping[str, Any]) -> str:
    return f.p_value(row.get("p_holm")) if f.number(row.get("p_holm")) is not None else f.p_value(row.get("p"))


def _outcome(row: Mapping[str, Any], t: Say) -> tuple[str, str]:
    """The sign and the word for what the test found in one domain."""
    if row.get("worse") is True:
        return "▼", t("worse, within the margin" if row.get("holds") is True else "worse")
    if row.get("holds") is False:
        return "✗", t("not shown to hold")
    if row.get("improved") is True:
        return "▲", t("better")
    return ("✓", t("holds")) if row.get("holds") is True else ("", f.DASH)


def _average(average: Mapping[str, Any], scale: charts.Scale, unit: f.Unit, guarded: bool, t: Say) -> ForestRow:
    delta, low, high = (f.number(average.get(side)) for side in ("delta", "low", "high"))
    change, interval = unit.change(delta), unit.interval(low, high, t)
    if low is None or high is None:
        sign, outcome = "", f.DASH
    elif low > 0:
        sign, outcome = "▲", t("better")
    else:
        sign, outcome = ("▼", t("worse")) if high < 0 else ("", t("unclear"))
    name = t("Average")
    label = t("{name}: change {change}, interval {interval}", name=name, change=change, interval=interval)
    svg = charts.forest_diamond(scale, delta, low, high, label)
    detectable = unit.score(average.get("smallest_detectable"))
    over = t("of those that fed back") if guarded else ""
    return ForestRow(name, over, "", change, interval, f.DASH, "", detectable, _p(average), outcome, sign, svg)


def limits(record: Mapping[str, Any], t: Say) -> list[str]:
    """What the test could not have seen, in sentences."""
    judged = f.part(record, "verdict", "domains")
    domains = {f.text(name): f.part(judged, name) for name in judged}
    seed = "" if record.get("seed") is None else f" ({f.text(record.get('seed'))})"
    return [
        *_blind_spots(domains, t),
        *_narrow_margins(domains, t),
        *_saturated(domains, t),
        *_unguarded(domains, t),
        *_untold(record, t),
        t(
            "One training seed{seed}. The intervals cover the choice of test rows, not the luck of training: "
            "another seed can give another model.",
            seed=seed,
        ),
        t(
            "The test rows come from where the training rows come from. "
            "What changes in the world after they were collected is not in these numbers."
        ),
    ]


def _blind_spots(domains: Mapping[str, Mapping[str, Any]], t: Say) -> list[str]:
    seen = [
        (got, name) for name, row in domains.items() if (got := f.number(row.get("smallest_detectable"))) is not None
    ]
    blind = [name for name in domains if name not in {name for _, name in seen}]
    said = []
    if seen:
        seen.sort()
        (fine, finest), (coarse, coarsest) = seen[0], seen[-1]
        sharp, dull = (
            t("{amount} in {name}", amount=_amount(value, domains[name], t), name=name)
            for value, name in ((fine, finest), (coarse, coarsest))
        )
        span = t("from {low} to {high}", low=sharp, high=dull) if len(seen) > 1 else dull
        said.append(t("Changes smaller than the smallest visible one could have gone unseen: {span}.", span=span))
    if blind:
        said.append(t("The power of the test is not known for {names}.", names=listed(blind, t)))
    return said


def _amount(value: float, row: Mapping[str, Any], t: Say) -> str:
    unit = f.unit_of(row.get("metric"))
    return f"{unit.score(value)} {t(unit.name)}".strip()


def _narrow_margins(domains: Mapping[str, Mapping[str, Any]], t: Say) -> list[str]:
    narrow = [
        name
        for name, row in domains.items()
        if (margin := f.number(row.get("margin"))) is not None
        and (seen := f.number(row.get("smallest_detectable"))) is not None
        and margin < seen
    ]
    if not narrow:
        return []
    return [
        t(
            "The margin is finer than what the rows can resolve in {names}: "
            "there, even a model that lost nothing may fail the test. More test rows would help.",
            names=listed(narrow, t),
        )
    ]


def _saturated(domains: Mapping[str, Mapping[str, Any]], t: Say) -> list[str]:
    full = [
        name
        for name, row in domains.items()
        if f.unit_of(row.get("metric")) == f.POINTS and (f.number(row.get("incumbent")) or 0) >= 0.97
    ]
    said = "The incumbent leaves little to gain in {names} (97% or more)."
    return [t(said, names=listed(full, t))] if full else []


def _unguarded(domains: Mapping[str, Mapping[str, Any]], t: Say) -> list[str]:
    if any(row.get("role") == "guard" for row in domains.values()):
        return []
    return [t("No guard domain was set: what nobody fed was not measured, so general ability may have changed unseen.")]


def _untold(record: Mapping[str, Any], t: Say) -> list[str]:
    verdict = f.part(record, "verdict")
    if f.part(verdict, "untold") or verdict.get("mode") == "untold" or record.get("task") == "causal-lm":
        return []
    return [t("Only told scores were judged: whether the model finds the domain by itself was not tested.")]


def listed(names: Sequence[str], t: Say, at_most: int = 6) -> str:
    """Names in a sentence, the first few of many."""
    shown = list(names[:at_most])
    more = len(names) - len(shown)
    return ", ".join(shown) + (t(" and {n} more", n=more) if more else "")
