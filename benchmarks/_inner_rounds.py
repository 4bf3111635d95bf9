"""A way back taken many times over, each contribution through its owner's boundary; what is there is not made again."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from _specialists import made
from fanbu.boundary import cross
from fanbu.catalogue import method
from fanbu.contribution import Contribution, open_contribution
from fanbu.domain import Specialist
from fanbu.model import Model, open_model
from fanbu.progress import log
from fanbu.types import Context, Inner

Twist = Callable[[int, Contribution, Model], Contribution]  # what a false owner makes of its update


def inner_rounds(
    way: tuple[str, Mapping[str, Any]], times: int, owners: Sequence[Specialist], base: Model, context: Context,
    out: Path, twists: Mapping[str, Twist] | None = None,
) -> Model:  # fmt: skip
    """The model after so many inner rounds of a way with these arguments; ``twists`` are of false owners, by name."""
    if (out / "fanbu.json").exists():
        return open_model(out, verify=False)
    (name, arguments), model, rounds = way, base, out.with_name(f"{out.name}-rounds")
    done = [n for n in range(times) if (rounds / str(n) / "model" / "fanbu.json").exists()]
    if done:
        model = open_model(rounds / str(done[-1]) / "model", verify=False)
    for number in range(done[-1] + 1 if done else 0, times):
        folder = rounds / str(number)
        before, sent = folder.with_name(str(number - 1)), []
        log(f"{out.name}: inner round {number + 1} of {times}")
        for s in owners:
            place, twist = folder / s.domain.name, (twists or {}).get(s.domain.name)
            if not (place / "sent" / "contribution.json").exists():
                own = replace(context, inner=_inner(number, times, before / s.domain.name, place, before))
                update = method(name).contribute(s, model, own, **arguments)
                cross(twist(number, update, model) if twist else update, s.domain.share, place / "sent")
            sent.append(open_contribution(place / "sent"))
        centre = replace(context, inner=_inner(number, times, before, folder, before))
        place = out if number == times - 1 else folder / "model"
        model = made(place, partial(_absorb, name, model, sent, centre, arguments))
        if number:  # of the one before nothing is needed any more
            shutil.rmtree(before)
    shutil.rmtree(rounds)
    return model


def _inner(number: int, times: int, before: Path, after: Path, centre: Path) -> Inner:
    states = [p if p.is_dir() else None for p in (before / "state", centre / "said")]
    return Inner(number, states[0], after / "state", states[1], after / "said", of=times)


def _absorb(name: str, model: Model, sent: Any, context: Context, arguments: Mapping[str, Any], out: Path) -> Model:
    return method(name).absorb(model, sent, out, context, **arguments)
