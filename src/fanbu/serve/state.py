"""What the page of a running round shows: one plain value, in words that are ready to print."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fanbu.lang import translator
from fanbu.live import FILE
from fanbu.report import charts, verdict
from fanbu.report import format as f
from fanbu.report.words import words
from fanbu.serve.files import SILENT, liveness, moment, read_lines, read_object, read_records, whole

_ROUNDS, _EVENTS, _DOMAINS = 20, 40, 60  # how many of each the page shows; the report shows all
Say = Callable[[str], str]


def look(root: Path, lang: str = "en", now: float | None = None) -> dict[str, Any]:
    """Everything that the page shows, in words that are ready to print."""
    now, say = time.time() if now is None else now, translator("watch", lang)
    live, records, events = read_object(root / FILE), read_records(root), read_lines(root / "history.jsonl")
    state, why = liveness(live, now)
    name = live.get("name") or (records[-1][1].get("name") if records else None) or root.name
    return {
        "head": {
            "name": f.text(name), "state": state, "word": say(_WORDS[state]), "round": _round(live, records, say),
            "why": f.text(live.get("error")) if state == "failed" else say(why), "time": _elapsed(live, now, say),
            "report": "/report.html" if (root / "report.html").is_file() else None,
        },
        "now": _running(live, say, now) if state == "running" else None,
        "steps": _steps(live, state, records, say),
        "rounds": [_finished(root, number, record, lang) for number, record in records[: -_ROUNDS - 1 : -1]],
        "champion": _champion(read_object(root / "champion.json"), events, records),
        "stages": [_stage(row, say) for row in f.rows(live, "stages")][::-1],
        "events": [_event(row, say) for row in events[: -_EVENTS - 1 : -1]],
    }  # fmt: skip


_WORDS = {
    "running": "Running", "finished": "Finished", "failed": "Failed", "stalled": "Stopped", "idle": "Not running",
}  # fmt: skip


def _round(live: Mapping[str, Any], records: Sequence[Any], say: Say) -> str:
    last = records[-1][0] if records else 0
    number = whole(live.get("round")) if live.get("state") in ("running", "failed") else last
    of = max(whole(live.get("rounds")), last)
    return say("Round {number} of {of}").format(number=number, of=max(number, of)) if number else ""


def _elapsed(live: Mapping[str, Any], now: float, say: Say) -> str:
    began, updated = moment(live.get("started")), moment(live.get("updated"))
    if began is None or updated is None:
        return ""
    over = updated if live.get("state") != "running" or now - updated > SILENT else now
    return say("{time} since it was started").format(time=f.seconds(max(0.0, over - began)))


def _running(live: Mapping[str, Any], say: Say, now: float) -> dict[str, Any]:
    """The stage that runs, and how far it is."""
    done, total, left = (f.number(live.get(key)) for key in ("done", "total", "left"))
    known = done is not None and total is not None and total > 0
    share = min(1.0, max(0.0, (done or 0) / (total or 1))) if known else None
    updated = moment(live.get("updated"))
    if left is not None and updated is not None:
        left = max(0.0, left - max(0.0, now - updated))
    stage, what = f.text(live.get("stage")), f.text(live.get("what"))
    return {
        "stage": stage if live.get("stage") else say("between two stages"),
        "what": what if live.get("what") and what not in stage else "",
        "share": share,
        "count": f"{f.count(done)} / {f.count(total)}" if known else "",
        "left": "" if left is None or not known else _left(left, say),
    }


def _left(seconds: float, say: Say) -> str:
    return say("about {time} left").format(time=f.seconds(seconds)) if seconds >= 10 else say("a few seconds left")


def _decision(record: Mapping[str, Any]) -> str:
    accepted = f.part(record, "verdict").get("accepted")
    said = record.get("decision")
    return str(said) if said in ("promoted", "refused") else "promoted" if accepted is True else "refused"


_STEPS = {
    "promoted": ("✓", "promoted"), "refused": ("✗", "refused"), "running": ("●", "running"),
    "stopped": ("■", "stopped"), "waiting": ("○", "to come"),
}  # fmt: skip


def _steps(live: Mapping[str, Any], state: str, records: Sequence[Any], say: Say) -> list[dict[str, Any]]:
    """One step for each round that was, is and will be."""
    known = {number: _decision(record) for number, record in records}
    last, at = max(whole(live.get("rounds")), *known, 0), whole(live.get("round"))
    found = []
    for number in range(max(1, last - _ROUNDS), min(last, 100_000) + 1):
        here = {"running": "running", "failed": "stopped", "stalled": "stopped"}.get(state, "waiting")
        kind = known.get(number) or (here if number == at else "waiting")
        found.append({"number": number, "kind": kind, "sign": _STEPS[kind][0], "word": say(_STEPS[kind][1])})
    return found


def _finished(root: Path, number: int, record: Mapping[str, Any], lang: str) -> dict[str, Any]:
    """A finished round: what was decided and why, and what changed in each domain."""
    say, kind = translator("watch", lang), _decision(record)
    banner, page = verdict.banner(record, words(lang)), f"rounds/{record['folder']}/report.html"
    changes = _changes(record, number, lang)
    return {
        "number": number, "kind": kind, "sign": _STEPS[kind][0], "title": say("Round {number}").format(number=number),
        "word": say("Promoted") if kind == "promoted" else say("Kept the old one"), "reason": banner.reason,
        "facts": [{"name": fact.name, "value": fact.value, "note": fact.note} for fact in banner.facts],
        "domains": changes[:_DOMAINS], "more": max(0, len(changes) - _DOMAINS),
        "unit": words(lang)(verdict.average_unit(record).name),
        "report": f"/{page}" if (root / page).is_file() else None,
    }  # fmt: skip


def _changes(record: Mapping[str, Any], number: int, lang: str) -> list[dict[str, Any]]:
    """The change of each domain in one round, and where it lies on the scale of that round, in percent."""
    judged, say = f.part(record, "verdict", "domains"), translator("watch", lang)
    forest = verdict.forest(record, words(lang))
    shown = {row.name: row for _, group in forest.groups for row in group} if forest else {}
    sides = ("delta", "low", "high")
    numbers = {name: [f.number(f.part(judged, name).get(side)) for side in sides] for name in judged}
    scale = charts.scale_of([0.0, *(value for row in numbers.values() for value in row)])
    return [
        {
            "name": f.text(name), "tags": _tags(f.part(record, "domains", name), f.part(judged, name), number, say),
            "scores": row.scores, "change": row.change, "interval": row.interval, "sign": row.sign,
            "outcome": row.outcome, "zero": scale.at(0.0),
            "at": [None if value is None else round(scale.at(value), 2) for value in numbers[name]],
        }
        for name in judged
        if (row := shown.get(f.text(name))) is not None
    ]  # fmt: skip


def _tags(domain: Mapping[str, Any], judged: Mapping[str, Any], number: int, say: Say) -> str:
    """What is special about a domain in this round."""
    rows = [f.number(count) for count in f.part(domain, "new_rows").values()]
    fresh = sum(count for count in rows if count is not None)
    said = ["guard"] if judged.get("role") == "guard" else []
    said += ["joined"] if number > 1 and domain.get("joined") is True else []
    new = [say("{count} new rows").format(count=f.count(fresh))] if number > 1 and fresh > 0 else []
    return ", ".join([*map(say, said), *new])


def _champion(
    pointer: Mapping[str, Any], events: Sequence[Mapping[str, Any]], records: Sequence[tuple[int, Any]]
) -> dict[str, Any] | None:
    """The champion of now; none where the last domain to leave took the champion with it."""
    if not pointer.get("model") or (events and events[-1].get("event") == "left" and events[-1].get("model") is None):
        return None
    made = [number for number, record in records if record.get("key") == pointer.get("round")]
    model = f.digest(pointer.get("model"))
    return {
        "short": model.short,
        "full": model.full,
        "path": f.text(pointer.get("path")),
        "round": made[0] if made else None,
    }


def _stage(row: Mapping[str, Any], say: Say) -> dict[str, Any]:
    reused = row.get("reused") is True
    return {
        "name": f.text(row.get("stage")),
        "time": f.seconds(row.get("seconds")),
        "reused": say("reused") if reused else "",
    }


def _event(row: Mapping[str, Any], say: Say) -> dict[str, Any]:
    domain = f" ({f.text(row['domain'])})" if row.get("domain") else ""
    reason = f.text(row.get("reason")) if row.get("reason") else ""
    return {
        "what": say(f.text(row.get("event"))) + domain, "time": f.moment(row.get("time")),
        "model": f.digest(row.get("model")).short, "reason": reason,
    }  # fmt: skip
