"""What may be tuned of a way back: ranges around its arguments, read from its signature."""

from __future__ import annotations

import math
import types
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

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
    """Ranges and choices by parameter (``train.lr`` is a key of a block), around ``given`` arguments and defaults;
    ``over`` replaces them: two numbers are a range, anything else a list of choices.

    Numbers are taken from a fourth to four times what they are, within what the signature allows (those up to 1 stay up
    to 1); switches and words with their choices; rates of training within ``train``. Raises UsageError for a parameter
    that the way does not have.
    """
    checked, found = way.check(given), Space()
    for name, (kind, _) in way.parameters().items():
        if name not in _LEFT and (one := _around(kind, checked[name])) is not None:
            found[name] = one
        if isinstance(checked[name], Train):
            rates = {f"{name}.{rate}": getattr(checked[name], rate) for rate in _OF_TRAIN}
            found |= {
                key: Range(value / _FACTOR, value * _FACTOR, log=True) for key, value in rates.items() if value > 0
            }
    if over:
        found = {key: _given(way, key, values) for key, values in over.items()}
    return found


def _around(kind: Any, value: Any) -> Range | tuple[Any, ...] | None:
    limits = get_args(kind)[1:] if get_origin(kind) is Annotated else ()
    plain = get_args(kind)[0] if get_origin(kind) is Annotated else kind
    if get_origin(plain) in (Union, types.UnionType) and float in get_args(plain):
        plain = float
    if plain is bool:
        return (False, True)
    if get_origin(plain) is Literal:
        return tuple(get_args(plain))
    if plain not in (float, int) or not isinstance(value, (int, float)) or value <= 0:
        return None
    low, high = value / _FACTOR, value * _FACTOR
    for limit in limits:
        low = max([low, *(getattr(limit, n) for n in ("ge", "gt") if hasattr(limit, n))])
        high = min([high, *(getattr(limit, n) for n in ("le",) if hasattr(limit, n))])
        high = min([high, *(math.nextafter(limit.lt, 0) for n in ("lt",) if hasattr(limit, n))])
    if plain is float and value <= 1:
        high = min(high, 1.0)
    if plain is int:
        return Range(max(1, math.floor(low)), math.ceil(high), log=True, whole=True)
    return Range(low, high, log=True) if low < high else None


def _given(way: Method, key: str, values: list[Any]) -> Range | tuple[Any, ...]:
    if key.partition(".")[0] not in way.parameters() or not values:
        raise UsageError(
            "unknown-parameter", f"compare.space: {way.name} has no parameter {key!r}",
            allowed=sorted(way.parameters()), got=values,
            remedy="name one of these, with two numbers or a list of choices",
        )  # fmt: skip
    numbers = [v for v in values if isinstance(v, (int, float)) and not isinstance(v, bool)]
    if len(values) == 2 and len(numbers) == 2 and numbers[0] < numbers[1]:
        whole = all(isinstance(v, int) for v in numbers)
        return Range(numbers[0], numbers[1], log=numbers[0] > 0, whole=whole)
    return tuple(values)


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
