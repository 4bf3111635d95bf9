"""The report of all rounds, and what one round's page has since there are several: from made-up records."""

from __future__ import annotations

import copy
import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from fanbu.errors import UsageError
from fanbu.report import curves, heat, html, rounds
from fanbu.report.html import render, render_workspace, write_workspace_report
from fanbu.report.lineage import lineage
from test_report import Outline, full_record

EVIL = "\"'><script>alert(1)</script><img src=https://evil.example/x onerror=alert(1)>\u202e{names}\x00"
LONG = "a_very_long_name_of_an_industry_that_somebody_wrote_without_a_single_blank_" * 2
Events = list[dict[str, Any]]


def sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def bins(shift: float) -> list[list[float]]:
    """Ten bins, the first two empty, too sure by ``shift``."""
    return [[0, 0.0, 0.0]] * 2 + [[10 + 9 * i, 0.05 + i / 10, 0.05 + i / 10 - shift] for i in range(2, 10)]


def example(i: int, label: str) -> dict[str, str]:
    return {"text": f"row {i}: where is my parcel, it was to come on Monday?", "label": label, "old": "b", "new": label}


def domain_news(record: dict[str, Any], d: str, turn: int, *, joined: bool, train: int, born: str) -> None:
    """What one domain of a record has since there are several rounds."""
    own, loss = record["domains"][d], record["task"] == "causal-lm"
    own["joined"], own["new_rows"] = joined, {"train": train, "unlabelled": train // 3}
    if own["specialist"]:
        forerunner = {"digest": sha(f"{d}{turn - 1}"), "path": "x", "valid": 0.8, "score": 0.81}
        own["specialist"] |= {"born": born, "valid": 0.82, "forerunner": None if born == "born" else forerunner}
        if born == "carried on":
            own["specialist"]["reborn_valid"] = 0.79
        if loss:
            own["specialist"]["valid"] = -0.82
    pair = {"wins": [example(1, "a")], "losses": [example(2, "b")]}
    if loss:
        rows = [{"text": "once upon a time", "label": "", "old": "2.31 nats a token", "new": "2.11 nats a token"}]
        pair = {"wins": rows, "losses": []}
    own["examples"] = {"withheld": "the domain is private"} if own["share"]["private"] else pair
    own["calibration"] = None if loss else {"incumbent": bins(0.08), "candidate": bins(0.03)}


def turned(
    turn: int, names: Sequence[str], scores: Mapping[str, tuple[float, float]], parent: str, *, accepted: bool,
    metric: str = "accuracy", left: Sequence[str] = (), new: Mapping[str, int] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """A round's record in which ``scores`` are (incumbent, candidate) of each domain."""
    record = full_record(tuple(names), accepted=accepted, metric=metric)
    record |= {"round": turn, "key": sha(f"round {turn}"), "decision": "promoted" if accepted else "refused"}
    record |= {"parent": None if turn == 1 else parent, "left": list(left)}
    record["incumbent"]["digest"], record["candidate"]["digest"] = parent, sha(f"candidate {turn}")
    for d, (old, candidate) in scores.items():
        record["verdict"]["domains"][d] |= {"incumbent": old, "candidate": candidate}
        for row, value in zip(record["table"], (old, candidate), strict=False):
            row["domains"][d] |= {"told": value, "untold": value - 0.03}
        count = (new or {}).get(d, 300)
        joined = turn == 2 and d == "travel"
        born = "born" if turn == 1 or joined else "carried on" if count == 0 else "reborn"
        domain_news(record, d, turn, joined=joined or turn == 1, train=count, born=born)
    return record


FIRST, SECOND, THIRD, OUT = sha("first"), sha("candidate 1"), sha("candidate 3"), sha("out")


def event(name: str, model: str | None, **more: Any) -> dict[str, Any]:
    return {"event": name, "model": model, "path": "stages/x", "round": None, "number": None} | {
        "time": "2026-11-22T19:00:00Z", **more
    }  # fmt: skip


def story(names: Sequence[str] = ("legal", "internet", "general"), metric: str = "accuracy") -> tuple[Any, Events, Any]:
    """Three rounds: promoted; refused while ``travel`` joined; one left; promoted, and then rolled back.

    In round 3 the first domain has no new rows and loses 2 points.
    """
    a, b, c = names
    sign = 1 if metric == "accuracy" else -1
    s = {a: 0.80, b: 0.70, c: 0.90, "travel": 0.75}

    def pair(d: str, old: float, new: float) -> tuple[float, float]:
        return s[d] + sign * old, s[d] + sign * new

    records = [
        turned(1, (a, b, c), {a: pair(a, 0, 0.04), b: pair(b, 0, 0.02), c: pair(c, 0, 0)}, FIRST,
               accepted=True, metric=metric),
        turned(2, (a, b, "travel", c), {a: pair(a, 0.04, 0.01), b: pair(b, 0.02, 0.03), c: pair(c, 0, 0),
               "travel": pair("travel", 0, 0.05)}, SECOND, accepted=False, metric=metric, new={c: 0}),
        turned(3, (a, "travel", c), {a: pair(a, 0.04, 0.02), "travel": pair("travel", 0, 0.09), c: pair(c, 0, 0.003)},
               OUT, accepted=True, metric=metric, left=[b], new={a: 0, c: 0}),
    ]  # fmt: skip
    history = [
        event("started", FIRST),
        event("promoted", SECOND, round=sha("round 1"), number=1, parent=FIRST, reason="better on average"),
        event("refused", sha("candidate 2"), round=sha("round 2"), number=2, parent=SECOND, reason="worse in " + a),
        event("left", OUT, domain=b),
        event("promoted", THIRD, round=sha("round 3"), number=3, parent=OUT, reason="better on average"),
        event("rolled back", OUT, **{"from": THIRD}),
    ]
    return records, history, {"model": OUT, "path": "stages/x", "round": None, "previous": SECOND}


def old_story() -> tuple[Any, Events, Any]:
    """A workspace of the first version: one round, none of the new keys."""
    record = full_record()
    history = [
        {"event": "started", "model": record["incumbent"]["digest"], "path": "a", "round": None, "time": "2026"},
        {"event": "promoted", "model": record["candidate"]["digest"], "path": "b", "round": record["key"],
         "reason": "better", "time": "2026"},
    ]  # fmt: skip
    return [record], history, {"model": record["candidate"]["digest"], "path": "b", "round": None, "previous": None}


def test_an_unknown_language_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="lang"):
        write_workspace_report(*story(), tmp_path, "xx")
    assert not list(tmp_path.iterdir())


def test_the_page_of_all_rounds_has_every_section(tmp_path: Path) -> None:
    path = write_workspace_report(*story(), tmp_path / "ws")
    assert path == tmp_path / "ws" / "report.html"
    page = path.read_text(encoding="utf-8")
    outline = Outline(page)
    ids = [value for _, name, value in outline.attributes if name == "id"]
    assert ids == ["verdict", "trajectory", "gain", "change", "rounds", "lineage", "growth", "untold", "crossed",
                   "warnings", "limits"]  # fmt: skip
    assert not {"script", "link", "img", "iframe", "object", "embed", "base", "form"} & set(outline.tags)
    loads = [a for a in outline.attributes if a[1] in ("src", "srcset", "xlink:href", "action", "data")]
    links = {value for tag, name, value in outline.attributes if name == "href"}
    assert loads == []
    assert links == {f"rounds/{sha(f'round {n}')[:20]}/report.html" for n in (1, 2, 3)}
    for drawing in re.findall(r"<svg[^>]*>", page):
        inner = re.fullmatch(r'<svg x="[^>]*aria-hidden="true">', drawing)
        assert inner or 'aria-hidden="true"' in drawing or re.search(r'role="img" aria-label="[^"]+"', drawing)


def cells(page: str, section: str) -> dict[str, list[list[str]]]:
    """The heat map of a section: for each row's name its cells, as their class and the words in them."""
    body = page.split(f'aria-labelledby="{section}"')[1].split("</section>")[0]
    rows = re.findall(r'<tr class="[^"]*"><th scope="row" class="first"><bdi>(.*?)</bdi>.*?</th>(.*?)</tr>', body, re.S)
    found = {name: re.findall(r'<td class="([^"]*)">(.*?)</td>', row, re.S) for name, row in rows}
    return {name: [f"{kind} {plain(inner)}".split() for kind, inner in row] for name, row in found.items()}


def plain(inner: str) -> str:
    """The words of a piece of a page."""
    return " ".join(re.sub("<[^>]*>", " ", inner).split())


def test_gain_is_that_of_the_model_which_stood_after_each_round() -> None:
    page = render_workspace(*story())
    gain = cells(page, "gain")
    assert [cell[:2] for cell in gain["legal"]] == [["plain0", "80.0"], ["p2", "+4.0"], ["p2", "+4.0"], ["p1", "+2.0"]]
    assert [cell[-1] for cell in gain["legal"][1:]] == ["84.0", "84.0", "82.0"]  # round 2 kept the champion
    assert gain["internet"][3] == ["absent", "left", "left"]
    assert gain["travel"][1] == ["absent", "early", "not", "there", "yet"]
    assert gain["travel"][3][:2] == ["p5", "+9.0"]
    assert [cell[1] for cell in gain["Average"][1:]] == ["+3.0", "+2.0", "+5.5"]  # without the guard


def test_change_shows_what_was_forgotten() -> None:
    page = render_workspace(*story())
    change = cells(page, "change")
    assert [cell[1] for cell in change["legal"]] == ["+4.0", "0.0", "\u22122.0"]
    assert change["legal"][2] == ["n1", "\u22122.0", "○", "no", "new", "rows"]
    assert change["legal"][0][2:] == ["+400", "rows"]
    assert change["legal"][1][0] == "p0"
    assert '<dd>\u22122.0 points<span class="small">legal, round 3</span>' in page
    assert "Round 3 forgot more than a point (0.01 of the metric) without new rows there: legal." in page


def test_a_falling_loss_is_a_gain() -> None:
    records, history, champion = story(metric="loss")
    page = render_workspace(records, history, champion)
    gain = cells(page, "gain")
    assert [cell[1] for cell in gain["legal"]] == ["0.800", "+0.040", "+0.040", "+0.020"]
    assert gain["legal"][1][-1] == "0.760"
    assert "loss ↓" in page
    assert "+0.020 nats since the start" in page
    assert "valid 0.820" in page  # recorded as minus the loss
    assert "lower is better" in page


def test_mixed_metrics_have_no_common_mean() -> None:
    records, history, champion = story()
    for record in records:
        record["verdict"]["domains"]["legal"] |= {"metric": "loss", "higher_is_better": False}
    page = render_workspace(records, history, champion)
    assert "Average" not in cells(page, "gain")
    assert "No mean over these rounds" in page
    assert page.count('<span class="ramp"') == 8  # a scale for each unit in each of four maps


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_shade_can_be_read(scheme: str) -> None:
    style = re.findall(r"<style>(.*?)</style>", render_workspace([], [], None), flags=re.S)[0]
    light, dark = style.split("@media screen and (prefers-color-scheme: dark)")
    colours = dict(re.findall(r"--(\w+): (#[0-9a-f]{6})", light))
    if scheme == "dark":
        colours |= dict(re.findall(r"--(\w+): (#[0-9a-f]{6})", dark))
    for shade in (*(f"{side}{i}" for side in "pn" for i in range(1, 6)), "row", "paper"):
        assert contrast(colours["ink"], colours[shade]) >= 4.5, shade
    ramp = [luminance(colours[f"p{i}"]) for i in range(1, 6)]
    assert ramp == sorted(ramp, reverse=scheme == "light")


def luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    r, g, b = (c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
    return 0.2126 * r + 0.7152 * g + 0.0722 * b


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def english(text: str, /, **values: object) -> str:
    return text.format(**values) if values else text


def tree(history: Events, champion: str) -> list[tuple[str, str, bool, int]]:
    """Word, model, whether it is the champion, and the lane that its node is drawn in."""
    records = story()[0]
    found = lineage(rounds.rounds_of(records, history), history, {"model": champion}, english)
    places = [float(re.findall(r'<g transform="translate\(([\d.]+) ', leaf.svg)[0]) for leaf in found]
    return [
        (leaf.word, leaf.model.full, leaf.champion, int(x // curves.LANE))
        for leaf, x in zip(found, places, strict=True)
    ]


def test_the_tree_tells_what_stood_and_what_did_not() -> None:
    _, history, champion = story()
    assert tree(history, champion["model"]) == [
        ("base model", "12" * 32, False, 0),
        ("first champion", FIRST, False, 0),
        ("promoted in round 1", SECOND, False, 0),
        ("refused in round 2", sha("candidate 2"), False, 1),
        ("without internet: its labels were taken out", OUT, True, 0),
        ("promoted in round 3", THIRD, False, 1),
        ("rolled back to", OUT, False, 0),
    ]


def test_a_tree_without_parents_and_numbers_is_replayed() -> None:
    _, history, champion = story()
    for each in history:
        for key in ("parent", "number"):
            each.pop(key, None)
    again = tree(history, champion["model"])
    assert again == tree(story()[1], champion["model"])


def test_by_hand_a_refused_candidate_becomes_champion() -> None:
    _, history, _ = story()
    history = [*history[:3], event("promoted", sha("candidate 2"), reason="by hand")]
    assert tree(history, sha("candidate 2"))[-2:] == [
        ("refused in round 2", sha("candidate 2"), True, 1),
        ("promoted by hand", sha("candidate 2"), False, 1),
    ]


def forgotten() -> Events:
    """A history in which a domain had its data forgotten, and the next round started from the base."""
    return [*story()[1][:3], event("left", None, domain="legal", forget=True), event("started", sha("anew"))]


def test_after_a_domain_was_forgotten_the_tree_starts_from_the_base_again() -> None:
    assert tree(forgotten(), sha("anew"))[-2:] == [
        ("legal was forgotten: the next round starts from the base", "–", False, 2),
        ("first champion", sha("anew"), True, 0),
    ]
    page = render_workspace(story()[0], forgotten()[:4], {"model": None})
    assert "No champion now" in page
    assert 'badge">champion of now' not in page


def test_lines_of_the_tree_do_not_run_through_other_models() -> None:
    """Two promoted chains and leaves between them: no two models share a lane at the same height."""
    history = [event("started", "m0")]
    history += [event("promoted", f"m{i}", parent=f"m{i - 1}") for i in (1, 2, 3)]
    history += [event("rolled back", "m1", **{"from": "m3"}), event("promoted", "m4", parent="m1")]
    history += [event("refused", "m5", parent="m4"), event("promoted", "m3", reason="by hand")]
    history += [event("promoted", "m6", parent="m3"), event("refused", "m7", parent="m1")]
    found = lineage([], history, {"model": "m6"}, english)
    for leaf in found:
        ends = re.findall(r'<line class="twig[^"]*" x1="([\d.]+)" x2="\1" y1="(\S+)" y2="(\S+)"', leaf.svg)
        assert len(ends) == len(set(ends))


def test_the_champion_of_now_is_measured_where_it_was_measured() -> None:
    records, history, _ = story()
    assert "+5.5 points since the start" in render_workspace(records, history, {"model": THIRD})
    assert "+2.0 points since the start" in render_workspace(records, history, {"model": OUT})
    assert "As it was at the start" in render_workspace(records[:1], history[:2], {"model": FIRST})
    assert "No mean" in render_workspace(records, history, {"model": sha("never measured")})


def test_what_moved_the_champion_between_rounds_is_marked() -> None:
    records, history, champion = story()
    found = rounds.rounds_of(records, history)
    assert [turn.moved for turn in found] == [(), (), ("left",)]
    assert "before it: a domain&#39;s labels were taken out" in render_workspace(records, history, champion)


def test_specialists_are_shown_beside_their_forerunners() -> None:
    page = render_workspace(*story())
    body = page.split('aria-labelledby="growth"')[1].split("</section>")[0]
    words_of = plain(body)
    assert "born 83.0 valid 82.0" in words_of
    assert "reborn ▲ 81.0 → 83.0 valid 80.0 → 82.0" in words_of
    assert "carried on ▲ 81.0 → 83.0 valid 80.0 → 82.0 the reborn one: 79.0" in words_of


def test_bytes_add_up_over_rounds() -> None:
    records, history, champion = story()
    page = render_workspace(records, history, champion)
    every = [row["bytes"] for r in records for d in r["domains"].values() for row in d["crossed"]]
    legal = sum(row["bytes"] for r in records for row in r["domains"]["legal"]["crossed"])
    assert f"<dd>{sum(every) / 1e6:.1f}\u00a0MB<span" in page
    body = page.split('aria-labelledby="crossed"')[1].split("</section>")[0]
    assert f'<td class="num">{legal / 1e6:.1f}\u00a0MB</td></tr>' in body
    widths = [float(w) for w in re.findall(r'<rect class="kind\d" x="[\d.]+%" y="0" width="([\d.]+)%"', body)]
    assert max(widths) < 100
    assert sum(widths[:3]) == pytest.approx(100, abs=0.1)  # the domain that sent most fills its bar


def test_the_mean_line_is_over_the_same_domains_in_every_round() -> None:
    page = render_workspace(*story())
    body = page.split('aria-labelledby="trajectory"')[1].split("</section>")[0]
    assert "Over the domains that were there in every round: <bdi>legal</bdi>." in body
    assert 'aria-label="champion: 80.0, 84.0, 84.0, 82.0; refused candidate: –, –, 81.0, –;' in body
    assert body.count('<circle class="dot champion kept"') == 2  # in the chart and in its legend
    assert body.count('class="cross"') == 2


def test_old_records_and_a_single_round_build() -> None:
    page = render_workspace(*old_story())
    Outline(page)
    assert "+2.9 points since the start" in page
    assert '<dd>–<span class="small">not recorded</span>' in page
    assert 'id="change"' not in page
    assert "no domain was without new rows" in render_workspace(story()[0][:1], [], None)
    assert "Every round is judged on" not in page
    assert "promoted in round 1" in page
    body = page.split("<main>")[1]
    assert not [word for word in ("○", "†", "↩", "not there yet", "Carried on") if word in body.split('id="growth"')[0]]


def test_old_records_that_all_say_round_one_are_counted() -> None:
    record = full_record()
    found = rounds.rounds_of([record, record, record], [])
    assert [turn.number for turn in found] == [1, 2, 3]
    assert [turn.number for turn in rounds.rounds_of([{"round": 2}, {"round": 5}], [])] == [2, 5]


def test_an_empty_workspace_builds(tmp_path: Path) -> None:
    page = write_workspace_report([], [], None, tmp_path).read_text(encoding="utf-8")
    Outline(page)
    assert "No round yet" in page
    Outline(render_workspace([{}], [{}], {}))


def test_hostile_names_stay_text() -> None:
    records, history, champion = story((EVIL, LONG, "\u05d0\u05d1 \u202b general"))
    records[0]["key"] = "../../" + "a" * 64
    for each in history:
        each["reason"] = EVIL
    pages = [render_workspace(records, history, champion, language) for language in ("en", "zh")]
    for page in (*pages, *(render(record, "zh") for record in records)):
        outline = Outline(page)
        assert not {"script", "img"} & set(outline.tags)
        assert not [a for a in outline.attributes if a[1].startswith("on")]
        assert not {"\u202e", "\u202b", "\x00"} & set(page)
        assert "{names}" in page  # a name is never a template
        assert not [a for a in outline.attributes if a[1] == "href" and not a[2].startswith("rounds/")]


def holes(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else []
    return [found for key, item in items for found in [(*path, key), *holes(item, (*path, key))]]


@pytest.mark.parametrize("fill", [None, math.nan, "text", [1]])
def test_any_hole_is_a_dash_and_never_a_crash(fill: Any) -> None:
    records, history, champion = story()
    whole = {"records": records[1:], "history": history, "champion": champion}
    skipped = ("table", "costs", "recipe", "versions", "verdict")  # what the page of one round is tested with
    paths = [p for p in holes(whole) if len(p) > 2 and not (p[0] == "records" and p[2] in skipped and len(p) > 4)]
    for path in paths[:: 7 if fill is None else 23]:
        broken = copy.deepcopy(whole)
        at: Any = broken
        for key in path[:-1]:
            at = at[key]
        at[path[-1]] = fill
        pages = [render_workspace(broken["records"], broken["history"], broken["champion"])]
        pages += [render(broken["records"][path[1]])] if path[0] == "records" else []
        for page in pages:
            shown = re.sub(r"<style>.*?</style>|<pre>.*?</pre>", "", page, flags=re.S)
            assert "nan" not in shown.lower().split(), path
            assert ">None<" not in page, path


def test_one_round_shows_what_is_new_since_there_are_several() -> None:
    records, _, _ = story()
    page = render(records[1])
    body = {name: page.split(f'aria-labelledby="{name}"')[1].split("</section>")[0] for name in
            ("examples", "calibration", "arrivals", "specialists")}  # fmt: skip
    assert "row 1: where is my parcel" in body["examples"]
    assert 'class="more answer right" role="cell" data-label="New model"><bdi>a</bdi>' in body["examples"]
    assert 'class="more answer right" role="cell" data-label="Old model"><bdi>b</bdi>' in body["examples"]
    assert "Withheld: the domain is private" in body["examples"]
    assert body["calibration"].count('class="reliability"') == 4
    assert "gap 8.0 → 3.0 points" in body["calibration"]
    assert "0.9–1.0 91 95.0 87.0 91 95.0 92.0" in plain(body["calibration"])
    assert '<bdi>travel</bdi> <span class="badge">joined</span>' in body["arrivals"]
    assert "<td>no new rows</td>" in body["arrivals"]
    assert "Left before this round: <bdi>internet</bdi>" in render(records[2])
    assert "reborn, forerunner 81.0 → 83.0, on validation rows 80.0 → 82.0" in body["specialists"]


def test_examples_of_a_causal_model_have_no_truth() -> None:
    page = render(story(metric="loss")[0][0])
    body = page.split('aria-labelledby="examples"')[1].split("</section>")[0]
    assert "2.31 nats a token" in body
    assert 'class="empty" role="cell" data-label="Truth"' in body
    assert 'id="calibration"' not in page


def test_the_worst_fall_counts_only_without_new_rows() -> None:
    records, history, _ = story()
    found = rounds.rounds_of(records, history)
    fall = heat.worst(found)
    assert fall is not None
    assert (fall.domain, fall.number, round(fall.change, 3)) == ("legal", 3, -0.02)
    records[2]["domains"]["legal"]["new_rows"] = {"train": 5}
    later = heat.worst(rounds.rounds_of(records, history))
    assert later is not None
    assert later.domain == "general"
    for record in records:
        for domain in record["domains"].values():
            del domain["new_rows"]
    assert heat.worst(rounds.rounds_of(records, history)) is None


def test_changed_test_rows_are_marked() -> None:
    records, history, champion = story()
    assert "†" not in render_workspace(records, history, champion)
    records[2]["domains"]["travel"]["rows"]["test"] = 999
    assert cells(render_workspace(records, history, champion), "gain")["travel"][3][2] == "†"


def test_the_same_records_give_the_same_page() -> None:
    first, second = (render_workspace(*json.loads(json.dumps(story()))) for _ in range(2))
    assert first == second
    assert html.render_workspace(*story(), lang="zh") != first
