"""A fitted forest as plain arrays: the same answers as scikit-learn's, safe on disk, no pickle."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from fanbu.errors import IntegrityError

Array = np.ndarray[Any, np.dtype[Any]]
MAX_NODES = 2**27


@dataclass(frozen=True)
class Trees:
    """All nodes of all trees, one after the other.

    ``left`` and ``right`` are node numbers, 0 for a leaf (no node has the first root for a child); a row goes left
    where x[feature] <= threshold. ``roots`` [trees]; ``values`` [nodes, outputs].
    """

    left: Array
    right: Array
    feature: Array
    threshold: Array
    roots: Array
    values: Array

    @classmethod
    def of(cls, forest: Any) -> Trees:
        """Of a fitted forest of scikit-learn: a classifier's values are probabilities, a regressor's its outputs."""
        parts = [one.tree_ for one in forest.estimators_]
        starts = np.cumsum([0, *(t.node_count for t in parts)])
        leaf = np.concatenate([t.children_left < 0 for t in parts])

        def shifted(name: str) -> Array:
            whole = np.concatenate([getattr(t, name) + s for t, s in zip(parts, starts, strict=False)])
            return np.where(leaf, 0, whole).astype(np.int32)

        values = np.concatenate([t.value for t in parts])  # [nodes, outputs, classes]; a regressor has one "class"
        values = values[:, 0] if hasattr(forest, "classes_") else values[:, :, 0]  # shares of classes come to 1
        return cls(
            shifted("children_left"), shifted("children_right"),
            np.where(leaf, 0, np.concatenate([t.feature for t in parts])).astype(np.int32),
            np.where(leaf, 0.0, np.concatenate([t.threshold for t in parts])), starts[:-1].astype(np.int32), values,
        )  # fmt: skip

    def leaves(self, x_nf: Array) -> Array:
        """The node that each row ends in, [rows, trees]. Rows are compared in float32, as scikit-learn does."""
        x = np.asarray(x_nf, np.float32)
        rows = np.arange(len(x))[:, None]
        at = np.broadcast_to(self.roots, (len(x), len(self.roots))).copy()
        while (inner := self.left[at] != 0).any():
            goes_left = x[rows, self.feature[at]] <= self.threshold[at]
            at = np.where(inner, np.where(goes_left, self.left[at], self.right[at]), at)
        return at

    def mean(self, x_nf: Array) -> Array:
        """The mean over trees of their leaves' values, [rows, outputs]."""
        total = np.zeros((len(x_nf), self.values.shape[1]))
        for at in self.leaves(x_nf).T:
            total += self.values[at]
        return total / len(self.roots)

    def arrays(self, prefix: str) -> dict[str, Array]:
        """Its arrays by name."""
        return {f"{prefix}.{name}": getattr(self, name) for name in self.__dataclass_fields__}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, Array], prefix: str, features: int, outputs: int) -> Trees:
        """The way back. Raises IntegrityError for anything that is no forest over so many features and outputs."""
        try:
            made = cls(*(np.asarray(arrays[f"{prefix}.{name}"]) for name in cls.__dataclass_fields__))
            sound = made._sound(features, outputs)
        except (KeyError, ValueError, IndexError, TypeError):
            sound = False
        if not sound:
            raise IntegrityError(
                "forest-broken", f"{prefix} is no forest over {features} features with {outputs} outputs",
                allowed="children behind their parents, finite thresholds and values", got=sorted(arrays)[:6],
                remedy="ask for the files again",
            )  # fmt: skip
        return made

    def _sound(self, features: int, outputs: int) -> bool:
        whole = (self.left, self.right, self.feature, self.roots)
        n = len(self.left)
        if not all(a.dtype.kind == "i" and a.ndim == 1 for a in whole) or not 0 < n <= MAX_NODES:
            return False
        if self.values.shape != (n, outputs) or not all(
            len(a) == n for a in (self.right, self.feature, self.threshold)
        ):
            return False
        own, inner = np.arange(n), self.left != 0
        behind = (self.left > own) & (self.right > own) & (self.left < n) & (self.right < n)
        return bool(
            (behind | ~inner).all() and (inner == (self.right != 0)).all() and len(self.roots)
            and (self.roots >= 0).all() and (self.roots < n).all()
            and (self.feature >= 0).all() and (self.feature < features).all()
            and self.threshold.dtype.kind == "f" and np.isfinite(self.threshold).all()
            and self.values.dtype.kind == "f" and np.isfinite(self.values).all()
        )  # fmt: skip
