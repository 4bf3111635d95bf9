"""What a search tried: the size of each sub-network against its score, and those that nothing smaller beats."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from html import escape
from typing import Any

from fanbu.report import format as f
from fanbu.report.charts import Scale, scale_of, svg, ticks
from fanbu.report.words import Say

HEIGHT = 200
_SHOW = {"milliseconds": f.milliseconds, "bytes": f.size, "parameters": f.big}


@dataclass(frozen=True)
class Searched:
    """One domain's search: the drawing, and its frontier as (size, score) for those who read."""

    domain: str
    trials: int
    axis: str
    low: str
    high: str
    plot_svg: str
    frontier: list[tuple[str, str]]


def searches(record: Mapping[str, Any], t: Say) -> list[Searched]:
    """All domains whose specialist was searched for."""
    domains = f.part(record, "domains")
    found = [_searched(str(name), f.part(domains, name, "specialist"), t) for name in domains]
    return [one for one in found if one]


def _searched(name: str, own: Mapping[str, Any], t: Say) -> Searched | None:
    kind = str(own.get("searched_by"))
    tried = [
        (x, y) for row in f.rows(own, "searched")
        if (x := f.number(row.get("size"))) is not None and (y := f.number(row.get("score"))) is not None
    ]  # fmt: skip
    if not tried or kind not in _SHOW:
        return None
    best = frontier(tried)
    across, up = scale_of([x for x, _ in tried]), scale_of([y for _, y in tried], pad=0.1)
    show = _SHOW[kind]
    dots = [_dot(across, up, p, p in best, f"{show(p[0])}: {p[1]:.3f}") for p in sorted(tried, key=lambda p: p in best)]
    grid = [f'<line class="grid" x1="0" x2="100%" y1="{_y(up, g)}" y2="{_y(up, g)}"/>' for g in ticks(up, 4)]
    label = t("{n} sub-networks of {domain}: {axis} and score", n=len(tried), domain=f.text(name), axis=t(kind))
    return Searched(
        f.text(name), len(tried), t(kind), show(min(tried)[0]), show(max(tried)[0]),
        svg([*grid, *dots], label, "lines"), [(show(x), f"{y:.3f}") for x, y in best],
    )  # fmt: skip


def frontier(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points that no other beats in one of size and score without losing in the other, smallest first."""
    found: list[tuple[float, float]] = []
    for x, y in sorted(set(points), key=lambda p: (p[0], -p[1])):
        if not found or y > found[-1][1]:
            found.append((x, y))
    return found


def _y(scale: Scale, value: float) -> str:
    return f"{HEIGHT * (1 - scale.at(value) / 100):.1f}"


def _dot(across: Scale, up: Scale, point: tuple[float, float], best: bool, said: str) -> str:
    kind, radius = ("champion", 5) if best else ("reference", 2.5)
    x, y = f"{across.at(point[0]):.2f}%", _y(up, point[1])
    return f'<circle class="dot {kind}" cx="{x}" cy="{y}" r="{radius}"><title>{escape(said)}</title></circle>'
