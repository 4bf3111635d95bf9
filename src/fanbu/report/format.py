"""How the report reads a record and writes numbers. A part that is missing, null or not finite becomes a dash."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fanbu.report.words import Say

DASH = "–"
MINUS = "\u2212"
# Text-direction marks could make a hostile name look like another one.
_DIRECTION = set("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
_LOWER_IS_BETTER = {"loss", "perplexity", "bits_per_byte", "brier", "calibration_error"}
_NOT_A_SHARE = {"loss": "nats", "perplexity": "", "bits_per_byte": "bits", "mse": "", "mae": "", "return": ""}


def part(value: object, *keys: str) -> Mapping[str, Any]:
    """The mapping found under ``keys``, or an empty one."""
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value if isinstance(value, Mapping) else {}


def rows(value: object, key: str) -> list[Mapping[str, Any]]:
    """The mappings of the list under ``key``; anything else in it is left out."""
    found = value.get(key) if isinstance(value, Mapping) else None
    return [row for row in found if isinstance(row, Mapping)] if isinstance(found, (list, tuple)) else []


def texts(value: object, key: str) -> list[str]:
    """The list under ``key`` as texts."""
    found = value.get(key) if isinstance(value, Mapping) else None
    return [text(item) for item in found if item is not None] if isinstance(found, (list, tuple)) else []


def number(value: object) -> float | None:
    """A finite number, or None."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return float(value)


def text(value: object) -> str:
    """One value as text for the page: a dash for nothing, and no hidden characters. (The template escapes it.)"""
    if value is None or value == "":
        return DASH
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float) and not math.isfinite(value):
        return DASH
    return clean(str(value))


def clean(raw: str) -> str:
    """``raw`` with control, direction and surrogate characters shown as the replacement character."""
    return "".join("\ufffd" if _hidden(c) else c for c in raw)


def _hidden(letter: str) -> bool:
    return letter in _DIRECTION or (letter not in "\n\t" and unicodedata.category(letter) in ("Cc", "Cs"))


def signed(value: float, digits: int) -> str:
    """A number with its sign, a real minus, and no negative zero."""
    shown = f"{value:+.{digits}f}"
    if float(shown) == 0:
        return f"{0:.{digits}f}"
    return shown.replace("-", MINUS)


@dataclass(frozen=True)
class Unit:
    """How a metric is printed: shares of one in percent (changes in points), everything else as it is."""

    scale: float
    digits: int
    name: str

    def score(self, value: object) -> str:
        """One score."""
        got = number(value)
        return DASH if got is None else f"{got * self.scale:.{self.digits}f}".replace("-", MINUS)

    def change(self, value: object) -> str:
        """A difference of two scores, with its sign."""
        got = number(value)
        return DASH if got is None else signed(got * self.scale, self.digits)

    def named(self, value: object, t: Say) -> str:
        """A difference with its sign and the unit's name."""
        return f"{self.change(value)} {t(self.name)}".strip() if number(value) is not None else DASH

    def interval(self, low: object, high: object, t: Say) -> str:
        """A confidence interval of a change."""
        return DASH if number(low) is None and number(high) is None else between(self.change(low), self.change(high), t)


def between(low: str, high: str, t: Say) -> str:
    """From one printed number to another."""
    return t("{low} to {high}", low=low, high=high)


POINTS = Unit(100.0, 1, "points")


def unit_of(metric: object) -> Unit:
    """The unit of a metric by its name."""
    name = str(metric)
    return Unit(1.0, 3, _NOT_A_SHARE[name]) if name in _NOT_A_SHARE else POINTS


def common_unit(units: list[Unit]) -> Unit:
    """The unit of a mean over metrics: theirs where they agree, else plain numbers."""
    return units[0] if units and all(u == units[0] for u in units) else (POINTS if not units else Unit(1.0, 3, ""))


def higher_is_better(metric: object, stated: object = None) -> bool:
    """Whether more is better: as stated, else by the metric's name."""
    return stated if isinstance(stated, bool) else str(metric) not in _LOWER_IS_BETTER


def percent(value: object) -> str:
    """A share of one as whole percent."""
    got = number(value)
    return DASH if got is None else f"{got * 100:.0f}%".replace("-", MINUS)


def p_value(value: object) -> str:
    """A p-value to two significant digits."""
    got = number(value)
    if got is None:
        return DASH
    if got < 0.001:
        return "<0.001"
    return f"{got:.3f}" if got < 0.1 else f"{got:.2f}"


def count(value: object) -> str:
    """A count with thin spaces between thousands."""
    got = number(value)
    return DASH if got is None else f"{got:,.0f}".replace(",", "\u202f")


def _scaled(got: float, steps: list[str], space: str) -> str:
    step = 0
    while abs(got) >= 999.5 and step < len(steps) - 1:
        got, step = got / 1000, step + 1
    digits = 0 if step == 0 or abs(got) >= 99.95 else 1
    return f"{got:.{digits}f}{space}{steps[step]}".strip()


def big(value: object) -> str:
    """A number of parameters: 22.7M."""
    got = number(value)
    return DASH if got is None else _scaled(got, ["", "k", "M", "B", "T"], "")


def size(value: object) -> str:
    """Bytes in decimal units: 12.3 kB."""
    got = number(value)
    return DASH if got is None else _scaled(got, ["B", "kB", "MB", "GB", "TB"], "\u00a0")


def seconds(value: object) -> str:
    """A duration: 0.4 s, 32 s, 4 min 32 s, 2 h 05 min."""
    got = number(value)
    if got is None:
        return DASH
    if got < 9.95:
        return f"{got:.1f}\u00a0s"
    whole = round(got)
    if whole < 60:
        return f"{whole}\u00a0s"
    if whole < 3600:
        return f"{whole // 60}\u00a0min {whole % 60:02d}\u00a0s"
    return f"{whole // 3600}\u00a0h {whole % 3600 // 60:02d}\u00a0min"


def energy(value: object) -> str:
    """Joules as watt-hours."""
    got = number(value)
    return DASH if got is None else _scaled(got / 3.6, ["mWh", "Wh", "kWh", "MWh"], " ")


def milliseconds(value: object) -> str:
    """A latency."""
    got = number(value)
    return DASH if got is None else f"{got:.{1 if got < 99.95 else 0}f}\u00a0ms"


def moment(value: object) -> str:
    """An ISO time, readable."""
    shown = text(value)
    return shown.replace("T", " ").replace("Z", " UTC") if len(shown) == 20 and shown.endswith("Z") else shown


@dataclass(frozen=True)
class Hash:
    """A digest: short on the page, full in the tooltip."""

    short: str
    full: str


def digest(value: object) -> Hash:
    """A digest for the page."""
    full = text(value)
    return Hash(full[:10], full)
