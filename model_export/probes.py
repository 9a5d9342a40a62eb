"""Rows made to tell two implementations of the same trees apart: values at each split, missing values and extremes.

Called by the export's checks. A split at 0.30000001 that an export rounds to 0.3 differs on no row of ordinary data, but does
on a row that reaches the split with a value between the two; so the rows are built by walking down the trees.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import xgboost

from model_export.dataset import Floats

LARGEST = np.finfo(np.float32).max
# Probes are built for at most this many splits, spread evenly over the trees. 4 rows a split.
PROBED_SPLITS_MAX = 20_000
BELOW, AT, ABOVE, MISSING = range(4)
PROBES_A_SPLIT = 4


@dataclass(frozen=True)
class Tree:
    """Arrays of (nodes,), as XGBoost stores them: `left` is -1 at a leaf; a value under `threshold` goes left."""

    left: npt.NDArray[np.int32]
    right: npt.NDArray[np.int32]
    feature: npt.NDArray[np.int32]
    threshold: npt.NDArray[np.float32]


def trees_of(booster: xgboost.Booster) -> list[Tree]:
    """The booster's trees with the exact float32 thresholds."""
    model = json.loads(booster.save_raw("json"))["learner"]["gradient_booster"]["model"]
    return [
        Tree(
            left=np.array(t["left_children"], np.int32),
            right=np.array(t["right_children"], np.int32),
            feature=np.array(t["split_indices"], np.int32),
            threshold=np.array(t["split_conditions"], np.float32),
        )
        for t in model["trees"]
    ]


def split_probes(trees: list[Tree], base: Floats, splits_max: int = PROBED_SPLITS_MAX) -> Floats:
    """Rows that reach each split with the value just below its threshold, at it, just above it, and missing.

    What a path leaves open is taken from `base`, (rows, features). Returns (4 * splits, features); when there are more than
    `splits_max` splits, every second, third ... of them.
    """
    paths = [path for tree in trees for path in _paths(tree)]
    stride = -(-len(paths) // splits_max) if paths else 1
    chosen = paths[::stride]
    rows = np.repeat(base[np.arange(len(chosen)) % len(base)], PROBES_A_SPLIT, axis=0)
    for i, (conditions, feature, threshold) in enumerate(chosen):
        probe = rows[PROBES_A_SPLIT * i : PROBES_A_SPLIT * (i + 1)]
        for on_path, (low, high) in conditions.items():
            # The path asks for low <= value < high.
            probe[:, on_path] = low if np.isfinite(low) else np.nextafter(high, np.float32(-np.inf), dtype=np.float32)
        probe[BELOW, feature] = np.nextafter(threshold, np.float32(-np.inf), dtype=np.float32)
        probe[AT, feature] = threshold
        probe[ABOVE, feature] = np.nextafter(threshold, np.float32(np.inf), dtype=np.float32)
        probe[MISSING, feature] = np.nan
    return rows


Interval = tuple[np.float32, np.float32]


def _paths(tree: Tree) -> list[tuple[dict[int, Interval], int, np.float32]]:
    """For each split of a tree: the interval of each feature that leads to it, its feature and its threshold."""
    anything = (np.float32(-np.inf), np.float32(np.inf))
    found = []
    open_nodes: list[tuple[int, dict[int, Interval]]] = [(0, {})]
    while open_nodes:
        node, conditions = open_nodes.pop()
        if tree.left[node] < 0:
            continue
        feature, threshold = int(tree.feature[node]), tree.threshold[node]
        found.append((conditions, feature, threshold))
        low, high = conditions.get(feature, anything)
        open_nodes.append((int(tree.right[node]), {**conditions, feature: (max(low, threshold), high)}))
        open_nodes.append((int(tree.left[node]), {**conditions, feature: (low, min(high, threshold))}))
    return found


def extreme_rows(base: Floats) -> Floats:
    """Rows of one special value each, alone in every column and in single columns of ordinary rows. (rows, base's features)."""
    features = base.shape[1]
    tiny = np.finfo(np.float32).smallest_subnormal
    special = np.array([np.nan, np.inf, -np.inf, 0.0, -0.0, LARGEST, -LARGEST, tiny, -tiny, 1.0, -1.0], np.float32)
    uniform = np.repeat(special[:, None], features, axis=1)
    single = np.repeat(base[np.arange(features) % len(base)], len(special), axis=0)
    single[np.arange(len(single)), np.repeat(np.arange(features), len(special))] = np.tile(special, features)
    return np.concatenate([uniform, single])
