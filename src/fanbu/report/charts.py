"""Charts as inline SVG: pure functions from numbers to text.

Every chart is a strip for one row of a table. Its horizontal positions are percentages, so that it stretches with the
page while strokes, markers and text keep their size, and the table around it is the text behind the chart.
Colours come from the page's style sheet by class; labels are escaped here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape


@dataclass(frozen=True)
class Scale:
    """The values at a chart's left and right edge."""

    low: float
    high: float

    def at(self, value: float) -> float:
        """Where ``value`` lies, in percent of the width."""
        return 100 * min(1.0, max(0.0, (value - self.low) / (self.high - self.low)))


@dataclass(frozen=True)
class Mark:
    """One system in a dot strip; ``kind`` picks its shape: candidate, incumbent, specialists or reference."""

    kind: str
    name: str
    value: float


def scale_of(values: Iterable[float | None], pad: float = 0.06) -> Scale:
    """A scale that holds all values with some room at both ends."""
    known = [value for value in values if value is not None]
    low, high = (min(known), max(known)) if known else (0.0, 0.0)
    if high - low < 1e-12:
        room = abs(high) * 0.05 or 0.01
        return Scale(low - room, high + room)
    return Scale(low - pad * (high - low), high + pad * (high - low))


def ticks(scale: Scale, at_most: int = 6) -> list[float]:
    """Round values inside the scale."""
    rough = (scale.high - scale.low) / at_most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * (1 - 1e-9))
    first, last = math.ceil(scale.low / step - 1e-9), math.floor(scale.high / step + 1e-9)
    return [index * step for index in range(first, last + 1)]


def svg(body: Iterable[str], label: str, name: str, width: int | None = None) -> str:
    """A drawing with a name, or without one: then it is hidden from those who listen."""
    said = f'role="img" aria-label="{escape(label)}"' if label else 'aria-hidden="true"'
    wide = "" if width is None else f' width="{width}"'
    return f'<svg class="{name}"{wide} {said} focusable="false">{"".join(body)}</svg>'


def _vertical(x: float, name: str) -> str:
    return f'<line class="{name}" x1="{x:.2f}%" x2="{x:.2f}%" y1="0" y2="100%"/>'


def _grid(scale: Scale) -> list[str]:
    return [_vertical(scale.at(tick), "grid") for tick in ticks(scale)]


def _zero(scale: Scale) -> list[str]:
    return [_vertical(scale.at(0.0), "zero")] if scale.low <= 0 <= scale.high else []


def _box(x: float, width: float, height: float, name: str, title: str = "") -> str:
    inside = f"<title>{escape(title)}</title>" if title else ""
    shift = f"translate({-width / 2:.1f} {-height / 2:.1f})"
    return (
        f'<rect class="{name}" x="{x:.2f}%" y="50%" width="{width:.1f}" height="{height:.1f}" '
        f'transform="{shift}">{inside}</rect>'
    )


def forest_row(
    scale: Scale,
    delta: float | None,
    low: float | None,
    high: float | None,
    *,
    floor: float | None = None,
    margin: float | None = None,
    role: str = "feeds",
    weight: float = 0.5,
    label: str = "",
) -> str:
    """One domain: a square at the change (larger with more rows, ``weight`` 0 to 1), its interval, and its margin.

    What lies left of minus ``margin`` is shaded. ``floor`` is the one-sided lower bound that is held against it: where
    it lies in the shade, the domain does not hold.
    """
    body: list[str] = []
    if margin is not None:
        edge = scale.at(-margin)
        body.append(f'<rect class="zone" x="0" y="0" width="{edge:.2f}%" height="100%"/>')
        body.append(_vertical(edge, "margin"))
    body += _grid(scale) + _zero(scale)
    kind = "guard" if role == "guard" else "feeds"
    if low is not None and high is not None:
        left, right = scale.at(low), scale.at(high)
        body.append(f'<line class="ci {kind}" x1="{left:.2f}%" x2="{right:.2f}%" y1="50%" y2="50%"/>')
        body += [_box(x, 1.5, 8, f"cap {kind}") for x in (left, right)]
    if floor is not None:
        body.append(_box(scale.at(floor), 2.5, 17, "floor"))
    if delta is not None:
        side = 7 + 5 * min(1.0, max(0.0, weight))
        body.append(_box(scale.at(delta), side, side, f"mark {kind}"))
    return svg(body, label, "strip")


