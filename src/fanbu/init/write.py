"""The recipe as a commented text, with numbers that suit the rows and the model."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from fanbu.init.look import Look

SHARES: Mapping[str, tuple[Any, str]] = {
    "open": ("open", "everything may leave its owner, labels too"),
    "texts": ({"preset": "open", "labels": False}, "texts and predictions may leave their owner, labels may not"),
    "internal": ("internal", "weights, statistics and predictions may leave; neither texts nor labels"),
}
DISCORDANCE = 0.15  # the share of test rows on which two models differ, as a rule
_MANY, _LIMITS = 12_000, {"train": 8000, "valid": 1000, "test": 3000}


@dataclass(frozen=True)
class Wish:
    """What the recipe is to be, beside its domains."""

    name: str
    model: str
    task: str
    share: str = "texts"
    rounds: int = 1
    parameters: int = 0
    max_length: int = 128
    about_length: str = ""
    public: Path | None = None


def recipe_text(wish: Wish, looks: Sequence[Look], folder: Path) -> str:
    """The whole recipe; paths in it are relative to ``folder`` where they can be."""
    size = f"   # {wish.parameters / 1e6:.1f} million parameters" if wish.parameters else ""
    lines = [
        "# Written by `fanbu init` after a look at your files. Every key is explained in docs/recipes.md.",
        "# `fanbu doctor` with this file checks it and says how long a round may take; `fanbu run` runs it, and",
        "# goes on after a stop. `--set key.key=value` changes one value for one run.",
        "fanbu: 1",
        f"name: {_flow(wish.name)}",
        f"model: {_flow(wish.model)}{size}",
        f"max_length: {wish.max_length}   # {wish.about_length}",
        f"rounds: {wish.rounds}   # the champion of one round is the parent of the next",
        "",
        "domains:",
    ]
    for number, look in enumerate(looks):
        lines += _domain(wish, look, folder, explain=number == 0)
    lines += _ways(wish, looks, folder)
    lines += _gate(wish, looks)
    return "\n".join(lines) + "\n"


def _domain(wish: Wish, look: Look, folder: Path, *, explain: bool) -> list[str]:
    """One domain; ``explain`` adds what every domain's lines mean."""

    def because(comment: str) -> str:
        return f"   # {comment}" if explain else ""

    classes = f", {len(look.labels)} labels" if look.labels else ""
    share, meaning = SHARES[wish.share]
    rows = look.rows["train"]
    lines = [f"  {look.name}:   # {rows} rows of train{classes}"]
    lines += [f"    # look: {warning}" for warning in look.warnings]
    lines += [f"    task: {wish.task}"] if wish.task != "text-classification" else []
    for split in ("train", "valid", "test", "unlabelled"):
        if split in look.files:
            lines.append(f"    {split}: {_flow(relative(look.files[split], folder))}")
        elif split == "test":
            kept = f"there is no test file: about {round(test_share(rows) * rows)} of the {rows} rows are kept apart"
            lines.append(f"    test: {test_share(rows)}{because(kept)}")
        elif split == "valid":
            lines.append(f"    valid: 0.1{because('the share of the training rows that decides which epoch is kept')}")
    named = {"text": look.columns.text, "label": look.columns.label, "id": look.columns.id}
    other = {key: name for key, name in named.items() if name is not None and name != key}
    if other:
        lines.append(f"    columns: {_flow(other)}{because('what your file calls them')}")
    if limit := {split: most for split, most in _LIMITS.items() if rows > _MANY}:
        lines.append(f"    limit: {_flow(limit)}{because('so that a round ends soon; remove it to use all rows')}")
    lines.append(f"    share: {_flow(share)}{because(meaning)}")
    return [*lines, *_later(wish)] if explain and wish.rounds > 1 else lines


def _later(wish: Wish) -> list[str]:
    """How rows that come later are named: as a comment, since they are not there."""
    return [
        "    # rows that come later:   arrivals: [{round: 2, train: more.csv}]",
        f"    # or the rows of train in portions, one a round:   arrivals: {wish.rounds}",
    ]


