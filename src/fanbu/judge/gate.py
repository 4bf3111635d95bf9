"""The gate: a new large model is accepted only if it got better and no domain got worse than its margin."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from fanbu.contribution import Contribution
from fanbu.domain import Domain
from fanbu.errors import UsageError
from fanbu.judge.compare import Paired, average, compare, gain_kept, holm

Outcomes = Mapping[str, Contribution]


@dataclass(frozen=True)
class Gate:
    """``margin`` is what a domain may lose, in points of accuracy (0.05 = 5 points) or as a share of the loss.

    ``margins`` override it by domain. ``mode`` says which answers count: with the domain told or untold.
    """

    margin: float = 0.05
    margins: Mapping[str, float] = field(default_factory=dict)
    mode: Literal["told", "untold"] = "told"
    confidence: float = 0.95


def judge(
    candidate: Outcomes,
    incumbent: Outcomes,
    specialists: Outcomes,
    domains: Mapping[str, Domain],
    gate: Gate,
    seed: int,
) -> dict[str, Any]:
    """The verdict, as plain values.

    Accepted if (1) the mean change over the feeding domains is above 0 with confidence, and (2) in each domain, also
    in guards that fed nothing, the one-sided lower bound of the change is above minus its margin (non-inferiority).
    An improvement of a single domain is claimed only after Holm's correction.
    """
    unknown = set(gate.margins) - set(domains)
    if unknown:
        raise UsageError("unknown-domain", "gate: margins", allowed=list(domains), got=unknown, remedy="fix the name")
    pairs = {d: compare(candidate[d], incumbent[d], gate.mode, seed, gate.confidence) for d in domains}
    feeding = [p for d, p in pairs.items() if domains[d].role == "feeds"]
    adjusted = holm({d: p.p for d, p in pairs.items()})
    rows = {d: _row(p, domains[d], gate, adjusted[d]) for d, p in pairs.items()}
    mean = average(feeding, gate.confidence)
    failing = [d for d, row in rows.items() if not row["holds"]]
    say = _points if all(d.metric == "accuracy" for d in domains.values()) else _nats
    checks = [
        {
            "name": "better on average, with confidence", "passed": mean["low"] > 0,
            "detail": f"mean change {say(mean['delta'])}, interval {say(mean['low'])} to {say(mean['high'])}",
        },
        {
            "name": "no domain worse than its margin", "passed": not failing,
            "detail": f"not shown for {', '.join(failing)}" if failing else f"holds for all {len(rows)}",
        },
    ]  # fmt: skip
    untold = {}
    if gate.mode == "told" and any("untold" in candidate[d].tensors for d in domains):
        untold = {d: _short(compare(candidate[d], incumbent[d], "untold", seed, gate.confidence)) for d in domains}
    return {
        "accepted": all(c["passed"] for c in checks), "reason": _reason(checks, say(mean["delta"]), failing),
        "mode": gate.mode, "level": gate.confidence, "power": 0.8,
        "average": mean, "domains": rows, "untold": untold, "checks": checks,
        "gain_kept": gain_kept(candidate, incumbent, specialists, gate.mode, seed) if specialists else None,
    }  # fmt: skip


def _row(pair: Paired, domain: Domain, gate: Gate, p_holm: float) -> dict[str, Any]:
    margin = gate.margins.get(pair.domain, gate.margin)
    lower_is_better = domain.metric == "loss"
    room = margin * abs(pair.incumbent) if lower_is_better else margin
    sign = -1 if lower_is_better else 1
    return {
        "role": domain.role, "metric": domain.metric, "higher_is_better": not lower_is_better,
        "incumbent": sign * pair.incumbent, "candidate": sign * pair.candidate, "delta": pair.delta,
        "low": pair.low, "high": pair.high, "floor": pair.floor, "margin": room, "holds": pair.floor >= -room,
        "worse": pair.high < 0, "improved": p_holm < 1 - gate.confidence and pair.delta > 0, "p": pair.p,
        "p_holm": p_holm, "n": pair.n, "wins": pair.wins, "losses": pair.losses,
        "smallest_detectable": pair.smallest_detectable,
    }  # fmt: skip


def _short(pair: Paired) -> dict[str, float]:
    names = ("incumbent", "candidate", "delta", "low", "high")
    return {name: getattr(pair, name) for name in names}


def _points(change: float) -> str:
    return f"{100 * change:+.1f} points"


def _nats(change: float) -> str:
    return f"{change:+.3f} nats a token"


def _reason(checks: list[dict[str, Any]], change: str, failing: list[str]) -> str:
    if all(c["passed"] for c in checks):
        return f"better on average by {change} with confidence, and no domain worse than its margin"
    parts = []
    if not checks[0]["passed"]:
        parts.append(f"the mean change of {change} could be chance")
    if failing:
        parts.append(f"{', '.join(failing)} may have become worse than the margin")
    return "; ".join(parts)
