"""More charts as inline SVG: lines over rounds, reliability diagrams, stacked bars and the lanes of a tree.

As in ``charts``: horizontal positions are percentages, text and strokes keep their size, labels are escaped here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise

from fanbu.report.charts import Scale, scale_of, svg, ticks

HEIGHT = 250
LANE = 20
NODE = 17  # how far below a row's top its node is drawn


@dataclass(frozen=True)
class Series:
    """One line: ``kind`` picks its colour and marker; a reference has a letter, its ``tag``."""

    kind: str
    name: str
    values: list[float | None]
    tag: str = ""


@dataclass(frozen=True)
class Lines:
    """A line chart in parts: the axis at the left, the plot, the tags at the right, and the axis below."""

    left_svg: str
    plot_svg: str
    right_svg: str
    below_svg: str


def _across(i: int, n: int) -> float:
    return 50.0 if n < 2 else 4 + 92 * i / (n - 1)


def lines(
    series: Sequence[Series], kept: Sequence[bool], names: Sequence[str], show: Callable[[float], str], label: str
) -> Lines:
    """Values over rounds; where ``kept`` is true the champion's marker is hollow. ``names`` stand below."""
    scale = scale_of([value for s in series for value in s.values], pad=0.12)
    n = len(names)
    grid = ticks(scale, 5)
    plot = [f'<line class="grid" x1="0" x2="100%" y1="{_y(scale, g)}" y2="{_y(scale, g)}"/>' for g in grid]
    order = ("reference", "specialists", "refused", "champion")
    drawn = sorted(series, key=lambda s: order.index(s.kind) if s.kind in order else 0)
    for at, one in enumerate(drawn):
        plot += _line(one, scale, n, at % 4)
        plot += [m for i, value in enumerate(one.values) for m in _marker(one, i, value, scale, n, kept, show)]
    axis = [f'<text x="100%" y="{_y(scale, g)}" dy=".35em" text-anchor="end">{escape(show(g))}</text>' for g in grid]
    return Lines(
        left_svg=svg(axis, "", "yaxis"),
        plot_svg=svg(plot, label, "lines"),
        right_svg=svg(_tags(series, scale), "", "tags"),
        below_svg=svg(_below(names), "", "xaxis"),
    )


def _y(scale: Scale, value: float) -> str:
    return f"{HEIGHT * (1 - scale.at(value) / 100):.1f}"


def _line(one: Series, scale: Scale, n: int, dash: int) -> list[str]:
    pairs = [(i, a, b) for i, (a, b) in enumerate(pairwise(one.values)) if a is not None and b is not None]
    return [
        f'<line class="series {one.kind} dash{dash}" x1="{_across(i, n):.2f}%" x2="{_across(i + 1, n):.2f}%" '
        f'y1="{_y(scale, a)}" y2="{_y(scale, b)}"/>'
        for i, a, b in pairs
    ]  # fmt: skip


def _marker(
    one: Series, i: int, value: float | None, scale: Scale, n: int, kept: Sequence[bool], show: Callable[[float], str]
) -> list[str]:
    if value is None:
        return []
    x, y = f"{_across(i, n):.2f}%", _y(scale, value)
    title = f"<title>{escape(one.name)}: {escape(show(value))}</title>"
    if one.kind == "champion":
        hollow = " kept" if kept[i] else ""
        return [f'<circle class="dot champion{hollow}" cx="{x}" cy="{y}" r="5.5">{title}</circle>']
    if one.kind == "specialists":
        return [_at(x, y, f'<polygon class="dot specialists" points="0,-6.5 6.5,0 0,6.5 -6.5,0">{title}</polygon>')]
    if one.kind == "refused":
        return [_at(x, y, f'<path class="cross" d="M-5-5 5 5M-5 5 5-5">{title}</path>')]
    return [f'<circle class="dot reference" cx="{x}" cy="{y}" r="2.5">{title}</circle>']


def _at(x: str, y: str, shape: str) -> str:
    return f'<svg x="{x}" y="{y}" width="1" height="1" overflow="visible" aria-hidden="true">{shape}</svg>'


def _tags(series: Sequence[Series], scale: Scale) -> list[str]:
    """The references' letters at the height of their last value, moved apart where they would overlap."""
    ends = [
        (float(_y(scale, last)), one.tag)
        for one in series
        if one.tag and (last := next((value for value in reversed(one.values) if value is not None), None)) is not None
    ]
    body, below = [], -100.0
    for y, tag in sorted(ends):
        below = max(y, below + 12)
        body.append(f'<text x="2" y="{below:.1f}" dy=".35em">{escape(tag)}</text>')
    return body


