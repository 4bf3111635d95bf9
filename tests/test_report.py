"""The report: from full, thin, hostile and refused records."""

from __future__ import annotations

import copy
import json
import math
import os
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from fanbu.report import charts, format
from fanbu.report.html import render, write_report

VOID = {"meta", "col", "wbr", "br", "hr", "img", "link", "input"}
DOMAINS = ("internet", "legal", "general")


def full_record(names: tuple[str, ...] = DOMAINS, accepted: bool = True, metric: str = "accuracy") -> dict[str, Any]:
    higher = metric != "loss"
    return {
        "fanbu": 1,
        "version": "0.1.0",
        "name": "demo",
        "round": 1,
        "key": "ab" * 32,
        "seed": 0,
        "task": "text-classification" if higher else "causal-lm",
        "created": "2026-11-22T19:00:00Z",
        "recipe": {
            "name": "demo",
            "domains": [{"name": n, "share": "internal"} for n in names],
            "gate": {"margin": 0.05},
        },
        "base": _large("base", "12") | {"source": "sentence-transformers/all-MiniLM-L6-v2"},
        "incumbent": _large("incumbent", "34") | {"method": "probe"},
        "candidate": _large("candidate", "56") | {"method": "distill", "arguments": {"temperature": 2.0, "epochs": 4}},
        "verdict": {
            "accepted": accepted,
            "reason": "Better on average with confidence, and nowhere shown to be worse than the margin allows."
            if accepted
            else f"Not shown to hold in {names[0]}: the interval reaches beyond the margin of 5.0 points.",
            "mode": "told",
            "level": 0.95,
            "average": {"delta": 0.031, "low": 0.018, "high": 0.044} if accepted else _bad_average(),
            "domains": {n: _judged(i, len(names), metric, accepted) for i, n in enumerate(names)},
            "untold": {n: _untold(i) for i, n in enumerate(names)},
            "gain_kept": {"value": 0.85, "low": 0.6, "high": 1.1},
            "checks": [
                {
                    "name": "better on average with confidence",
                    "passed": accepted,
                    "detail": "+3.1 points, interval +1.8 to +4.4",
                },
                {"name": "no domain worse than its margin", "passed": accepted, "detail": "margins 5.0 points"},
                {"name": "every model reloads", "passed": True, "detail": "bit for bit"},
            ],
        },
        "domains": {n: _domain(i, len(names), metric) for i, n in enumerate(names)},
        "table": [_system(name, role, gain, names, higher) for name, role, gain in _SYSTEMS],
        "costs": _costs(names),
        "warnings": ["two processor threads: timings are rough"],
        "reproduce": ["pip install fanbu==0.1.0", "fanbu run recipe.yaml --seed 0"],
        "versions": {"python": "3.11.7", "torch": "2.13.0", "transformers": "5.1.0"},
    }


_SYSTEMS = [
    ("incumbent (probed base)", "incumbent", 0.0),
    ("candidate (distill)", "candidate", 0.031),
    ("each specialist at home", "specialists", 0.036),
    ("uniform average of weights", "reference", -0.08),
    ("specialists with an oracle router", "reference", 0.034),
    ("TF-IDF regression", "reference", -0.11),
    ("joint training on all rows", "reference", 0.041),
]


def _large(name: str, two: str) -> dict[str, Any]:
    return {"digest": two * 32, "path": f"runs/demo/models/{name}", "parameters": 22_713_216, "bytes": 90_900_000}


def _bad_average() -> dict[str, float]:
    return {"delta": -0.004, "low": -0.017, "high": 0.009}


def _judged(i: int, of: int, metric: str, accepted: bool) -> dict[str, Any]:
    guard, bad = i == of - 1, not accepted and i == 0
    delta = -0.061 if bad else 0.004 if guard else 0.045 - 0.011 * (i % 4)
    before, half, n = 0.81 - 0.03 * (i % 5), 0.032 + 0.004 * (i % 3), 300 + 150 * (i % 4)
    return {
        "role": "guard" if guard else "feeds",
        "metric": metric,
        "higher_is_better": metric != "loss",
        "incumbent": before,
        "candidate": before + (delta if metric != "loss" else -delta),
        "delta": delta,
        "low": delta - half,
        "high": delta + half,
        "floor": delta - 0.84 * half,
        "margin": 0.05,
        "holds": not bad,
        "worse": bad,
        "improved": delta - half > 0,
        "p": 0.03,
        "p_holm": 0.0004 if i == 0 else 0.061,
        "n": n,
        "wins": 20 + i,
        "losses": 11,
        "smallest_detectable": 0.06 if i == 0 else 0.043,
    }


