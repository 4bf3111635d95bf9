"""Labels of different owners that mean the same are found by what specialists say of the same texts."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from fanbu.contribution import Contribution
from fanbu.feedback.predictions._alike import alike
from fanbu.feedback.predictions._panel import rows_known, said
from fanbu.record import _untaught
from fanbu.types import CLASSIFYING, Context, ProbeRow, ProbeSet

TRUTH = torch.tensor([0] * 30 + [1] * 30 + [2] * 20)


def panel(base: Any, domain: str, labels: list[str], rows: list[str]) -> Contribution:
    """Says ``rows`` of the texts, in order; "?" is any of its labels alike."""
    p = torch.full((len(rows), len(labels)), 1 / len(labels))
    for k, label in enumerate(rows):
        if label != "?":
            p[k] = 0.0
            p[k, labels.index(label)] = 1.0
    group, mark = rows_known(base, domain)
    industry = domain.partition("@")[0]
    known = [group.index(base.labels.index(f"{industry}/{label}")) for label in labels]
    meta = {"head": mark, "known": known, "most": 64, "mass": 0.98, "probe": ""}
    return Contribution("predictions", domain, "distill", said(p, 64, 0.98), meta=meta)


def answers(names: tuple[str, str, str]) -> list[str]:
    return [names[i] for i in TRUTH.tolist()]


def probe(owners: list[str | None]) -> Context:
    rows = [ProbeRow(str(i), f"text {i}", owners[i % len(owners)]) for i in range(len(TRUTH))]
    return Context(probe=ProbeSet(tuple(rows)))


def test_two_owners_names_for_one_thing_are_found() -> None:
    labels = ("shop/hello", "shop/refund", "shop/money back", "shop/other")
    base: Any = SimpleNamespace(labels=labels, task=CLASSIFYING[0], path="x")
    context = probe(["shop@north", "shop@south"])
    north = panel(base, "shop@north", ["hello", "refund"], answers(("hello", "refund", "?")))
    south = panel(base, "shop@south", ["hello", "money back", "other"], answers(("hello", "money back", "other")))
    found = alike(base, [south, north], context)
    assert found == {"shop/money back = shop/refund": 1.0}
    assert alike(base, [north, south], context) == found
    other = panel(base, "shop@south", ["hello", "money back", "other"], answers(("other", "other", "money back")))
    assert alike(base, [north, other], context) == {}
    assert "give them one name" in _untaught({"alike": found})[0]


def test_of_other_industries_only_what_both_were_asked_about_counts() -> None:
    labels = ("shop/hello", "shop/buy", "bank/hello", "bank/pay", "bank/loan")
    base: Any = SimpleNamespace(labels=labels, task=CLASSIFYING[0], path="x")
    shop = panel(base, "shop", ["hello", "buy"], answers(("hello", "buy", "buy")))
    bank = panel(base, "bank", ["hello", "pay", "loan"], answers(("hello", "?", "?")))
    assert alike(base, [shop, bank], probe([None])) == {"bank/hello = shop/hello": 1.0}
    unsure = panel(base, "bank", ["hello", "pay"], answers(("?", "?", "?")))
    assert alike(base, [shop, unsure], probe([None])) == {}
    own = [panel(base, d, ["hello", other], ["hello"] * 40) for d, other in (("shop", "buy"), ("bank", "pay"))]
    assert alike(base, own, probe(["shop", "bank"])) == {}  # each was asked about its own


def test_of_a_few_texts_nothing_is_said() -> None:
    base: Any = SimpleNamespace(
        labels=("shop/hello", "shop/buy", "bank/hello", "bank/pay"), task=CLASSIFYING[0], path="x"
    )
    few = Context(probe=ProbeSet(probe([None]).probe.rows[:14]))
    short = [panel(base, d, ["hello", other], ["hello"] * 14) for d, other in (("shop", "buy"), ("bank", "pay"))]
    assert alike(base, short, few) == {}
    causal: Any = SimpleNamespace(labels=(), task="causal-lm", path="x")
    assert alike(causal, short, few) == {}


def test_what_chance_does_is_not_said() -> None:
    base: Any = SimpleNamespace(
        labels=("mail/ham", "mail/spam", "film/good", "film/bad"), task=CLASSIFYING[0], path="x"
    )
    context, numbers = probe([None]), torch.Generator().manual_seed(0)
    often = (torch.rand(2, len(TRUTH), generator=numbers) < 0.85).long().tolist()
    mail = panel(base, "mail", ["ham", "spam"], [("spam", "ham")[i] for i in often[0]])
    film = panel(base, "film", ["good", "bad"], [("bad", "good")[i] for i in often[1]])
    assert alike(base, [mail, film], context) == {}
    unsure = [
        panel(base, d, list(k), ["?"] * len(TRUTH)) for d, k in (("mail", ("ham", "spam")), ("film", ("good", "bad")))
    ]
    assert alike(base, unsure, context) == {}
