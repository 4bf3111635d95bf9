"""One base, probed, and full-size specialists of several domains: what ways back are compared on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from _outcomes import BASE, Outcomes, score
from fanbu.boundary import cross
from fanbu.catalogue import method
from fanbu.contribution import Contribution, open_contribution, write_contribution
from fanbu.domain import Domain, Specialist, load_domain
from fanbu.heads import open_classifier
from fanbu.judge.compare import average, compare, gain_kept
from fanbu.judge.evaluate import evaluate
from fanbu.model import Model, load_tokenizer, open_model, provenance, save_network
from fanbu.progress import log
from fanbu.types import Context, ProbeRow, ProbeSet


@dataclass(frozen=True)
class Bench:
    """One seed: its domains, its base, its specialists. The probe set is the domains' training texts."""

    folder: Path
    domains: Mapping[str, Domain]
    context: Context
    incumbent: Model
    specialists: Sequence[Specialist]
    others: Mapping[str, Domain] = field(default_factory=dict)  # that no specialist is of


def prepare(
    folders: Mapping[str, Path], seed: int, work: Path, context: Context, limit: Mapping[str, int],
    tune: Mapping[str, Any], judged_on: Mapping[str, int] | None = None,
) -> Bench:  # fmt: skip
    """Base opened and probed, specialists fine-tuned from it on ``limit`` rows; what is there is not made again.

    ``judged_on``: the rows that ways back see and are judged on, where these are other ones.
    """
    folder = work / f"seed-{seed}"
    whole = {name: limited(name, path, limit) for name, path in folders.items()}
    domains = {name: limited(name, path, judged_on or limit) for name, path in folders.items()}
    context = replace(context, seed=seed, probe=asking({d.name: d.train.texts for d in domains.values()}))
    incumbent = made(folder / "incumbent", lambda out: probed(whole, out, context))
    grown = []
    for name, d in whole.items():
        log(f"specialist {name}")
        model = made(
            folder / f"specialist-{name}",
            lambda out, d=d: method("finetune").shrink(incumbent, d, out, context, train=tune),
        )
        grown.append(Specialist(model, domains[name], incumbent))
    return Bench(folder, domains, context, incumbent, grown)


def asking(texts: Mapping[str, Sequence[str]]) -> ProbeSet:
    """A probe set of texts by domain."""
    return ProbeSet(tuple(ProbeRow(f"{d}/{i}", text, d) for d, some in texts.items() for i, text in enumerate(some)))


def limited(name: str, path: Path, limit: Mapping[str, int]) -> Domain:
    """A folder's three splits, each cut to its limit."""
    return load_domain(name, **{s: str(path / f"{s}.jsonl") for s in ("train", "valid", "test")}, limit=limit)


def probed(domains: Mapping[str, Domain], out: Path, context: Context) -> Model:
    """The shipped encoder, opened, with probed label rows, brought to one level on the probe set."""
    base, probe = open_model(BASE), method("probe")
    network, tokenizer = open_classifier(base, context), load_tokenizer(base)
    opened = save_network(network, tokenizer, out.with_name("opened"), provenance("open", [base], context))
    sent = [probe.contribute(Specialist(opened, d), opened, context) for d in domains.values()]
    return probe.absorb(opened, sent, out, context)


def made(folder: Path, make: Callable[[Path], Any]) -> Model:
    """What is in a folder, made first where it is not there."""
    if not (folder / "fanbu.json").exists():
        make(folder)
    return open_model(folder, verify=False)


def judged(bench: Bench, name: str, models: Mapping[str, Model]) -> Outcomes:
    """Test outcomes, one model a domain; kept in the work folder."""
    found = {}
    for domain, model in models.items():
        place = bench.folder / "outcomes" / name.replace("/", "-") / domain
        if not (place / "contribution.json").exists():
            write_contribution(evaluate(model, bench.domains[domain], bench.context), place)
        found[domain] = open_contribution(place)
    return found


def mean(outcome: Outcomes, mode: str) -> float:
    """Accuracy, averaged over domains."""
    values = [score(c, mode) for c in outcome.values()]
    return sum(v for v in values if v is not None) / len(values)


def difference(one: Outcomes, other: Outcomes) -> dict[str, float]:
    """Mean over domains of the paired difference of told accuracy, with its interval."""
    return average([compare(one[d], other[d], "told", 0) for d in other])


def points(d: Mapping[str, float]) -> str:
    """A difference with its interval."""
    return f"{100 * d['delta']:+.2f} ({100 * d['low']:+.2f} to {100 * d['high']:+.2f})"


def contributions(
    bench: Bench, specialists: Sequence[Specialist], folder: str, way: str = "distill"
) -> list[Contribution]:
    """What owners contribute to a way back, as it crosses: written, checked, read again."""
    found, feedback = [], method(way, "feedback")
    for s in specialists:
        place = bench.folder / folder / s.domain.name
        if not (place / "contribution.json").exists():
            log(f"{way} contribution of {s.domain.name}")
            cross(feedback.contribute(s, bench.incumbent, bench.context), s.domain.share, place)
        found.append(open_contribution(place))
    return found


def scores(found: Mapping[str, Outcomes]) -> list[list[str]]:
    """The table: told accuracy by domain, the means, and the gain kept."""
    base, full = found["probed base"], found["specialists"]
    rows = [["way", *base, "told", "untold", "gain kept"]]
    for name, outcome in found.items():
        kept = gain_kept(outcome, base, full, "told", 0)
        untold = f"{100 * mean(outcome, 'untold'):.1f}" if all("untold" in c.tensors for c in outcome.values()) else "-"
        by_domain = [f"{100 * (score(c, 'told') or 0):.1f}" for c in outcome.values()]
        rows.append([
            name, *by_domain, f"{100 * mean(outcome, 'told'):.1f}", untold,
            "-" if kept is None else f"{kept['value']:.2f} ({kept['low']:.2f} to {kept['high']:.2f})",
        ])  # fmt: skip
    return rows