def _below(names: Sequence[str], at_most: int = 9) -> list[str]:
    every = -(-len(names) // at_most)
    shown = [i for i in range(len(names)) if (len(names) - 1 - i) % every == 0]
    return [
        f'<text x="{_across(i, len(names)):.2f}%" y="14" text-anchor="middle">{escape(names[i])}</text>' for i in shown
    ]


def reliability(
    systems: Sequence[tuple[str, Sequence[tuple[float, float, float]]]], across: str, up: str, label: str
) -> str:
    """Confidence (``across``) against accuracy (``up``): bins as (share of rows, confidence, accuracy)."""
    body = [f'<line class="grid" x1="{p}%" x2="{p}%" y1="0" y2="100%"/>' for p in (25, 50, 75)]
    body += [f'<line class="grid" y1="{p}%" y2="{p}%" x1="0" x2="100%"/>' for p in (25, 50, 75)]
    body += [
        '<rect class="frame" x="0" y="0" width="100%" height="100%"/>',
        '<line class="honest" x1="0" y1="100%" x2="100%" y2="0"/>',
        f'<text x="98%" y="97%" text-anchor="end">{escape(across)}</text>',
        f'<text x="3%" y="4%" dy=".7em">{escape(up)}</text>',
    ]
    for kind, bins in systems:
        points = [(100 * confidence, 100 - 100 * accuracy, share) for share, confidence, accuracy in bins]
        body += [
            f'<line class="joint {kind}" x1="{a[0]:.1f}%" y1="{a[1]:.1f}%" x2="{b[0]:.1f}%" y2="{b[1]:.1f}%"/>'
            for a, b in pairwise(points)
        ]
        body += [
            f'<circle class="dot {kind}" cx="{x:.1f}%" cy="{y:.1f}%" r="{2.2 + 5 * share**0.5:.1f}"/>'
            for x, y, share in points
        ]
    return svg(body, label, "reliability")


def stack(parts: Sequence[tuple[int, float, str]], label: str) -> str:
    """A bar of parts, each (number of its colour, share of the full width, what it stands for)."""
    body, x = [], 0.0
    for colour, share, title in parts:
        width = 100 * share
        body.append(
            f'<rect class="kind{colour}" x="{x:.2f}%" y="0" width="{width:.2f}%" height="100%">'
            f"<title>{escape(title)}</title></rect>"
        )
        x += width
    return svg(body, label, "bar stack")


def swatch(colour: int) -> str:
    """A small square of a stack's colour for the legend."""
    return svg([f'<rect class="kind{colour}" x="3" y="2" width="13" height="12"/>'], "", "key")


@dataclass(frozen=True)
class Lane:
    """One row of a tree: its node's lane and kind, the lane it branches from, and the lanes that pass.

    Each passing lane says whether it belongs to the ``path`` that leads to the champion, as ``path`` says of the node.
    """

    lane: int
    kind: str
    path: bool
    branch: int | None
    above: tuple[tuple[int, bool], ...]
    below: tuple[tuple[int, bool], ...]


def tree_row(row: Lane, lanes: int) -> str:
    """The lines beside one row: those that pass, the elbow from the parent, and the node."""
    ends = [(lane, path, "0", str(NODE)) for lane, path in row.above]
    ends += [(lane, path, str(NODE), "100%") for lane, path in row.below]
    body = [_upright(*end) for end in sorted(ends, key=lambda end: end[1])]
    x = _lane(row.lane)
    if row.branch is not None and row.branch != row.lane:
        body.append(f'<line class="{_twig(row.path)}" x1="{_lane(row.branch)}" x2="{x}" y1="{NODE}" y2="{NODE}"/>')
    body.append(_node(f"{row.kind} path" if row.path and row.kind == "stood" else row.kind, x))
    return svg(body, "", "tree", LANE * lanes)


def _lane(lane: int) -> float:
    return LANE * (lane + 0.5)


def _twig(path: bool) -> str:
    return "twig path" if path else "twig"


def _upright(lane: int, path: bool, top: str, bottom: str) -> str:
    return f'<line class="{_twig(path)}" x1="{_lane(lane)}" x2="{_lane(lane)}" y1="{top}" y2="{bottom}"/>'


def _node(kind: str, x: float) -> str:
    if kind == "refused":
        inside = '<rect class="node" x="-6" y="-6" width="12" height="12"/><path class="cross" d="M-4-4 4 4M-4 4 4-4"/>'
    elif kind == "back":
        inside = '<circle class="node" r="7"/><path class="turn" d="M3.2 1.6A3.4 3.4 0 1 0-2.6 2.2M-5-.4-2.8 2.8.3.6"/>'
    else:
        inside = f'<circle class="node {kind}" r="{7.5 if kind == "champion" else 6}"/>'
    return f'<g transform="translate({x} {NODE})">{inside}</g>'
