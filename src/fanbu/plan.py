"""The plan: what a recipe needs against what its domains share and its methods leave in common, before any training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fanbu.boundary import ADDED
from fanbu.catalogue import Method, method, methods
from fanbu.domain import Domain, is_target
from fanbu.errors import BoundaryError, FitError, UsageError
from fanbu.model import open_model
from fanbu.recipe import Recipe
from fanbu.recipe_parts import Likeness, Step, TreeSpec
from fanbu.tree import named
from fanbu.types import CLASSIFYING


def check_plan(recipe: Recipe, domains: Mapping[str, Domain]) -> None:
    """Raises where a method of the recipe cannot work with these domains; nothing has been trained yet."""
    tasks = {d.task for d in domains.values()}
    if len(tasks) > 1:
        raise UsageError("mixed-tasks", "all domains of a round have one task", got=tasks, remedy="make two recipes")
    for step in recipe.ways:
        reason = refusal(step, recipe, list(domains.values()))
        if reason and step in recipe.feedback:
            raise reason
        if reason:
            raise type(reason)(reason.code, f"reference {step.method}: {reason.what}", remedy=reason.remedy)
    if "tfidf" in recipe.references and tasks != {"text-classification"}:
        raise UsageError("no-tfidf", "references: tfidf is for classifying texts", remedy="leave it out")
    if recipe.probe.written and tasks != {"causal-lm"}:
        raise UsageError(
            "bad-parameter", "probe: written", allowed="0, but for causal models", got=recipe.probe.written,
            remedy="leave it out: a classifier writes no texts",
        )  # fmt: skip
    _check_teachers(recipe)
    if reason := unjudged(recipe, list(domains.values())):
        raise reason


def unjudged(recipe: Recipe, domains: Sequence[Domain]) -> FitError | BoundaryError | None:
    """Why no round can be made with these domains, whatever its way back; None where one can."""
    for d in domains:
        if "scores" not in d.share.kinds or d.share.private:
            return BoundaryError(
                "not-shared", f"the judge needs outcomes that {d.name} does not share",
                allowed="scores among its kinds",
                got=d.share.as_dict(), remedy="share scores; private domains cannot take part in this version",
            )  # fmt: skip
    if any(d.task in CLASSIFYING for d in domains):
        return misfit(method("probe", "feedback"), [], domains, recipe)
    return None


def need_rows_here(recipe: Recipe, what: str) -> None:
    """Raises UsageError where owners hold their rows elsewhere, and ``what`` is asked for depends on them."""
    if recipe.transport.transport().away:
        raise UsageError(
            "owners-elsewhere", f"{what} depends on rows that are at their owners",
            allowed="a recipe whose owners are here", got=recipe.transport.kind,
            remedy="look at it with `fanbu doctor`",
        )  # fmt: skip


TIMES = 6  # inner rounds of a federated way that a recipe only names


def usual(name: str, recipe: Recipe) -> Step:
    """A way back that is only named: with the recipe's own arguments where it is one of the recipe's, else with its
    defaults, and federated ones with so many inner rounds as they live by."""
    own = next((step for step in recipe.feedback if step.method == name), None)
    return own or Step(method=name, times=TIMES if method(name, "feedback").family == "updates" else 1)


def refusal(step: Step, recipe: Recipe, domains: Sequence[Domain]) -> FitError | BoundaryError | None:
    """Why a step of a recipe, a way back, cannot work with these domains; None where it can."""
    way = method(step.method, "feedback")
    reason = misfit(way, recipe.shrink, domains, recipe, step.arguments) or unsummable(way, domains, step)
    return reason or (_untreed(way, step.tree, recipe, domains) if step.tree else None)


_FEWEST = 32  # texts whose mean may cross where none of them may
_OF_TREE = {"weights": "weights", "texts": "statistics", "answers": "predictions"}  # the kind that crosses


def _untreed(way: Method, tree: TreeSpec, recipe: Recipe, domains: Sequence[Domain]) -> FitError | BoundaryError | None:
    """Why a way back cannot be taken along this tree; None where it can. UsageError where it is none."""
    feeding = [d for d in domains if d.role == "feeds"]
    unknown = sorted(set(named(tree.groups)) - set(recipe.domains))
    if unknown:
        raise UsageError(
            "bad-tree", "tree: domains that the recipe does not have", allowed=sorted(recipe.domains), got=unknown,
            remedy="name these, or leave them out",
        )  # fmt: skip
    if not way.needs.specialist:
        known = sorted(m.name for m in methods() if m.family != "shrink" and m.needs.specialist)
        return FitError(
            "tree-ignored", f"{way.name} sends what owners' rows say, and nothing of what a group made", allowed=known,
            got=way.name, remedy="leave the tree out, or take one of these",
        )  # fmt: skip
    if recipe.transport.transport().away:
        return FitError(
            "tree-elsewhere", "a tree is followed where all owners are here", allowed="transport: local or ray",
            got=recipe.transport.kind, remedy="leave the tree out",
        )  # fmt: skip
    if tree.shrinkage or tree.by == "weights":
        for step in recipe.shrink:
            if method(step.method, "shrink").code.CHANGES:
                return FitError(
                    "other-architecture", f"a tree with shrinkage, or by weights, needs the base's architecture; "
                    f"{step.method} changes it", remedy="set tree.shrinkage to 0, and take texts or answers",
                )  # fmt: skip
    if tree.by in ("answers", "texts") and feeding[0].task not in CLASSIFYING:
        return FitError(
            "other-task", f"a tree by {tree.by} is for classifiers", allowed="by: weights, or groups", got=tree.by,
            remedy="take one of these",
        )  # fmt: skip
    if tree.by == "answers" and (unasked := _unprobed("a tree by answers", recipe, feeding)):
        return unasked
    return next((reason for d in feeding if tree.by and (reason := _unlike(tree.by, d))), None)


def _unlike(by: Likeness, d: Domain) -> BoundaryError | None:
    """Why a domain cannot be compared by this; None where it can."""
    kind, why = _OF_TREE[by], ""
    if kind not in d.share.kinds:
        why = f"needs {kind}, which {d.name} does not share"
    elif d.share.together and kind in ADDED:
        why = f"needs {kind} of single owners, and {d.name} shares them in sums alone"
    elif by == "texts" and not d.share.texts and len(d.train) + len(d.unlabelled) < _FEWEST:
        why = f"needs the mean over {_FEWEST} texts, and {d.name} has fewer, of which it shares none"
    if not why:
        return None
    return BoundaryError(
        "not-shared", f"a tree by {by} {why}", allowed=d.share.as_dict(),
        remedy="give the groups, or compare domains by what they share",
    )  # fmt: skip


def unsummable(way: Method, domains: Sequence[Domain], step: Step) -> FitError | BoundaryError | None:
    """Why a way back cannot work on a masked sum, where it is to (``secure``), or owners share nothing else; None where
    it can."""
    feeding = [d for d in domains if d.role == "feeds"]
    least = max((d.share.together for d in feeding), default=0)
    if step.noise is not None and (reason := _without_noise(way, step)):
        return reason
    if not step.secure:
        if not (least and way.needs.kind in ADDED and (way.code.LINEAR or way.needs.kind != "statistics")):
            return None
        return BoundaryError(
            "not-shared", f"{way.name} sends {way.needs.kind} of single owners, and some share them in sums alone",
            allowed="secure: true beside it, or another way", got=[d.name for d in feeding if d.share.together],
            remedy="set secure: true",
        )  # fmt: skip
    usual = {name: default for name, (_, default) in way.parameters().items() if name in _EACH}
    other = {k: v for k, v in step.arguments.items() if k in usual and v != usual[k]}
    if not way.code.LINEAR or other:
        linear = sorted(m.name for m in methods() if m.family != "shrink" and m.code.LINEAR)
        return FitError(
            "not-linear", f"{way.name} looks at what each owner sent, and a secure sum shows none of it",
            allowed=linear, got=other or way.name,
            remedy="leave secure out, or take one of these, without these arguments",
        )  # fmt: skip
    if len(feeding) < max(2, least):
        return BoundaryError(
            "not-shared", "too few owners for a secure sum", allowed=f"{max(2, least)} at least", got=len(feeding),
            remedy="let more owners take part, or lower `share.together` with its owner's consent",
        )  # fmt: skip
    return None


def _without_noise(way: Method, step: Step) -> FitError | None:
    """Why noise hides no owner in what a way sends; None where it does."""
    if way.code.SENSITIVITY is None or not (step.noise and step.noise.epsilon):
        known = sorted(m.name for m in methods() if m.family != "shrink" and m.code.SENSITIVITY is not None)
        return FitError(
            "no-sensitivity", f"{way.name} has no form with noise of a whole owner", allowed=known,
            got=step.noise and vars(step.noise),
            remedy="leave noise out, or take one of these, with an epsilon above 0",
        )  # fmt: skip
    learns = way.check(step.arguments).get("learns")
    if learns and (learns.privacy.epsilon or learns.store != "exact"):
        return FitError(
            "no-sensitivity", f"{way.name}: noise of a whole owner is added to exact numbers without other noise",
            allowed="learns without privacy and store", got=step.arguments["learns"], remedy="leave these out",
        )  # fmt: skip
    if step.secure and way.own("absorb", step.arguments).get("by_rows"):
        return FitError(
            "no-sensitivity", f"{way.name}: owners count alike in a secure sum with noise",
            allowed="by_rows: false", got=True, remedy="set by_rows: false",
        )  # fmt: skip
    return None


_EACH = {"aggregate", "clip", "weights"}  # arguments that say what is made of single contributions


def _check_teachers(recipe: Recipe) -> None:
    """A way down that learns from a model needs one that is there: named, or made by a step before."""
    for number, step in enumerate(recipe.shrink):
        if "teacher" in method(step.method, "shrink").parameters():
            named = step.arguments.get("teacher")
            if named:
                open_model(named)
            elif not number:
                raise UsageError(
                    "no-teacher", f"{step.method} is the first way down and names no teacher", allowed="a model folder",
                    got=named, remedy="name one under `teacher`, or let finetune go before",
                )  # fmt: skip


def misfit(
    way: Method,
    shrink: Sequence[Step],
    domains: Sequence[Domain],
    recipe: Recipe,
    arguments: Mapping[str, Any] | None = None,
) -> FitError | BoundaryError | None:
    """Why a way back does not fit; None where it does."""
    needs = way.needs_with(arguments or {})
    feeding = [d for d in domains if d.role == "feeds"]
    for d in feeding:
        if d.task not in needs.tasks:
            return FitError(
                "other-task", f"{way.name} does not know {d.task}", allowed=needs.tasks, remedy="take another way"
            )
        refused: list[str] = [needs.kind] if needs.kind not in d.share.kinds else []
        refused += ["texts"] if needs.texts and not d.share.texts else []
        refused += ["labels"] if needs.labels and d.task != "causal-lm" and not d.share.labels else []
        if d.share.private and way.code.SENSITIVITY is None:
            refused += [f"anything without a privacy cost ({way.name} adds no noise)"]
        if refused:
            return BoundaryError(
                "not-shared", f"{way.name} needs what {d.name} does not share: {', '.join(refused)}",
                allowed=d.share.as_dict(), remedy="choose another way, or widen `share` with the owner's consent",
            )  # fmt: skip
    if needs.most is not None and len(feeding) > needs.most:
        return FitError(
            "too-many", f"{way.name} takes {needs.most} specialists at most", allowed=needs.most, got=len(feeding),
            remedy="take another way, or let fewer domains feed",
        )  # fmt: skip
    for step in shrink:
        changes = method(step.method, "shrink").code.CHANGES
        if needs.same_architecture and changes:
            return FitError(
                "other-architecture", f"{way.name} needs the base's architecture; {step.method} changes it",
                remedy="feed back by predictions (distill), or shrink with finetune only",
            )  # fmt: skip
        if "tokenizer" in changes and domains[0].task == "causal-lm" and needs.same_tokenizer:
            return FitError(
                "other-tokenizer", f"{way.name} needs the base's tokenizer; {step.method} changes it",
                remedy="leave that step out",
            )  # fmt: skip
    if needs.probe and (reason := _unprobed(way.name, recipe, feeding)):
        return reason
    if needs.target and not any(is_target(d, feeding) and recipe.probe.from_domain(d.share) for d in domains):
        return FitError(
            "no-target", f"{way.name} needs an owner who has texts and no labels, in an industry that others feed",
            allowed=[f"{i}@..." for i in sorted({d.industry for d in feeding})],
            got=[d.name for d in domains if d.role == "guard"],
            remedy="name it under guards, with its texts under unlabelled and test rows to judge by",
        )  # fmt: skip
    return None


def _unprobed(what: str, recipe: Recipe, feeding: Sequence[Domain]) -> FitError | None:
    if recipe.probe.public or any(recipe.probe.from_domain(d.share) for d in feeding):
        return None
    return FitError(
        "no-probe-set", f"{what} needs a probe set, and no domain shares texts",
        remedy="name public texts under probe.public, or a number of texts under probe.synthetic",
    )  # fmt: skip
