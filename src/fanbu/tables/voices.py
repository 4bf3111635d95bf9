"""Whom to believe: weights over voices that a mixture gives, node by node down a forest."""

from __future__ import annotations

import numpy as np

from fanbu.tables.trees import Array, Trees

_LEAST = 1e-3


def weights(likelihood_nv: Array, prior_v: Array, strength: float, steps: int = 15) -> Array:
    """The weights w of a mixture sum_v w_v p_v(y) over rows, with a Dirichlet prior worth ``strength`` rows.

    By expectation and maximisation: r_v = w_v p_v / sum_u w_u p_u, then w = (sum of r + strength prior) /
    (n + strength). Where a likelihood is NaN that row says nothing of the voice: r_v is w_v, and the others share the
    rest.
    """
    w, silent = prior_v.copy(), np.isnan(likelihood_nv)
    said = np.where(silent, 0.0, likelihood_nv)
    for _ in range(steps):
        r = said * w
        apart = np.where(silent, w, 0.0)
        r *= (1 - apart.sum(1, keepdims=True)) / r.sum(1, keepdims=True).clip(1e-300)
        r += apart
        w = (r.sum(0) + strength * prior_v) / (len(likelihood_nv) + strength)
    return w


def weigh_nodes(trees: Trees, x_nf: Array, likelihood_nv: Array, prior_v: Array, strength: float) -> Trees:
    """The trees with weights over voices for values: each node's are fitted to its rows, towards its parent's."""
    likelihood = likelihood_nv.clip(_LEAST)
    first = weights(likelihood, prior_v, strength, 60)
    values = np.tile(first, (len(trees.left), 1))
    for tree, root in enumerate(trees.roots):
        members = {int(root): np.arange(len(x_nf))}
        end = trees.roots[tree + 1] if tree + 1 < len(trees.roots) else len(trees.left)
        for node in range(root, end):  # parents come before their children
            rows, left = members.pop(node), trees.left[node]
            if left == 0:
                continue
            goes = np.asarray(x_nf[rows, trees.feature[node]], np.float32) <= trees.threshold[node]
            for child, some in ((left, rows[goes]), (trees.right[node], rows[~goes])):
                members[int(child)] = some
                values[child] = weights(likelihood[some], values[node], strength) if len(some) else values[node]
    return Trees(trees.left, trees.right, trees.feature, trees.threshold, trees.roots, values)