def _ways(wish: Wish, looks: Sequence[Look], folder: Path) -> list[str]:
    plan = training(min(look.rows["train"] for look in looks), wish.parameters)
    grown, fed = {"method": "finetune", "train": plan}, {"method": "distill", "train": {**plan, "epochs": 3}}
    if plan["epochs"] > 3:  # few rows: the way back needs as many steps as the way down
        grown["train"], fed["train"] = {**plan, "patience": 3}, dict(plan)
    lines = [
        "",
        "shrink:   # how specialists are born; `fanbu methods` lists the ways (depth and vocabulary make them smaller)",
        f"  - {_flow(grown)}",
        "",
    ]
    if wish.share == "internal" and wish.public is None:
        return [
            *lines,
            "# How they feed back. Without shared texts: by the mean of the weights. Public texts would be better:",
            "# name a file under `probe: {public: [{path: FILE}]}`, and take `method: distill` here.",
            f"feedback: {_flow({'method': 'average'})}",
            "",
        ]
    lines += [
        "# How they feed back: the large model learns from the specialists' answers on shared texts.",
        f"feedback: {_flow(fed)}",
        "",
    ]
    if wish.public is not None:
        public = {"public": [{"path": relative(wish.public, folder)}]}
        lines += [f"probe: {_flow(public)}   # texts that belong to nobody", ""]
    return lines


def _gate(wish: Wish, looks: Sequence[Look]) -> list[str]:
    tested = {look.name: test_rows(look) for look in looks}
    if wish.task == "causal-lm":
        return ["gate:", "  margin: 0.02   # no domain's loss may rise by more than this share of it"]
    margins = {name: margin(rows) for name, rows in tested.items()}
    most = max(margins.values())
    name, rows = min(tested.items(), key=lambda item: item[1])
    points = 100 * math.sqrt(DISCORDANCE / rows)
    lines = [
        "references: [tfidf]   # shown beside the new model, never promoted",
        "",
        "gate:",
        "  # What a domain may lose, in points of accuracy: 0.05 is five points. It must be SHOWN to hold, so it",
        "  # cannot be smaller than what the test rows resolve. Where two models differ on 15% of n test rows, the",
        f"  # standard error of a change is sqrt(0.15/n): {points:.1f} points with the {rows} test rows of {name}.",
        "  # The margin is two and a half of these; more test rows allow a smaller one.",
        f"  margin: {most}",
    ]
    other = {name: value for name, value in margins.items() if value != most}
    return [*lines, *([f"  margins: {_flow(other)}"] if other else [])]


def training(rows: int, parameters: int) -> dict[str, Any]:
    """Epochs, batch size and learning rate of full fine-tuning that suit the number of rows and the model."""
    rate = 2e-4 if parameters < 60e6 else 5e-5 if parameters < 250e6 else 2e-5
    size = 32 if rows >= 1000 else 16
    epochs = 2 if rows >= 4000 else 3 if rows >= 1000 else 6  # few rows: more steps, or the gain drowns in chance
    return {"epochs": epochs, "batch_size": size, "lr": rate}


def test_share(rows: int) -> float:
    """How much of the training rows is kept apart where there is no test file."""
    return 0.25 if rows < 2000 else 0.2 if rows < 10_000 else 0.1


def test_rows(look: Look) -> int:
    """Test rows of a domain, carved out or not, within the limit."""
    rows = look.rows["train"]
    found = look.rows.get("test") or max(round(test_share(rows) * rows), 1)
    return min(found, _LIMITS["test"]) if rows > _MANY else found


def margin(rows: int) -> float:
    """The smallest margin, in steps of a point, that so many test rows can resolve: 2.5 sqrt(0.15 / rows)."""
    return min(max(math.ceil(250 * math.sqrt(DISCORDANCE / rows)), 1), 25) / 100


def relative(path: Path, folder: Path) -> str:
    """A path as the recipe names it."""
    try:
        return Path(os.path.relpath(path, folder)).as_posix()
    except ValueError:  # another drive
        return str(path)


class _Plain(yaml.SafeDumper):
    """Numbers as a person writes them: YAML 1.1 reads 5e-05 as a text."""


_Plain.add_representer(float, lambda dumper, value: dumper.represent_scalar("tag:yaml.org,2002:float", _decimal(value)))


def _decimal(value: float) -> str:
    text = repr(value)
    return text if "e" not in text or "." in text else text.replace("e", ".0e")


def _flow(value: Any) -> str:
    """A value on one line."""
    text = yaml.dump(value, Dumper=_Plain, default_flow_style=True, allow_unicode=True, sort_keys=False, width=math.inf)
    return text.removesuffix("...\n").strip()
