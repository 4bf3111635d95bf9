"""The page of all rounds: its banner, its warnings, and its sections put together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fanbu.report import format as f
from fanbu.report import heat
from fanbu.report.growth import Flows, flows, growth
from fanbu.report.lineage import lineage
from fanbu.report.rounds import Events, Record, Round, domains_of, lines, new_rows, rounds_of, seconds, there
from fanbu.report.run import warnings as warnings_of
from fanbu.report.trajectory import trajectory
from fanbu.report.verdict import Fact, listed
from fanbu.report.words import Say, counted


@dataclass(frozen=True)
class Banner:
    """What came of all rounds, in words and numbers."""

    state: str
    word: str
    reason: str
    facts: list[Fact]
    champion: f.Hash | None


def sections(
    records: Sequence[Record], history: Events, champion: Mapping[str, Any] | None, t: Say
) -> dict[str, Any]:  # fmt: skip
    """What the template shows, section by section."""
    rounds = rounds_of(records, history)
    several = len(rounds) > 1  # else the change is the gain
    last: Record = records[-1] if records else {}
    crossed = flows(rounds, t) if rounds else None
    return {
        "title": f.text(last.get("name") or t("unnamed")),
        "facts": _facts(rounds, t),
        "version": f.text(last.get("version")),
        "banner": _banner(rounds, champion, crossed, t),
        "rounds": rounds,
        "gain": heat.gain_map(rounds, t),
        "change": heat.change_map(rounds, t) if several else None,
        "untold": heat.gain_map(rounds, t, "untold"),
        "untold_change": heat.change_map(rounds, t, "untold") if several else None,
        "trajectory": trajectory(rounds, t) if rounds else None,
        "lineage": lineage(rounds, history, champion, t),
        "growth": growth(rounds, t) if rounds else [],
        "flows": crossed,
        "lines": lines(rounds, t),
        "notices": _notices(rounds, champion, t),
        "warnings": _warnings(rounds),
        "limits": _limits(rounds, t),
    }


def _facts(rounds: Sequence[Round], t: Say) -> list[str]:
    if not rounds:
        return []
    last = rounds[-1].record
    told = [f.text(last.get("task")), f.moment(last.get("created"))]
    told += [counted(t, len(rounds), "{n} round", "{n} rounds")]
    told += [counted(t, len(domains_of(rounds)), "{n} domain", "{n} domains")]
    return [fact for fact in told if fact != f.DASH]


def _now(rounds: Sequence[Round], champion: Mapping[str, Any] | None) -> tuple[Round, str] | None:
    """The last round that measured the champion of now, and as what; None where none did."""
    model = champion.get("model") if champion else None
    if champion and model is None:
        return None
    for turn in reversed(rounds):
        roles = ("candidate", "incumbent") if turn.promoted else ("incumbent", "candidate")
        for role in roles:
            if model is None or f.part(turn.record, role).get("digest") == model:
                return turn, role
    return None


def _banner(rounds: Sequence[Round], champion: Mapping[str, Any] | None, crossed: Flows | None, t: Say) -> Banner:
    now = _now(rounds, champion)
    gain = heat.mean_gain(rounds, *now) if now else None
    state = "unknown" if gain is None or gain[0] == 0 else "accepted" if gain[0] > 0 else "refused"
    if gain is None:
        gone = bool(champion) and (champion or {}).get("model") is None
        word = t("No champion now" if gone else "No mean over these rounds" if rounds else "No round yet")
    else:
        shown = gain[1].named(gain[0], t)
        word = t("As it was at the start") if gain[0] == 0 else t("{change} since the start", change=shown)
    won = sum(turn.promoted is True for turn in rounds)
    lost = sum(turn.promoted is False for turn in rounds)
    reason = t("{won} promoted, {lost} refused.", won=won, lost=lost) if rounds else ""
    model = (champion or {}).get("model")
    return Banner(
        state, word, reason, _numbers(rounds, gain, crossed, t), None if model is None else f.digest(model)
    )  # fmt: skip


def _numbers(
    rounds: Sequence[Round], gain: tuple[float, f.Unit, int] | None, crossed: Flows | None, t: Say
) -> list[Fact]:
    spent = [got for turn in rounds if (got := seconds(turn.record)) is not None]
    over = counted(t, gain[2], "mean of {n} domain", "mean of {n} domains") if gain else ""
    return [
        Fact(t("Gain since the start"), gain[1].named(gain[0], t) if gain else f.DASH, over),
        _forgotten(rounds, t),
        Fact(t("Time"), f.seconds(sum(spent)) if spent else f.DASH, _each(spent, t)),
        Fact(t("Left its owners"), crossed.total if crossed else f.DASH, t("over all rounds") if crossed else ""),
    ]


def _each(spent: Sequence[float], t: Say) -> str:
    return t("{time} a round", time=f.seconds(sum(spent) / len(spent))) if len(spent) > 1 else ""


def _forgotten(rounds: Sequence[Round], t: Say) -> Fact:
    worst = heat.worst(rounds)
    name = t("Most forgotten")
    if worst is None:
        known = any(new_rows(turn, d) is not None for turn in rounds for d in domains_of(rounds))
        return Fact(name, f.DASH, t("no domain was without new rows" if known else "not recorded"))
    if worst.change >= 0:
        return Fact(name, t("nothing"), t("no domain without new rows fell"))
    where = t("{domain}, round {n}", domain=f.text(worst.domain), n=worst.number)
    return Fact(name, worst.unit.named(worst.change, t), where)


_TOLERATED = 0.01  # a point of accuracy: a larger fall without new rows is a warning

_FORGOT = "Round {n} forgot more than a point (0.01 of the metric) without new rows there: {names}."
_STUCK = "The last {n} rounds were all refused: these rows may hold nothing more that the champion can learn."
_CHANGED = "The champion of now is not the one that the last round left; the lineage says what happened since."
_CARRIED = "In the last round, reborn specialists were no better than their forerunners: {names}."
_REUSED = (
    "Every round is judged on test rows that earlier rounds were judged on too. Each look lets some luck through, "
    "so the gain over many rounds is flattered a little; rows that no round has seen would tell."
)
_NO_INTERVALS = (
    "The heat maps show differences of scores, without intervals; each round’s own page has the paired intervals."
)
_COMPOSITION = "Domains joined or left, so the averages of different rounds are over different domains."
_ONE_SEED = "All rounds have the same seed ({seed}): how much of this is the luck of training is not known."


def _notices(rounds: Sequence[Round], champion: Mapping[str, Any] | None, t: Say) -> list[str]:
    """What the numbers over rounds warn of."""
    if not rounds:
        return []
    said, steps = [], heat.changes(rounds)
    for i, turn in enumerate(rounds):
        fallen = [f.text(d) for d in steps if new_rows(turn, d) == 0 and (steps[d][i] or 0.0) < -_TOLERATED]
        said += [t(_FORGOT, n=turn.number, names=listed(fallen, t))] if fallen else []
    refused = next((n for n, turn in enumerate(reversed(rounds)) if turn.promoted is not False), len(rounds))
    said += [t(_STUCK, n=refused)] if refused > 1 else []
    last = (rounds[-1], "candidate" if rounds[-1].promoted else "incumbent")
    said += [t(_CHANGED)] if champion and _now(rounds, champion) != last else []
    grown = {d: f.part(rounds[-1].record, "domains", d, "specialist") for d in domains_of(rounds)}
    carried = [f.text(d) for d, own in grown.items() if own.get("born") == "carried on"]
    return said + ([t(_CARRIED, names=listed(carried, t))] if carried else [])


def _warnings(rounds: Sequence[Round]) -> list[tuple[str, str, str]]:
    """The rounds' own warnings, each once: (rounds, domain or nothing, text)."""
    found: dict[tuple[str, str], list[int]] = {}
    for turn in rounds:
        for said in dict.fromkeys(warnings_of(turn.record)):
            found.setdefault(said, []).append(turn.number)
    return [(", ".join(map(str, numbers)), domain, text) for (domain, text), numbers in found.items()]


def _limits(rounds: Sequence[Round], t: Say) -> list[str]:
    """What these numbers cannot tell, in sentences."""
    said = [t(_REUSED), t(_NO_INTERVALS)] if len(rounds) > 1 else []
    if any(not there(turn, d) for turn in rounds for d in domains_of(rounds)):
        said.append(t(_COMPOSITION))
    seeds = {f.text(turn.record.get("seed")) for turn in rounds if turn.record.get("seed") is not None}
    return said + ([t(_ONE_SEED, seed=seeds.pop())] if len(seeds) == 1 else [])
