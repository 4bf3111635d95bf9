"""Over all rounds: each specialist beside its forerunner, and what crossed from each domain."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fanbu.report import curves
from fanbu.report import format as f
from fanbu.report.rounds import Round, column_of, domains_of
from fanbu.report.run import born, validity
from fanbu.report.verdict import crossed_bytes
from fanbu.report.words import Say


@dataclass(frozen=True)
class Young:
    """One specialist of one round: how it came, its test score after its forerunner's, and on validation rows."""

    word: str
    sign: str
    scores: str
    valid: str
    note: str


@dataclass(frozen=True)
class Growth:
    """One domain's specialists over all rounds; None where a round has none."""

    domain: str
    metric: str
    cells: list[Young | None]


@dataclass(frozen=True)
class Flow:
    """What crossed from one domain: in each round, in all, and by kind."""

    domain: str
    rounds: list[str]
    total: str
    kinds: list[str]
    svg: str


@dataclass(frozen=True)
class Flows:
    """What crossed over all rounds; ``kinds`` are (legend drawing, name, sum)."""

    kinds: list[tuple[str, str, str]]
    rows: list[Flow]
    totals: list[str]
    total: str
    bytes: float


def growth(rounds: Sequence[Round], t: Say) -> list[Growth]:
    """Each domain's specialists, round by round; empty where there are none."""
    found = []
    for d in domains_of(rounds):
        cells = [_young(turn, d, column_of(rounds, d).higher, t) for turn in rounds]
        if any(cells):
            metric = column_of(rounds, d).metric
            found.append(Growth(f.text(d), f.text(metric).replace("_", " "), cells))
    return found


def _young(turn: Round, domain: str, higher: bool, t: Say) -> Young | None:
    own = f.part(turn.record, "domains", domain, "specialist")
    if not own:
        return None
    unit, before = column_of([turn], domain).unit, f.part(own, "forerunner")
    score, old = f.number(own.get("score")), f.number(before.get("score"))
    valid, old_valid, reborn = (
        validity(v, higher) for v in (own.get("valid"), before.get("valid"), own.get("reborn_valid"))
    )
    gain = None if score is None or old is None else (score - old) * (1 if higher else -1)
    sign = "" if gain is None else _sign(float(f"{gain * unit.scale:.{unit.digits}f}"))
    return Young(
        word=born(own.get("born"), t),
        sign=sign,
        scores=_arrow(unit, old, score, bool(before)),
        valid="" if valid is None else t("valid {scores}", scores=_arrow(unit, old_valid, valid, bool(before))),
        note=""
        if reborn is None or own.get("born") != "carried on"
        else t("the reborn one: {score}", score=unit.score(reborn)),
    )


def _sign(value: float) -> str:
    return "▲" if value > 0 else "▼" if value < 0 else "="


def _arrow(unit: f.Unit, old: float | None, new: float | None, both: bool) -> str:
    return f"{unit.score(old)} → {unit.score(new)}" if both else unit.score(new)


def flows(rounds: Sequence[Round], t: Say) -> Flows | None:
    """What crossed over all rounds; None where nothing is recorded."""
    names = domains_of(rounds)
    sums = {d: [crossed_bytes(f.part(turn.record, "domains", d)) for turn in rounds] for d in names}
    if all(got is None for row in sums.values() for got in row):
        return None
    by_kind = {d: _kinds(rounds, d) for d in names}
    order = sorted(
        {k for kinds in by_kind.values() for k in kinds}, key=lambda k: (-sum(b.get(k, 0) for b in by_kind.values()), k)
    )
    most = max([sum(kinds.values()) for kinds in by_kind.values()], default=0.0)
    rows = [_flow(d, sums[d], by_kind[d], order, most) for d in names]
    totals = [_sum([sums[d][i] for d in names]) for i in range(len(rounds))]
    every = _sum(totals) or 0.0
    kinds = [(curves.swatch(_colour(order, k)), k, f.size(sum(b.get(k, 0) for b in by_kind.values()))) for k in order]
    return Flows(kinds, rows, [f.size(got) for got in totals], f.size(every), every)


def _sum(values: Sequence[float | None]) -> float | None:
    known = [got for got in values if got is not None]
    return sum(known) if known else None


def _kinds(rounds: Sequence[Round], domain: str) -> dict[str, float]:
    found: dict[str, float] = {}
    for turn in rounds:
        for row in f.rows(f.part(turn.record, "domains", domain), "crossed"):
            if (got := f.number(row.get("bytes"))) is not None:
                kind = f.text(row.get("kind"))
                found[kind] = found.get(kind, 0.0) + max(0.0, got)
    return found


def _colour(order: Sequence[str], kind: str) -> int:
    """Seven colours, for the seven kinds there are; a kind nobody knows shares the last one."""
    return min(order.index(kind), 6)


def _flow(
    domain: str, sums: Sequence[float | None], kinds: dict[str, float], order: Sequence[str], most: float
) -> Flow:
    said = [(k, f"{k} {f.size(kinds[k])}") for k in order if k in kinds]
    parts = [(_colour(order, k), kinds[k] / most if most > 0 else 0.0, text) for k, text in said]
    label = f"{f.text(domain)}: {', '.join(text for _, text in said) or f.DASH}"
    total = _sum(sums)
    return Flow(
        f.text(domain),
        [f.size(got) for got in sums],
        f.size(total),
        [text for _, text in said],
        curves.stack(parts, label),
    )
