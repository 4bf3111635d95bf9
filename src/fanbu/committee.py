"""A committee: the specialists themselves are asked, and the large model says which industry a text is of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fanbu.contribution import Contribution
from fanbu.errors import UsageError
from fanbu.feedback.predictions._pool import Combine, Voice, pool
from fanbu.feedback.predictions._teach import with_base
from fanbu.heads import check_labels_known, domains_of
from fanbu.model import Model, load_network, load_tokenizer, require_task
from fanbu.predict import class_logits
from fanbu.types import Context, industry_of


@dataclass(frozen=True)
class Committee:
    """p(l | x) = q(industry | x) p(l | x, industry): q is the large model's, p what its specialists say together.

    The base has a voice of its own, with what their trust leaves; who is trusted with nothing is not heard. Every
    specialist of an industry is asked about every text, so a committee is as slow as all of them together: it is what
    the large model that ``ensemble`` teaches is to come up to.

    ``specialists`` are by domain, ``industry@owner`` or the domain's name. ``panels``, what they once sent, bring each
    one's temperature and trust; without them answers are taken as they are, in full. ``combine`` is as in ``ensemble``,
    but for ``stacked``, whose weights need labels.
    """

    base: Model
    specialists: Mapping[str, Model]
    context: Context
    panels: Sequence[Contribution] = ()
    combine: Combine = "weighted"

    def __post_init__(self) -> None:
        known = domains_of(self.base.labels)
        strange = sorted({industry_of(d) for d in self.specialists} - set(known))
        if strange or not self.specialists:
            raise UsageError(
                "unknown-domain", "a committee is of specialists whose industries the base knows",
                allowed=sorted(known), got=strange or "no specialists", remedy="give the base that they were fed to",
            )  # fmt: skip
        if self.combine == "stacked":
            raise UsageError(
                "bad-parameter", "a committee has no labels to stack by", allowed="weighted, mean, log_mean, gate",
                got=self.combine, remedy="teach a large model with `ensemble`, or take another",
            )  # fmt: skip
        for name, model in self.specialists.items():
            require_task(model, self.base.task or "text-classification")
            check_labels_known(self.base, [label for label in model.labels if industry_of(name) == label.split("/")[0]])

    def probabilities(self, texts: Sequence[str], domain: str | None = None) -> Tensor:
        """[texts, the base's labels], rows summing to 1; told the ``domain``, all of it on that industry's labels."""
        z = class_logits(load_network(self.base), load_tokenizer(self.base), texts, self.context)
        q, groups = z.softmax(1), domains_of(self.base.labels)
        if domain is not None and industry_of(domain) not in groups:
            raise UsageError(
                "unknown-domain", "the committee is told a domain that its base does not know", allowed=sorted(groups),
                got=domain, remedy="take one of these, or leave it out",
            )  # fmt: skip
        if domain is not None:
            told = groups[industry_of(domain)]
            q = torch.zeros_like(z).index_copy_(1, torch.tensor(told), z[:, told].softmax(1))
        for industry in sorted({industry_of(d) for d in self.specialists}):
            if domain is not None and industry != industry_of(domain):
                continue
            rows = groups[industry]
            mass = q[:, rows].sum(1, keepdim=True)
            start = q[:, rows] / mass.clamp_min(1e-9)
            voices = [self._voice(d, texts, rows, domain) for d in self._of(industry)]
            voices = [v for v in voices if v.weight > 0]
            if voices:
                q[:, rows] = mass * pool(with_base(voices, start), start, self.combine)
        return q / q.sum(1, keepdim=True)

    def answers(self, texts: Sequence[str], domain: str | None = None) -> list[str]:
        """The likeliest label of each text."""
        return [self.base.labels[i] for i in self.probabilities(texts, domain).argmax(1).tolist()]

    def _of(self, industry: str) -> list[str]:
        return sorted(d for d in self.specialists if industry_of(d) == industry)

    def _voice(self, name: str, texts: Sequence[str], rows: Sequence[int], domain: str | None) -> Voice:
        model, sent = self.specialists[name], next((c for c in self.panels if c.domain == name), None)
        z = class_logits(load_network(model), load_tokenizer(model), texts, self.context)
        names = {self.base.labels[i]: place for place, i in enumerate(rows)}
        own = [k for k, label in enumerate(model.labels) if label in names]
        p = (z[:, own] / float(sent.meta["temperature"] if sent else 1.0)).softmax(1)
        mine = torch.full((len(texts),), name == domain)
        return Voice(name, [names[model.labels[k]] for k in own], p, mine, float(sent.meta["trust"]) if sent else 1.0)
