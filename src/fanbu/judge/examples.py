"""Real examples of what a new model won and lost, chosen at the owner (kind ``samples``: texts and labels cross)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fanbu.contribution import Contribution
from fanbu.data.media import described
from fanbu.domain import Domain

MOST, LONGEST = 6, 600
Answers = Mapping[str, Tensor]


def examples(domain: Domain, old: Answers, new: Answers) -> Contribution:
    """At most six test rows that only the new model answered right, and six that only the old one did.

    For a classifier those of which the one that was right was surest; for a causal model those whose loss per token
    changed most. rows: ``id`` (``wins-0``...), ``text`` (600 characters at most) and ``label``; meta: ``answers``,
    the old and the new model's, by id. ``old`` and ``new`` are the answers that ``judge.evaluate.examine`` gives.
    """
    if domain.task == "causal-lm":
        change = old["loss"] - new["loss"]
        chosen = {"wins": _first(change, change > 0), "losses": _first(-change, change < 0)}
    else:
        right = torch.tensor(domain.test.labels)
        was, now = old["answer"] == right, new["answer"] == right
        chosen = {"wins": _first(new["confidence"], now & ~was), "losses": _first(old["confidence"], was & ~now)}
    rows, answers = [], {}
    for kind, numbers in chosen.items():
        for rank, i in enumerate(numbers):
            row = {"id": f"{kind}-{rank}", "text": described(domain.test.texts[i], LONGEST)}
            if domain.test.labels is not None:
                row["label"] = domain.labels[domain.test.labels[i]]
            rows.append(row)
            answers[row["id"]] = [_answer(domain, a, i) for a in (old, new)]
    return Contribution("samples", domain.name, "examples", rows=rows, meta={"answers": answers})


def _first(order: Tensor, among: Tensor) -> list[int]:
    """The row numbers among which ``order`` is largest, at most MOST."""
    numbers = torch.nonzero(among).flatten().tolist()
    return sorted(numbers, key=lambda i: (-float(order[i]), i))[:MOST]


def _answer(domain: Domain, answers: Answers, i: int) -> str:
    if domain.task == "causal-lm":
        return f"{float(answers['loss'][i]):.2f} nats a token"
    return f"{domain.labels[int(answers['answer'][i])]}"
