"""Contributions of features to a margin: path-dependent TreeSHAP, as XGBoost's pred_contribs defines it. Called by gateway/explain.py.

Lundberg and others, "From local explanations to global understanding with explainable AI for trees" (2020). A leaf's part in a row's
contributions depends only on which of the conditions on its path the row meets. A path has at most as many features as the tree is deep,
so the contributions of all 2^m cases are worked out once, at load, and looked up for each row (Yang, "Fast TreeSHAP", 2021, version 2).
Its slow twins are `contributions_by_definition` in tests/agreement, and XGBoost itself.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from gateway.kernels.compiled import compiled
from gateway.kernels.intake import Floats, Int64s

Int32s = npt.NDArray[np.int32]
Float32s = npt.NDArray[np.float32]
# Distinct features on one path: as many bits has a case.
PATH_FEATURES_MAX = 16


@compiled
def path_features(feature: Int32s, left: Int32s, right: Int32s, parent: Int32s, slot: Int32s, sizes: Int32s) -> int:
    """How the features on the way to each node are numbered: `slot` of a split is the number of its feature among the different ones above
    and at it, `sizes` of a node how many those above it are. `parent` gets each node's. Returns the largest size, or -1 once one is
    above PATH_FEATURES_MAX. Parents stand before their children.
    """
    nodes = len(feature)
    largest = 0
    for n in range(nodes):
        parent[n] = -1
        sizes[n] = 0
    for n in range(nodes):
        if feature[n] < 0:
            slot[n] = -1
            continue
        found = sizes[n]
        above = parent[n]
        while above >= 0:
            if feature[above] == feature[n]:
                found = slot[above]
            above = parent[above]
        slot[n] = found
        size = max(sizes[n], found + 1)
        if size > PATH_FEATURES_MAX:
            return -1
        largest = max(largest, size)
        for child in (left[n], right[n]):
            parent[child] = n
            sizes[child] = size
    return largest


@compiled
def leaf_paths(
    feature: Int32s,
    left: Int32s,
    right: Int32s,
    cover: Float32s,
    parent: Int32s,
    slot: Int32s,
    sizes: Int32s,
    path_at: Int64s,
    path_feature: Int32s,
    path_share: Floats,
) -> None:
    """For each leaf n, from `path_at[n]` on, the features of its path and the share of the training rows, among those that came to its
    splits by that feature, that went the leaf's way. Shares of a split's two ways add up to 1.
    """
    for n in range(len(feature)):
        if feature[n] >= 0:
            continue
        start = path_at[n]
        for k in range(sizes[n]):
            path_share[start + k] = 1.0
        child, above = n, parent[n]
        while above >= 0:
            k = start + slot[above]
            path_feature[k] = feature[above]
            both = np.float64(cover[left[above]]) + np.float64(cover[right[above]])
            path_share[k] *= np.float64(cover[child]) / both
            child, above = above, parent[above]


@compiled
def leaf_contributions(
    value: float, share: Floats, start: int, m: int, case: int, weights: Floats, poly: Floats, out: Floats
) -> None:
    """Shapley values of the m features of a path, from `share[start]` on, for a leaf of `value`, into `out` (m,).

    Bit k of `case` says whether the row meets the path's conditions on feature k. A coalition that doesn't know feature k takes its
    share instead. `weights` (m,): of coalitions of 0..m - 1 others. `poly` is scratch of m + 1: the sums over coalitions of each size.
    """
    for j in range(m):
        for k in range(m):
            poly[k] = 0.0
        poly[0] = 1.0
        size = 0
        for k in range(m):
            if k == j:
                continue
            z = share[start + k]
            met = np.float64((case >> k) & 1)
            for i in range(size + 1, 0, -1):
                poly[i] = poly[i] * z + poly[i - 1] * met
            poly[0] *= z
            size += 1
        total = 0.0
        for k in range(m):
            total += weights[k] * poly[k]
        out[j] = value * (np.float64((case >> j) & 1) - share[start + j]) * total


@compiled
def fill_tables(
    feature: Int32s,
    value: Float32s,
    sizes: Int32s,
    path_at: Int64s,
    path_share: Floats,
    weights: Floats,
    table_at: Int64s,
    table: Float32s,
) -> None:
    """For each leaf n, from `table_at[n]` on, its contributions in each of its 2^m cases. `weights` (sizes, sizes): by m, by others."""
    scratch = np.empty(PATH_FEATURES_MAX + 1)
    out = np.empty(PATH_FEATURES_MAX)
    for n in range(len(feature)):
        if feature[n] >= 0:
            continue
        m = sizes[n]
        at = table_at[n]
        for case in range(1 << m):
            leaf_contributions(value[n], path_share, path_at[n], m, case, weights[m], scratch, out)
            for k in range(m):
                table[at + k] = out[k]
            at += m


@compiled
def contributions(
    rows: Float32s,
    tree_starts: Int32s,
    feature: Int32s,
    threshold: Float32s,
    left: Int32s,
    right: Int32s,
    missing_left: npt.NDArray[np.bool_],
    value: Float32s,
    slot: Int32s,
    sizes: Int32s,
    path_at: Int64s,
    path_feature: Int32s,
    path_share: Floats,
    weights: Floats,
    table_at: Int64s,
    table: Float32s,
    out: Floats,
) -> None:
    """Adds to `out` (rows, features) what each feature contributes to the margin of each of `rows` (rows, features).

    `table` may be empty: then each leaf is worked out anew. A tree is asked for all rows in turn, so that its tables stay near.
    """
    tabled = len(table) > 0
    scratch = np.empty(PATH_FEATURES_MAX + 1)
    of_leaf = np.empty(PATH_FEATURES_MAX)
    largest = 0
    for t in range(len(tree_starts) - 1):
        largest = max(largest, tree_starts[t + 1] - tree_starts[t])
    # By node of the tree at hand: the case, which of the conditions above it the row meets.
    met = np.empty(largest, np.int32)
    for t in range(len(tree_starts) - 1):
        start = tree_starts[t]
        for r in range(len(rows)):
            met[0] = (1 << PATH_FEATURES_MAX) - 1
            for n in range(start, tree_starts[t + 1]):
                case = met[n - start]
                f = feature[n]
                if f >= 0:
                    x = rows[r, f]
                    goes_left = missing_left[n] if np.isnan(x) else x < threshold[n]
                    without = case & ~(1 << slot[n])
                    met[left[n] - start] = case if goes_left else without
                    met[right[n] - start] = without if goes_left else case
                    continue
                m = sizes[n]
                case &= (1 << m) - 1
                path = path_at[n]
                if tabled:
                    at = table_at[n] + case * m
                    for k in range(m):
                        out[r, path_feature[path + k]] += table[at + k]
                else:
                    leaf_contributions(value[n], path_share, path, m, case, weights[m], scratch, of_leaf)
                    for k in range(m):
                        out[r, path_feature[path + k]] += of_leaf[k]


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
