"""Model Stock: the mean of the specialists, drawn towards the base as far as they disagree."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fanbu.contribution import Contribution
from fanbu.feedback.weights._task_vector import contribute
from fanbu.merging.engine import Combine, Linear, Stack, merge
from fanbu.merging.geometry import gram, mean_cosine
from fanbu.model import Model, provenance
from fanbu.types import Context, Needs

__all__ = ["LINEAR", "NEEDS", "NEUTRAL", "SENSITIVITY", "absorb", "contribute"]

NEEDS = Needs(kind="weights", same_architecture=True)
LINEAR = False
SENSITIVITY = None
NEUTRAL: dict[str, float] = {}


def absorb(base: Model, contributions: Sequence[Contribution], out: Path, context: Context) -> Model:
    """theta = theta_base + t * mean of delta_i, with t = N cos / (1 + (N - 1) cos) for each tensor.

    cos is the mean cosine between two of the N task vectors; t is held within 0..1. With one specialist t is 1.

    Raises:
        FitError: a contribution's tensors are not the base's.

    Reference: Jang et al. 2024, "Model Stock: all we need is just a few fine-tuned models".
    """

    def rule(stack: Stack) -> Combine:
        count = len(stack.domains)
        cosine = mean_cosine(gram(stack, deltas=True))
        t = min(1.0, max(0.0, count * cosine / (1 + (count - 1) * cosine))) if count > 1 else 1.0
        return Linear([t / count] * count)

    made = provenance("model_stock", [base], context, domains=[c.domain for c in contributions])
    return merge(base, contributions, out, context, rule, made)
