"""Parts of a round's page: how its way back was chosen, what specialists were worth, and the tree they stand in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from fanbu.report import format as f
from fanbu.report.charts import Scale, axis, forest_row, scale_of, svg, ticks
from fanbu.report.heat import STEPS
from fanbu.report.words import Say

HEIGHT = 220
_DEEPEST = 20
_SHARE = f.Unit(100.0, 2, "%")  # of a loss


@dataclass(frozen=True)
class Shade:
    """A number and its shade (-5 to 5); no number is a dash without one."""

    shown: str
    step: int


@dataclass(frozen=True)
class Candidate:
    """One candidate: its scores by share of the rows, its changes by domain with the most rows it had, what it cost."""

    name: str
    won: bool
    best: bool  # no other beats it
    shares: list[Shade]
    domains: list[Shade]
    interval: str
    wins: str
    worst: str
    crossed: str
    seconds: str


@dataclass(frozen=True)
class Chosen:
    """A comparison: its candidates, the picture of quality beside time, and what was left out."""

    candidates: list[Candidate]
    shares: list[str]
    domains: list[str]
    plot_svg: str
    fastest: str
    slowest: str
    unit: str
    corrected: str
    spent: str
    left_out: list[tuple[str, str]]


@dataclass(frozen=True)
class Worth:
    """What specialists were worth: rows of (domain, value, interval, strip), the axis, and which did harm."""

    way: str
    rows: list[tuple[str, str, str, str]]
    axis_svg: str
    unit: str
    shapley: bool
    harmful: list[str]


@dataclass(frozen=True)
class Branch:
    """A line of a drawn tree: how deep it stands, and whether it is a domain."""

    name: str
    depth: int
    leaf: bool


def _unit(found: Mapping[str, Any]) -> f.Unit:
    return _SHARE if found.get("metric") == "loss" else f.POINTS


def chosen(record: Mapping[str, Any], t: Say) -> Chosen | None:
    """The comparison that chose the round's way back; None where there was none."""
    found = f.part(record, "comparison")
    by_name: dict[str, dict[float, Mapping[str, Any]]] = {}
    for row in f.rows(found, "trials"):
        if (share := f.number(row.get("share"))) is not None and row.get("candidate") is not None:
            by_name.setdefault(f.text(row["candidate"]), {})[share] = row
    if not by_name:
        return None
    unit, plain, front = _unit(found), f.unit_of(found.get("metric")), f.texts(found, "front")
    shares = sorted({share for trials in by_name.values() for share in trials})
    whole = {name: trials[max(trials)] for name, trials in by_name.items()}
    domains = sorted({str(d) for row in whole.values() for d in f.part(row, "changes")})
    top = _most([f.number(row.get("score")) for trials in by_name.values() for row in trials.values()])
    widest = _most([f.number(v) for row in whole.values() for v in f.part(row, "changes").values()])
    order = sorted(by_name, key=lambda name: (-max(by_name[name]), -(f.number(whole[name].get("score")) or 0.0), name))
    winner = f.text(found.get("winner"))
    candidates = [
        Candidate(
            name, name == winner, name in front,
            [_shade(by_name[name].get(s, {}).get("score"), top, unit) for s in shares],
            [_shade(f.part(whole[name], "changes").get(d), widest, plain) for d in domains],
            unit.interval(whole[name].get("low"), whole[name].get("high"), t), f.percent(whole[name].get("wins")),
            unit.change(whole[name].get("worst")), f.size(whole[name].get("crossed_bytes")),
            f.seconds(whole[name].get("seconds")),
        )
        for name in order
    ]  # fmt: skip
    points = [(seconds, score, name, name in front) for name in order
              if (seconds := f.number(whole[name].get("seconds"))) is not None and max(by_name[name]) == 1
              and (score := f.number(whole[name].get("score"))) is not None]  # fmt: skip
    left = f.part(found, "left_out")
    return Chosen(
        candidates, [f.percent(s) for s in shares], [f.text(d) for d in domains], _picture(points, unit, t),
        f.seconds(min((p[0] for p in points), default=None)), f.seconds(max((p[0] for p in points), default=None)),
        unit.name, unit.named(whole.get(winner, {}).get("corrected"), t), _spent(found, t),
        [(f.text(name), t(why) if (why := f.text(left[name])) in _REASONS else why) for name in left],
    )  # fmt: skip


