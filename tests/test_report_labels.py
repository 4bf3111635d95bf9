"""The report's labels: each is translated, no translation is left over, and no English word stays on a Chinese page."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest

from fanbu import lang
from fanbu.report import words
from fanbu.report.html import render, render_workspace
from test_report import Outline, chosen_record, full_record
from test_report_generations import FIRST, OUT, SECOND, THIRD, Events, event, forgotten, old_story, story, turned


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The labels that pages asked for since the test began."""
    asked: set[str] = set()

    def recording(area: str, language: str) -> Any:
        look = lang.translator(area, language)
        return lambda text: asked.add(text) or look(text)

    monkeypatch.setattr(words, "translator", recording)
    return asked


def odd_records() -> list[dict[str, Any]]:
    """Records that reach the labels which an ordinary one does not."""
    bare: dict[str, Any] = {"name": None, "verdict": {"accepted": None, "checks": [{"name": "x", "passed": None}]}}
    plain = full_record(("legal", "sea"))
    for row in (plain["verdict"]["domains"], plain["domains"]):
        row["sea"]["role"] = "feeds"
    plain["verdict"]["domains"]["legal"] |= {"worse": True, "holds": True, "incumbent": 0.98}
    plain["verdict"]["domains"]["sea"] |= {"smallest_detectable": None}
    plain["verdict"] |= {"untold": {}, "mode": "other", "average": {"delta": 0.0, "low": -0.1, "high": 0.1}}
    plain["costs"] = [{"stage": f"s{i}", "seconds": 1.0 + i, "reused": i == 0} for i in range(30)]
    plain["domains"]["legal"]["specialist"] |= {"parameters": 22_713_216, "born": "born"}
    worse = full_record(tuple(f"d{i}" for i in range(9)), accepted=False)
    worse["verdict"]["average"] = {"delta": -0.1, "low": -0.2, "high": -0.1}
    worse["verdict"]["domains"]["d1"] |= {"holds": False, "worse": False, "improved": False}
    worse["verdict"]["domains"]["d2"] |= {"improved": False}
    worse["costs"] = [{"stage": "a", "seconds": 2.0}]
    for row in worse["verdict"]["domains"].values():
        del row["floor"]
        row["smallest_detectable"], row["incumbent"] = None, 0.99
    for name, kind in (("d3", "milliseconds"), ("d4", "bytes"), ("d5", "parameters")):
        tried = [{"size": 10.0 + n, "score": 0.1 * n} for n in range(4)]
        worse["domains"][name]["specialist"] |= {"searched_by": kind, "searched": tried}
    bits = full_record(("legal",))
    bits["verdict"]["domains"]["legal"] |= {"metric": "bits_per_byte", "higher_is_better": False}
    mixed = full_record(("code", "legal"))
    mixed["verdict"]["domains"]["code"] |= {"metric": "mse", "higher_is_better": False}
    return [bare, plain, worse, bits, mixed]


def odd_workspaces() -> list[tuple[Any, Events, Any]]:
    """Workspaces that reach the labels which the stories do not."""
    undecided, _, _ = story()
    for record in undecided:
        del record["decision"], record["verdict"]["accepted"]
    flat, history, _ = story()
    for record in flat[1:]:
        record["domains"]["legal"]["rows"]["test"] += record["round"]
        record["decision"] = "refused"
        for d in record["domains"].values():
            d["new_rows"] = {"train": 0}
    by_hand = [*history, event("promoted", FIRST, reason="by hand")]
    gone = copy.deepcopy(flat)
    gone[1]["domains"]["legal"] = {"metric": "accuracy", "crossed": [{"what": "x", "kind": "y", "bytes": 1}]}
    for row in (*gone[1]["table"],):
        row["domains"].pop("legal")
    gone[1]["verdict"]["domains"].pop("legal")
    apart = [turned(1, ("a", "b"), {}, FIRST, accepted=True), turned(2, ("c", "d"), {}, FIRST, accepted=True)]
    moved = copy.deepcopy(history)
    moved[4:4] = [event("rolled back", SECOND, **{"from": OUT}), event("promoted", OUT, reason="by hand")]
    fed = [turned(1, ("a", "b"), {}, FIRST, accepted=True)]
    fed[0]["domains"]["a"]["new_rows"] = {}
    steady = story()[0][:1]
    steady[0]["domains"]["general"]["new_rows"] = {"train": 0, "unlabelled": 0}
    numberless = [{k: v for k, v in e.items() if k not in ("number", "round")} for e in history]
    return [
        ([], [], None), (undecided, [], None), (flat, by_hand, {"model": FIRST}), (gone, history, {"model": FIRST}),
        (apart, [], None), (story()[0], moved, {"model": THIRD}), (fed, [], None), (steady, [], None),
        (story()[0][:1], [], None), (story()[0], forgotten(), {"model": None}),
        (story()[0], numberless, {"model": SECOND}), (odd_records()[4:], [], None), (odd_records()[3:4], [], None),
    ]  # fmt: skip


def every_page(language: str) -> list[str]:
    """Pages that together use every label."""
    stories = [story(), story(metric="loss"), old_story(), *odd_workspaces()]
    records = [*story()[0], *story(metric="loss")[0], full_record(accepted=False), *odd_records()]
    pages = [render_workspace(*each, lang=language) for each in stories]
    steps = chosen_record()
    steps["comparison"]["in"], steps["worth"]["shapley"] = "steps", None
    records += [chosen_record(), steps]
    return pages + [render(record, language) for record in records]


def test_every_label_is_translated_and_every_translation_is_used(said: set[str]) -> None:
    for page in every_page("zh"):
        assert '<html lang="zh">' in page
    known = lang.table("report", "zh")
    assert said - set(known) == set()
    assert set(known) - said == set()
    for english, chinese in known.items():
        assert sorted(re.findall(r"\{\w+\}", english)) == sorted(re.findall(r"\{\w+\}", chinese)), english


def greek(value: Any) -> Any:
    """The same record with every text of it in Greek letters, save those that are words of the contract."""
    contract = {"born", "reborn", "carried on", "guard", "feeds", "promoted", "refused", "candidate", "incumbent",
                "specialists", "reference", "told", "by hand", "rolled back", "left", "started"}  # fmt: skip
    keys = {"legal": "λ", "internet": "ι", "general": "γ", "travel": "τ", "accuracy": "α"}
    if isinstance(value, dict):
        return {keys.get(k, k): greek(v) for k, v in value.items()}
    if isinstance(value, list):
        return [greek(v) for v in value]
    if not isinstance(value, str) or value in contract or re.fullmatch("[0-9a-f]{64}", value):
        return value
    return keys.get(value, "Ω")


def test_no_english_word_is_left_on_a_chinese_page() -> None:
    records, history, champion = greek(list(story()))
    for record in records:
        del record["versions"], record["candidate"]["arguments"]
    names = r"fanbu|Holm|json|report|kB|MB|m?Wh|min|UTC|ms|TF|IDF"
    fields = r"train|valid|test|unlabelled|loss|recall|precision|weighted|macro|f\d|calibration|error"
    for page in (render_workspace(records, history, champion, "zh"), *(render(r, "zh") for r in records)):
        outline = Outline(re.sub(r"<style>.*?</style>|<pre>.*?</pre>|<code.*?</code>", "", page, flags=re.S))
        labels = [value for _, name, value in outline.attributes if name in ("aria-label", "title", "data-label")]
        found = set(re.findall(r"[A-Za-z]{2,}", " ".join([*outline.words, *labels])))
        assert not {word for word in found if not re.fullmatch(f"{names}|{fields}", word)}
