"""What domains have in common: texts that are in several, labels of one name or of contradicting meaning, and
specialists that taught nothing or are the same."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from typing import Any

from fanbu.data.check import normalised
from fanbu.domain import Domain

_MANY = 0.1  # of the smaller domain's texts or labels: what is told of


def overlaps(domains: Sequence[Domain]) -> list[str]:
    """Warnings of rows and labels, over all domains that feed; by normalised texts and names."""
    feeding = [d for d in domains if d.role == "feeds"]
    said = {d.name: _said(d) for d in feeding}
    found = [w for d in feeding for w in _contradicted(d.name, said[d.name], d.labels)]
    for a, b in combinations(feeding, 2):
        found += _shared_texts(a, b, said[a.name], said[b.name])
        found += [*_tested(a, b, said[b.name]), *_tested(b, a, said[a.name])]
        found += _shared_labels(a, b) if a.industry != b.industry else ()
    return found


Said = Mapping[str, set[int]]  # numbers of the labels that a text has; none where it has no label


def _said(d: Domain) -> Said:
    found: dict[str, set[int]] = defaultdict(set)
    for text, label in zip(d.train.texts, d.train.labels or [-1] * len(d.train), strict=True):
        found[normalised(text)] |= {label} - {-1}
    return found


def _contradicted(name: str, said: Said, labels: Sequence[str]) -> Iterator[str]:
    twice = {text: numbers for text, numbers in said.items() if len(numbers) > 1}
    if twice:
        text, numbers = next(iter(twice.items()))
        shown = ", ".join(labels[i] for i in sorted(numbers))
        yield f"{name}: {len(twice)} training texts have several labels (such as {text[:60]!r}: {shown})"


def _shared_texts(a: Domain, b: Domain, one: Said, two: Said) -> Iterator[str]:
    both = one.keys() & two.keys()
    if a.industry == b.industry and a.labels:
        names = [{t: {d.labels[i] for i in s[t]} for t in both} for d, s in ((a, one), (b, two))]
        apart = sorted(t for t in both if names[0][t] and names[1][t] and not names[0][t] & names[1][t])
        if apart:
            shown = " and ".join(", ".join(sorted(n[apart[0]])) for n in names)
            yield (
                f"{a.name} and {b.name} contradict each other in {len(apart)} training texts "
                f"(such as {apart[0][:60]!r}: {shown})"
            )
    share = len(both) / max(1, min(len(one), len(two)))
    if share > _MANY:
        yield (
            f"{a.name} and {b.name}: {share:.0%} of the smaller one's training texts are in both; what both teach "
            f"counts twice" + ("" if a.industry == b.industry else ", and a text has labels of both")
        )


def _tested(a: Domain, b: Domain, taught: Said) -> Iterator[str]:
    if known := {normalised(text) for text in a.test.texts} & taught.keys():
        yield (
            f"{len(known)} test texts of {a.name} are training texts of {b.name} (such as {min(known)[:50]!r}): what "
            f"is learned from them looks better than it is; leave them out of {b.name}"
        )


def _shared_labels(a: Domain, b: Domain) -> Iterator[str]:
    names = [{_plain(label) for label in d.labels} for d in (a, b)]
    both = sorted(n for n in names[0] & names[1] if not n.isdigit())
    if len(both) > _MANY * max(1, min(map(len, names))):
        yield (
            f"{a.name} and {b.name}: {len(both)} labels have the same name ({', '.join(both[:5])}); "
            f"they are kept apart: if they mean the same, make them owners of one industry (industry@owner)"
        )


def _plain(label: str) -> str:
    return re.sub(r"[\W_]+", " ", normalised(label)).strip()


def unhelpful(record: Mapping[str, Any] | None) -> list[str]:
    """Warnings of the last round's specialists: those that are no better on their own domain than the large model was,
    and those that are the same model."""
    if record is None:
        return []
    grown = {d: told for d, told in record["domains"].items() if told.get("specialist")}
    sign = {d: -1 if told["metric"] == "loss" else 1 for d, told in grown.items()}
    found = [
        f"{d}: in round {record['round']} its specialist had {told['specialist']['score']:.4g} ({told['metric']}) and "
        f"the large model {told['parent']['score']:.4g}: it has nothing to teach"
        for d, told in grown.items()
        if sign[d] * (told["specialist"]["score"] - told["parent"]["score"]) <= 0
    ]
    by_digest = defaultdict(list)
    for d, told in grown.items():
        by_digest[told["specialist"]["digest"]].append(d)
    return found + [f"{', '.join(same)}: their specialists are one model" for same in by_digest.values() if same[1:]]
