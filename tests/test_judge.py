"""The judge: intervals that cover, a gate that seldom promotes by chance, and the mathematics behind."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fanbu.contribution import Contribution
from fanbu.domain import Domain, Rows
from fanbu.errors import DataError
from fanbu.judge.compare import average, compare, gain_kept, holm
from fanbu.judge.evaluate import evaluate, measure, tfidf
from fanbu.judge.gate import Gate, judge
from fanbu.metrics import calibration_error, classification_metrics
from fanbu.model import Model
from fanbu.types import PRESETS, Context


def outcome(domain: str, right: np.ndarray) -> Contribution:
    tensors = {"told": torch.tensor(right, dtype=torch.float64), "weight": torch.ones(len(right), dtype=torch.float64)}
    return Contribution(
        "scores", domain, "evaluate", tensors, meta={"metrics": {"told": {"accuracy": float(right.mean())}}}
    )


def plain_domain(name: str, role: str = "feeds") -> Domain:
    empty = Rows()
    return Domain(
        name, "text-classification", ("a", "b"), empty, empty, empty, empty, "accuracy", PRESETS["open"], role
    )  # type: ignore[arg-type]


def test_holm_by_hand() -> None:
    adjusted = holm({"a": 0.01, "b": 0.04, "c": 0.03})
    assert adjusted == pytest.approx({"a": 0.03, "c": 0.06, "b": 0.06})


def test_mcnemar_and_delta_by_hand() -> None:
    old = np.array([1.0] * 70 + [0.0] * 30)
    new = old.copy()
    new[70:82] = 1  # 12 wins
    new[:2] = 0  # 2 losses
    pair = compare(outcome("d", new), outcome("d", old), "told", 0)
    assert (pair.wins, pair.losses, pair.n) == (12, 2, 100)
    assert pair.delta == pytest.approx(0.10)
    # exact binomial, two-sided: 2 * P(X <= 2), X ~ B(14, 1/2) = 2 * 106 / 2**14
    assert pair.p == pytest.approx(2 * 106 / 2**14)
    assert pair.low < pair.floor < 0.10 < pair.high


@pytest.mark.slow
def test_intervals_cover_the_truth_about_as_often_as_they_say() -> None:
    rng, covered = np.random.default_rng(0), 0
    for trial in range(120):
        old = (rng.random(300) < 0.7).astype(float)
        flip = rng.random(300)
        new = np.where(flip < 0.10, 1.0, np.where(flip > 0.94, 0.0, old))
        truth = 0.10 * 0.3 - 0.06 * 0.7
        pair = compare(outcome("d", new), outcome("d", old), "told", trial)
        covered += pair.low <= truth <= pair.high
    assert covered / 120 > 0.88


@pytest.mark.slow
def test_equal_models_are_seldom_promoted() -> None:
    rng, promoted = np.random.default_rng(1), 0
    domains = {n: plain_domain(n) for n in ("a", "b")}
    for trial in range(100):
        old = {n: outcome(n, (rng.random(400) < 0.8).astype(float)) for n in domains}
        new = {n: outcome(n, (rng.random(400) < 0.8).astype(float)) for n in domains}
        promoted += judge(new, old, {}, domains, Gate(margin=0.1), trial)["accepted"]
    assert promoted <= 8  # one-sided 2.5% is the design


def test_a_domain_that_may_be_worse_than_its_margin_stops_the_gate() -> None:
    rng = np.random.default_rng(2)
    base = {n: (rng.random(500) < 0.6).astype(float) for n in ("good", "bad")}
    better, worse = base["good"].copy(), base["bad"].copy()
    better[:200] = 1
    worse[:60] = 0
    domains = {"good": plain_domain("good"), "bad": plain_domain("bad")}
    new, old = (
        {"good": outcome("good", better), "bad": outcome("bad", worse)},
        {n: outcome(n, v) for n, v in base.items()},
    )
    verdict = judge(new, old, {}, domains, Gate(margin=0.03), 0)
    assert not verdict["accepted"]
    assert "bad" in verdict["reason"]
    assert verdict["domains"]["bad"]["worse"]
    assert judge(new, old, {}, domains, Gate(margin=0.03, margins={"bad": 0.2}), 0)["accepted"]
    guarded = {"good": plain_domain("good"), "bad": plain_domain("bad", "guard")}
    assert not judge(new, old, {}, guarded, Gate(margin=0.03), 0)["accepted"]


def test_gain_kept_by_hand() -> None:
    base, half, full = np.zeros(100), np.zeros(100), np.zeros(100)
    half[:20], full[:40] = 1, 1
    found = gain_kept({"d": outcome("d", half)}, {"d": outcome("d", base)}, {"d": outcome("d", full)}, "told", 0)
    assert found is not None
    assert found["value"] == pytest.approx(0.5)
    assert found["low"] < 0.5 < found["high"]
    assert gain_kept({"d": outcome("d", half)}, {"d": outcome("d", full)}, {"d": outcome("d", base)}, "told", 0) is None


def test_domains_count_once_each() -> None:
    small = compare(outcome("s", np.ones(10)), outcome("s", np.zeros(10)), "told", 0)
    large = compare(outcome("l", np.zeros(1000)), outcome("l", np.zeros(1000)), "told", 0)
    assert average([small, large])["delta"] == pytest.approx(0.5)


def test_outcomes_of_other_examples_are_not_paired() -> None:
    with pytest.raises(DataError, match="not of the same examples"):
        compare(outcome("d", np.ones(3)), outcome("d", np.ones(4)), "told", 0)


def test_metrics_by_hand() -> None:
    probs = np.array([[0.9, 0.1], [0.6, 0.4], [0.3, 0.7], [0.8, 0.2]])
    found = classification_metrics(probs, np.array([0, 1, 1, 0]))
    assert found["accuracy"] == 0.75
    assert found["macro_f1"] == pytest.approx((0.8 + 2 / 3) / 2)
    assert found["loss"] == pytest.approx(-np.log([0.9, 0.4, 0.7, 0.8]).mean())
    # all in one bin at 0.9, half of them right
    assert calibration_error(np.full(4, 0.9), np.array([True, True, False, False])) == pytest.approx(0.4)


def test_told_knows_the_domain_and_untold_must_find_it(
    incumbent: Model, domains: dict[str, Domain], context: Context
) -> None:
    found = evaluate(incumbent, domains["food"], context)
    told, untold = found.tensors["told"], found.tensors["untold"]
    assert len(told) == len(untold) == 36
    assert found.meta["metrics"]["told"]["accuracy"] == pytest.approx(float(told.mean()))
    assert bool((told >= untold).all())  # right among all labels is right among one's own
    assert evaluate(incumbent, domains["food"], context).digest == found.digest


def test_tfidf_and_measure(incumbent: Model, domains: dict[str, Domain], context: Context) -> None:
    assert tfidf(domains["food"], context).meta["metrics"]["told"]["accuracy"] > 0.9
    sizes = measure(incumbent, domains["food"].test.texts, context, repeats=3)
    assert sizes["parameters"] == incumbent.parameters
    assert sizes["latency_ms"] > 0
