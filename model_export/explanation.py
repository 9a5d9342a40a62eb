"""The explanation of a booster: its trees as arrays that the gateway can explain scores from without XGBoost.

Called by `model_export.export`; takes a few milliseconds.
"""

from __future__ import annotations

import json
import math
import warnings
from typing import Any

import numpy as np
import numpy.typing as npt
import xgboost

from gateway.contracts.explanation import NO_NODE, UNUSUAL_PERCENTILE, Explanation, encode_explanation
from model_export.dataset import Floats


def explanation_of(booster: xgboost.Booster, golden: Floats, sample: Floats) -> bytes:
    """The file explanation.npz. `golden` (rows, features) are the package's golden rows, `sample` rows of the kind it will score."""
    learner = json.loads(booster.save_raw("json"))["learner"]
    assert learner["objective"]["name"] == "binary:logistic", "a margin is the log odds"
    assert learner["gradient_booster"]["name"] == "gbtree"
    trees = learner["gradient_booster"]["model"]["trees"]
    assert all(not any(t["split_type"]) for t in trees), "no splits by category"
    orders = [_parents_first(t) for t in trees]
    starts = np.cumsum([0, *map(len, orders)])
    parts = [_tree(t, order, start) for t, order, start in zip(trees, orders, starts[:-1].tolist(), strict=True)]
    joined = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    with warnings.catch_warnings():
        # Of a feature that was never known nothing is usual.
        warnings.filterwarnings("ignore", message="All-NaN slice encountered", category=RuntimeWarning)
        finite = np.where(np.isfinite(sample), sample, np.nan)
        median, unusual = np.nanpercentile(finite, [50, UNUSUAL_PERCENTILE], axis=0).astype(np.float32)
    return encode_explanation(
        Explanation(
            **joined,
            tree_starts=starts.astype(np.int32),
            base_margin=np.array([_base_margin(learner["learner_model_param"]["base_score"])]),
            golden_margin=margins(booster, golden),
            median=median,
            unusual=unusual,
        )
    )


def margins(booster: xgboost.Booster, rows: Floats) -> npt.NDArray[np.float32]:
    """The log odds of fraud, (rows,), from XGBoost itself."""
    return np.asarray(booster.inplace_predict(rows, missing=np.nan, predict_type="margin"), np.float32)


def _base_margin(base_score: str) -> float:
    """XGBoost keeps the probability as a text, in brackets since 3.1, and a float32 of it inside."""
    p = float(np.float32(base_score.strip("[]")))
    return math.log(p / (1 - p))


def _parents_first(tree: dict[str, Any]) -> list[int]:
    """The nodes that can be reached, each behind its parent. XGBoost keeps pruned ones as well, and numbers of them for others."""
    left, right = tree["left_children"], tree["right_children"]
    order = [0]
    for node in order:
        if left[node] >= 0:
            order += (left[node], right[node])
    return order


def _tree(tree: dict[str, Any], order: list[int], start: int) -> dict[str, npt.NDArray[Any]]:
    """The arrays of one tree whose nodes, in `order`, stand from `start` on."""
    place = np.full(len(tree["left_children"]) + 1, NO_NODE, np.int32)
    place[order] = start + np.arange(len(order))
    left = np.array(tree["left_children"], np.int32)[order]
    right = np.array(tree["right_children"], np.int32)[order]
    leaf = left < 0
    condition = np.array(tree["split_conditions"], np.float32)[order]
    return {
        "feature": np.where(leaf, NO_NODE, np.array(tree["split_indices"], np.int32)[order]).astype(np.int32),
        "threshold": np.where(leaf, np.float32(0), condition),
        "left": place[left],
        "right": place[right],
        "missing_left": np.array(tree["default_left"], bool)[order] & ~leaf,
        # XGBoost keeps a leaf's value where a split has its threshold.
        "value": np.where(leaf, condition, np.float32(0)),
        "cover": np.array(tree["sum_hessian"], np.float32)[order],
    }
