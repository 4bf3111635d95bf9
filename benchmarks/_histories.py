"""Recipes of a bandit's benchmark: subsets of the open text domains, with few rows or more, trained little or much."""

from __future__ import annotations

import itertools
import random
from pathlib import Path
from typing import Any

from _common import text_domains
from _outcomes import BASE, usable
from fanbu.errors import DataError
from fanbu.recipe import Recipe, load_domains, load_recipe

RECIPES = 12
ROWS, EPOCHS = (30, 60, 120), (1, 3)
CANDIDATES: list[dict[str, Any]] = [
    {"method": "average"}, {"method": "task_arithmetic", "scale": 0.3}, {"method": "tsv_m"}, {"method": "probe"},
    {"method": "regmean"}, {"method": "multitask"}, {"method": "distill", "train": {"epochs": 3}},
    {"method": "distill", "train": {"epochs": 3, "lr": 6e-4}},
    {"method": "fedavg", "times": 3, "train": {"epochs": 1, "lr": 3e-4}},
]  # fmt: skip


def recipes(data: Path, work: Path, count: int) -> list[Recipe]:
    """So many recipes of two to four domains; the seed is the recipe's number. Those with too few rows for their labels
    are left out."""
    folders, found = usable(text_domains(data)), list[Recipe]()
    for number in itertools.count():
        if len(found) == count:
            return found
        recipe = _recipe(folders, number, work / str(number))
        try:
            load_domains(recipe)
            found.append(recipe)
        except DataError:
            continue
    raise AssertionError


def _recipe(folders: dict[str, Path], number: int, work: Path) -> Recipe:
    rng = random.Random(number)
    names = sorted(rng.sample(sorted(folders), rng.choice((2, 3, 4))))
    rows, epochs = rng.choice(ROWS), rng.choice(EPOCHS)
    domains = {
        name: {
            **{s: str(folders[name] / f"{s}.jsonl") for s in ("train", "valid", "test")},
            "limit": {"train": rows, "valid": 100, "test": 300},
        }
        for name in names
    }
    return load_recipe({
        "fanbu": 1, "name": f"bandit-{number}", "model": BASE, "workspace": str(work / "workspace"), "threads": 1,
        "device": "cpu", "precision": "fp32", "max_length": 64, "domains": domains, "feedback": {"method": "distill"},
        "shrink": [{"method": "finetune", "train": {"epochs": epochs, "lr": 2e-4}}], "compare": {"ways": CANDIDATES},
    })  # fmt: skip
