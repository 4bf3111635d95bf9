"""Successive halving over candidates that cost unlike: few rows for many of them, all rows for the few that are left.

A candidate that reads no rows is tried once, as a whole: what it cost is spent, and it stands until the end. Others are
tried with a growing share of the rows, and of those of one rung the best 1 in ``eta`` go on (Jamieson and Talwalkar
2016). Nothing that would end above the budget is begun. What a trial will take is read off the line through its earlier
ones; after the first, half of what the cheapest candidate took counts as the part that does not grow with the rows.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

from fanbu.errors import FanbuError, RetryError

LEAST = 3  # rungs below the whole at most: the least share of the rows is eta to the minus this
_FAILED = "it ended with an error"
BEYOND = "it would take more than the budget with all rows"
SPENT = "what was left of the budget did not do for all rows"
_TELLING = 200  # rows of a domain, on average, below which a trial tells nothing


@dataclass(frozen=True)
class Arm:
    """A candidate by name; ``grows`` says that more rows change what it makes."""

    name: str
    grows: bool = True


@dataclass(frozen=True)
class Trial:
    """One candidate with a share of the rows: its score on validation rows (more is better), and its seconds."""

    arm: str
    share: float
    score: float
    seconds: float


@dataclass
class History:
    """What was tried, in its order, and what was not begun, with the reason; and which candidate was ``chosen``, where
    that is not simply the one with the best score. ``lost`` is what failed trials took."""

    trials: list[Trial] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    chosen: str | None = None
    lost: float = 0.0
    costs: Callable[[str, float], float] | None = None  # where it is known beforehand what a trial takes

    @property
    def seconds(self) -> float:
        """What all trials took, those that failed among them."""
        return sum(t.seconds for t in self.trials) + self.lost

    @property
    def best(self) -> Trial | None:
        """The best of those that were tried with all rows, or the chosen one; None where none was."""
        whole = [t for t in self.trials if t.share == 1 and self.chosen in (None, t.arm)]
        return max(whole, key=lambda t: (t.score, t.arm), default=None)

    def of(self, arm: str) -> list[Trial]:
        """One candidate's trials, the smallest share first."""
        return sorted((t for t in self.trials if t.arm == arm), key=lambda t: t.share)


Run = Callable[[str, float], Trial]
# what a candidate may end with: torch's out of memory and linear algebra are RuntimeErrors
FAILURES = (FanbuError, MemoryError, RuntimeError, np.linalg.LinAlgError)


def halving(
    arms: Sequence[Arm], run: Run, budget: float, eta: int = 3, least: int = LEAST,
    costs: Callable[[str, float], float] | None = None,
) -> History:  # fmt: skip
    """Tries candidates until the budget (seconds) is spent; ``run`` makes one trial of a candidate with a share of the
    rows. The order of ``arms`` is that of their promise: where the budget does not do for all, the last are left out.

    Candidates that would not fit the budget with all rows are left out after their first trial, and until then so much
    is kept as the best of a rung would take with all. Where few rows save little time, candidates are tried with the
    least share that saves half of it, or with all rows at once.
    """
    history, shares = History(costs=costs), list(shares_of(eta, least))
    growing, standing = sum(arm.grows for arm in arms), list[str]()
    for arm in arms:
        share = shares[0] if arm.grows else 1.0
        left = budget - history.seconds - (_whole_of_best(history, standing) if share < 1 else 0.0)
        half = budget / 2 - sum(t.seconds for t in history.trials if t.share < 1)
        spent = left <= 0 and not costs  # what is known to cost nothing may follow
        if spent or _usual(history, arms, arm, share) > (min(left, half) if share < 1 else left):
            history.left_out[arm.name] = "the budget was spent before its first trial"
        elif attempt(history, run, arm.name, share) and share < 1:
            standing.append(arm.name)
            if len(standing) == 1 and growing * history.trials[-1].seconds > budget / eta:
                shares = _saving(history, run, arm.name, shares, budget)
                standing = [] if arm.name in history.left_out else standing  # it failed on its way
    for fewer, share in pairwise(shares):
        standing = sorted(standing, key=lambda name: -_score(history, name, fewer))
        if share < 1:
            standing = standing[: math.ceil(len(standing) / eta)]
        standing = _rung(history, run, standing, share, budget)
    for name in sorted({t.arm for t in history.trials}, key=lambda name: (-history.of(name)[-1].score, name)):
        if history.best is None and not history.left_out.get(name, "").startswith(_FAILED):
            _rung(history, run, [name], 1.0, budget)  # of those that went on, none fits with all rows
    return history


