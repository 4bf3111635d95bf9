"""What an attacker gains from a released model: whether a row was trained on, guessed from its loss."""

from __future__ import annotations

from typing import Any

import numpy as np

from fanbu.domain import Domain
from fanbu.errors import DataError
from fanbu.heads import check_labels_known
from fanbu.model import Model, load_network, load_tokenizer, require_task
from fanbu.predict import class_logits, token_losses
from fanbu.types import Context, derived_seed

Floats = np.ndarray[Any, np.dtype[np.float64]]
_FALSE_ALARMS = 0.01
_DRAWS = 1000


def audit(model: Model, domain: Domain, context: Context) -> dict[str, float]:
    """At the owner: training rows (members) beside test rows, told apart by the model's loss on them, told.

    ``auc``: the chance that a member's loss is below a stranger's (0.5: nothing is given away), with its 95% bootstrap
    interval ``low``, ``high``; ``advantage``: max over thresholds of true minus false alarms; ``caught``: the share of
    members that are named where one stranger in a hundred is. A stronger attack may find more: this is a lower bound.

    Raises DataError where there are no training or no test rows.

    References: Yeom et al. 2018, "Privacy risk in machine learning" (the attack and its advantage); Carlini et al.
    2022, "Membership inference attacks from first principles" (why few false alarms matter).
    """
    require_task(model, domain.task)
    if not (len(domain.train) and len(domain.test)):
        raise DataError(
            "nothing-to-audit", f"{domain.name} has nothing to audit", allowed="training rows and test rows",
            got=f"{len(domain.train)} and {len(domain.test)}", remedy="name files with rows",
        )  # fmt: skip
    members, strangers = (_losses(model, domain, split, context) for split in ("train", "test"))
    draw = np.random.default_rng(derived_seed(context.seed, "audit", domain.name))
    draws = [_auc(draw.choice(members, len(members)), draw.choice(strangers, len(strangers))) for _ in range(_DRAWS)]
    low, high = np.quantile(draws, [0.025, 0.975])
    levels = np.unique(np.concatenate([members, strangers]))
    named, false = (np.searchsorted(np.sort(v), levels, side="right") / len(v) for v in (members, strangers))
    return {
        "members": len(members), "strangers": len(strangers), "auc": _auc(members, strangers), "low": float(low),
        "high": float(high), "advantage": float(max(0.0, (named - false).max())),
        "caught": float(named[false <= _FALSE_ALARMS].max(initial=0.0)),
    }  # fmt: skip


def _losses(model: Model, domain: Domain, split: str, context: Context) -> Floats:
    """Of each row, in nats; of a causal model's, a token."""
    network, tokenizer, rows = load_network(model), load_tokenizer(model), getattr(domain, split)
    if domain.task == "causal-lm":
        sums = token_losses(network, tokenizer, rows.texts, context).double().numpy()
        found: Floats = sums[:, 0] / np.maximum(sums[:, 1], 1)
        return found
    check_labels_known(model, domain.full_labels)
    columns = [model.labels.index(label) for label in domain.full_labels]
    logits = class_logits(network, tokenizer, rows.texts, context)[:, columns].double().log_softmax(1).numpy()
    return -logits[np.arange(len(logits)), np.array(rows.labels)]


def _auc(members: Floats, strangers: Floats) -> float:
    """P(member < stranger) + P(equal) / 2, from ranks (Mann and Whitney 1947)."""
    from scipy.stats import rankdata

    ranks = rankdata(np.concatenate([strangers, members]))
    above = ranks[: len(strangers)].sum() - len(strangers) * (len(strangers) + 1) / 2
    return float(above / (len(members) * len(strangers)))
