"""Linear probes: each owner fits label rows on the frozen base, and the centre joins them into one head."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fanbu.contribution import Contribution
from fanbu.domain import Specialist
from fanbu.feedback.statistics._label_rows import counts, join_rows
from fanbu.heads import sent_head
from fanbu.model import Model, load_network, load_tokenizer
from fanbu.probing import fit_probe
from fanbu.types import CLASSIFYING, Context, Needs

NEEDS = Needs(kind="statistics", specialist=False, tasks=CLASSIFYING)
LINEAR = False
SENSITIVITY = None


def contribute(specialist: Specialist, base: Model, context: Context) -> Contribution:
    """Label rows for the specialist's domain, fitted on the frozen base (multinomial logistic regression).

    The specialist's own weights are not used: this is what an owner can give who trained nothing. All training rows
    are used and the strength is chosen on validation rows (see ``fanbu.probing.fit_probe``). Where there are several
    owners, how many rows it has of each label crosses too.
    """
    network, tokenizer = load_network(base), load_tokenizer(base)
    head, found = fit_probe(network, tokenizer, specialist.domain, context)
    tensors = {"weight": head.weight_lh, "bias": head.bias_l, **counts(specialist.domain)}
    return Contribution(
        "statistics", specialist.domain.name, "probe", tensors, meta={"labels": list(head.labels), **found}
    )


def absorb(base: Model, contributions: Sequence[Contribution], out: Path, context: Context) -> Model:
    """Joins the label rows into the base's head; rows of other domains stay bit for bit. Where several owners of an
    industry bring rows for a label, it is their mean, weighted by how many training rows each has of it.

    Each domain's bias is lowered by its mean logsumexp on its own rows; where the probe set has texts whose domain is
    known, they are aligned on these (``_label_rows.join_rows``). Neither changes an answer within a domain.
    """
    new = []
    for c in contributions:
        new.append(sent_head(c, c.tensors["bias"] - c.meta["mean_logsumexp"]))
    return join_rows(base, new, out, context, "probe", [c.domain for c in contributions])
