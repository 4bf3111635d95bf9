"""The mean over rounds of the champion, the specialists and the references: a line chart and the table behind it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from string import ascii_lowercase

from fanbu.report import comparison, curves
from fanbu.report import format as f
from fanbu.report.rounds import Record, Round, column_of, domains_of, score, standing
from fanbu.report.words import Say


@dataclass(frozen=True)
class Trajectory:
    """One chart: what its mean is over, its lines, and the table behind it (name, kind, tag, values)."""

    over: list[str]
    always: bool
    metric: str
    direction: str
    chart: curves.Lines
    kinds: list[str]
    columns: list[str]
    table: list[tuple[str, str, str, list[str]]]


def trajectory(rounds: Sequence[Round], t: Say) -> Trajectory | None:
    """The chart of the domains that share the most common metric; None where no round has a score."""
    columns = _columns(rounds)
    if not columns:
        return None
    common = [c for c in columns if all(standing(turn, c.name) is not None for turn in rounds)]
    over = common or columns
    series = _series(rounds, [c.name for c in over], bool(common), t)
    if not any(value is not None for one in series for value in one.values):
        return None
    unit, names = over[0].unit, [t("start"), *(str(turn.number) for turn in rounds)]
    metric = f.text(over[0].metric).replace("_", " ")
    metric = t("{metric} in percent", metric=metric) if unit == f.POINTS else metric
    label = "; ".join(f"{s.name}: {', '.join(unit.score(value) for value in s.values)}" for s in series)
    kept = [False, *(turn.promoted is False for turn in rounds)]
    return Trajectory(
        over=[f.text(c.name) for c in over],
        always=bool(common),
        metric=metric,
        direction=t("higher is better" if over[0].higher else "lower is better"),
        chart=curves.lines(series, kept, names, lambda value: _tick(unit, value), label),
        kinds=[k for k in ("champion", "kept", "refused", "specialists") if k == "kept" or _has(series, k)]
        if any(kept)
        else [k for k in ("champion", "specialists") if _has(series, k)],
        columns=names,
        table=[(s.name, s.kind, s.tag, [unit.score(value) for value in s.values]) for s in series],
    )


def _tick(unit: f.Unit, value: float) -> str:
    return f"{value * unit.scale:.4g}".replace("-", f.MINUS)


def _has(series: Sequence[curves.Series], kind: str) -> bool:
    return any(one.kind == kind for one in series)


def _columns(rounds: Sequence[Round]) -> list[comparison.Column]:
    """The domains of the chart: those that fed back and share the metric that most of them have."""
    known = [column_of(rounds, d) for d in domains_of(rounds)]
    known = [c for c in known if any(standing(turn, c.name) is not None for turn in rounds)]
    fed = [c for c in known if not c.guard] or known
    kinds = [(c.metric, c.higher) for c in fed]
    most = max(kinds, key=kinds.count, default=None)
    return [c for c in fed if (c.metric, c.higher) == most]


def _series(rounds: Sequence[Round], domains: Sequence[str], always: bool, t: Say) -> list[curves.Series]:
    """The champion (from the first incumbent on), refused candidates, specialists and references."""

    def mean(values: Sequence[float | None]) -> float | None:
        known = [value for value in values if value is not None]
        return sum(known) / len(known) if known and (len(known) == len(values) or not always) else None

    first = mean([score(rounds[0].record, "incumbent", d) for d in domains])
    champion = [first, *(mean([standing(turn, d) for d in domains]) for turn in rounds)]
    lost = [
        mean([score(turn.record, "candidate", d) for d in domains]) if turn.promoted is False else None
        for turn in rounds
    ]
    found = [curves.Series("champion", t("champion"), champion)]
    if any(value is not None for value in lost):
        found.append(curves.Series("refused", t("refused candidate"), [None, *lost]))
    grown = [mean([score(turn.record, "specialists", d) for d in domains]) for turn in rounds]
    if any(value is not None for value in grown):
        found.append(curves.Series("specialists", t("specialists, each at home"), [None, *grown]))
    names = dict.fromkeys(name for turn in rounds for name in _references(turn.record))
    for tag, name in zip([*ascii_lowercase, *([""] * len(names))], names, strict=False):
        values = [mean([_named(turn.record, name, d) for d in domains]) for turn in rounds]
        if any(value is not None for value in values):
            found.append(curves.Series("reference", f.text(name), [None, *values], tag))
    return found


def _references(record: Record) -> list[str]:
    known = ("incumbent", "candidate", "specialists")
    return [str(row.get("name")) for row in f.rows(record, "table") if row.get("role") not in known]


def _named(record: Record, name: str, domain: str) -> float | None:
    rows = [row for row in f.rows(record, "table") if str(row.get("name")) == name]
    return f.number(f.part(rows[0], "domains", domain).get("told")) if rows else None
