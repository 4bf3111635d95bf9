"""The rounds of a workspace side by side: what each measured, whose model stood at its end, and the list of them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fanbu.report import comparison
from fanbu.report import format as f
from fanbu.report import verdict as v
from fanbu.report.words import Say

Record = Mapping[str, Any]
Events = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Round:
    """One finished round; ``moved`` are the events that changed the champion since the round before."""

    number: int
    record: Record
    promoted: bool | None
    moved: tuple[str, ...]


@dataclass(frozen=True)
class Line:
    """One round in the list of rounds."""

    number: int
    link: str
    state: str
    word: str
    reason: str
    change: str
    interval: str
    kept: str
    kept_interval: str
    seconds: str
    created: str
    news: list[str]


def rounds_of(records: Sequence[Record], history: Events) -> list[Round]:
    """The rounds, numbered as recorded, or by their place where old records do not count up."""
    stated = [f.number(record.get("round")) for record in records]
    counted = [int(n) for n in stated if n is not None and n == int(n)]
    rising = len(counted) == len(records) and counted == sorted(set(counted))
    numbers = counted if rising else list(range(1, len(records) + 1))
    moved = _moved(records, history)
    return [
        Round(number, record, promoted(record), by)
        for number, record, by in zip(numbers, records, moved, strict=True)
    ]  # fmt: skip


def promoted(record: Record) -> bool | None:
    """Whether the round's candidate became the champion; None where nothing was decided."""
    decision = record.get("decision")
    if decision in ("promoted", "refused"):
        return bool(decision == "promoted")
    accepted = f.part(record, "verdict").get("accepted")
    return accepted if isinstance(accepted, bool) else None


def decided(event: Mapping[str, Any]) -> bool:
    """Whether an event is a round's own decision."""
    return event.get("event") in ("promoted", "refused") and event.get("reason") != "by hand"


def _moved(records: Sequence[Record], history: Events) -> list[tuple[str, ...]]:
    """For each record, what else happened to the champion between the decision before and its own."""
    by_round: dict[str, tuple[str, ...]] = {}
    since: list[str] = []
    for event in history:
        if decided(event):
            by_round.setdefault(str(event.get("round")), tuple(since))
            since = []
        elif event.get("event") in ("rolled back", "left", "promoted"):
            since.append("by hand" if event.get("event") == "promoted" else str(event.get("event")))
    return [by_round.get(str(record.get("key")), ()) for record in records]


def domains_of(rounds: Sequence[Round]) -> list[str]:
    """Every domain that any round knows, in order of appearance."""
    found: dict[str, None] = {}
    for turn in rounds:
        for part in (f.part(turn.record, "domains"), f.part(turn.record, "verdict", "domains")):
            found |= dict.fromkeys(map(str, part))
        found |= dict.fromkeys(str(d) for row in f.rows(turn.record, "table") for d in f.part(row, "domains"))
    return list(found)


def column_of(rounds: Sequence[Round], domain: str) -> comparison.Column:
    """How a domain is read, as the last round that measured it says."""
    knowing = [turn.record for turn in rounds if there(turn, domain)] or [rounds[-1].record]
    return comparison.column_of(knowing[-1], domain)


def there(turn: Round, domain: str) -> bool:
    """Whether a domain took part in a round."""
    return bool(f.part(turn.record, "domains", domain)) or score(turn.record, "incumbent", domain) is not None


def score(record: Record, role: str, domain: str, way: str = "told") -> float | None:
    """A score of the incumbent or the candidate, from the table or else from the verdict."""
    for row in f.rows(record, "table"):
        if row.get("role") == role and (got := f.number(f.part(row, "domains", domain).get(way))) is not None:
            return got
    judged = f.part(record, "verdict", "domains" if way == "told" else "untold", domain)
    return f.number(judged.get(role))


def standing(turn: Round, domain: str, way: str = "told") -> float | None:
    """The score of the model that was the champion at the end of a round."""
    return score(turn.record, "candidate" if turn.promoted else "incumbent", domain, way)


def started(rounds: Sequence[Round], domain: str, way: str = "told") -> float | None:
    """The score of the first incumbent that was measured on a domain."""
    return next((got for turn in rounds if (got := score(turn.record, "incumbent", domain, way)) is not None), None)


def new_rows(turn: Round, domain: str) -> float | None:
    """Rows that a domain got in a round, training and unlabelled; None where the record does not say."""
    counts = [f.number(n) for n in f.part(turn.record, "domains", domain, "new_rows").values()]
    known = [n for n in counts if n is not None]
    return sum(known) if known else None


def seconds(record: Record) -> float | None:
    """What a round took, without the stages that an earlier run had done."""
    fresh = [row for row in f.rows(record, "costs") if row.get("reused") is not True]
    known = [got for row in fresh if (got := f.number(row.get("seconds"))) is not None]
    return sum(known) if known else None


def link(record: Record) -> str:
    """Where the round's own page lies, relative to the workspace; nothing where the key is none of ours."""
    key = str(record.get("key"))
    return f"rounds/{key[:20]}/report.html" if re.fullmatch(r"[0-9a-f]{20,128}", key) else ""


_STATES = {True: ("accepted", "promoted"), False: ("refused", "refused"), None: ("unknown", "not decided")}


def lines(rounds: Sequence[Round], t: Say) -> list[Line]:
    """The list of rounds, the last first."""
    return [_line(turn, rounds[i - 1] if i else None, t) for i, turn in reversed(list(enumerate(rounds)))]


def _line(turn: Round, before: Round | None, t: Say) -> Line:
    judged, unit = f.part(turn.record, "verdict"), v.average_unit(turn.record)
    average, kept = f.part(judged, "average"), f.part(judged, "gain_kept")
    state, word = _STATES[turn.promoted]
    return Line(
        number=turn.number,
        link=link(turn.record),
        state=state,
        word=t(word),
        reason=f.text(judged.get("reason")),
        change=unit.named(average.get("delta"), t),
        interval=unit.interval(average.get("low"), average.get("high"), t),
        kept=f.percent(kept.get("value")),
        kept_interval=v.percents(kept.get("low"), kept.get("high"), t),
        seconds=f.seconds(seconds(turn.record)),
        created=f.moment(turn.record.get("created")),
        news=_news(turn, before, t),
    )


def _news(turn: Round, before: Round | None, t: Say) -> list[str]:
    """What was different from the round before, in a few words."""
    domains = f.part(turn.record, "domains")
    joined = [f.text(d) for d in domains if f.part(domains, d).get("joined") is True] if before else []
    gone = set(f.texts(turn.record, "left")) - set(f.texts(before.record, "left") if before else [])
    said = [t("joined: {names}", names=v.listed(joined, t))] if joined else []
    said += [t("left: {names}", names=v.listed(sorted(gone), t))] if gone else []
    rows = [n for d in domains if (n := new_rows(turn, d)) is not None]
    said += [t("{n} new rows", n=f.count(sum(rows)))] if rows else []
    return said + [t(MOVED[by]) for by in dict.fromkeys(turn.moved)]


MOVED = {
    "rolled back": "before it: rolled back",
    "by hand": "before it: promoted by hand",
    "left": "before it: a domain's labels were taken out",
}
