"""Contributions of features to a margin: path-dependent TreeSHAP, as XGBoost's pred_contribs defines it.

Called by gateway/explanations/explain.py. Shapley values are an integral (Owen, "Multilinear extensions of games", 1972): if each other
feature is known with probability t, what feature j adds on average over t from 0 to 1. For a leaf of value v it is

    v (o_j - z_j) * integral over t of the product over the path's other features k of (z_k (1 - t) + o_k t)

where o_k says whether the row meets the path's conditions on feature k, and z_k is the share of the training rows that do. That is a
polynomial, which Gauss' quadrature at half as many points as its degree integrates exactly. Products are carried down the tree, sums over
leaves up again, so a row costs a few multiplications a node and point, and no tables of cases (as in "Linear TreeSHAP", Yu and others,
2022). Its slow twins are `contributions_by_definition` in tests/agreement, and XGBoost itself.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from gateway.kernels.compiled import allocating, compiled
from gateway.kernels.intake import Floats

Int32s = npt.NDArray[np.int32]
Float32s = npt.NDArray[np.float32]
# Different features on one path.
PATH_FEATURES_MAX = 32
# What a row can be to an edge, whose feature may have been asked for above: it meets the conditions there and here, it did above but
# not here, or it didn't above.
MET, FAILED, FAILED_ABOVE = range(3)
STATES = 3


@allocating
def edges(
    feature: Int32s, left: Int32s, right: Int32s, cover: Float32s, earlier: Int32s, share: Floats, weight: Floats, sizes: Int32s
) -> int:
    """What is to be known of the edge to each node from its parent; parents stand before their children.

    `earlier`: the node whose edge was the last above by the same feature, -1: none. `share`: of the training rows that came to the splits
    by this feature on the way, those that went this way. `weight`: the same of all splits. `sizes`: different features on the way.
    Returns the largest of those.
    """
    nodes = len(feature)
    parent = np.full(nodes, -1, np.int32)
    largest = 0
    for n in range(nodes):
        p = parent[n]
        earlier[n] = -1
        if p < 0:
            share[n] = weight[n] = 1.0
            sizes[n] = 0
        else:
            # The edge to a node is by the feature of its parent.
            above = p
            while parent[above] >= 0:
                if feature[parent[above]] == feature[p]:
                    earlier[n] = above
                    break
                above = parent[above]
            ratio = np.float64(cover[n]) / (np.float64(cover[left[p]]) + np.float64(cover[right[p]]))
            weight[n] = weight[p] * ratio
            share[n] = ratio if earlier[n] < 0 else ratio * share[earlier[n]]
            sizes[n] = sizes[p] + 1 if earlier[n] < 0 else sizes[p]
            largest = max(largest, sizes[n])
        if feature[n] >= 0:
            parent[left[n]] = n
            parent[right[n]] = n
    return largest


@compiled
def factors(
    feature: Int32s, value: Float32s, earlier: Int32s, share: Floats, points: Floats, weights: Floats, down: Floats, up: Floats
) -> None:
    """By node, state and point, what its edge multiplies a product by on the way `down`, a leaf's value included, and what it takes of the
    sum that comes `up`: its feature's part by the conditions so far, less that by the conditions above. Both (nodes, STATES, points).
    """
    for n in range(len(feature)):
        here = share[n]
        above = share[earlier[n]] if earlier[n] >= 0 else 1.0
        for state in range(STATES):
            met = 1.0 if state == MET else 0.0
            met_above = 0.0 if state == FAILED_ABOVE else 1.0
            for q in range(len(points)):
                t = points[q]
                factor = here * (1 - t) + met * t
                factor_above = above * (1 - t) + met_above * t
                down[n, state, q] = factor / factor_above * (value[n] if feature[n] < 0 else 1.0)
                up[n, state, q] = weights[q] * ((met - here) / factor - (met_above - above) / factor_above)


@allocating
def contributions(
    rows: Float32s,
    tree_starts: Int32s,
    feature: Int32s,
    threshold: Float32s,
    left: Int32s,
    right: Int32s,
    missing_left: npt.NDArray[np.bool_],
    earlier: Int32s,
    down: Floats,
    up: Floats,
    out: Floats,
) -> None:
    """Adds to `out` (rows, features) what each feature contributes to the margin of each of `rows` (rows, features).

    A tree is asked for all rows in turn, so that what is known of it stays near.
    """
    points = down.shape[2]
    largest = 0
    for t in range(len(tree_starts) - 1):
        largest = max(largest, tree_starts[t + 1] - tree_starts[t])
    # By node of the tree at hand: the products of the way to it, then the sum over the leaves below.
    product = np.empty((largest, points))
    state = np.empty(largest, np.int8)
    for t in range(len(tree_starts) - 1):
        start, end = tree_starts[t], tree_starts[t + 1]
        for r in range(len(rows)):
            product[0] = 1.0
            for n in range(start, end):
                f = feature[n]
                if f < 0:
                    continue
                a, b = left[n], right[n]
                x = rows[r, f]
                goes_left = missing_left[n] if np.isnan(x) else x < threshold[n]
                of_a = MET if goes_left else FAILED
                of_b = FAILED if goes_left else MET
                # Both edges are by the same feature, and so is the one above.
                if earlier[a] >= 0 and state[earlier[a] - start] != MET:
                    of_a = of_b = FAILED_ABOVE
                state[a - start] = of_a
                state[b - start] = of_b
                for q in range(points):
                    so_far = product[n - start, q]
                    product[a - start, q] = so_far * down[a, of_a, q]
                    product[b - start, q] = so_far * down[b, of_b, q]
            for n in range(end - 1, start - 1, -1):
                if feature[n] < 0:
                    continue
                a, b = left[n], right[n]
                of_a, of_b = state[a - start], state[b - start]
                total = 0.0
                for q in range(points):
                    sum_a, sum_b = product[a - start, q], product[b - start, q]
                    product[n - start, q] = sum_a + sum_b
                    total += sum_a * up[a, of_a, q] + sum_b * up[b, of_b, q]
                out[r, feature[n]] += total


@compiled
def tree_margins(
    rows: Float32s,
    tree_starts: Int32s,
    feature: Int32s,
    threshold: Float32s,
    left: Int32s,
    right: Int32s,
    missing_left: npt.NDArray[np.bool_],
    value: Float32s,
    out: Floats,
) -> None:
    """Adds to `out` (rows,) the values of the leaves that each row comes to."""
    for r in range(len(rows)):
        for t in range(len(tree_starts) - 1):
            n = tree_starts[t]
            while feature[n] >= 0:
                x = rows[r, feature[n]]
                goes_left = missing_left[n] if np.isnan(x) else x < threshold[n]
                n = left[n] if goes_left else right[n]
            out[r] += value[n]
