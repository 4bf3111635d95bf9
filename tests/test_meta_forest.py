"""Meta decision forests: scikit-learn's contract, who is believed where, and files that nobody has to trust."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from sklearn.ensemble import ExtraTreesRegressor, RandomForestClassifier
from sklearn.utils.estimator_checks import parametrize_with_checks

from fanbu.errors import DataError, IntegrityError
from fanbu.tables.meta_forest import MetaForestClassifier
from fanbu.tables.trees import Trees
from fanbu.tables.voices import weights

SMALL = {"specialist_trees": 10, "gate_trees": 6, "gate_leaf": 10, "random_state": 0}


@parametrize_with_checks([MetaForestClassifier(specialist_trees=5, gate_trees=3, gate_leaf=5, random_state=0)])
def test_it_is_an_estimator_as_scikit_learn_wants_it(estimator: Any, check: Any) -> None:
    check(estimator)


def industries(seed: int = 0, count: int = 300) -> tuple[Any, Any, Any]:
    """Two industries whose rules are opposite, told apart by the last column; each row is of one."""
    numbers = np.random.default_rng(seed)
    x = numbers.normal(size=(count, 4))
    group = np.arange(count) % 2
    x[:, 3] = group + numbers.normal(0, 0.1, count)
    y = np.where((x[:, 0] + 0.5 * x[:, 1] > 0) ^ (group == 1), "yes", "no")
    return x, y, np.where(group == 1, "upside", "plain")


@pytest.mark.parametrize("passthrough", [True, False])
def test_leaves_believe_the_specialist_of_the_rows_industry(passthrough: bool) -> None:
    x, y, names = industries()
    model = MetaForestClassifier(**SMALL, passthrough=passthrough).fit(x, y, domains=names)
    fresh, truth, of = industries(1)
    assert (model.predict(fresh) == truth).mean() > 0.85  # either specialist alone is right half the time
    w = model.believed(fresh)
    np.testing.assert_allclose(w.sum(1), 1)
    assert w.shape == (300, len(model.voices_)) == (300, 3 + passthrough)
    plain, upside = (model.voices_.index(n) for n in ("plain", "upside"))
    assert w[of == "plain", plain].mean() > 2 * w[of == "plain", upside].mean()
    assert w[of == "upside", upside].mean() > 2 * w[of == "upside", plain].mean()


def test_three_classes_of_which_some_domains_know_two() -> None:
    x = np.random.default_rng(0).normal(size=(240, 3))
    y, names = x[:, :2].argmax(1) + 2 * (x[:, 2] > 0.8), np.where(x[:, 2] > 0, "new", "old")
    y = np.minimum(y, 2)
    model = MetaForestClassifier(**SMALL).fit(x, y, domains=names)
    assert set(np.unique(y[names == "old"])) == {0, 1}
    assert (model.predict(x) == y).mean() > 0.85


def test_few_rows_turn_it_to_an_industry_that_nobody_knew() -> None:
    x, y, names = industries()
    model = MetaForestClassifier(**SMALL).fit(x, y, domains=names)
    fresh, truth, of = industries(2)
    fresh, truth = fresh[of == "upside"], truth[of == "upside"]
    fresh[:, 3] = 0.0  # it looks like the plain one
    few, rest = slice(0, 40), slice(40, None)
    before = (model.predict(fresh[rest]) == truth[rest]).mean()
    adapted = model.adapt(fresh[few], truth[few])
    assert before < 0.4
    assert (adapted.predict(fresh[rest]) == truth[rest]).mean() > 0.8
    assert (model.predict(fresh[rest]) == truth[rest]).mean() == before  # the first one stays as it was
    with pytest.raises(DataError, match="no specialist knows"):
        model.adapt(fresh[:1], np.array(["perhaps"]))


def test_saved_and_loaded_it_says_the_same_bits(tmp_path: Path) -> None:
    x, y, names = industries()
    for passthrough in (True, False):
        model = MetaForestClassifier(**SMALL, passthrough=passthrough).fit(x, y, domains=names).adapt(x[:20], y[:20])
        again = MetaForestClassifier.load(model.save(tmp_path / str(passthrough)))
        assert np.array_equal(again.predict_proba(x), model.predict_proba(x))
        assert again.predict(x).tolist() == model.predict(x).tolist()
        assert {p.suffix for p in (tmp_path / str(passthrough)).iterdir()} == {".json", ".safetensors"}


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("gate.left", lambda a: np.zeros_like(a) + 5), ("gate.left", lambda a: a - 1), ("gate.roots", lambda a: a - 9),
        ("gate.feature", lambda a: a + 10_000), ("gate.values", lambda a: a * np.nan),
        ("gate.values", lambda a: a[:, :1]),
        ("specialist0.threshold", lambda a: a + np.inf), ("specialist1.right", lambda a: a[:-1]),
        ("spreads", lambda a: a * 0), ("weight", lambda a: a[:1]), ("tilt", lambda a: a.astype(np.float32)),
    ],
)  # fmt: skip
def test_broken_and_hostile_files_are_refused(name: str, change: Any, tmp_path: Path) -> None:
    x, y, names = industries(count=80)
    folder = MetaForestClassifier(**SMALL).fit(x, y, domains=names).save(tmp_path)
    arrays = load_file(folder / "meta_forest.safetensors")
    save_file({**arrays, name: np.ascontiguousarray(change(arrays[name]))}, folder / "meta_forest.safetensors")
    with pytest.raises(IntegrityError) as caught:
        MetaForestClassifier.load(folder)
    assert caught.value.code == "forest-broken"


@pytest.mark.parametrize(
    "change", [{"features": -1}, {"classes": []}, {"domains": "ab"}, {"parameters": {"cv": "exit()"}}, {"features": 2}]
)
def test_facts_that_do_not_fit_are_refused(change: dict[str, Any], tmp_path: Path) -> None:
    x, y, names = industries(count=80)
    folder = MetaForestClassifier(**SMALL).fit(x, y, domains=names).save(tmp_path)
    facts = json.loads((folder / "meta_forest.json").read_text())
    (folder / "meta_forest.json").write_text(json.dumps({**facts, **change}))
    with pytest.raises(IntegrityError):
        MetaForestClassifier.load(folder)


def test_trees_answer_as_the_forests_that_they_were() -> None:
    x, y, _ = industries()
    classifier = RandomForestClassifier(7, random_state=0).fit(x, y)
    np.testing.assert_allclose(Trees.of(classifier).mean(x), classifier.predict_proba(x), atol=1e-12)
    regressor = ExtraTreesRegressor(5, min_samples_leaf=9, random_state=0).fit(x, x[:, :2])
    np.testing.assert_allclose(Trees.of(regressor).mean(x), regressor.predict(x), atol=1e-12)


def test_weights_are_those_that_the_rows_were_drawn_with() -> None:
    numbers = np.random.default_rng(0)
    right = numbers.choice(2, p=[0.8, 0.2], size=4000)
    likelihood = np.where(np.arange(2) == right[:, None], 0.9, 0.1)
    assert weights(likelihood, np.array([0.5, 0.5]), 1.0, 200)[0] == pytest.approx((0.8 - 0.1) / 0.8, abs=0.02)
    assert weights(likelihood, np.array([0.5, 0.5]), 1e9)[0] == pytest.approx(0.5, abs=1e-3)
