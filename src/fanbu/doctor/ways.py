"""Every way back against a recipe's domains: whether it fits, why not, and what would make it fit."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

from fanbu.catalogue import Method, method, methods
from fanbu.domain import Domain
from fanbu.errors import BoundaryError, FitError
from fanbu.plan import refusal, unjudged, usual
from fanbu.recipe import Recipe
from fanbu.recipe_parts import PublicTexts, Step

_MOST = 4  # changes at once that are tried


@dataclass(frozen=True)
class _Setup:
    """What a way back would work with."""

    recipe: Recipe
    domains: tuple[Domain, ...]
    step: Step

    @property
    def refusal(self) -> FitError | BoundaryError | None:
        """Why the way does not fit, or no round can be made; None where one can."""
        return refusal(self.step, self.recipe, self.domains) or unjudged(self.recipe, self.domains)

    def sharing(self, who: Callable[[Domain], bool], **more: Any) -> _Setup:
        """With more that these domains share."""
        grown = (replace(d, share=replace(d.share, **more)) if who(d) else d for d in self.domains)
        return replace(self, domains=tuple(grown))


_Change = tuple[str, Callable[[_Setup], _Setup]]


def ways(recipe: Recipe, domains: Mapping[str, Domain]) -> list[dict[str, Any]]:
    """Every way back as plain values: ``fits``, ``why`` it does not, what it ``would`` take, and whether the recipe has
    chosen it. Each is taken as it usually is (``plan.usual``)."""
    found = []
    for way in methods():
        if way.family == "shrink":
            continue
        chosen = any(step.method == way.name for step in recipe.feedback)
        setup = _Setup(recipe, tuple(domains.values()), usual(way.name, recipe))
        reason = setup.refusal
        found.append({
            "name": way.name, "family": way.family, "chosen": chosen, "experimental": way.experimental,
            "fits": reason is None, "code": reason and reason.code, "why": reason.what if reason else "",
            "would": would_fit(way, setup) if reason else "",
        })  # fmt: skip
    return found


def would_fit(way: Method, setup: _Setup) -> str:
    """The fewest changes after which the way fits, in words, with all choices; the remedy of its refusal where none of
    them helps."""
    known = list(_changes(way, setup))
    for count in range(1, min(len(known), _MOST) + 1):
        found = [chosen for chosen in combinations(known, count) if _changed(setup, chosen).refusal is None]
        if found:
            return "; or ".join(", and ".join(said for said, _ in chosen) for chosen in found)
    return setup.refusal.remedy if setup.refusal else ""


def _changed(setup: _Setup, chosen: Sequence[_Change]) -> _Setup:
    for _, change in chosen:
        setup = change(setup)
    return setup


def _changes(way: Method, setup: _Setup) -> Iterator[_Change]:
    """What a person could change for this way, with what it does."""
    needs = way.needs_with(setup.step.arguments)
    feeding = [d for d in setup.domains if d.role == "feeds"]

    def of(lacking: Callable[[Domain], bool]) -> str:
        return ", ".join(d.name for d in feeding if lacking(d))

    if needs.probe:
        yield from _texts_to_ask(setup)
    if any(d.share.together for d in feeding):
        yield "it had secure: true", lambda s: replace(s, step=s.step.model_copy(update={"secure": True}))
    for step in dict.fromkeys(s.method for s in setup.recipe.shrink if method(s.method, "shrink").code.CHANGES):
        yield f"specialists grew without {step}", _without(step)
    for kind in dict.fromkeys((needs.kind, "scores", "statistics", *(["samples"] if needs.probe else []))):
        if who := of(_lacking(kind)):
            yield f"{who} shared {kind}", _sharing_kind(kind)
    if who := of(lambda d: not d.share.texts):
        yield f"{who} shared texts", lambda s: s.sharing(lambda d: d.role == "feeds", texts=True)
    if who := of(lambda d: not d.share.labels):
        yield f"{who} shared labels", lambda s: s.sharing(lambda d: d.role == "feeds", labels=True)
    if who := of(lambda d: d.share.private):
        yield f"{who} were not private", lambda s: s.sharing(lambda d: d.role == "feeds", private=False)


def _lacking(kind: str) -> Callable[[Domain], bool]:
    return lambda d: kind not in d.share.kinds


def _sharing_kind(kind: str) -> Callable[[_Setup], _Setup]:
    def change(s: _Setup) -> _Setup:
        grown = (replace(d, share=replace(d.share, kinds=d.share.kinds | {kind})) for d in s.domains)
        return replace(s, domains=tuple(grown))

    return change


def _texts_to_ask(setup: _Setup) -> Iterator[_Change]:
    """A probe set, where there is none."""
    probe = setup.recipe.probe
    if not probe.domains:
        yield "owners' texts joined the probe set (probe.domains: true)", _probing(domains=True)
    if not probe.synthetic and any(d.share.synthetic for d in setup.domains if d.role == "feeds"):
        yield "owners made texts up (probe.synthetic)", _probing(synthetic=1000)
    if not probe.public:
        yield "there were public texts (probe.public)", _probing(public=[PublicTexts(path="public.jsonl")])


def _probing(**more: Any) -> Callable[[_Setup], _Setup]:
    def change(s: _Setup) -> _Setup:
        probe = s.recipe.probe.model_copy(update=more)
        return replace(s, recipe=s.recipe.model_copy(update={"probe": probe}))

    return change


def _without(name: str) -> Callable[[_Setup], _Setup]:
    def change(s: _Setup) -> _Setup:
        kept: Sequence[Step] = [step for step in s.recipe.shrink if step.method != name]
        return replace(s, recipe=s.recipe.model_copy(update={"shrink": kept}))

    return change
