"""What may be tuned of a way back: ranges around its arguments, read from its signature."""

from __future__ import annotations

import math
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, is_dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from fanbu.catalogue import Method
from fanbu.errors import UsageError
from fanbu.types import Train

_FACTOR = 4.0  # numbers are tried from a fourth of what they are to four times that
# what crosses, whom to believe, and how exactly to compute, are no matters of taste
_LEFT = frozenset({
    "store", "aggregate", "clip", "liars", "layers", "weights", "batch", "rows", "mass", "top_k", "floor", "ridge",
    "tolerance", "trim", "order",
})  # fmt: skip
_OF_TRAIN = ("lr", "head_lr")


@dataclass(frozen=True)
class Range:
    """Numbers from ``low`` to ``high``, evenly on a logarithmic scale where ``log``; whole ones where ``whole``."""

    low: float
    high: float
    log: bool = False
    whole: bool = False


Space = dict[str, Range | tuple[Any, ...]]


def space_of(way: Method, given: Mapping[str, Any], over: Mapping[str, list[Any]] | None = None) -> Space:
    """Ranges and choices by parameter (``train.lr`` is a key of a block), around ``given`` arguments and defaults. If
    ``over`` names some, those of the way's alone: two numbers are a range, anything else a list of choices.

    Numbers are taken from a fourth to four times what they are, within what the signature allows (those up to 1 stay up
    to 1); switches and words with their choices; rates of training within ``train``.
    """
    if over:
        return {key: _given(way, key, values) for key, values in over.items() if _has(way, key)}
    checked, found = way.check(given), Space()
    for name, (kind, _) in way.parameters().items():
        value = checked[name]
        if isinstance(value, Train):
            rates = {f"{name}.{rate}": getattr(value, rate) for rate in _OF_TRAIN}
            found |= {key: Range(rate / _FACTOR, rate * _FACTOR, log=True) for key, rate in rates.items() if rate > 0}
        elif name not in _LEFT and (one := _around(kind, value)) is not None:
            found[name] = one
    return found


def check_space(over: Mapping[str, list[Any]], ways: Sequence[Method]) -> None:
    """Raises UsageError for a key that is no parameter of any of these ways, for one without values, and for values
    that a way which has the parameter does not take."""
    for key, values in over.items():
        having = [way for way in ways if _has(way, key)]
        if not values or not having:
            raise UsageError(
                "unknown-parameter", f"compare.space: no candidate has a parameter {key!r} with these values",
                allowed=sorted({name for way in ways for name in way.parameters()}), got=values,
                remedy="name one of these, with two numbers or a list of choices",
            )  # fmt: skip
        for way in having:
            one = _given(way, key, values)
            for value in (one.low, one.high) if isinstance(one, Range) else one:
                way.check(with_values({}, {key: value}))


def _has(way: Method, key: str) -> bool:
    return key.partition(".")[0] in way.parameters()


def _plain(kind: Any) -> tuple[Any, list[Any]]:
    """A type without its limits, ``float`` where it may be one, and the limits."""
    plain, *limits = get_args(kind) if get_origin(kind) is Annotated else (kind,)
    is_float = get_origin(plain) in (Union, types.UnionType) and float in get_args(plain)
    return (float if is_float else plain), limits


def _around(kind: Any, value: Any) -> Range | tuple[Any, ...] | None:
    plain, limits = _plain(kind)
    if plain is bool:
        return (False, True)
    if get_origin(plain) is Literal:
        return tuple(get_args(plain))
    if plain not in (float, int) or not isinstance(value, (int, float)) or value <= 0:
        return None
    least = [bound for limit in limits for bound in _bounds(limit, "ge", "gt", math.inf)]
    most = [bound for limit in limits for bound in _bounds(limit, "le", "lt", -math.inf)]
    if plain is int:
        return Range(max([1, value // _FACTOR, *least]), min([value * _FACTOR, *most]), log=True, whole=True)
    most += [1.0] if value <= 1 else []
    low, high = max([value / _FACTOR, *least]), min([value * _FACTOR, *most])
    return Range(low, high, log=True) if low < high else None


def _bounds(limit: Any, closed: str, opened: str, inwards: float) -> list[float]:
    """The bound that a limit sets at one side, itself allowed."""
    found = [getattr(limit, closed)] if hasattr(limit, closed) else []
    return found + ([math.nextafter(getattr(limit, opened), inwards)] if hasattr(limit, opened) else [])


def _given(way: Method, key: str, values: list[Any]) -> Range | tuple[Any, ...]:
    values = [_number(v) for v in values]  # YAML reads 1e-4 as text
    numbers = [v for v in values if isinstance(v, (int, float)) and not isinstance(v, bool)]
    if len(values) == 2 and len(numbers) == 2 and numbers[0] < numbers[1]:
        return Range(numbers[0], numbers[1], log=numbers[0] > 0, whole=_is_whole(way, key))
    return tuple(values)


def _is_whole(way: Method, key: str) -> bool:
    """Whether a parameter takes whole numbers alone."""
    name, _, inner = key.partition(".")
    kind, default = way.parameters()[name]
    if inner and is_dataclass(default):
        kind = get_type_hints(type(default), include_extras=True).get(inner)
    plain, _ = _plain(kind)
    return int in (plain, *get_args(plain))


def _number(value: Any) -> Any:
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def with_values(given: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments with these values in place of theirs."""
    found = {k: dict(v) if isinstance(v, Mapping) else v for k, v in given.items()}
    for key, value in values.items():
        name, dot, inner = key.partition(".")
        if dot:
            found[name] = {**found.get(name, {}), inner: value}
        else:
            found[name] = value
    return found
