"""Linear probes: each owner fits label rows on the frozen base, and the centre joins them into one head."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fanbu.contribution import Contribution
from fanbu.domain import Specialist
from fanbu.heads import Head, align_domains, domains_of, get_head, replace_rows, set_head
from fanbu.model import Model, load_network, load_tokenizer, provenance, save_network
from fanbu.predict import features
from fanbu.probing import fit_probe
from fanbu.types import Context, Needs, ProbeRow, ProbeSet

NEEDS = Needs(kind="statistics", tasks=("text-classification",))
LINEAR = False
SENSITIVITY = None
_ALIGN = 500


def contribute(specialist: Specialist, base: Model, context: Context) -> Contribution:
    """Label rows for the specialist's domain, fitted on the frozen base (multinomial logistic regression).

    The specialist's own weights are not used: this is what an owner can give who trained nothing. All training rows
    are used and the strength is chosen on validation rows (see ``fanbu.probing.fit_probe``).
    """
    network, tokenizer = load_network(base), load_tokenizer(base)
    head, found = fit_probe(network, tokenizer, specialist.domain, context)
    tensors = {"weight": head.weight_lh, "bias": head.bias_l}
    return Contribution(
        "statistics", specialist.domain.name, "probe", tensors, meta={"labels": list(head.labels), **found}
    )


def absorb(base: Model, contributions: Sequence[Contribution], out: Path, context: Context) -> Model:
    """Joins the label rows into the base's head; rows of other domains stay bit for bit.

    Heads that were fitted apart have incomparable scales. Where the probe set has texts whose domain is known, a
    shift common to all rows of a domain is fitted on them (``fanbu.heads.align_domains``); else each domain's bias is
    lowered by its mean logsumexp on its own rows. Neither changes an answer within a domain.
    """
    network, tokenizer = load_network(base), load_tokenizer(base)
    new = []
    for c in contributions:
        bias = c.tensors["bias"] - c.meta["mean_logsumexp"]
        new.append(Head(tuple(c.meta["labels"]), c.tensors["weight"], bias))
    before = get_head(network)
    head = replace_rows(before, new)
    known = aligning_rows(context.probe)
    if known:
        x = features(network, tokenizer, [row.text for row in known], context)
        movable = [domain for h in new for domain in domains_of(h.labels)]
        head = align_domains(head, x, [str(row.domain) for row in known], movable)
    set_head(network, head)
    return save_network(
        network, tokenizer, out, provenance("probe", [base], context, domains=[c.domain for c in contributions])
    )


def aligning_rows(probe: ProbeSet) -> list[ProbeRow]:
    """At most 500 probe rows of each domain, evenly spaced: enough for one vector a domain."""
    by_domain: dict[str, list[ProbeRow]] = {}
    for row in probe.rows:
        if row.domain is not None:
            by_domain.setdefault(row.domain, []).append(row)
    return [row for rows in by_domain.values() for row in rows[:: max(1, -(-len(rows) // _ALIGN))]]
