"""A record, a verdict, a history as plain text for the terminal; ``t`` gives headings in another language."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Words = Callable[[str], str]


def summary(record: Mapping[str, Any], t: Words = str) -> str:
    """One round: the verdict, the table against the baselines and what crossed."""
    verdict = record["verdict"]
    word = t("PROMOTED") if verdict["accepted"] else t("KEPT THE OLD ONE")
    if record.get("round"):
        word = f"{t('round')} {record['round']}: {word}"
    names = list(record["domains"])
    rows = [["", *names, t("mean")], *(_table_row(row, names, "told", t) for row in record["table"])]
    if any(r["domains"].get(d, {}).get("untold") is not None for r in record["table"] for d in names):
        shown = [r for r in record["table"] if any(v["untold"] is not None for v in r["domains"].values())]
        found = (_table_row(r, names, "untold", t) for r in shown)
        rows += [[f"{row[0]} ({t('untold')})", *row[1:]] for row in found]
    kept = verdict.get("gain_kept")
    lines = [f"{word}: {verdict['reason']}", "", *aligned(rows), ""]
    if kept:
        interval = f"{kept['low']:.2f} .. {kept['high']:.2f}"
        lines.append(f"{t('gain kept of the specialists')}: {kept['value']:.2f} ({t('95% interval')} {interval})")
    crossed = {d: sum(c["bytes"] for c in record["domains"][d]["crossed"]) for d in names}
    lines.append(f"{t('crossed')}: " + ", ".join(f"{d} {b / 1e6:.2f} MB" for d, b in crossed.items()))
    lines += [f"{t('warning')}: {w}" for w in record["warnings"]]
    return "\n".join(lines)


def _table_row(row: Mapping[str, Any], names: Sequence[str], mode: str, t: Words) -> list[str]:
    values = [row["domains"].get(d, {}).get(mode) for d in names]
    known = [v for v in values if v is not None]
    mean = sum(known) / len(known) if len(known) == len(values) else None
    before, colon, method = str(row["name"]).partition(": ")
    return [t(before) + colon + method, *("-" if v is None else f"{v:.3f}" for v in [*values, mean])]


def aligned(rows: Sequence[Sequence[str]], left: int = 1) -> list[str]:
    """Rows of a table in columns, the first ``left`` columns to the left; wide characters count twice."""
    widths = [max(width(row[i]) for row in rows) for i in range(len(rows[0]))]

    def cell(text: str, column: int) -> str:
        room = " " * (widths[column] - width(text))
        return text + room if column < left else room + text

    return ["  ".join(cell(c, i) for i, c in enumerate(row)).rstrip() for row in rows]


def width(text: str) -> int:
    """Columns that a text takes on a terminal."""
    return sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def verdict_table(verdict: Mapping[str, Any], t: Words = str) -> str:
    """One line a domain with its interval, then the decision."""
    heading = [t("domain"), t("old"), t("new"), t("change"), t("interval"), t("margin"), t("holds")]
    rows = [
        [
            d, f"{v['incumbent']:.4f}", f"{v['candidate']:.4f}", f"{v['delta']:+.4f}",
            f"{v['low']:+.4f} .. {v['high']:+.4f}",
            f"{v['margin']:.4f}", t("yes") if v["holds"] else t("no"),
        ]
        for d, v in verdict["domains"].items()
    ]  # fmt: skip
    word = t("accepted") if verdict["accepted"] else t("refused")
    return "\n".join([*aligned([heading, *rows]), f"{word}: {verdict['reason']}"])


def history_tree(events: Sequence[Mapping[str, Any]], champion: Mapping[str, Any] | None, t: Words = str) -> str:
    """Events oldest first; each model under the champion of its time; ``*`` marks the champion of now."""
    lines, depth = [], 0
    now = champion["model"] if champion else None
    for event in events:
        name = event["event"]
        if name == "rolled back":
            depth = max(depth - 1, 0)
        mark = "*" if now and event["model"] == now else " "
        branch = depth + (name in {"promoted", "refused", "left"})
        indent = f"{'   ' * branch}└─ " if branch else ""
        said = [t(name), *([str(event["domain"])] if name == "left" else [])]
        said += [f"({t('round')} {event['number']})"] if event.get("number") else []
        said += [f" {event['time']}", *([f" {event['reason']}"] if event.get("reason") else [])]
        lines.append(f"{mark} {indent}{(event['model'] or '-')[:12]}  {' '.join(said)}")
        depth += name in {"promoted", "left"}
    return "\n".join(lines) or t("nothing yet")


def method_page(
    name: str, family: str, docs: Sequence[str], parameters: Mapping[str, Mapping[str, Any]], t: Words = str
) -> str:
    """What `fanbu methods show` prints."""
    lines = [
        f"{name} ({family})",
        "",
        "\n\n".join(docs),
        "",
        f"{t('parameters')}:" if parameters else t("no parameters"),
    ]
    lines += [f"  {k}: {v['type']} = {v['default']}" for k, v in parameters.items()]
    return "\n".join(lines)
