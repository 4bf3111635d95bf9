"""Successive halving: what it spends, what it leaves out, and how often it finds the best."""

from __future__ import annotations

import random

import pytest

from fanbu.errors import FitError, RetryError
from fanbu.search.halving import Arm, History, Trial, halving, seconds


class Bench:
    """Candidates whose score grows with the rows, with noise that more rows lessen."""

    def __init__(self, count: int, seed: int, noise: float = 0.01, whole: float = 100.0) -> None:
        rng = random.Random(seed)
        self.final = {f"w{i}": rng.uniform(0.0, 0.1) for i in range(count)}
        self.whole = {name: whole * rng.uniform(0.5, 1.0) for name in self.final}
        self.rng, self.noise = rng, noise
        self.arms = [Arm(name) for name in self.final]

    def __call__(self, arm: str, share: float) -> Trial:
        score = self.final[arm] * share**0.2 + self.rng.gauss(0, self.noise * (1 - share))
        return Trial(arm, share, score, 2.0 + self.whole[arm] * share)


def test_it_finds_a_good_one_within_its_budget() -> None:
    near = 0
    for seed in range(50):
        bench = Bench(16, seed)
        found = halving(bench.arms, bench, budget=300.0)
        assert found.seconds <= 300
        assert found.best
        near += max(bench.final.values()) - bench.final[found.best.arm] < 0.01
    assert near >= 40


def test_it_beats_trying_some_with_all_rows() -> None:
    def loss(seed: int, halved: bool) -> float:
        bench = Bench(16, seed)
        if halved:
            best = halving(bench.arms, bench, budget=300.0).best
        else:
            tried = History([bench(arm.name, 1.0) for arm in bench.arms[:3]])
            best = tried.best
        assert best
        return max(bench.final.values()) - bench.final[best.arm]

    assert sum(loss(s, True) for s in range(30)) < 0.5 * sum(loss(s, False) for s in range(30))


def test_one_that_reads_no_rows_is_tried_once_and_stands_to_the_end() -> None:
    bench = Bench(4, 1)
    arms = [*bench.arms, Arm("merge", grows=False)]

    def run(arm: str, share: float) -> Trial:
        return Trial("merge", share, 0.5, 3.0) if arm == "merge" else bench(arm, share)

    found = halving(arms, run, budget=400.0)
    assert [t.share for t in found.of("merge")] == [1.0]
    assert found.best
    assert found.best.arm == "merge"


def test_the_budget_is_kept_and_what_is_left_out_is_told() -> None:
    bench = Bench(12, 3)
    for budget in (5.0, 40.0, 120.0, 1000.0):
        found = halving(bench.arms, bench, budget)
        assert found.seconds <= budget + 8  # the first trials are begun before anything is known of their cost
        tried = {t.arm for t in found.trials}
        assert tried | found.left_out.keys() == {arm.name for arm in bench.arms}
    assert found.best  # a large budget reaches all rows


def test_what_is_too_costly_does_not_stop_the_others() -> None:
    bench = Bench(6, 5, noise=0.0)
    best = max(bench.final, key=lambda name: bench.final[name])
    bench.whole[best] = 5000.0
    found = halving(bench.arms, bench, budget=400.0)
    assert "more than the budget" in found.left_out[best]
    assert found.best
    assert found.best.arm != best


def test_where_what_went_on_no_longer_fits_another_is_tried_with_all_rows() -> None:
    took = {("b", 1 / 3): 40.0}  # ten times as long with three times the rows

    def run(arm: str, share: float) -> Trial:
        return Trial(arm, share, {"a": 0.1, "b": 0.2, "c": 0.0}[arm], took.get((arm, share), 4.0))

    found = halving([Arm("a"), Arm("b"), Arm("c")], run, budget=100.0, least=2)
    assert "more than the budget" in found.left_out["b"]
    assert found.best
    assert (found.best.arm, found.best.share) == ("a", 1.0)


def test_one_that_ends_with_an_error_of_torch_is_named_and_paid_for() -> None:
    def run(arm: str, share: float) -> Trial:
        if arm == "a":
            raise RuntimeError("CUDA out of memory")
        return Trial(arm, share, 0.1, 10.0)

    found = halving([Arm("a"), Arm("b"), Arm("c")], run, budget=25.0, least=0, costs=lambda name, share: 10.0)
    assert "RuntimeError: CUDA out of memory" in found.left_out["a"]
    assert [t.arm for t in found.trials] == ["b"]  # the budget does for two
    assert found.seconds == 20


def test_what_costs_nothing_follows_a_budget_that_is_spent() -> None:
    arms = [Arm("a"), Arm("b"), Arm("merge", grows=False)]

    def run(arm: str, share: float) -> Trial:
        return Trial(arm, share, 0.1, cost(arm, share))

    def cost(arm: str, share: float) -> float:
        return 0.0 if arm == "merge" else 10 * share

    found = halving(arms, run, 20.0, least=0, costs=cost)
    assert {t.arm for t in found.trials} == {"a", "b", "merge"}


def test_who_climbed_first_is_compared_at_what_all_were_tried_with() -> None:
    final = {f"m{i}": 0.2 + 0.05 * i for i in range(9)}

    def run(arm: str, share: float) -> Trial:
        return Trial(arm, share, final[arm] * share**0.8, 2.0 + 98.0 * share)

    found = halving([Arm(name) for name in final], run, 200.0, least=2)
    assert [t.arm for t in found.trials if t.share == pytest.approx(1 / 3)] == ["m0", "m4"]  # m0 to see what rows save
    assert found.best
    assert found.best.arm != "m0"  # the worst, whose score with three times the rows was above all others'


def test_costs_are_read_off_the_line() -> None:
    history = History([Trial("a", 1 / 27, 0, 6.0), Trial("b", 1 / 27, 0, 2.0)])
    assert seconds(history, "b", 1.0) == pytest.approx(1.0 + 1 * 27)
    assert seconds(history, "a", 1.0) == pytest.approx(1.0 + 5 * 27)
    history.trials.append(Trial("a", 1 / 9, 0, 14.0))
    assert seconds(history, "a", 1.0) == pytest.approx(14 + 8 / (2 / 27) * (8 / 9))


def test_one_that_fails_stops_no_other_and_a_full_disk_stops_all() -> None:
    bench = Bench(5, 7, noise=0.0)
    best = max(bench.final, key=lambda name: bench.final[name])

    def run(arm: str, share: float) -> Trial:
        if arm == best and share > 0.1:
            raise FitError("diverged", "the loss is no longer finite", remedy="lower lr")
        return bench(arm, share)

    found = halving(bench.arms, run, budget=500.0)
    assert "the loss is no longer finite [diverged]" in found.left_out[best]
    assert found.best
    assert found.best.arm != best

    def full(arm: str, share: float) -> Trial:
        raise RetryError("disk-full", "no room", remedy="free some")

    with pytest.raises(RetryError):
        halving(bench.arms, full, budget=500.0)
