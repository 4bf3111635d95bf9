"""What the command line prints: short tables for a terminal of 80 columns or more."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def summary(record: Mapping[str, Any]) -> str:
    """The verdict, the table against the baselines and what crossed."""
    verdict = record["verdict"]
    word = "PROMOTED" if verdict["accepted"] else "KEPT THE OLD ONE"
    names = list(record["domains"])
    rows = [["", *names, "mean"], *(_table_row(row, names, "told") for row in record["table"])]
    if any(r["domains"].get(d, {}).get("untold") is not None for r in record["table"] for d in names):
        shown = [r for r in record["table"] if any(v["untold"] is not None for v in r["domains"].values())]
        rows += [[f"{row[0]} (untold)", *row[1:]] for row in (_table_row(r, names, "untold") for r in shown)]
    kept = verdict.get("gain_kept")
    lines = [f"{word}: {verdict['reason']}", "", *_aligned(rows), ""]
    if kept:
        lines.append(
            f"gain kept of the specialists': {kept['value']:.2f} (95% interval {kept['low']:.2f} to {kept['high']:.2f})"
        )
    crossed = {d: sum(c["bytes"] for c in record["domains"][d]["crossed"]) for d in names}
    lines.append("crossed: " + ", ".join(f"{d} {b / 1e6:.2f} MB" for d, b in crossed.items()))
    lines += [f"warning: {w}" for w in record["warnings"]]
    return "\n".join(lines)


def _table_row(row: Mapping[str, Any], names: Sequence[str], mode: str) -> list[str]:
    values = [row["domains"].get(d, {}).get(mode) for d in names]
    known = [v for v in values if v is not None]
    mean = sum(known) / len(known) if len(known) == len(values) else None
    return [row["name"], *("-" if v is None else f"{v:.3f}" for v in [*values, mean])]


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        for row in rows
    ]


def verdict_table(verdict: Mapping[str, Any]) -> str:
    """One line a domain with its interval, then the decision."""
    rows = [["domain", "old", "new", "change", "interval", "margin", "holds"]]
    rows += [
        [
            d, f"{v['incumbent']:.4f}", f"{v['candidate']:.4f}", f"{v['delta']:+.4f}",
            f"{v['low']:+.4f} to {v['high']:+.4f}",
            f"{v['margin']:.4f}", "yes" if v["holds"] else "no",
        ]
        for d, v in verdict["domains"].items()
    ]  # fmt: skip
    word = "accepted" if verdict["accepted"] else "refused"
    return "\n".join([*_aligned(rows), f"{word}: {verdict['reason']}"])


def history_tree(events: Sequence[Mapping[str, Any]], champion: Mapping[str, Any] | None) -> str:
    """Events oldest first; each model under the champion of its time; ``*`` marks the champion of now."""
    lines, depth = [], 0
    now = champion["model"] if champion else None
    for event in events:
        if event["event"] == "rolled back":
            depth = max(depth - 1, 0)
        mark = "*" if event["model"] == now else " "
        why = f"  {event['reason']}" if event.get("reason") else ""
        branch = depth + (event["event"] in {"promoted", "refused"})
        indent = f"{'   ' * branch}└─ " if branch else ""
        lines.append(f"{mark} {indent}{event['model'][:12]}  {event['event']}  {event['time']}{why}")
        depth += event["event"] == "promoted"
    return "\n".join(lines) or "nothing yet"


def method_page(name: str, family: str, docs: Sequence[str], parameters: Mapping[str, Mapping[str, Any]]) -> str:
    """What `fanbu methods show` prints."""
    lines = [f"{name} ({family})", "", "\n\n".join(docs), "", "parameters:" if parameters else "no parameters"]
    lines += [f"  {k}: {v['type']} = {v['default']}" for k, v in parameters.items()]
    return "\n".join(lines)
