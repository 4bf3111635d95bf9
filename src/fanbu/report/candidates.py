"""What a comparison tried, and what specialists were worth, as plain text for the terminal."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from fanbu.recipe_parts import Step
from fanbu.report.format import seconds, size
from fanbu.report.text import Words, aligned


def compared_page(found: Mapping[str, Any], t: Words = str) -> str:
    """A line a candidate: its score by share of the rows, and with all rows its interval, its worst domain and what it
    cost; the best first. Those that nothing beats in all four are marked."""
    shares = sorted({row["share"] for row in found["trials"]})
    by_name: dict[str, dict[float, Mapping[str, Any]]] = {}
    for row in found["trials"]:
        by_name.setdefault(row["candidate"], {})[row["share"]] = row
    order = sorted(by_name, key=lambda name: (-max(by_name[name]), -by_name[name][max(by_name[name])]["score"]))
    heading = [" " + t("candidate"), *(f"{share:.0%}" for share in shares), t("interval"), t("best in"),
               t("worst domain"), t("what crosses"), t("time")]  # fmt: skip
    rows = [_row(name, by_name[name], shares, found) for name in order]
    points = t("Change on validation rows, in points, by share of the rows:")
    percent = t("Change on validation rows, in percent of the loss, by share of the rows:")
    lines = [points if found["metric"] == "accuracy" else percent, *aligned([heading, *rows])]
    lines += [f"{t('left out')}: {name}: {t(why)}" for name, why in found["left_out"].items()]
    spent = [seconds(value) if found["in"] == "seconds" else f"{value:.0f} {t('steps')}"
             for value in (found["spent"], found["budget"])]  # fmt: skip
    best = next(row for row in found["trials"] if row["candidate"] == found["winner"] and row["share"] == 1)
    lines.append(
        f"{t('winner')}: {found['winner']} ({_points(best['mean'])}; {_points(best['corrected'])} "
        f"{t('without what choosing the best adds by chance')}); {t('spent')} {spent[0]} {t('of')} {spent[1]}"
    )
    step = json.dumps(Step(**best["step"]).model_dump(mode="json", exclude_defaults=True))
    lines.append(f"{t('to take it again, in the recipe')}: feedback: {step}")
    return "\n".join(lines)


def _row(
    name: str, trials: Mapping[float, Mapping[str, Any]], shares: list[float], found: Mapping[str, Any]
) -> list[str]:
    scores = [_points(trials[s]["score"]) if s in trials else "" for s in shares]
    mark = "*" if name in found["front"] else " "
    whole = trials.get(1.0)
    if whole is None:
        return [mark + name, *scores, "", "", "", "", ""]
    interval = f"{_points(whole['low'])} {_points(whole['high'])}"
    costs = [size(whole["crossed_bytes"]), seconds(whole["seconds"])]
    return [mark + name, *scores, interval, f"{whole['wins']:.0%}", _points(whole["worst"]), *costs]


def worth_page(found: Mapping[str, Any], recipe: str, t: Words = str) -> str:
    """A line a specialist: what the round would have lost without it, and its Shapley value, with intervals."""

    def part(of: Mapping[str, float]) -> list[str]:
        return [_points(of["value"]), f"{_points(of['low'])} {_points(of['high'])}"]

    values = found["shapley"]
    heading = [t("specialist"), t("the gain without it is less by"), t("interval")]
    heading += [t("Shapley value"), t("interval")] if values else []
    order = sorted(found["left_out"], key=lambda d: -(values or found["left_out"])[d]["value"])
    rows = [[d, *part(found["left_out"][d]), *(part(values[d]) if values else [])] for d in order]
    unit = t("in points") if found["metric"] == "accuracy" else t("in percent of the loss")
    lines = [
        f"{t('round')} {found['round']}, {found['way']}: {t('mean change with all of them')} {_points(found['whole'])} "
        f"({unit})",
        *aligned([heading, *rows]),
    ]
    lines += [f"{t('harmful')}: {d}: fanbu leave {recipe} {d} --forget" for d in found["harmful"]]
    return "\n".join(lines)


def _points(change: float) -> str:
    return f"{100 * change:+.2f}"