_REASONS = (
    "the budget was spent before its first trial", "it would take more than the budget with all rows",
    "earlier comparisons promise too little of it", "what was left of the budget did not do for all rows",
)  # fmt: skip


def _most(values: Sequence[float | None]) -> float:
    return max([abs(v) for v in values if v is not None], default=0.0)


def _shade(value: object, top: float, unit: f.Unit) -> Shade:
    got = f.number(value)
    step = 0 if got is None or not top else round(STEPS * got / top)
    return Shade(unit.change(value), step)


def _spent(found: Mapping[str, Any], t: Say) -> str:
    steps = found.get("in") == "steps"
    spent, budget = (f.count(found.get(k)) if steps else f.seconds(found.get(k)) for k in ("spent", "budget"))
    if steps:
        return t("{spent} of {budget} steps spent", spent=spent, budget=budget)
    return t("{spent} of {budget} spent", spent=spent, budget=budget)


def _picture(points: Sequence[tuple[float, float, str, bool]], unit: f.Unit, t: Say) -> str:
    """Quality beside time; filled where no other candidate beats one in quality, worst domain, bytes and time."""
    if not points:
        return ""
    across, up = scale_of([p[0] for p in points]), scale_of([p[1] for p in points], pad=0.12)
    body = [f'<line class="grid" x1="0" x2="100%" y1="{_y(up, g)}" y2="{_y(up, g)}"/>' for g in ticks(up, 4)]
    for seconds, score, name, best in sorted(points, key=lambda p: p[3]):
        kind, radius = ("champion", 5) if best else ("reference", 3)
        x, y = across.at(seconds), float(_y(up, score))
        side = "end" if x > 60 else "start"
        said = escape(f"{name}: {unit.change(score)}, {f.seconds(seconds)}")
        body.append(
            f'<circle class="dot {kind}" cx="{x:.2f}%" cy="{y:.1f}" r="{radius}"><title>{said}</title></circle>'
        )
        if best:
            body.append(f'<text x="{x:.2f}%" y="{y - 9:.1f}" text-anchor="{side}">{escape(f.clean(name))}</text>')
    return svg(body, t("{n} candidates: quality beside time", n=len(points)), "lines")


def _y(scale: Scale, value: float) -> str:
    return f"{HEIGHT * (1 - scale.at(value) / 100) + 14:.1f}"


def worth(record: Mapping[str, Any], t: Say) -> Worth | None:
    """What each specialist was worth: its Shapley value where that was asked for, else what is lost without it."""
    found = f.part(record, "worth")
    shapley = bool(f.part(found, "shapley"))
    values = f.part(found, "shapley" if shapley else "left_out")
    if not values:
        return None
    unit = _unit(found)
    known = {str(d): [f.number(f.part(values, d).get(k)) for k in ("value", "low", "high")] for d in values}
    scale = scale_of([0.0, *(v for each in known.values() for v in each)])
    order = sorted(known, key=lambda d: (-(known[d][0] or 0.0), d))
    rows = []
    for d in order:
        value, low, high = known[d]
        label = t("{domain}: {value}", domain=f.text(d), value=unit.change(value))
        rows.append((f.text(d), unit.change(value), unit.interval(low, high, t),
                     forest_row(scale, value, low, high, label=label)))  # fmt: skip
    return Worth(
        f.text(found.get("way")), rows, axis(scale, unit.change), unit.name, shapley, f.texts(found, "harmful")
    )


def tree(record: Mapping[str, Any]) -> list[Branch]:
    """The tree along which the last way back with one was taken, line by line."""
    made = f.part(record, "candidate", "made")
    found = f.part(made, "tree") or next((p for k in reversed(list(made)) if (p := f.part(made, k, "tree"))), {})
    return list(_lines(found, 0)) if f.rows(found, "children") else []


def _lines(node: Mapping[str, Any], depth: int) -> list[Branch]:
    children = f.rows(node, "children") if depth < _DEEPEST else []
    below = [line for child in children for line in _lines(child, depth + 1)]
    return [Branch(f.text(node.get("name")), depth, not children), *below]
