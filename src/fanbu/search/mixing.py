"""How much of each domain goes in: coefficients of a way back by domain, or by domain and depth, as something to tune.

A controller of mixtures is then the tuning that there is: coefficients are drawn (CMA-ES suits them: they are numbers,
and depend on each other), a large model is made of them, and validation rows say what it came to. What they weigh is
the way's own: task vectors of merges, texts of ``distill``, how often rows come in ``multitask``. Learned by gradient,
on texts without labels, they are a way of their own (``adamerging``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, get_args, get_origin

from fanbu.catalogue import Method
from fanbu.search.spaces import Range, Space

_FACTOR = 4.0  # from a fourth to four times as much
_DEPTHS = 3  # anchors of a coefficient that changes with depth
_KINDS = ("weights", "shares")  # parameters that give each domain a number


def mixing_space(
    way: Method, domains: Sequence[str], by_layer: bool = False, classifies: bool = True, given: Mapping[str, Any] = {},
) -> Space:  # fmt: skip
    """A range by domain (``weights.DOMAIN``), or by domain and depth (``weights.DOMAIN/0`` to ``/2``, from the first
    layer to the last) where the way takes dials; around what the way was ``given`` for it, if that is a number above 0,
    else around 1. Nothing where it gives domains no numbers."""
    name = next((n for n in _KINDS if n in way.parameters()), None)
    if name is None or (way.needs.kind == "predictions" and not classifies):
        return {}
    told = {d: given.get(name, {}).get(d) for d in domains}
    middle = {d: float(v) if isinstance(v, (int, float)) and v > 0 else 1.0 for d, v in told.items()}
    dials = by_layer and list in _origins(way.parameters()[name][0])
    depths = [f"/{i}" for i in range(_DEPTHS)] if dials else [""]
    return {
        f"{name}.{d}{at}": Range(v / _FACTOR, v * _FACTOR, log=True) for d, v in middle.items() for at in depths
    }  # fmt: skip


def _origins(kind: Any) -> set[Any]:
    """All types that a type is made of."""
    return {get_origin(kind)} | {o for part in get_args(kind) for o in _origins(part)}


def coefficients(values: Mapping[str, Any]) -> dict[str, Any]:
    """Drawn values with those of one domain at several depths as one list, which is a dial."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        name, slash, depth = key.rpartition("/")
        if slash and depth.isdigit() and name.partition(".")[0] in _KINDS:
            found.setdefault(name, []).append(value)
        else:
            found[key] = value
    return found
