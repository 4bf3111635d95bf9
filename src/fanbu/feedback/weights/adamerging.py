"""AdaMerging: learns how much of each specialist each layer takes, until answers on unlabelled texts are certain."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from fanbu.batches import collate, encode, pad_id
from fanbu.contribution import Contribution
from fanbu.errors import UsageError
from fanbu.feedback.weights._probed import contribute
from fanbu.merging.dials import layer_of
from fanbu.merging.engine import Linear, Stack, merge
from fanbu.merging.live import Live, asked_texts
from fanbu.model import Model, provenance
from fanbu.predict import limit
from fanbu.train import set_up
from fanbu.types import CLASSIFYING, Context, Needs

__all__ = ["LINEAR", "NEEDS", "NEUTRAL", "SENSITIVITY", "absorb", "contribute"]

NEEDS = Needs(kind="weights", same_architecture=True, same_tokenizer=True, probe=True, tasks=CLASSIFYING)
LINEAR = False
SENSITIVITY = None
NEUTRAL = {"init": 1.0, "steps": 0}
_BETAS, _TINY = (0.9, 0.999), 1e-8


def absorb(
    base: Model, contributions: Sequence[Contribution], out: Path, context: Context, *, init: float = 0.3,
    by: Literal["layer", "task"] = "layer", steps: int = 50, lr: float = 0.02, batch: int = 8,
) -> Model:  # fmt: skip
    """theta = theta_base + sum of lambda_il delta_i in layer l, lambda minimising the mean entropy of told answers.

    Each step takes texts of one domain after the other from the probe set (never from test rows), and moves lambda by
    Adam along d loss / d lambda_il = <d loss / d theta_l, delta_il>. No label is used. The network is in memory, the
    specialists are not.

    Args:
        init: lambda at the start.
        by: ``layer`` learns a lambda for each specialist and layer, ``task`` one for each specialist.
        steps: of Adam; each goes over the texts of all domains.
        lr: of Adam (the paper takes 1e-3 and some hundred steps).
        batch: texts of each domain in a step.

    Raises:
        FitError: a contribution's tensors are not the base's, or a domain has no texts in the probe set.
        UsageError: steps below 0, or a batch below 1.

    Reference: Yang et al. 2024, "AdaMerging: adaptive model merging for multi-task learning".
    """
    if steps < 0 or batch < 1:
        raise UsageError(
            "bad-parameter", "adamerging: steps or batch", allowed="steps >= 0, batch >= 1", got=[steps, batch],
            remedy="change it",
        )  # fmt: skip
    texts = asked_texts(context, contributions, "adamerging")
    live = Live(base, contributions, context)
    groups = {n: 1 + layer if by == "layer" and (layer := layer_of(n)) is not None else 0 for n in live.stacks}
    shares = torch.full((len(texts), 1 + max(groups.values(), default=0)), init, dtype=torch.float64)
    mean, square = torch.zeros_like(shares), torch.zeros_like(shares)
    set_up(context, "adamerging")
    batches = {domain: _encoded(live, texts[domain], context) for domain in sorted(texts)}
    for step in range(1, steps + 1):
        slope = _slope(live, batches, groups, shares, (step - 1) * batch, batch)
        mean.lerp_(slope, 1 - _BETAS[0])
        square.mul_(_BETAS[1]).addcmul_(slope, slope, value=1 - _BETAS[1])
        length = (square / (1 - _BETAS[1] ** step)).sqrt_().add_(_TINY)
        shares.addcdiv_(mean, length, value=-lr / (1 - _BETAS[0] ** step))
        context.progress("adamerging", step, steps)
    made = provenance(
        "adamerging", [base], context, init=init, by=by, steps=steps, lr=lr, batch=batch, domains=sorted(texts),
        learned=[[round(v, 6) for v in row] for row in shares.tolist()], probe=context.probe.digest,
    )  # fmt: skip
    learned = shares.tolist()
    return merge(
        base, contributions, out, context, lambda stack: Linear([row[groups[stack.name]] for row in learned]), made
    )


def _encoded(live: Live, texts: Sequence[str], context: Context) -> list[list[int]]:
    """Tokens of a domain's texts, shuffled by the seed."""
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(context.seeded("adamerging"))).tolist()
    return encode(live.tokenizer, [texts[i] for i in order], limit(live.network, context))


def _slope(
    live: Live, batches: Mapping[str, list[list[int]]], groups: Mapping[str, int], shares: Tensor, first: int, size: int
) -> Tensor:
    """d loss / d lambda at the present lambda, [specialists, groups]."""
    values = shares.tolist()
    live.blend(lambda stack: [row[groups[stack.name]] for row in values])
    live.network.zero_grad()
    for domain, sequences in batches.items():
        chosen = [sequences[(first + i) % len(sequences)] for i in range(size)]
        logits = live.network(**collate(chosen, pad_id(live.tokenizer), live.context.device)).logits
        log_p = logits[:, live.columns(domain)].float().log_softmax(1)
        (-(log_p.exp() * log_p).sum(1).mean() / len(batches)).backward()
    slope = torch.zeros_like(shares)
    for name, parameter in live.parameters.items():
        if parameter.grad is not None:
            slope[:, groups[name]] += _along(live.stacks[name], parameter.grad)
    return slope


def _along(stack: Stack, gradient: Tensor) -> Tensor:
    """<gradient, delta_i> of one tensor."""
    flat = gradient.reshape(-1, *stack.shape[1:]) if stack.shape else gradient.reshape(1)
    total = torch.zeros(len(stack.sources), dtype=torch.float64)
    for part in stack.parts():
        rows = flat[part.start : part.stop]
        total += torch.tensor([float((rows * delta).sum()) for delta in part.deltas], dtype=torch.float64)
    return total
