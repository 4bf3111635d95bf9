"""A network in memory whose body is base + sum of w_i delta_i, set anew as often as it is tried or learned from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fanbu.contribution import Contribution
from fanbu.errors import FitError
from fanbu.heads import domains_of, set_head
from fanbu.merging.engine import Stack, head_of, stacks
from fanbu.model import Model, load_network, load_tokenizer
from fanbu.predict import class_logits
from fanbu.types import Context, industry_of


class Live:
    """The base's network with the label rows of all specialists, and the stacks that its body is made of.

    Raises FitError where the network's parameters do not carry the names of the checkpoint's tensors.
    """

    def __init__(self, base: Model, contributions: Sequence[Contribution], context: Context) -> None:
        self.context, self.tokenizer = context, load_tokenizer(base)
        self.network = load_network(base).float().to(context.device).eval()
        self.stacks: Mapping[str, Stack] = {s.name: s for s in stacks(base, contributions, context)}
        self.parameters = {n: p for n, p in self.network.named_parameters() if n in self.stacks}
        lacking = self.stacks.keys() - self.parameters.keys() - {n for n, _ in self.network.named_buffers()}
        if lacking:
            raise FitError(
                "other-architecture", f"{base.path} loads with other names than its tensors have",
                allowed="parameters named as in the files", got=sorted(lacking)[:6], remedy="save it once more",
            )  # fmt: skip
        head = head_of(base, contributions)
        if head:
            set_head(self.network, head)
            self.network.to(context.device)
            self.labels = head.labels

    @torch.no_grad()
    def blend(self, weights: Callable[[Stack], Sequence[float]]) -> None:
        """Sets the body to base + sum of w_i delta_i; ``weights`` gives the w_i of one tensor."""
        for name, parameter in self.parameters.items():
            stack = self.stacks[name]
            flat = parameter.data.view(-1, *stack.shape[1:]) if stack.shape else parameter.data.view(1)
            w = weights(stack)
            for part in stack.parts():
                for delta, weight in zip(part.deltas, w, strict=True):
                    part.base.add_(delta, alpha=weight)
                flat[part.start : part.stop] = part.base

    @torch.no_grad()
    def become(self, names: Sequence[str], domain: str) -> None:
        """Sets some tensors to those of one specialist."""
        for name in names:
            whole = self.alone(name, domain).whole()
            self.parameters[name].copy_(whole.base.add_(whole.deltas[0]).view_as(self.parameters[name]))

    def alone(self, name: str, domain: str) -> Stack:
        """The stack of one tensor with one specialist."""
        stack = self.stacks[name]
        place = stack.domains.index(domain)
        return replace(stack, domains=(domain,), sources=(stack.sources[place],))

    def logits(self, texts: Sequence[str], domain: str) -> Tensor:
        """[texts, the domain's labels]."""
        return class_logits(self.network, self.tokenizer, texts, self.context)[:, self.columns(domain)]

    def columns(self, domain: str) -> list[int]:
        """The domain's rows of the label head."""
        return domains_of(self.labels)[industry_of(domain)]


def asked_texts(context: Context, contributions: Sequence[Contribution], method: str) -> dict[str, list[str]]:
    """The probe set's texts by domain. Raises FitError where a specialist's domain has none, or the set is another."""
    texts: dict[str, list[str]] = {c.domain: [] for c in contributions}
    for row in context.probe.rows:
        if row.domain in texts:
            texts[row.domain].append(row.text)
    lacking = sorted(d for d, found in texts.items() if not found)
    other = sorted(c.domain for c in contributions if c.meta["probe"] != context.probe.digest)
    if lacking or other:
        raise FitError(
            "no-probe-set", f"{method} needs texts of every specialist's domain",
            allowed="the probe set that specialists were asked with, with texts of each",
            got=f"none of {', '.join(lacking)}" if lacking else f"another set for {', '.join(other)}",
            remedy="name them under `probe`, or take a method that needs no data",
        )  # fmt: skip
    return texts
