"""The middle of the page: every system on every domain, told and untold, and the metrics beside the main one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fanbu.report import charts
from fanbu.report import format as f
from fanbu.report.words import Say


@dataclass(frozen=True)
class Column:
    """One domain and how its metric is read."""

    name: str
    metric: str
    unit: f.Unit
    higher: bool
    guard: bool


@dataclass(frozen=True)
class Cell:
    """One score, told and untold, and whether it is the best of its column."""

    told: str
    untold: str
    told_best: bool
    untold_best: bool


@dataclass(frozen=True)
class System:
    """One row of the comparison."""

    name: str
    role: str
    cells: list[Cell]
    seconds: str


@dataclass(frozen=True)
class Panel:
    """The dot plot of all domains with one metric: a strip for each, and their axis."""

    metric: str
    direction: str
    strips: list[tuple[str, str]]
    axis_svg: str


@dataclass(frozen=True)
class Metrics:
    """The further metrics of one domain: a value for each system and metric."""

    domain: str
    systems: list[tuple[str, list[str]]]


@dataclass(frozen=True)
class Comparison:
    """The table against the baselines, and the charts and details beside it."""

    columns: list[Column]
    averaged: bool
    systems: list[System]
    timed: bool
    untold: bool
    panels: list[Panel]
    kinds: list[str]
    metric_names: list[str]
    metrics: list[Metrics]


# Printed as they are, not in percent.
_PLAIN = {"loss", "perplexity", "bits_per_byte"}


def comparison(record: Mapping[str, Any], t: Say) -> Comparison | None:
    """The comparison of all systems; None where the record has no table."""
    table = f.rows(record, "table")
    columns = _columns(record, table)
    if not table or not columns:
        return None
    averaged = len(columns) > 1 and len({(c.unit, c.higher) for c in columns}) == 1
    names = _metric_names(table)
    return Comparison(
        columns=columns,
        averaged=averaged,
        systems=_systems(table, columns, averaged),
        timed=any(f.number(row.get("seconds")) is not None for row in table),
        untold=any(_score(row, c.name, "untold") is not None for row in table for c in columns),
        panels=_panels(table, columns, t),
        kinds=[kind for kind in ("candidate", "incumbent", "specialists", "reference") if _has(table, kind)],
        metric_names=[f.text(name).replace("_", " ") for name in names],
        metrics=_metrics(table, columns, names),
    )


def _has(table: Sequence[Mapping[str, Any]], kind: str) -> bool:
    return any(_role(row) == kind for row in table)


def _role(row: Mapping[str, Any]) -> str:
    role = str(row.get("role"))
    return role if role in ("candidate", "incumbent", "specialists") else "reference"


def _columns(record: Mapping[str, Any], table: Sequence[Mapping[str, Any]]) -> list[Column]:
    measured = {str(name) for row in table for name in f.part(row, "domains")}
    ordered = [*f.part(record, "domains"), *f.part(record, "verdict", "domains"), *sorted(measured)]
    return [column_of(record, name) for name in dict.fromkeys(map(str, ordered)) if name in measured]


def column_of(record: Mapping[str, Any], name: str) -> Column:
    """How one domain of a record is read."""
    judged, known = f.part(record, "verdict", "domains", name), f.part(record, "domains", name)
    metric = judged.get("metric") or known.get("metric") or ("loss" if record.get("task") == "causal-lm" else "score")
    higher = f.higher_is_better(metric, judged.get("higher_is_better"))
    guard = "guard" in (judged.get("role"), known.get("role"))
    return Column(name, str(metric), f.unit_of(metric), higher, guard)


def _score(row: Mapping[str, Any], domain: str, way: str) -> float | None:
    return f.number(f.part(row, "domains", domain).get(way))


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None


def _systems(table: Sequence[Mapping[str, Any]], columns: Sequence[Column], averaged: bool) -> list[System]:
    told, untold = (
        [_with_mean([_score(row, c.name, way) for c in columns], columns, averaged) for row in table]
        for way in ("told", "untold")
    )
    wide = [*columns, columns[0]] if averaged else list(columns)
    best_told, best_untold = (_best(scores, wide) for scores in (told, untold))
    return [
        System(
            name=f.text(row.get("name")),
            role=_role(row),
            cells=[
                Cell(c.unit.score(a), c.unit.score(b), _is(c, a, best_told[i]), _is(c, b, best_untold[i]))
                for i, (c, a, b) in enumerate(zip(wide, told[r], untold[r], strict=True))
            ],
            seconds=f.seconds(row.get("seconds")),
        )
        for r, row in enumerate(table)
    ]


def _with_mean(values: list[float | None], columns: Sequence[Column], averaged: bool) -> list[float | None]:
    """The scores, and their mean over the domains that fed back (over all, where only guards were scored)."""
    fed = [value for value, column in zip(values, columns, strict=True) if not column.guard]
    return [*values, _mean(fed or values)] if averaged else values


def _best(scores: Sequence[Sequence[float | None]], columns: Sequence[Column]) -> list[float | None]:
    """The best value of each column; None where fewer than two systems have one."""
    found: list[float | None] = []
    for i, column in enumerate(columns):
        known = [row[i] for row in scores]
        values = [value for value in known if value is not None]
        found.append(None if len(values) < 2 else max(values) if column.higher else min(values))
    return found


def _is(column: Column, value: float | None, best: float | None) -> bool:
    """Whether a score is printed the same as the best one: what looks equal is marked equally."""
    return value is not None and best is not None and column.unit.score(value) == column.unit.score(best)


def _panels(table: Sequence[Mapping[str, Any]], columns: Sequence[Column], t: Say) -> list[Panel]:
    metrics = dict.fromkeys((column.metric, column.higher) for column in columns)
    return [
        _panel(table, [c for c in columns if (c.metric, c.higher) == (metric, higher)], t) for metric, higher in metrics
    ]


def _panel(table: Sequence[Mapping[str, Any]], columns: Sequence[Column], t: Say) -> Panel:
    first = columns[0]
    scale = charts.scale_of([_score(row, c.name, "told") for row in table for c in columns])
    strips = [(f.text(column.name), _strip(table, column, scale)) for column in columns]
    metric = f.text(first.metric).replace("_", " ")
    name = t("{metric} in percent", metric=metric) if first.unit == f.POINTS else metric
    axis = charts.axis(
        scale, lambda tick: f"{tick * first.unit.scale:.6g}".replace("-", f.MINUS), t("axis: {name}", name=name)
    )
    direction = t("further right is better" if first.higher else "further left is better")
    return Panel(name, direction, strips, axis)


def _strip(table: Sequence[Mapping[str, Any]], column: Column, scale: charts.Scale) -> str:
    marks = [
        charts.Mark(_role(row), f.text(row.get("name")), value)
        for row in table
        if (value := _score(row, column.name, "told")) is not None
    ]
    values = ", ".join(f"{mark.name} {column.unit.score(mark.value)}" for mark in marks)
    return charts.dots(scale, marks, column.unit.score, f"{f.text(column.name)}: {values}")


def _metric_names(table: Sequence[Mapping[str, Any]]) -> list[str]:
    usual = [
        "accuracy",
        "macro_f1",
        "weighted_f1",
        "precision",
        "recall",
        "calibration_error",
        "loss",
    ]
    found = {
        str(name)
        for row in table
        for domain in f.part(row, "domains")
        for name in f.part(row, "domains", domain, "metrics")
    }
    return [name for name in usual if name in found] + sorted(found.difference(usual))


def _metrics(table: Sequence[Mapping[str, Any]], columns: Sequence[Column], names: Sequence[str]) -> list[Metrics]:
    grouped = []
    for column in columns:
        systems = [
            (f.text(row.get("name")), [_metric(name, own.get(name)) for name in names])
            for row in table
            if (own := f.part(row, "domains", column.name, "metrics"))
        ]
        if systems:
            grouped.append(Metrics(f.text(column.name), systems))
    return grouped


def _metric(name: str, value: object) -> str:
    return f.Unit(1.0, 3, "").score(value) if name in _PLAIN else f.unit_of(name).score(value)
