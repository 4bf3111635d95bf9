"""MAML: owners teach the large model to be good after a few steps on few rows of a new task."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge, Gt
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy

from fanbu.contribution import Contribution
from fanbu.domain import Specialist
from fanbu.errors import FanbuError
from fanbu.feedback.updates._episodes import Episode, Episodes, Learn, Rows, absorb, meta_update
from fanbu.heads import final_layer
from fanbu.model import Model
from fanbu.train import optimizer_of
from fanbu.types import CLASSIFYING, Context, Needs, Train

__all__ = ["EXPERIMENTAL", "LINEAR", "NEEDS", "SENSITIVITY", "absorb", "contribute"]

NEEDS = Needs(kind="updates", specialist=False, tasks=CLASSIFYING)
LINEAR = True
EXPERIMENTAL = "on industries held out not surely better than the plain base with 5 rows a label, and behind it with 10"
SENSITIVITY = 1.0
OUTER = Train(epochs=1, lr=1e-4, warmup=0.0, schedule="constant", patience=0)


def contribute(
    specialist: Specialist, base: Model, context: Context, *, episodes: Episodes = Episodes(),
    steps: Annotated[int, Ge(1)] = 3, rate: Annotated[float, Gt(0)] = 0.01, order: Literal[1, 2] = 1,
    train: Train = OUTER,
) -> Contribution:  # fmt: skip
    """For each episode: phi <- phi - rate grad L_support(phi), so many ``steps`` from theta; then theta goes one step
    of an optimizer along grad_theta L_queries(phi).

    ``order`` 2 differentiates through those steps; 1 takes the gradient at phi for it, at a third of the cost. Label
    rows are adapted with the trunk, from prototypes, and do not outlive their episode. The owner's label rows are
    fitted anew on its trunk; follow with ``probe`` to fit them to the one that all owners made. Always in float32.

    Args:
        episodes: how small tasks are drawn from the owner's rows: ``count``, ``labels``, ``shots``, ``queries``.
        steps: of adapting.
        rate: the learning rate of adapting, by plain gradients.
        order: of the derivatives that are taken.
        train: the optimizer of theta (``optimizer``, ``lr``, ``weight_decay``, ``clip``); its epochs do not count.

    Raises:
        FitError: fewer than two labels have two rows.
        FanbuError: the loss is not finite.

    Reference: Finn, Abbeel and Levine 2017, "Model-agnostic meta-learning for fast adaptation of deep networks";
    rows from prototypes: Triantafillou et al. 2020, "Meta-dataset"; at owners: Fallah et al. 2020, "Personalized
    federated learning".
    """

    def learner(network: Any) -> Learn:
        optimizer = optimizer_of(network, final_layer(network), train)
        trunk = [p for group in optimizer.param_groups for p in group["params"]]

        def learn(episode: Episode) -> None:
            # kernels that keep no attention matrix have no second derivative
            with sdpa_kernel(SDPBackend.MATH) if order == 2 else nullcontext():
                fast = adapted(network, episode.support, episode.pad, context.device, steps, rate, order)
                loss = _loss(network, fast, episode.queries, episode.pad, context.device)
                if not torch.isfinite(loss):
                    raise FanbuError(
                        "diverged", f"{episode.name}: the loss is not finite", remedy="lower rate, or train's lr"
                    )
                loss.backward()
            if train.clip:
                torch.nn.utils.clip_grad_norm_(trunk, train.clip)
            optimizer.step()
            optimizer.zero_grad()

        return learn

    return meta_update("maml", specialist, base, context, episodes, learner)


def adapted(
    network: Any, rows: Rows, pad: int, device: str, steps: int, rate: float, order: int
) -> dict[str, torch.Tensor]:  # fmt: skip
    """Parameters by name after so many steps of plain gradient descent on these rows, differentiable in the network's
    own: through the gradients, too, where ``order`` is 2."""
    fast = {n: p for n, p in network.named_parameters() if p.requires_grad}
    for _ in range(steps):
        loss = _loss(network, fast, rows, pad, device)
        slopes = torch.autograd.grad(loss, list(fast.values()), create_graph=order == 2, allow_unused=True)
        fast = {n: p if g is None else p - rate * g for (n, p), g in zip(fast.items(), slopes, strict=True)}
    return fast


def _loss(network: Any, fast: dict[str, torch.Tensor], rows: Rows, pad: int, device: str) -> torch.Tensor:
    batch, truth = rows.batch(pad, device)
    return cross_entropy(functional_call(network, fast, (), batch).logits.float(), truth)
