"""A way back along a tree of industries: from the leaves up, and down again.

At each group the way is taken with what its members made alone, so that what is alike is fed back together before what
is not. What a group made speaks for each of its domains one level up, by that domain's label rows. With shrinkage s
(in rows), each model is then drawn towards its parent's, theta~ = (n theta + s theta~_parent) / (n + s) with the n
rows under it, from the root down to the specialists; and these are fed back once more. Few rows lean on their
relatives; many stand for themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from fanbu.domain import Domain, Specialist
from fanbu.errors import FitError
from fanbu.heads import get_head, set_head
from fanbu.likeness import likeness
from fanbu.model import Model, copy_model, load_network, load_tokenizer, provenance, said_anew, save_network
from fanbu.recipe_parts import Step
from fanbu.tree import Node, clustered, given
from fanbu.turn import Turn
from fanbu.types import Context

_MODULE = "fanbu.hierarchy"
Feed = Callable[[Turn, Step, Sequence[Specialist], Model, str], Model]
Known = Mapping[str, Specialist]  # by domain


def along(turn: Turn, step: Step, specialists: Sequence[Specialist], base: Model, name: str, feed: Feed) -> Model:
    """The large model, whose manifest tells the tree. Where it has no groups, this is the way without it."""
    assert step.tree
    plain, leaves = step.model_copy(update={"tree": None}), {s.domain.name: s for s in specialists}
    told: dict[str, object] = {"shrinkage": step.tree.shrinkage}
    if step.tree.by:
        matrix = likeness(turn, step.tree.by, specialists, base)
        tree = clustered([*leaves], matrix)
        told |= {"by": step.tree.by, "domains": [*leaves], "likeness": [[round(v, 6) for v in row] for row in matrix]}
    else:
        tree = given(step.tree.groups, [*leaves])
    models: dict[tuple[str, ...], Model] = {}  # by the domains under a group

    def up(node: Node, known: Known) -> list[Specialist]:
        """What speaks for each domain under a node."""
        if not node.children:
            return [known[node.name]]
        parts = [s for child in node.children for s in up(child, known)]
        model = models[tuple(node.leaves)] = feed(
            turn, plain, parts, base, name if node is tree else f"{name} {node.name}"
        )
        if node is tree:
            return []
        return [Specialist(_part(turn, model, s.domain), s.domain, base) for s in parts]

    up(tree, leaves)
    if step.tree.shrinkage:
        up(tree, dict(_drawn(turn, tree, models, leaves, step.tree.shrinkage)))
    made = models[tuple(tree.leaves)]
    inputs = {"model": made.digest, "tree": tree.as_dict(), "told": told}

    def tell(out: Path, context: Context) -> Model:
        copied = copy_model(made, out)
        if copied.digest == base.digest:
            return copied
        return said_anew(copied, {"parameters": {**made.manifest["parameters"], "tree": {**told, **tree.as_dict()}}})

    return turn.model(f"{name} tree", _MODULE, inputs, tell)


def _part(turn: Turn, model: Model, d: Domain) -> Model:
    """A group's model with the label rows of one domain alone."""
    if d.task == "causal-lm":
        return model

    def make(out: Path, context: Context) -> Model:
        network = load_network(model)
        set_head(network, get_head(network).take(d.full_labels))
        return save_network(network, load_tokenizer(model), out, provenance("part", [model], context, domain=d.name))

    return turn.model(f"part {d.name}", _MODULE, {"model": model.digest, "labels": list(d.full_labels)}, make)


def _drawn(
    turn: Turn, tree: Node, models: Mapping[tuple[str, ...], Model], leaves: Known, shrinkage: float
) -> list[tuple[str, Specialist]]:
    """The specialists, each drawn towards the groups that it stands in."""

    def down(node: Node, parent: Model | None) -> list[tuple[str, Specialist]]:
        rows = sum(len(leaves[leaf].domain.train) for leaf in node.leaves)
        if not node.children:
            assert parent
            [(_, s)] = turn.at_owners(drawn, [(leaves[node.name], parent, rows, shrinkage)])
            return [(node.name, s)]
        own = models[tuple(node.leaves)]
        own = own if parent is None else _between(turn, own, parent, rows, shrinkage, node.name, None)
        return [found for child in node.children for found in down(child, own)]

    return down(tree, None)


def drawn(turn: Turn, s: Specialist, parent: Model, rows: int, shrinkage: float) -> Specialist:
    """At its owner: a specialist drawn towards the group that it stands in."""
    model = _between(turn, s.model, parent, rows, shrinkage, s.domain.name, s.domain)
    return Specialist(model, s.domain, s.origin)


def _between(
    turn: Turn, own: Model, parent: Model, rows: int, shrinkage: float, name: str, domain: Domain | None
) -> Model:
    """(n theta_own + s theta_parent) / (n + s). FitError where they have other tensors."""
    share = shrinkage / (rows + shrinkage)

    def make(out: Path, context: Context) -> Model:
        network, other = load_network(own), load_network(parent)
        if own.labels:
            set_head(other, get_head(other).take(own.labels))
        mine, theirs = network.state_dict(), other.state_dict()
        if {n: t.shape for n, t in mine.items()} != {n: t.shape for n, t in theirs.items()}:
            raise FitError(
                "other-architecture", f"{name} and its group have other tensors, so it cannot be drawn towards it",
                allowed="shrinkage: 0, or specialists of the large model's architecture", got=str(own.path),
                remedy="set tree.shrinkage to 0",
            )  # fmt: skip
        # made apart from the network: tied tensors have two names, and would move twice in place
        network.load_state_dict({n: t.lerp(theirs[n], share) if t.is_floating_point() else t for n, t in mine.items()})
        made = provenance("shrinkage", [own, parent], context, share=share)
        return save_network(network, load_tokenizer(own), out, made)

    inputs = {"own": own.digest, "parent": parent.digest, "share": share}
    return turn.model(f"shrinkage {name}", _MODULE, inputs, make, domain)