def _untold(i: int) -> dict[str, Any]:
    delta = 0.028 - 0.006 * (i % 4)
    return {"incumbent": 0.78, "candidate": 0.78 + delta, "delta": delta, "low": delta - 0.03, "high": delta + 0.03}


def _domain(i: int, of: int, metric: str) -> dict[str, Any]:
    guard = i == of - 1
    return {
        "task": "text-classification",
        "metric": metric,
        "role": "guard" if guard else "feeds",
        "rows": {"train": 900, "valid": 100, "test": 300, "unlabelled": 0},
        "labels": 12,
        "share": {
            "kinds": ["weights", "predictions", "statistics"],
            "texts": i == 0,
            "labels": False,
            "private": i == 1,
        },
        "warnings": ["3 training rows whose text is also in test were left out"] if i == 0 else [],
        "crossed": []
        if guard
        else [
            {"what": "probe texts", "kind": "samples", "bytes": 123_456},
            {"what": "probe head", "kind": "weights", "bytes": 18_480 * (i + 1)},
            {"what": "predictions", "kind": "predictions", "bytes": 1_044_000},
        ],
        "specialist": None
        if guard
        else {
            "digest": "78" * 32,
            "path": f"runs/demo/specialists/{i}",
            "method": "vocabulary > depth",
            "parameters": 4_300_000 + 900_000 * (i % 3),
            "bytes": 17_200_000,
            "latency_ms": 3.2,
            "score": 0.83,
        },
        "parent": {"parameters": 22_713_216, "bytes": 90_900_000, "latency_ms": 9.1, "score": 0.80},
    }


def _system(name: str, role: str, gain: float, names: tuple[str, ...], higher: bool) -> dict[str, Any]:
    domains = {}
    for i, n in enumerate(names):
        told = 0.81 - 0.03 * (i % 5) + (gain if higher else -gain) * (1 - 0.1 * (i % 3))
        metrics = {"accuracy": told, "macro_f1": told - 0.02, "weighted_f1": told, "precision": told, "recall": told}
        metrics |= {"calibration_error": 0.042, "loss": 0.71}
        domains[n] = {"told": told, "untold": told - 0.021 if role != "specialists" else None, "metrics": metrics}
    return {"name": name, "role": role, "domains": domains, "seconds": 12.3 if role != "incumbent" else None}


def _costs(names: tuple[str, ...]) -> list[dict[str, Any]]:
    stages = [(f"shrink vocabulary > depth {n}", 92.1 - 7 * i, i == 1) for i, n in enumerate(names[:-1])]
    stages += [("absorb distill", 141.0, False), ("judge", 33.4, False), ("probe base", 12.0, True)]
    return [
        {"stage": s, "seconds": t, "cpu_seconds": 1.9 * t, "peak_bytes": 900_000_000, "joules": 25 * t, "reused": r}
        for s, t, r in stages
    ]


