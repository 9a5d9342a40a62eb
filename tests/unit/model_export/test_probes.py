"""Probes reach the split they are made for, with the value on either side of its threshold."""

from __future__ import annotations

import numpy as np

from model_export.probes import ABOVE, AT, BELOW, MISSING, PROBES_A_SPLIT, Tree, extreme_rows, split_probes, trees_of
from model_export.training import train
from tests.factories_model import make_features, make_training_set


def small_tree() -> Tree:
    """x1 < 0.5 ? (x0 < -2 ? leaf : leaf) : (x1 < 7 ? leaf : leaf)"""
    return Tree(
        left=np.array([1, 3, 5, -1, -1, -1, -1], np.int32),
        right=np.array([2, 4, 6, -1, -1, -1, -1], np.int32),
        feature=np.array([1, 0, 1, 0, 0, 0, 0], np.int32),
        threshold=np.array([0.5, -2.0, 7.0, 0, 0, 0, 0], np.float32),
    )


def leaf_reached(tree: Tree, row: np.ndarray[tuple[int], np.dtype[np.float32]]) -> int:
    node = 0
    while tree.left[node] >= 0:
        node = int(tree.left[node] if row[tree.feature[node]] < tree.threshold[node] else tree.right[node])
    return node


def test_each_split_gets_its_threshold_its_neighbours_and_a_missing_value() -> None:
    probes = split_probes([small_tree()], np.full((1, 3), 100.0, np.float32)).reshape(-1, PROBES_A_SPLIT, 3)
    assert len(probes) == 3
    for probe, (feature, threshold) in zip(probes, [(1, 0.5), (0, -2.0), (1, 7.0)], strict=True):
        assert probe[BELOW, feature] < threshold == probe[AT, feature] < probe[ABOVE, feature]
        assert np.nextafter(probe[BELOW, feature], np.float32(np.inf)) == threshold
        assert np.isnan(probe[MISSING, feature])


def test_a_probe_walks_down_to_its_split() -> None:
    tree = small_tree()
    probes = split_probes([tree], np.full((1, 3), 100.0, np.float32)).reshape(-1, PROBES_A_SPLIT, 3)
    ends = [(leaf_reached(tree, probe[BELOW]), leaf_reached(tree, probe[AT])) for probe in probes[1:]]
    assert ends == [(3, 4), (5, 6)]


def test_every_split_of_a_real_model_is_probed_and_told_apart() -> None:
    data = make_training_set(3000)
    trees = trees_of(train(data, threads=1, rounds_max=20).booster)
    splits = [(tree, node) for tree in trees for node in range(len(tree.left)) if tree.left[node] >= 0]
    probes = split_probes(trees, data.features).reshape(-1, PROBES_A_SPLIT, data.features.shape[1])
    assert len(probes) == len(splits)
    assert sum(any(leaf_reached(t, p[BELOW]) != leaf_reached(t, p[AT]) for t in trees) for p in probes) == len(probes)


def test_no_more_splits_are_probed_than_asked() -> None:
    base = make_features(5)[:, :3]
    assert len(split_probes([small_tree()] * 100, base, splits_max=50)) == 50 * PROBES_A_SPLIT
    assert len(split_probes([], base)) == 0


def test_extremes_stand_alone_and_beside_ordinary_values() -> None:
    base = make_features(5)
    rows = extreme_rows(base)
    assert rows.shape[1] == base.shape[1]
    assert np.isinf(rows).all(axis=1).sum() == 2
    assert (np.isinf(rows).sum(axis=1) == 1).sum() == 2 * base.shape[1]
