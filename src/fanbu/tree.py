"""A tree of industries: domains are its leaves, groups of what is alike its inner nodes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fanbu.errors import UsageError

ROOT = "all"
_DEEPEST = 20
_NAMED = 3  # members of a group that was found, in its name


@dataclass(frozen=True)
class Node:
    """A domain (no children), or a group by name."""

    name: str
    children: tuple[Node, ...] = ()

    @property
    def leaves(self) -> list[str]:
        """The domains under it, or its own name."""
        return [leaf for child in self.children for leaf in child.leaves] if self.children else [self.name]

    @property
    def groups(self) -> list[Node]:
        """The inner nodes, itself the last."""
        below = [node for child in self.children for node in child.groups]
        return [*below, self] if self.children else []

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return {"name": self.name, **({"children": [c.as_dict() for c in self.children]} if self.children else {})}


def named(groups: Mapping[str, Any]) -> list[str]:
    """The domains of a recipe's groups, which are lists of domains or groups of their own. UsageError where one stands
    there twice, or a group is neither."""
    placed: list[str] = []

    def visit(name: str, value: Any, depth: int) -> None:
        if depth > _DEEPEST or not isinstance(value, (list, Mapping)) or not value:
            raise UsageError(
                "bad-tree", f"tree: group {name!r}", allowed="a list of domains, or a mapping of groups", got=value,
                remedy="write one of these",
            )  # fmt: skip
        if isinstance(value, Mapping):
            for key, inner in value.items():
                visit(str(key), inner, depth + 1)
        else:
            placed.extend(map(str, value))

    for key, inner in groups.items():
        visit(str(key), inner, 1)
    twice = sorted({name for name in placed if placed.count(name) > 1})
    if twice:
        raise UsageError(
            "bad-tree", "tree: a domain stands in several groups", allowed="each once", got=twice,
            remedy="leave it in one",
        )  # fmt: skip
    return placed


def given(groups: Mapping[str, Any], names: Sequence[str]) -> Node:
    """The tree of a recipe's groups over the domains that are there; those in no group stand under the root."""
    alone = sorted(set(names) - set(named(groups)))

    def grown(name: str, value: Any) -> Node | None:
        if isinstance(value, Mapping):
            return _joined(name, [node for k, v in value.items() if (node := grown(str(k), v))])
        return _joined(name, [Node(str(d)) for d in value if str(d) in names])

    children = [node for k, v in groups.items() if (node := grown(str(k), v))]
    children += map(Node, alone)
    if len(children) == 1 and children[0].children:  # a group of all is the root
        children = list(children[0].children)
    return Node(ROOT, tuple(sorted(children, key=lambda node: node.name)))


def _name(members: Sequence[str]) -> str:
    """What a group that was found is called."""
    shown = "+".join(members[:_NAMED])
    return shown if len(members) <= _NAMED else f"{shown}+{len(members) - _NAMED} more"


def _joined(name: str, children: Sequence[Node]) -> Node | None:
    """A group; what has one child is that child, and what has none is nothing."""
    if len(children) < 2:
        return children[0] if children else None
    return Node(name, tuple(sorted(children, key=lambda node: node.name)))


def clustered(names: Sequence[str], likeness: NDArray[np.float64]) -> Node:
    """Groups of what is alike: average linkage over distances 1 - ``likeness`` [domains, domains], cut where the mean
    silhouette is largest (Rousseeuw 1987); two or three domains have no groups worth a name, and stand under the root.
    """
    from scipy.cluster.hierarchy import fcluster, linkage
    from scipy.spatial.distance import squareform
    from sklearn.metrics import silhouette_score

    if len(names) < 4:
        return Node(ROOT, tuple(Node(name) for name in sorted(names)))
    apart = np.clip(1 - (likeness + likeness.T) / 2, 0.0, None)
    np.fill_diagonal(apart, 0.0)
    links = linkage(squareform(apart, checks=False), "average")
    cuts = [fcluster(links, count, "maxclust") for count in range(2, len(names))]
    cuts = [cut for cut in cuts if 1 < len(set(cut)) < len(names)]
    if not cuts:  # all are equally far from each other
        return Node(ROOT, tuple(Node(name) for name in sorted(names)))
    best = max(cuts, key=lambda cut: (silhouette_score(apart, cut, metric="precomputed"), -len(set(cut))))
    groups: dict[int, list[str]] = {}
    for name, group in zip(names, best, strict=True):
        groups.setdefault(int(group), []).append(name)
    nodes = [_joined(_name(sorted(members)), [Node(m) for m in members]) for members in groups.values()]
    return Node(ROOT, tuple(sorted((n for n in nodes if n), key=lambda node: node.name)))
