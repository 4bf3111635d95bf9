"""Heat maps: domains by rounds, what was gained since the start and what changed from round to round."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fanbu.report import format as f
from fanbu.report.comparison import Column
from fanbu.report.rounds import Round, column_of, domains_of, new_rows, score, standing, started, there
from fanbu.report.words import Say, counted

STEPS = 5  # shades on each side of zero


@dataclass(frozen=True)
class Cell:
    """One domain in one round: the change, its shade (-5 to 5), and what stands beside it."""

    shown: str
    step: int
    small: str
    state: str
    marks: list[str]


@dataclass(frozen=True)
class Row:
    """One domain over all rounds."""

    name: str
    metric: str
    note: str
    start: str
    cells: list[Cell]


@dataclass(frozen=True)
class Ramp:
    """The legend of one unit: shades from the worst to the best, and the numbers at the ends."""

    unit: str
    low: str
    high: str


@dataclass(frozen=True)
class Map:
    """One heat map."""

    rows: list[Row]
    mean: Row | None
    ramps: list[Ramp]
    marks: list[str]
    metric: str


@dataclass(frozen=True)
class Worst:
    """The largest loss of a domain that got no new rows."""

    change: float
    unit: f.Unit
    domain: str
    number: int


Values = dict[str, list[float | None]]
Beside = Callable[[Round, Column], tuple[str, list[str]]]  # the small text in a cell, and its marks


def gains(rounds: Sequence[Round], way: str = "told") -> Values:
    """For each domain, how far each round's champion is above the first incumbent. More is better, always."""
    return {d: _since(rounds, d, way) for d in domains_of(rounds)}


def _since(rounds: Sequence[Round], domain: str, way: str) -> list[float | None]:
    first, sign = started(rounds, domain, way), _sign(rounds, domain)
    scores = [standing(turn, domain, way) for turn in rounds]
    return [None if got is None or first is None else sign * (got - first) for got in scores]


def changes(rounds: Sequence[Round], way: str = "told") -> Values:
    """For each domain, the step from the champion of the round before to this round's. More is better, always."""
    found: Values = {}
    for d in domains_of(rounds):
        last, sign, found[d] = started(rounds, d, way), _sign(rounds, d), []
        for turn in rounds:
            now = standing(turn, d, way)
            found[d].append(None if now is None or last is None else sign * (now - last))
            last = last if now is None else now
    return found


def _sign(rounds: Sequence[Round], domain: str) -> int:
    return 1 if column_of(rounds, domain).higher else -1


def worst(rounds: Sequence[Round]) -> Worst | None:
    """What was forgotten most: over rounds, among domains that got no new rows in them. None where there were none."""
    found = [
        Worst(change, column_of(rounds, d).unit, d, turn.number)
        for d, steps in changes(rounds).items()
        for turn, change in zip(rounds, steps, strict=True)
        if change is not None and new_rows(turn, d) == 0
    ]
    return min(found, key=lambda w: w.change * w.unit.scale, default=None)


def mean_gain(rounds: Sequence[Round], turn: Round, role: str) -> tuple[float, f.Unit, int] | None:
    """How far one model of a round is above the first incumbent: the mean over domains that fed back.

    Gives the value, its unit and the number of domains.
    """
    columns = [column_of(rounds, d) for d in domains_of(rounds) if there(turn, d)]
    gained: dict[str, float | None] = {}
    for c in columns:
        first, now = started(rounds, c.name), score(turn.record, role, c.name)
        gained[c.name] = None if first is None or now is None else (now - first if c.higher else first - now)
    mean = _mean(columns, gained)
    return None if mean is None else (mean[0], columns[0].unit, mean[1])


def _mean(columns: Sequence[Column], values: dict[str, float | None]) -> tuple[float, int] | None:
    if len({(c.unit, c.higher) for c in columns}) != 1:
        return None
    fed = [c for c in columns if not c.guard] or list(columns)
    known = [got for c in fed if (got := values[c.name]) is not None]
    return (sum(known) / len(known), len(known)) if known else None


def gain_map(rounds: Sequence[Round], t: Say, way: str = "told") -> Map | None:
    """Gain since the first incumbent; the small number is the score itself."""

    def beside(turn: Round, column: Column) -> tuple[str, list[str]]:
        return column.unit.score(standing(turn, column.name, way)), []

    return _map(rounds, gains(rounds, way), beside, way, t)


