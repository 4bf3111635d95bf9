"""Meta decision forests: trees over what specialists say, whose leaves say which of them to believe."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import numpy as np
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.ensemble import ExtraTreesRegressor, RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import KFold, StratifiedKFold
from sklearn.utils import check_random_state
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data

from fanbu.errors import DataError
from fanbu.files import write_text
from fanbu.tables.trees import Array, Trees
from fanbu.tables.voices import weigh_nodes

_SURE = 1e-3
_FAR = 5.0


class MetaForestClassifier(ClassifierMixin, BaseEstimator):  # type: ignore[misc]
    """One random forest a domain, and a forest of gates that says for each row whom to believe.

    p(y | x) = sum_v w_v(x) p_v(y | x). Voices v: the specialists; ``committee``, a logistic regression on their
    probabilities (plain stacking); with ``passthrough``, ``generalist``, a forest over the row and all that is said of
    it. w(x) is the mean over gate trees of the weights in the leaf that x falls in. The trees grow on what would have
    been gained by believing each voice (log p_v(y)), over the row (with ``passthrough``) and meta-features: log-odds,
    entropy and margin of each specialist, their mean and spread, and how far x is from each domain's rows. A leaf's
    weights maximise the likelihood of its rows, shrunk towards its parent's (``tables.voices``), the root's towards
    the domains' sizes. Nothing is fitted on answers that a voice gives to rows it was fitted on: those are out-of-fold.

    Args:
        specialist_trees: trees in each specialist's forest.
        gate_trees: trees in the gate.
        specialist_leaf: rows that a specialist's leaf has at least.
        gate_leaf: rows that a gate's leaf has at least.
        passthrough: whether gate and generalist see the row itself, or only what is said of it.
        strength: how many rows a parent's weights are worth.
        cv: folds for out-of-fold answers.
        n_jobs: as in scikit-learn.
        random_state: as in scikit-learn.

    Attributes:
        classes_: as in scikit-learn.
        voices_: who may be believed, in the order of ``believed``.

    References: Todorovski and Dzeroski 2003, "Combining classifiers with meta decision trees" (leaves that name a
    classifier); Wolpert 1992, "Stacked generalization" (out-of-fold).
    """

    def __init__(
        self, *, specialist_trees: int = 200, gate_trees: int = 60, specialist_leaf: int = 3, gate_leaf: int = 30,
        passthrough: bool = True, strength: float = 10.0, cv: int = 5, n_jobs: int | None = None,
        random_state: Any = None,
    ) -> None:  # fmt: skip
        self.specialist_trees, self.gate_trees = specialist_trees, gate_trees
        self.specialist_leaf, self.gate_leaf = specialist_leaf, gate_leaf
        self.passthrough, self.strength, self.cv = passthrough, strength, cv
        self.n_jobs, self.random_state = n_jobs, random_state

    def fit(self, X: Any, y: Any, domains: Any = None) -> Self:  # noqa: N803 - scikit-learn's name
        """X [rows, features] of numbers, y [rows] of classes, domains [rows] of names; None: all are of one."""
        X, y = validate_data(self, X, y, dtype=np.float64)  # noqa: N806
        check_classification_targets(y)
        self.classes_, codes = np.unique(y, return_inverse=True)
        names = np.full(len(y), "all") if domains is None else np.asarray(domains).astype(str)
        if names.shape != (len(y),):
            raise ValueError(f"domains: one name a row is allowed ({len(y)}), got shape {names.shape}; name each row's")
        random = check_random_state(self.random_state)
        self._seed = int(random.randint(2**31 - 1))
        self.domains_, group = np.unique(names, return_inverse=True)
        said = self._fit_specialists(X, codes, group)
        meta = self._features(X, said)
        voices = np.concatenate([said, self._fit_combiners(meta, said, codes)], 1)
        truth = voices[np.arange(len(codes)), :, codes]
        grown = ExtraTreesRegressor(
            self.gate_trees, min_samples_leaf=self.gate_leaf, max_features=0.3, bootstrap=True, n_jobs=self.n_jobs,
            random_state=self._seed,
        ).fit(meta, np.log(truth.clip(_SURE)).reshape(len(codes), -1))  # fmt: skip
        sizes = np.bincount(group) / len(group)
        prior = np.concatenate([sizes, np.full(voices.shape[1] - len(sizes), sizes.mean())])
        self._gate = weigh_nodes(Trees.of(grown), meta, truth, prior / prior.sum(), self.strength)
        self._tilt = _untilted(voices.shape[1], len(self.classes_))
        return self

    @property
    def voices_(self) -> list[str]:
        """Specialists by domain, then the committee, then the generalist."""
        return [*map(str, self.domains_), "committee", *(["generalist"] if self.passthrough else [])]

    def predict_proba(self, X: Any) -> Array:  # noqa: N803
        """[rows, classes]."""
        voices, w = self._heard(X)
        return _mixed(voices, w, self._tilt)

    def predict(self, X: Any) -> Array:  # noqa: N803
        """[rows] of classes."""
        check_is_fitted(self)
        return np.asarray(self.classes_[self.predict_proba(X).argmax(1)])

    def believed(self, X: Any) -> Array:  # noqa: N803
        """How much each voice is believed for each row, [rows, voices], summing to 1."""
        return _tilted(self._heard(X)[1], self._tilt)

    def adapt(self, X: Any, y: Any, ridge: float = 3.0) -> Self:  # noqa: N803
        """A copy for a domain that nobody knew, by a few labelled rows of it.

        Its weights are w_v(x)^t exp(u_v), its answers p(c | x) exp(b_c), both normalised, with t in [0, 1]: how far
        the gate is right here too. u, b and t minimise -sum log p(y) + ridge (|u|^2 + |b|^2 + (1 - t)^2) / 2. Raises
        DataError for a class that was never seen.
        """
        from scipy.optimize import minimize

        check_is_fitted(self)
        X, y = validate_data(self, X, y, dtype=np.float64, reset=False)  # noqa: N806
        if strange := sorted(set(np.unique(y)) - set(self.classes_), key=str):
            raise DataError("unseen-labels", "adapt: rows of classes that no specialist knows", allowed=self.classes_,
                            got=strange, remedy="fit anew with rows of these classes")  # fmt: skip
        other = copy.copy(self)
        voices, w = self._heard(X)
        target, plain = np.searchsorted(self.classes_, y), _untilted(voices.shape[1], len(self.classes_))

        def loss(tilt: Array) -> float:
            p = _mixed(voices, w, tilt)[np.arange(len(target)), target]
            return float(0.5 * ridge * ((tilt - plain) ** 2).sum() - np.log(p.clip(1e-12)).sum())

        bounds = [(0.0, 1.0), *[(-6.0, 6.0)] * (len(plain) - 1)]
        starts = [np.concatenate([[t], plain[1:]]) for t in (1.0, 0.2)]  # a sure gate's slope is flat
        found = [minimize(loss, start, method="L-BFGS-B", bounds=bounds) for start in starts]
        other._tilt = min(found, key=lambda f: float(f.fun)).x
        return other

    def save(self, folder: str | Path) -> Path:
        """Writes ``meta_forest.json`` and ``meta_forest.safetensors``."""
        check_is_fitted(self)
        from safetensors.numpy import save_file

        out = Path(folder)
        out.mkdir(parents=True, exist_ok=True)
        arrays = {k: np.ascontiguousarray(v) for k, v in self._arrays()}
        save_file(arrays, out / "meta_forest.safetensors")
        facts = {
            "format": 1, "classes": self.classes_.tolist(), "domains": self.domains_.tolist(),
            "features": self.n_features_in_,
            "parameters": {k: v for k, v in self.get_params().items() if k != "random_state"},
        }  # fmt: skip
        write_text(out / "meta_forest.json", json.dumps(facts, indent=1, sort_keys=True))  # last: then it is whole
        return out

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """What ``save`` wrote; predicts the same bits. Raises IntegrityError where it is not whole or not sound."""
        from fanbu.tables._stored import read

        facts, arrays = read(Path(folder))
        made = cls(**facts["parameters"])
        made.classes_, made.domains_ = np.array(facts["classes"]), np.array(facts["domains"])
        made.n_features_in_ = facts["features"]
        classes, domains = len(made.classes_), len(made.domains_)
        made._specialists = [
            Trees.from_arrays(arrays, f"specialist{i}", facts["features"], classes) for i in range(domains)
        ]
        made._centres, made._spreads = arrays["centres"], arrays["spreads"]
        made._weight, made._bias = arrays["weight"], arrays["bias"]
        width = made._width
        made._generalist = Trees.from_arrays(arrays, "generalist", width, classes) if made.passthrough else None
        made._gate = Trees.from_arrays(arrays, "gate", width, len(made.voices_))
        made._tilt = arrays["tilt"]
        return made

    def _arrays(self) -> Iterator[tuple[str, Array]]:
        trees = {f"specialist{i}": t for i, t in enumerate(self._specialists)} | {"gate": self._gate}
        trees |= {} if self._generalist is None else {"generalist": self._generalist}
        for name, one in trees.items():
            yield from one.arrays(name).items()
        yield from (("centres", self._centres), ("spreads", self._spreads), ("weight", self._weight))
        yield from (("bias", self._bias), ("tilt", self._tilt))

    @property
    def _width(self) -> int:
        """How many numbers the gate sees of a row."""
        of_each = (1 if len(self.classes_) == 2 else len(self.classes_) + 2) + 1
        return len(self.domains_) * of_each + 2 * len(self.classes_) + self.n_features_in_ * self.passthrough

    def _fit_specialists(self, x: Array, codes: Array, group: Array) -> Array:
        """Fits the specialists; what they say of all rows [rows, specialists, classes], of their own out-of-fold."""
        self._specialists = []
        said = np.zeros((len(x), len(self.domains_), len(self.classes_)))
        self._centres = np.stack([x[group == d].mean(0) for d in range(len(self.domains_))])
        self._spreads = np.stack([x[group == d].std(0) for d in range(len(self.domains_))]) + 1e-3
        for d in range(len(self.domains_)):
            own = np.flatnonzero(group == d)
            self._specialists.append(self._forest(x[own], codes[own], self.specialist_trees))
            said[:, d] = self._specialists[-1].mean(x)
            for fitted, held in self._folds(codes[own]):
                part = self._forest(x[own[fitted]], codes[own[fitted]], self.specialist_trees)
                said[own[held], d] = part.mean(x[own[held]])
        return said

    def _forest(self, x: Array, codes: Array, trees: int) -> Trees:
        """A random forest whose values are over all classes, those that it never saw too."""
        forest = RandomForestClassifier(
            trees, min_samples_leaf=self.specialist_leaf, n_jobs=self.n_jobs, random_state=self._seed
        ).fit(x, codes)
        made = Trees.of(forest)
        values = np.zeros((len(made.left), len(self.classes_)))
        values[:, forest.classes_] = made.values
        return Trees(made.left, made.right, made.feature, made.threshold, made.roots, values)

    def _folds(self, codes: Array) -> list[tuple[Array, Array]]:
        """Stratified where each class has rows enough; of one row alone there is nothing to hold out."""
        count = min(self.cv, len(codes))
        if count < 2:
            return []
        few = np.bincount(codes)[np.unique(codes)].min() < count
        kind = KFold if few else StratifiedKFold
        return list(kind(count, shuffle=True, random_state=self._seed).split(codes, codes))

    def _features(self, x: Array, said: Array) -> Array:
        """What gate and generalist see, [rows, ``_width``]."""
        p = said.clip(_SURE, 1 - _SURE)
        odds = np.log(p / (1 - p))
        if said.shape[2] == 2:  # then entropy and margin say the same again
            own = odds[:, :, 1:]
        else:
            ranked = np.sort(said, 2)
            margin = ranked[:, :, -1:] - ranked[:, :, -2:-1] if said.shape[2] > 1 else ranked[:, :, -1:]
            own = np.concatenate([odds, -(p * np.log(p)).sum(2, keepdims=True), margin], 2)
        apart = np.minimum(np.abs((x[:, None] - self._centres) / self._spreads), _FAR)
        parts = [own.reshape(len(x), -1), said.mean(1), said.std(1), np.sqrt((apart**2).mean(2))]
        return np.concatenate([*parts, *([x] if self.passthrough else [])], 1)

    def _fit_combiners(self, meta: Array, said: Array, codes: Array) -> Array:
        """Committee and generalist, and what they say of rows that they were not fitted on."""
        flat, everything = said.reshape(len(said), -1), np.arange(len(said))
        folds = self._folds(codes) or [(everything, everything)]
        held = np.zeros((len(said), 1 + self.passthrough, len(self.classes_)))
        for fitted, out in folds:
            self._weight, self._bias = _logistic(flat[fitted], codes[fitted], len(self.classes_))
            held[out, 0] = self._committee(said[out])
            if self.passthrough:
                held[out, 1] = self._forest(meta[fitted], codes[fitted], self.specialist_trees).mean(meta[out])
        self._weight, self._bias = _logistic(flat, codes, len(self.classes_))
        self._generalist = self._forest(meta, codes, self.specialist_trees) if self.passthrough else None
        return held

    def _committee(self, said: Array) -> Array:
        z = said.reshape(len(said), -1) @ self._weight.T + self._bias
        z = np.exp(z - z.max(1, keepdims=True))
        return np.asarray(z / z.sum(1, keepdims=True))

    def _voices(self, meta: Array, said: Array) -> Array:
        """What all say, [rows, voices, classes]."""
        more = [] if self._generalist is None else [self._generalist.mean(meta)[:, None]]
        return np.concatenate([said, self._committee(said)[:, None], *more], 1)

    def _heard(self, X: Any) -> tuple[Array, Array]:  # noqa: N803
        """What all say of rows, and how much the gate believes each."""
        check_is_fitted(self)
        x = validate_data(self, X, dtype=np.float64, reset=False)
        said = np.stack([s.mean(x) for s in self._specialists], 1)
        meta = self._features(x, said)
        voices = self._voices(meta, said)
        return voices, self._gate.mean(meta)

    def __sklearn_is_fitted__(self) -> bool:
        return hasattr(self, "_gate")


def _untilted(voices: int, classes: int) -> Array:
    """t, then u of each voice, then b of each class: what changes nothing."""
    return np.concatenate([[1.0], np.zeros(voices + classes)])


def _tilted(w_nv: Array, tilt: Array) -> Array:
    z = tilt[0] * np.log(w_nv.clip(1e-12)) + tilt[1 : 1 + w_nv.shape[1]]
    w = np.exp(z - z.max(1, keepdims=True))
    return np.asarray(w / w.sum(1, keepdims=True))


def _mixed(voices_nvc: Array, w_nv: Array, tilt: Array) -> Array:
    """What comes of it all, [rows, classes]."""
    p = np.einsum("nvc,nv->nc", voices_nvc, _tilted(w_nv, tilt)) * np.exp(tilt[1 + w_nv.shape[1] :])
    return np.asarray(p / p.sum(1, keepdims=True))


def _logistic(x: Array, codes: Array, classes: int) -> tuple[Array, Array]:
    """weight [classes, features] and bias; a class that is not among the rows is never likely."""
    known = np.unique(codes)
    weight, bias = np.zeros((classes, x.shape[1])), np.full(classes, -20.0)
    if len(known) == 1:
        bias[known] = 0.0
        return weight, bias
    fitted = LogisticRegression(max_iter=1000).fit(x, codes)
    coef, intercept = fitted.coef_, fitted.intercept_
    if len(known) == 2:
        coef, intercept = np.concatenate([-coef, coef]) / 2, np.concatenate([-intercept, intercept]) / 2
    weight[known], bias[known] = coef, intercept
    return weight, bias
