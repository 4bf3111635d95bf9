"""Further parts of one round's page: what came in, how honest the confidences are, and won and lost examples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fanbu.report import curves
from fanbu.report import format as f
from fanbu.report.words import Say

Bin = tuple[float, float, float]
_LONGEST = 400  # letters of an example that the page shows


@dataclass(frozen=True)
class Arrival:
    """What was new in one domain."""

    domain: str
    joined: bool
    new: str
    rows: str


@dataclass(frozen=True)
class Arrivals:
    """What joined, what left and what rows were new."""

    rows: list[Arrival]
    left: list[str]


@dataclass(frozen=True)
class Reliability:
    """One domain's reliability diagram, the gap of each model, and the bins behind it."""

    domain: str
    svg: str
    gaps: str
    bins: list[tuple[str, list[str]]]


@dataclass(frozen=True)
class Example:
    """One row that only one of the models got right (or did better on)."""

    text: str
    label: str
    old: str
    new: str


@dataclass(frozen=True)
class Examples:
    """One domain's wins and losses, or why they are withheld."""

    domain: str
    withheld: str
    wins: list[Example]
    losses: list[Example]


def arrivals(record: Mapping[str, Any], t: Say) -> Arrivals | None:
    """What came in with this round; None where the record does not say."""
    domains, left = f.part(record, "domains"), f.texts(record, "left")
    known = [d for d in domains if {"joined", "new_rows"} & set(f.part(domains, d))]
    if not known and not left:
        return None
    return Arrivals([_arrival(str(d), f.part(domains, d), t) for d in known], left)


def _arrival(name: str, domain: Mapping[str, Any], t: Say) -> Arrival:
    counts = {split: f.number(n) for split, n in f.part(domain, "new_rows").items()}
    new = [f"+{f.count(n)} {f.text(split)}" for split, n in counts.items() if n]
    shown = ", ".join(new) if new or not counts else t("no new rows")
    rows = f.part(domain, "rows")
    every = ", ".join(f"{f.count(rows[s])} {f.text(s)}" for s in rows if rows[s])
    return Arrival(f.text(name), domain.get("joined") is True, shown or f.DASH, every or f.DASH)


def calibration(record: Mapping[str, Any], t: Say) -> list[Reliability]:
    """A reliability diagram for each domain that has bins."""
    found = []
    for name in f.part(record, "domains"):
        own = f.part(record, "domains", name, "calibration")
        pair = [(who, _bins(own.get(who))) for who in ("incumbent", "candidate")]
        if any(bins for _, bins in pair):
            found.append(_reliability(f.text(name), pair, t))
    return found


def _bins(value: object) -> list[Bin | None]:
    """The bins of one model, None for an empty one; nothing at all where it has no rows."""
    found = [_bin(row) for row in value] if isinstance(value, (list, tuple)) else []
    return found if any(found) else []


def _bin(row: object) -> Bin | None:
    """Rows, confidence and accuracy of one bin."""
    if not isinstance(row, (list, tuple)) or len(row) != 3:
        return None
    n, confidence, accuracy = map(f.number, row)
    if n is None or n <= 0 or confidence is None or accuracy is None:
        return None
    return n, min(1.0, max(0.0, confidence)), min(1.0, max(0.0, accuracy))


def _reliability(name: str, pair: Sequence[tuple[str, Sequence[Bin | None]]], t: Say) -> Reliability:
    drawn = []
    for who, bins in pair:
        whole = [b for b in bins if b is not None]
        total = sum(n for n, _, _ in whole)
        drawn.append((who, [(n / total, confidence, accuracy) for n, confidence, accuracy in whole]))
    old, new = (_gap([b for b in bins if b is not None]) for _, bins in pair)
    gaps = t("gap {old} → {new} points", old=old, new=new)
    n = max(len(bins) for _, bins in pair)
    rows = []
    for i in range(n):
        cells = [cell for _, bins in pair for cell in _cells(bins[i] if i < len(bins) else None)]
        if any(cell != f.DASH for cell in cells):
            rows.append((f"{i / n:.1f}–{(i + 1) / n:.1f}", cells))
    label = t("{name}: gap between confidence and accuracy, old {old}, new {new} points", name=name, old=old, new=new)
    return Reliability(name, curves.reliability(drawn, t("sure →"), t("↑ right"), label), gaps, rows)


def _gap(bins: Sequence[Bin]) -> str:
    """The expected calibration error in points."""
    total = sum(n for n, _, _ in bins)
    gap = sum(n * abs(confidence - accuracy) for n, confidence, accuracy in bins) / total if total else None
    return f.POINTS.score(gap)


def _cells(one: Bin | None) -> list[str]:
    return [f.DASH] * 3 if one is None else [f.count(one[0]), f.POINTS.score(one[1]), f.POINTS.score(one[2])]


def examples(record: Mapping[str, Any]) -> list[Examples]:
    """Rows that were won and lost, domain by domain."""
    found = []
    for name in f.part(record, "domains"):
        own = f.part(record, "domains", name, "examples")
        wins, losses = ([_example(row) for row in f.rows(own, side)] for side in ("wins", "losses"))
        withheld = "" if own.get("withheld") is None else f.text(own.get("withheld"))
        if wins or losses or withheld:
            found.append(Examples(f.text(name), withheld, wins, losses))
    return found


def _example(row: Mapping[str, Any]) -> Example:
    text, label = f.text(row.get("text")), row.get("label")
    short = text if len(text) <= _LONGEST else text[:_LONGEST].rstrip() + " …"
    return Example(short, "" if label in (None, "") else f.text(label), f.text(row.get("old")), f.text(row.get("new")))