def change_map(rounds: Sequence[Round], t: Say, way: str = "told") -> Map | None:
    """Change against the round before; the small text says how many rows were new, and a mark that there were none."""

    def beside(turn: Round, column: Column) -> tuple[str, list[str]]:
        rows = new_rows(turn, column.name)
        return t("+{n} rows", n=f.count(rows)) if rows else "", ["idle"] if rows == 0 else []

    return _map(rounds, changes(rounds, way), beside, way, t)


def _map(rounds: Sequence[Round], values: Values, beside: Beside, way: str, t: Say) -> Map | None:
    if all(value is None for row in values.values() for value in row):
        return None
    columns = [column_of(rounds, d) for d in values]
    units = dict.fromkeys(c.unit for c in columns)
    limits = {unit: _limit([v for c in columns if c.unit == unit for v in values[c.name]]) for unit in units}
    rows = [_row(rounds, c, values[c.name], limits[c.unit], beside, way, t) for c in columns]
    marks = {mark for row in rows for cell in row.cells for mark in cell.marks}
    marks |= {"moved"} if any(turn.moved for turn in rounds) else set()
    return Map(
        rows=rows,
        mean=_mean_row(rounds, columns, values, limits, t) if len(columns) > 1 else None,
        ramps=[Ramp(unit.name, unit.change(-top), unit.change(top)) for unit, top in limits.items()],
        marks=[mark for mark in ("idle", "tests", "moved") if mark in marks],
        metric=rows[0].metric if len({row.metric for row in rows}) == 1 else "",
    )


def metric_of(column: Column) -> str:
    """A metric's name, its unit where that is percent, and an arrow where less is better."""
    percent = "\u00a0%" if column.unit == f.POINTS else ""
    return f.text(column.metric).replace("_", " ") + percent + ("" if column.higher else " ↓")


def _limit(values: Sequence[float | None]) -> float:
    """A round number that no value goes beyond."""
    most = max([abs(v) for v in values if v is not None], default=0.0)
    if most < 1e-12:
        return 0.01
    power = 10.0 ** math.floor(math.log10(most))
    return next(power * m for m in (1, 2, 5, 10) if power * m >= most * (1 - 1e-9))


def _step(value: float, limit: float, unit: f.Unit) -> int:
    """The shade: none for what is printed as zero."""
    if float(f"{value * unit.scale:.{unit.digits}f}") == 0:
        return 0
    return int(math.copysign(min(STEPS, math.ceil(abs(value) / limit * STEPS - 1e-9)), value))


def _row(
    rounds: Sequence[Round],
    column: Column,
    values: Sequence[float | None],
    limit: float,
    beside: Beside,
    way: str,
    t: Say,
) -> Row:
    seen = [i for i, turn in enumerate(rounds) if there(turn, column.name)]
    cells = []
    for i, (turn, value) in enumerate(zip(rounds, values, strict=True)):
        if value is None:
            cells.append(Cell(f.DASH, 0, "", _absence(i, seen, turn, column.name), []))
            continue
        small, marks = beside(turn, column)
        marks += ["tests"] if i and _tests_changed(rounds[i - 1], turn, column.name) else []
        cells.append(Cell(column.unit.change(value), _step(value, limit, column.unit), small, "", marks))
    note = t("guard") if column.guard else ""
    return Row(
        f.text(column.name), metric_of(column), note, column.unit.score(started(rounds, column.name, way)), cells
    )


def _absence(at: int, seen: Sequence[int], turn: Round, domain: str) -> str:
    """Why a cell is empty: the domain had not joined, had left, or was there and not measured."""
    if f.clean(domain) in f.texts(turn.record, "left") or (seen and at > seen[-1]):
        return "left"
    if seen and at < seen[0]:
        return "early"
    return "gone"


def _tests_changed(before: Round, turn: Round, domain: str) -> bool:
    """Whether a domain's number of test rows is another one than in the round before."""
    old, new = (f.number(f.part(r.record, "domains", domain, "rows").get("test")) for r in (before, turn))
    return old is not None and new is not None and old != new


def _mean_row(
    rounds: Sequence[Round], columns: Sequence[Column], values: Values, limits: dict[f.Unit, float], t: Say
) -> Row | None:
    cells = []
    for i, turn in enumerate(rounds):
        present = [c for c in columns if there(turn, c.name)]
        mean = _mean(present, {d: row[i] for d, row in values.items()})
        if mean is None:
            return None
        unit = present[0].unit
        step = _step(mean[0], limits[unit], unit)
        cells.append(Cell(unit.change(mean[0]), step, counted(t, mean[1], "{n} domain", "{n} domains"), "", []))
    guarded = any(c.guard for c in columns)
    return Row(t("Average"), "", t("of those that fed back") if guarded else "", "", cells)