def _whole_of_best(history: History, standing: Sequence[str]) -> float:
    """What is kept for the best so far; nothing once a candidate was tried with all rows."""
    if history.best or not standing:
        return 0.0
    least = min(history.of(name)[-1].share for name in standing)
    return seconds(history, max(standing, key=lambda name: _score(history, name, least)), 1.0)


def _score(history: History, arm: str, share: float) -> float:
    """What a candidate came to with a share of the rows, though it may have been tried with more since; else with the
    most."""
    tried = history.of(arm)
    return next((t.score for t in tried if t.share == share), tried[-1].score)


def _saving(history: History, run: Run, arm: str, shares: Sequence[float], budget: float) -> list[float]:
    """The shares that save time, the least of which the first candidate was tried with: it climbs until the line
    through its trials tells what all rows take, as far as three fourths of the budget would do for it however it
    grows."""
    for share in shares[1:]:
        last = history.of(arm)[-1]
        if last.seconds * share / last.share > 0.75 * (budget - history.seconds):
            break
        if not attempt(history, run, arm, share):
            break
        whole = seconds(history, arm, 1.0)
        saving = [s for s in shares if s == 1 or seconds(history, arm, s) <= whole / 2]
        if saving[0] <= share:
            return saving
    return list(shares)


def rungs_of(rows: float, eta: int = 3) -> int:
    """How many rungs below the whole there are for domains of so many rows, so that the smallest still tells."""
    return min(LEAST, max(0, math.floor(math.log(max(rows, 1.0) / _TELLING, eta) + 1e-9)))


def shares_of(eta: int = 3, least: int = LEAST) -> tuple[float, ...]:
    """The shares of the rows that candidates are tried with, the smallest first."""
    return tuple(float(eta) ** -k for k in range(least, -1, -1))


def _rung(history: History, run: Run, standing: Sequence[str], share: float, budget: float) -> list[str]:
    """Tries those that stand, the best first, while the budget lasts. Returns those that go on: where it did for none,
    the best of those that it does for with all rows at once."""
    done: list[str] = []
    waiting: list[str] = []
    for name in standing:
        if history.of(name)[-1].share >= share:  # it has climbed already
            done.append(name)
            continue
        left = budget - history.seconds
        kept = seconds(history, (done or [name])[0], 1.0) if share < 1 else 0.0
        if (whole := seconds(history, name, 1.0)) > left:
            history.left_out[name] = BEYOND if whole > budget else SPENT
        elif seconds(history, name, share) + kept > left:
            history.left_out[name] = f"the budget did not do for {share:.0%} of the rows"
            waiting.append(name)
        elif attempt(history, run, name, share):
            done.append(name)
    return done or waiting[:1]


def attempt(history: History, run: Run, arm: str, share: float, cost: float | None = None) -> bool:
    """Makes one trial; whether it came to an end. What a candidate itself cannot do stops no other, and is paid for:
    ``cost`` where it is given, what is known beforehand, or the time that it took."""
    began = time.perf_counter()
    try:
        history.trials.append(run(arm, share))
    except RetryError:  # of the machine, not of the candidate
        raise
    except FAILURES as error:
        history.left_out[arm] = f"{_FAILED}: {said(error)}"
        if cost is None:
            cost = history.costs(arm, share) if history.costs else time.perf_counter() - began
        history.lost += cost
        return False
    history.left_out.pop(arm, None)  # what there was no room for on a rung may be tried on the next
    return True


def said(error: BaseException) -> str:
    """What went wrong, in a line."""
    if isinstance(error, FanbuError):
        return f"{error.what} [{error.code}]"
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def seconds(history: History, arm: str, share: float) -> float:
    """What a candidate will take with a share of the rows."""
    if history.costs:
        return history.costs(arm, share)
    known = history.of(arm)
    last = known[-1]
    if len(known) > 1:
        first = known[-2]
        slope = max(0.0, (last.seconds - first.seconds) / (last.share - first.share))
        return last.seconds + slope * (share - last.share)
    fixed = min(t.seconds for t in history.trials if t.share == last.share) / 2
    return fixed + (last.seconds - fixed) * share / last.share


def _usual(history: History, arms: Sequence[Arm], arm: Arm, share: float) -> float:
    """The mean of what trials with this share took so far, of those that rows make a difference to or of the others; 0
    where there was none, and what is known where it is."""
    if history.costs:
        return history.costs(arm.name, share)
    alike = {other.name for other in arms if other.grows == arm.grows}
    known = [t.seconds for t in history.trials if t.share == share and t.arm in alike]
    return sum(known) / len(known) if known else 0.0
