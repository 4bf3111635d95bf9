"""A meta decision forest read from disk: nothing in it is believed before it is checked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from fanbu.errors import IntegrityError
from fanbu.model import read_json
from fanbu.tables.trees import Array

_KINDS: dict[str, type | tuple[type, ...]] = {
    "specialist_trees": int, "gate_trees": int, "specialist_leaf": int, "gate_leaf": int, "passthrough": bool,
    "strength": (int, float), "cv": int, "n_jobs": (int, type(None)),
}  # fmt: skip


def read(folder: Path) -> tuple[dict[str, Any], dict[str, Array]]:
    """Facts and arrays. Raises IntegrityError where the files are not what ``save`` writes."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    facts = read_json(folder / "meta_forest.json", "forest-broken")
    try:
        arrays = load_file(folder / "meta_forest.safetensors")
        sound = _sound(facts, arrays)
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise _broken(folder, str(error)) from None
    if not sound:
        raise _broken(folder, "other shapes or kinds")
    return facts, arrays


def _sound(facts: dict[str, Any], arrays: dict[str, Array]) -> bool:
    classes, domains, features, given = (facts[k] for k in ("classes", "domains", "features", "parameters"))
    if not (isinstance(classes, list) and classes and isinstance(domains, list) and domains):
        return False
    if type(features) is not int or features < 1 or set(given) != set(_KINDS):
        return False
    if not all(isinstance(given[k], kind) for k, kind in _KINDS.items()):
        return False
    flat, voices = len(domains) * len(classes), len(domains) + 1 + bool(given["passthrough"])
    shapes = {
        "centres": (len(domains), features), "spreads": (len(domains), features), "weight": (len(classes), flat),
        "bias": (len(classes),), "tilt": (1 + voices + len(classes),),
    }  # fmt: skip
    right = all(
        arrays[n].shape == s and arrays[n].dtype == np.float64 and np.isfinite(arrays[n]).all()
        for n, s in shapes.items()
    )
    return bool(right and (arrays["spreads"] > 0).all())


def _broken(folder: Path, why: str) -> IntegrityError:
    return IntegrityError(
        "forest-broken", f"{folder} holds no meta decision forest: {why}",
        allowed="what MetaForestClassifier.save wrote", remedy="ask for the files again",
    )  # fmt: skip