def forest_diamond(scale: Scale, delta: float | None, low: float | None, high: float | None, label: str = "") -> str:
    """The average over domains: a diamond as wide as its interval."""
    body = _grid(scale) + _zero(scale)
    if delta is not None:
        centre = scale.at(delta)
        left = scale.at(low) if low is not None else centre - 1
        right = scale.at(high) if high is not None else centre + 1
        width = max(right - left, 0.5)
        top = min(100.0, max(0.0, 100 * (centre - left) / width))
        body.append(
            f'<g transform="translate(0 -9)"><svg x="{left:.2f}%" y="50%" width="{width:.2f}%" height="18" '
            f'viewBox="0 0 100 18" preserveAspectRatio="none" aria-hidden="true">'
            f'<polygon class="diamond" points="0,9 {top:.1f},0 100,9 {top:.1f},18"/></svg></g>'
        )
    return svg(body, label, "strip")


def axis(scale: Scale, show: Callable[[float], str], label: str = "") -> str:
    """The numbers under a column of strips."""
    body = ['<line class="base" x1="0" x2="100%" y1="0.5" y2="0.5"/>']
    for tick in ticks(scale):
        x = scale.at(tick)
        body.append(f'<line class="base" x1="{x:.2f}%" x2="{x:.2f}%" y1="0" y2="5"/>')
        body.append(f'<text x="{x:.2f}%" y="18" text-anchor="middle">{escape(show(tick))}</text>')
    return svg(body, label, "axis")


def _shape(kind: str, x: float, title: str) -> str:
    inside = f"<title>{escape(title)}</title>" if title else ""
    if kind in ("candidate", "incumbent"):
        return f'<circle class="dot {kind}" cx="{x:.2f}%" cy="50%" r="5.5">{inside}</circle>'
    if kind == "specialists":
        return (
            f'<svg x="{x:.2f}%" y="50%" width="1" height="1" overflow="visible" aria-hidden="true">'
            f'<polygon class="dot specialists" points="0,-6.5 6.5,0 0,6.5 -6.5,0">{inside}</polygon></svg>'
        )
    return _box(x, 2.5, 15, "dot reference", title)


def dots(scale: Scale, marks: Sequence[Mark], show: Callable[[float], str], label: str = "") -> str:
    """All systems on one domain; a line joins the incumbent to the candidate."""
    body = [*_grid(scale), '<line class="rail" x1="0" x2="100%" y1="50%" y2="50%"/>']
    ends = {mark.kind: scale.at(mark.value) for mark in marks if mark.kind in ("candidate", "incumbent")}
    if len(ends) == 2:
        body.append(
            f'<line class="step" x1="{ends["incumbent"]:.2f}%" x2="{ends["candidate"]:.2f}%" y1="50%" y2="50%"/>'
        )
    order = ("reference", "specialists", "incumbent", "candidate")
    drawn = sorted(marks, key=lambda mark: order.index(mark.kind) if mark.kind in order else 0)
    body += [_shape(mark.kind, scale.at(mark.value), f"{mark.name}: {show(mark.value)}") for mark in drawn]
    return svg(body, label, "strip")


def bar(share: float | None, kind: str, label: str = "") -> str:
    """A horizontal bar, ``share`` of the full width; kind is own, other or reused (drawn as an outline)."""
    if share is None:
        return ""
    name = kind if kind in ("own", "other", "reused") else "own"
    width = 100 * min(1.0, max(0.0, share))
    return svg([f'<rect class="{name}" x="0" y="0" width="{width:.2f}%" height="100%"/>'], label, "bar")


def key(kind: str) -> str:
    """The small drawing before an entry of a legend."""
    shapes = {
        "feeds": _box(50, 10, 10, "mark feeds"),
        "guard": _box(50, 10, 10, "mark guard"),
        "floor": _box(50, 2.5, 15, "floor"),
        "average": '<polygon class="diamond" points="1,8 11,2 21,8 11,14"/>',
        "margin": '<rect class="zone" x="0" y="0" width="70%" height="100%"/>' + _vertical(70, "margin"),
    }
    return svg([shapes[kind] if kind in shapes else _shape(kind, 50, "")], "", "key")