class Outline(HTMLParser):
    """The page's elements, and a check that they close in order."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.words: list[str] = []
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def chosen_record(names: tuple[str, ...] = DOMAINS, metric: str = "accuracy") -> dict[str, Any]:
    """A full record of a round whose way back was chosen, whose specialists were weighed, and which followed a tree."""
    record = full_record(names, metric=metric)
    tried = (("distill", 1 / 3, 0.02), ("distill", 1.0, 0.04), ("average", 1.0, -0.01), ("multitask", 1 / 3, -0.005))
    trials = [
        {
            "candidate": name, "share": share, "score": score, "changes": dict.fromkeys(names, score),
            "worst": score - 0.01, "seconds": 30 * share, "crossed_bytes": 9000, "low": score - 0.02,
            "high": score + 0.02, "wins": 0.5, "corrected": score - 0.003,
        }
        for name, share, score in tried
    ]  # fmt: skip
    record["comparison"] = {
        "metric": metric, "trials": trials, "winner": "distill", "front": ["distill", "average"], "spent": 70.0,
        "budget": 90.0, "in": "seconds",
        "left_out": {
            "ties": "the budget was spent before its first trial",
            "iso_c": "earlier comparisons promise too little of it",
            "magmax": "what was left of the budget did not do for all rows",
            "wudi": "it would take more than the budget with all rows", "dare": "it ended with an error: no",
        },
    }  # fmt: skip
    part = {"value": 0.02, "low": 0.01, "high": 0.03}
    record["worth"] = {
        "way": "distill", "metric": metric, "left_out": dict.fromkeys(names, part),
        "shapley": {n: {**part, "value": 0.02 - i / 50} for i, n in enumerate(names)}, "harmful": [names[-1]],
    }  # fmt: skip
    leaves = [{"name": n} for n in names]
    record["candidate"]["made"] = {
        "tree": {"name": "all", "children": [{"name": "near", "children": leaves[:2]}, *leaves[2:]]}
    }
    return record


def test_what_was_chosen_is_shown(tmp_path: Path) -> None:
    for metric in ("accuracy", "loss"):
        page = render(chosen_record(metric=metric))
        outline = Outline(page)
        ids = {value for _, name, value in outline.attributes if name == "id"}
        assert {"chosen", "worth", "tree"} <= ids
        for drawing in re.findall(r"<svg[^>]*>", page):
            hidden = 'aria-hidden="true"' in drawing or drawing == '<svg class="key">'
            assert hidden or re.search(r'role="img" aria-label="[^"]+"', drawing), drawing
    page = render(chosen_record())
    for shown in ("+4.0", "winner", "not beaten", "it ended with an error", "+3.7 points", "33%", "near"):
        assert shown in page
    record = chosen_record()
    record["worth"]["shapley"] = None
    record["comparison"]["in"] = "steps"
    assert "70 of 90 steps spent" in render(record)
    assert "would have been without it" in render(record)


@pytest.mark.parametrize("fill", [None, math.nan, "text"])
def test_holes_in_what_was_chosen(fill: Any) -> None:
    whole = chosen_record(("legal", "general"))
    parts = [p for p in _holes(whole) if p[0] in ("comparison", "worth") or p[:3] == ("candidate", "made", "tree")]
    assert len(parts) > 60
    for path in parts:
        assert not {"nan", "none-shown"} & set(_with_hole(whole, path, fill)), path


def test_full_record_has_every_section(tmp_path: Path) -> None:
    path = write_report(full_record(), tmp_path / "deep" / "folder")
    assert path == tmp_path / "deep" / "folder" / "report.html"
    page = path.read_text(encoding="utf-8")
    outline = Outline(page)
    ids = {value for _, name, value in outline.attributes if name == "id"}
    expected = {"verdict", "changes", "baselines", "specialists", "crossed", "costs", "warnings", "limits", "reproduce"}
    assert ids == expected
    for shown in (
        "Promoted",
        "+3.1 points",
        "+1.8 to +4.4",
        "60% to 110%",
        "22.7M",
        "distill (temperature=2.0",
        "ab" * 32,
    ):
        assert shown in page
    assert page.startswith('<!DOCTYPE html>\n<html lang="en">')
    assert sorted(os.listdir(path.parent)) == ["report.html", "report.json"]


def test_every_drawing_is_named_or_hidden() -> None:
    page = render(full_record())
    drawings = re.findall(r"<svg[^>]*>", page)
    assert len(drawings) > 30
    for drawing in drawings:
        hidden = 'aria-hidden="true"' in drawing or drawing == '<svg class="key">'
        assert hidden or re.search(r'role="img" aria-label="[^"]+"', drawing), drawing


def test_refused_round_says_so() -> None:
    page = render(full_record(accepted=False))
    assert "Kept the old one" in page
    assert "Promoted" not in page
    assert page.count("✗</span> failed") == 2
    assert "worse</span>" in page


@pytest.mark.parametrize(
    "record", [{}, {"verdict": None, "domains": None, "table": None, "costs": None, "recipe": None}]
)
def test_empty_records_build(record: dict[str, Any], tmp_path: Path) -> None:
    page = write_report(record, tmp_path).read_text(encoding="utf-8")
    Outline(page)
    assert "No verdict" in page


def _holes(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else []
    return [found for key, item in items for found in [(*path, key), *_holes(item, (*path, key))]]


def _with_hole(whole: dict[str, Any], path: tuple[Any, ...], fill: Any) -> list[str]:
    """The words and tags of the page of a record of which one value is another."""
    record = copy.deepcopy(whole)
    at: Any = record
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = fill
    page = re.sub(r"<style>.*?</style>|<pre>.*?</pre>", "", render(record), flags=re.S)
    return page.replace(">None<", "> none-shown <").lower().split()


@pytest.mark.parametrize("fill", [None, math.nan, "text"])
def test_any_hole_is_a_dash_and_never_a_crash(fill: Any) -> None:
    whole = full_record(("legal", "general"))
    for path in _holes(whole)[:: 1 if fill is None else 7]:
        assert not {"nan", "none-shown"} & set(_with_hole(whole, path, fill)), path


def test_hostile_texts_are_escaped_everywhere() -> None:
    evil = "\"'><script>alert(1)</script><img src=https://evil.example/x onerror=alert(1)>\u202e\x00"
    record = json.loads(json.dumps(full_record((evil, "legal", "general"))))
    at_every_text = _poisoned(record, evil)
    for each in (record, at_every_text, _poisoned(chosen_record((evil, "legal", "general")), evil)):
        page = render(each)
        outline = Outline(page)
        assert "script" not in outline.tags
        assert "img" not in outline.tags
        assert not [a for a in outline.attributes if a[1].startswith("on")]
        assert "\u202e" not in page
        assert "\x00" not in page


def _poisoned(value: Any, evil: str) -> Any:
    if isinstance(value, dict):
        return {key: _poisoned(item, evil) for key, item in value.items()}
    if isinstance(value, list):
        return [_poisoned(item, evil) for item in value]
    return evil if isinstance(value, str) and value not in ("guard", "feeds", "candidate", "incumbent") else value


def test_the_page_loads_nothing() -> None:
    page = render(full_record())
    outline = Outline(page)
    assert not [a for a in outline.attributes if a[1] in ("src", "href", "srcset", "xlink:href", "action", "data")]
    assert not {"script", "link", "img", "iframe", "object", "embed", "base"} & set(outline.tags)
    style = "".join(re.findall(r"<style>(.*?)</style>", page, flags=re.S))
    assert "url(" not in style
    assert "@import" not in style
    assert "http://" not in page
    assert "https://" not in page


def test_only_drawings_are_marked_safe() -> None:
    folder = Path(charts.__file__).parent
    for template in folder.glob("*.j2"):
        for marked in re.findall(r"([\w.()\"]+)\|safe", template.read_text(encoding="utf-8")):
            assert marked.endswith("svg") or marked.startswith("key("), (template.name, marked)


def test_record_round_trips(tmp_path: Path) -> None:
    record = full_record(("法律 ü", "legal", "general"))
    write_report(record, tmp_path)
    raw = (tmp_path / "report.json").read_text(encoding="utf-8")
    assert json.loads(raw) == record
    assert "法律 ü" in raw
    keys = list(json.loads(raw))
    assert keys == sorted(keys)


def test_not_finite_and_surrogates_still_give_json(tmp_path: Path) -> None:
    write_report({"name": "a\ud800b", "verdict": {"average": {"delta": math.nan, "low": -math.inf}}}, tmp_path)
    record = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert record == {"name": "a\ud800b", "verdict": {"average": {"delta": None, "low": None}}}


def test_a_failed_write_leaves_the_old_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_report(full_record(), tmp_path)
    before = (tmp_path / "report.html").read_bytes()

    def full_disk(*_: object) -> None:
        raise OSError("no space")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="no space"):
        write_report(full_record(accepted=False), tmp_path)
    assert (tmp_path / "report.html").read_bytes() == before
    assert sorted(os.listdir(tmp_path)) == ["report.html", "report.json"]


def test_same_record_same_page() -> None:
    assert render(full_record()) == render(full_record())


def test_loss_is_in_nats_and_lowest_is_best() -> None:
    page = render(full_record(("code", "legal", "general"), metric="loss"))
    assert "+0.045" in page
    assert "loss ↓" in page
    assert "further left is better" in page
    best = re.findall(r'<strong class="best">([^<]*)</strong>', page)
    assert best[0] == "0.769"


def test_the_average_is_over_the_domains_that_fed_back() -> None:
    record = full_record()
    page = render(record)
    told = [record["table"][1]["domains"][name]["told"] for name in DOMAINS[:2]]
    assert f'<td class="num mean">{50 * sum(told):.1f}' in page
    assert "without guards" in page
    assert "of those that fed back" in page
    for row in (record["verdict"]["domains"], record["domains"]):
        row["general"]["role"] = "feeds"
    assert "without guards" not in render(record)


def test_the_bound_that_decides_is_drawn_and_named() -> None:
    record = full_record()
    page = render(record)
    assert "one-sided lower bound" in page
    assert page.count('<rect class="floor"') == 1 + len(DOMAINS)
    for row in record["verdict"]["domains"].values():
        del row["floor"]
    assert "where the interval reaches in" in render(record)


def test_mixed_metrics_have_no_average_column() -> None:
    record = full_record(("code", "legal"))
    record["verdict"]["domains"]["code"] |= {"metric": "loss", "higher_is_better": False}
    page = render(record)
    assert 'mean">Average' not in page
    assert page.count("dot plot of") == 2


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0.0, 1.0, [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]), (-0.031, 0.062, [-0.02, 0.0, 0.02, 0.04, 0.06]), (3.0, 3.0001, None)],
)
def test_ticks_are_round_and_inside(low: float, high: float, expected: list[float] | None) -> None:
    scale = charts.Scale(low, high)
    found = charts.ticks(scale)
    assert 2 <= len(found) <= 8
    assert all(low - 1e-9 <= tick <= high + 1e-9 for tick in found)
    if expected is not None:
        assert found == pytest.approx(expected)


def test_strips_place_numbers_in_percent() -> None:
    scale = charts.scale_of([-1.0, 1.0], pad=0.0)
    assert scale.at(0.0) == 50.0
    strip = charts.forest_row(scale, 0.5, 0.0, 1.0, margin=0.5, label='"<x>')
    assert 'width="25.00%"' in strip
    assert 'x1="50.00%" x2="100.00%"' in strip
    assert "&quot;&lt;x&gt;" in strip
    assert charts.scale_of([]).low < charts.scale_of([]).high
    assert charts.bar(None, "own") == ""


def test_numbers_are_written_for_people() -> None:
    assert format.size(12_345) == "12.3\u00a0kB"
    assert format.size(0) == "0\u00a0B"
    assert format.big(22_713_216) == "22.7M"
    assert format.big(999_999) == "1.0M"
    assert format.seconds(272) == "4\u00a0min 32\u00a0s"
    assert format.seconds(59.7) == "1\u00a0min 00\u00a0s"
    assert format.POINTS.change(-0.00001) == "0.0"
    assert format.POINTS.change(-0.031) == "\u22123.1"
    assert format.p_value(0.0001) == "<0.001"
    assert format.moment("2026-11-22T19:00:00Z") == "2026-11-22 19:00:00 UTC"
    assert format.number(True) is None


def test_what_a_search_tried_is_drawn(tmp_path: Path) -> None:
    from fanbu.report.pareto import frontier

    points = [(1.0, 0.2), (2.0, 0.1), (2.0, 0.5), (3.0, 0.5), (4.0, 0.9)]
    assert frontier(points) == [(1.0, 0.2), (2.0, 0.5), (4.0, 0.9)]
    value = full_record()
    name = next(n for n, d in value["domains"].items() if d.get("specialist"))
    value["domains"][name]["specialist"] |= {
        "searched_by": "milliseconds", "searched": [{"size": x, "score": y} for x, y in points],
    }  # fmt: skip
    page = write_report(value, tmp_path).read_text()
    assert (
        page.count('<circle class="dot champion"')
        - write_report(full_record(), tmp_path).read_text().count('<circle class="dot champion"')
        == 3
    )
    assert "5 sub-networks" in page
    value["domains"][name]["specialist"] |= {"searched": "x", "searched_by": 3}
    assert "sub-networks" not in write_report(value, tmp_path).read_text()
