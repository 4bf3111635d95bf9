"""Dials: a parameter of merging that may differ by tensor, by layer or by specialist."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from fanbu.errors import UsageError

# A number; a list, spread evenly over the layers and interpolated between; or patterns, each with one of these.
Level = float | list[float]
Dial = float | list[float] | dict[str, Level]

_LAYER = re.compile(r"(?:^|\.)(\d+)\.")


def layer_of(name: str) -> int | None:
    """The number of the layer that a tensor belongs to; None outside the stack of layers."""
    found = _LAYER.search(name)
    return int(found[1]) if found else None


def depth_of(names: Iterable[str]) -> int:
    """How many layers these tensors have."""
    return 1 + max((n for name in names if (n := layer_of(name)) is not None), default=0)


def level(dial: Dial, name: str, layers: int) -> float:
    """The value of a dial for one tensor.

    A mapping goes by the first pattern that occurs in the tensor's name; ``*`` stands for all others. A list of
    values v_0..v_m is a gradient: at layer l of L it is interpolated at m l / (L - 1); tensors outside the layers take
    the first value. Raises UsageError where nothing in a mapping fits, or a list is empty.
    """
    if isinstance(dial, Mapping):
        fitting = [value for pattern, value in dial.items() if pattern != "*" and pattern in name]
        if not fitting and "*" not in dial:
            raise UsageError(
                "dial", f"no pattern fits tensor {name!r}", allowed=[*dial], remedy="add a value for `*`, all others"
            )
        return level(fitting[0] if fitting else dial["*"], name, layers)
    if not isinstance(dial, list):
        return float(dial)
    if not dial:
        raise UsageError("dial", "a gradient has no values", allowed="at least one number", remedy="write some")
    place = (layer_of(name) or 0) / max(1, layers - 1) * (len(dial) - 1)
    low = min(int(place), len(dial) - 1)
    high = min(low + 1, len(dial) - 1)
    return dial[low] + (dial[high] - dial[low]) * (place - low)
