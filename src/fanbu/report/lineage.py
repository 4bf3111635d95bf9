"""The tree of large models: what came from what, what was promoted, refused, taken back, and who is champion now."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fanbu.report import curves
from fanbu.report import format as f
from fanbu.report.rounds import Events, Round, link
from fanbu.report.words import Say


@dataclass(frozen=True)
class Step:
    """One event: the model it is about, its parent's place among the steps, and how it is drawn."""

    model: str
    kind: str
    parent: str
    event: Mapping[str, Any]


@dataclass(frozen=True)
class Leaf:
    """One row of the tree, in words and lines."""

    word: str
    state: str
    model: f.Hash
    parent: f.Hash | None
    link: str
    reason: str
    time: str
    champion: bool
    svg: str


_BASE, _GONE = "base", "nothing after event"


def lineage(rounds: Sequence[Round], history: Events, champion: Mapping[str, Any] | None, t: Say) -> list[Leaf]:
    """The tree, oldest first; empty where the history is."""
    steps = _steps(rounds, history)
    if not steps:
        return []
    now = str((champion or {}).get("model", ""))
    lanes = _lanes(steps)
    most = 1 + max(lanes.values())
    first = {step.model: i for i, step in reversed(list(enumerate(steps)))}
    return [
        _leaf(step, curves.tree_row(_drawn(steps, lanes, first, i, now), most), i == first[step.model], now, rounds, t)
        for i, step in enumerate(steps)
    ]


def _steps(rounds: Sequence[Round], history: Events) -> list[Step]:
    """History as steps, with the parents that older histories do not name filled in by replay."""
    steps: list[Step] = []
    known: set[str] = set()
    standing = ""
    base = f.part(rounds[0].record, "base") if rounds else {}
    if base.get("digest"):
        digest = f"{_BASE} {base['digest']}"  # apart from an incumbent that is the base bit for bit
        steps.append(Step(digest, "base", "", {"model": base["digest"], "reason": base.get("source")}))
        known, standing = {digest}, digest
    root = standing
    for i, event in enumerate(history):
        model, what = str(event.get("model")), event.get("event")
        if event.get("model") is None:  # what was forgotten left no champion: the next round starts from the base
            steps.append(Step(f"{_GONE} {i}", "refused", standing, event))
            standing = root
            continue
        stated = str(event.get("parent"))
        parent = stated if stated in known and stated != model else standing
        steps.append(Step(model, _kind(event, model in known), "" if model in known else parent, event))
        known.add(model)
        standing = standing if what == "refused" else model
    return steps


def _kind(event: Mapping[str, Any], known: bool) -> str:
    what = event.get("event")
    if what == "refused":
        return "refused"
    return "back" if what == "rolled back" or known else "stood"


def _spans(steps: Sequence[Step]) -> dict[str, tuple[int, int]]:
    """From which row to which each model's line runs: from its first event to its last event or child."""
    spans: dict[str, tuple[int, int]] = {}
    for i, step in enumerate(steps):
        for model in (step.model, step.parent):
            if model:
                spans[model] = (spans[model][0] if model in spans else i, i)
    return spans


def _lanes(steps: Sequence[Step]) -> dict[str, int]:
    """A lane for each model: its parent's where that line ends here, else the next free one at its right."""
    spans, lanes = _spans(steps), dict[str, int]()
    for i, step in enumerate(steps):
        if step.model in lanes:
            continue
        above = lanes.get(step.parent)
        if above is None:
            lanes[step.model] = 0
        elif spans[step.parent][1] == i and step.kind != "refused":
            lanes[step.model] = above
        else:
            last = spans[step.model][1]
            taken = {lanes[m] for m in lanes if spans[m][1] >= i and spans[m][0] <= last}
            lanes[step.model] = next(lane for lane in range(above + 1, len(steps) + 1) if lane not in taken)
    return lanes


def _path(steps: Sequence[Step], first: Mapping[str, int], now: str) -> dict[str, int]:
    """The champion of now and what it came from; for each, the row at which the path goes on to the next."""
    path: dict[str, int] = {}
    model, row = now, first.get(now, -1)
    while model in first:
        path[model] = row
        row, model = first[model], steps[first[model]].parent
    return path


def _drawn(steps: Sequence[Step], lanes: Mapping[str, int], first: Mapping[str, int], i: int, now: str) -> curves.Lane:
    spans, step, path = _spans(steps), steps[i], _path(steps, first, now)
    new = first[step.model] == i
    kind = "champion" if step.model == now and new else step.kind
    return curves.Lane(
        lane=lanes[step.model],
        kind=kind,
        path=step.model in path,
        branch=lanes.get(step.parent) if new else None,
        above=tuple((lanes[m], i <= path.get(m, -1)) for m, (start, end) in spans.items() if start < i <= end),
        below=tuple((lanes[m], i < path.get(m, -1)) for m, (start, end) in spans.items() if start <= i < end),
    )


def _leaf(step: Step, svg: str, new: bool, now: str, rounds: Sequence[Round], t: Say) -> Leaf:
    event = step.event
    found = next((turn for turn in rounds if turn.record.get("key") == event.get("round") is not None), None)
    word, state = _words(event, found, step, t)
    reason = event.get("reason")
    leaf = Leaf(
        word=word,
        state=state,
        model=f.digest(event.get("model")),
        parent=None,
        link=link(found.record) if found and event.get("event") in ("promoted", "refused") else "",
        reason="" if reason in (None, "by hand") else f.text(reason),
        time="" if event.get("time") is None else f.moment(event.get("time")),
        champion=step.model == now and new,
        svg=svg,
    )
    if event.get("event") == "rolled back" and event.get("from") is not None:
        return replace(leaf, parent=f.digest(event.get("from")))
    return leaf


def _words(event: Mapping[str, Any], found: Round | None, step: Step, t: Say) -> tuple[str, str]:
    """What happened, and the colour it is said in."""
    what, number = event.get("event"), event.get("number")
    n = number if f.number(number) is not None else found.number if found else None
    if step.kind == "base":
        return t("base model"), ""
    if what == "promoted" and event.get("reason") == "by hand":
        return t("promoted by hand"), "up"
    if what in ("promoted", "refused"):
        state = "up" if what == "promoted" else "down"
        return (t(str(what)) if n is None else t(_DECIDED[str(what)], n=f.text(n))), state
    if what == "left" and event.get("model") is None:
        return t(
            "{domain} was forgotten: the next round starts from the base", domain=f.text(event.get("domain"))
        ), "down"
    if what == "left":
        return t("without {domain}: its labels were taken out", domain=f.text(event.get("domain"))), ""
    return (t(_KNOWN[str(what)]) if str(what) in _KNOWN else f.text(what)), ""


_KNOWN = {"started": "first champion", "rolled back": "rolled back to"}
_DECIDED = {"promoted": "promoted in round {n}", "refused": "refused in round {n}"}
