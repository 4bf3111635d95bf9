"""Label rows that owners fitted apart, joined into one head on one level."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from fanbu.batches import evenly
from fanbu.domain import Domain
from fanbu.heads import Head, align_domains, domains_of, get_head, replace_rows, set_head
from fanbu.model import Model, load_network, load_tokenizer, provenance, save_network
from fanbu.predict import features
from fanbu.types import Context, ProbeRow, ProbeSet, industry_of

_ALIGN = 500


def join_rows(
    base: Model, new: Sequence[Head], out: Path, context: Context, method: str, domains: Sequence[str]
) -> Model:
    """The base with these label rows in the place of its own; rows of other domains stay bit for bit.

    Heads that were fitted apart have incomparable scales. Where the probe set has texts whose domain is known, a shift
    common to all rows of a domain is fitted on them (``fanbu.heads.align_domains``). It changes no answer within a
    domain.
    """
    network, tokenizer = load_network(base), load_tokenizer(base)
    head = replace_rows(get_head(network), new)
    known = aligning_rows(context.probe)
    if known:
        x = features(network, tokenizer, [row.text for row in known], context)
        movable = [domain for h in new for domain in domains_of(h.labels)]
        head = align_domains(head, x, [industry_of(str(row.domain)) for row in known], movable)
    set_head(network, head)
    return save_network(network, tokenizer, out, provenance(method, [base], context, domains=list(domains)))


def counts(domain: Domain) -> dict[str, Tensor]:
    """``count`` [labels], training rows of each; nothing of an owner who is alone in its industry."""
    if domain.name == domain.industry:
        return {}
    return {"count": torch.bincount(torch.tensor(domain.train.labels), minlength=len(domain.labels)).float()}


def aligning_rows(probe: ProbeSet) -> list[ProbeRow]:
    """At most 500 probe rows of each domain, evenly spaced: enough for one vector a domain."""
    by_domain: dict[str, list[ProbeRow]] = {}
    for row in probe.rows:
        if row.domain is not None:
            by_domain.setdefault(row.domain, []).append(row)
    return [row for rows in by_domain.values() for row in evenly(rows, _ALIGN)]
