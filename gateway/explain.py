"""Why a model gives the scores it gives: contributions of features to the margin, and the reason codes that follow from them.

An `Explainer` is made of the file explanation.npz beside the model and refuses one that isn't the model's. Evaluation holds no lock of
Python and waits for nothing, so it runs in a thread beside the event loop (gateway/reasons.py); docs/models.md has its cost.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from gateway.contracts.explanation import NO_NODE, Explanation, ExplanationError, check_explanation, decode_explanation
from gateway.contracts.feature_reasons import FEATURE_REASONS, MODEL_REASONS
from gateway.contracts.features import FEATURES
from gateway.contracts.reasons import REASONS_MAX, Reason
from gateway.kernels.treeshap import (
    PATH_FEATURES_MAX,
    contributions,
    fill_tables,
    leaf_paths,
    path_features,
    tree_margins,
)

# Of the tables of all leaves' cases. Trees of depth 6 take 25 KB each, so this is for 2,600 of them, or for 600 of depth 7.
TABLES_BYTES_MAX = 64 * 1024 * 1024
# The largest difference between a golden row's margin and the model's, which XGBoost adds up in float32.
MARGIN_TOLERANCE = 1e-4
# A code whose share of what raises the score is smaller is no reason.
REASON_SHARE_MIN = 0.05
assert REASON_SHARE_MIN < 1 / REASONS_MAX

Floats = npt.NDArray[np.float64]
Matrix = npt.NDArray[np.float32]
Bools = npt.NDArray[np.bool_]


class Explainer:
    """Explains one model. `expected` is the margin of a row of which nothing is known: base and the trees' means.

    `fast` tells whether each leaf's cases are tabulated: without, a row takes some hundred times as long, and only requests for an
    explanation are worth that.
    """

    def __init__(self, explanation: Explanation, tables_bytes_max: int = TABLES_BYTES_MAX) -> None:
        """Raises `ExplanationError` for trees whose paths have too many features."""
        e = self._e = explanation
        nodes = len(e.feature)
        parent, slot, sizes = np.empty(nodes, np.int32), np.empty(nodes, np.int32), np.empty(nodes, np.int32)
        longest = int(path_features(e.feature, e.left, e.right, parent, slot, sizes))
        if longest < 0:
            raise ExplanationError(f"a path has more than {PATH_FEATURES_MAX} different features")
        self._slot, self._sizes = slot, sizes
        in_leaf = np.where(e.feature < 0, sizes, 0).astype(np.int64)
        self._path_at = np.concatenate([[0], np.cumsum(in_leaf)[:-1]]).astype(np.int64)
        self._path_feature = np.zeros(int(in_leaf.sum()), np.int32)
        self._path_share = np.ones(int(in_leaf.sum()))
        leaf_paths(e.feature, e.left, e.right, e.cover, parent, slot, sizes, self._path_at, self._path_feature, self._path_share)
        self._weights = _coalition_weights(max(longest, 1))
        entries = np.where(e.feature < 0, in_leaf << in_leaf, 0)
        self._table_at = np.concatenate([[0], np.cumsum(entries)[:-1]]).astype(np.int64)
        self.table_bytes = 4 * int(entries.sum())
        self.fast = self.table_bytes <= tables_bytes_max
        self._table = np.zeros(int(entries.sum()) if self.fast else 0, np.float32)
        if self.fast:
            fill_tables(e.feature, e.value, sizes, self._path_at, self._path_share, self._weights, self._table_at, self._table)
        self.expected = self._expected_margin()
        self._sides = _Sides(e.median, e.unusual)

    @property
    def trees(self) -> int:
        return self._e.trees

    def _expected_margin(self) -> float:
        """Leaves weighted by the share of the training rows that came to them: all shares of each path multiplied."""
        leaf = self._e.feature < 0
        ends = self._path_at + self._sizes
        value = self._e.value.astype(np.float64)
        weighted = [value[n] * math.prod(self._path_share[self._path_at[n] : ends[n]].tolist()) for n in np.flatnonzero(leaf)]
        return float(self._e.base_margin[0]) + math.fsum(weighted)

    def margin(self, matrix: Matrix) -> Floats:
        """The log odds of each row of `matrix` (n, features) that the trees add up to, (n,)."""
        e = self._e
        out = np.full(len(matrix), e.base_margin[0])
        tree_margins(
            np.ascontiguousarray(matrix), e.tree_starts, e.feature, e.threshold, e.left, e.right, e.missing_left, e.value, out
        )
        return out

    def contributions(self, matrix: Matrix) -> Floats:
        """What each feature adds to the margin of each row of `matrix` (n, features): (n, features). With `expected` they add up to it."""
        e = self._e
        out = np.zeros((len(matrix), len(FEATURES)))
        contributions(
            np.ascontiguousarray(matrix),
            e.tree_starts,
            e.feature,
            e.threshold,
            e.left,
            e.right,
            e.missing_left,
            e.value,
            self._slot,
            self._sizes,
            self._path_at,
            self._path_feature,
            self._path_share,
            self._weights,
            self._table_at,
            self._table,
            out,
        )
        return out

    def by_reason(self, matrix: Matrix, of_features: Floats) -> Floats:
        """The contributions `of_features` to the rows of `matrix`, added up by code: (n, len(MODEL_REASONS))."""
        return self._sides.by_reason(matrix, of_features)

    def reason_of(self, row: Matrix) -> list[Reason]:
        """The code that each feature of `row` (features,) counts for."""
        return self._sides.reason_of(row)

    def codes(self, matrix: Matrix) -> list[list[Reason]]:
        """For each row, at most REASONS_MAX codes that raise its score, the largest first; none where nothing does."""
        return leading_codes(self.by_reason(matrix, self.contributions(matrix)))

    def thresholds(self) -> dict[int, Floats]:
        """By column, the values that the trees split at, rising."""
        e = self._e
        split = e.feature >= 0
        return {int(f): np.unique(e.threshold[split & (e.feature == f)].astype(np.float64)) for f in np.unique(e.feature[split])}


class _Sides:
    """contracts.feature_reasons as arrays, with a model's medians."""

    def __init__(self, median: Matrix, unusual: Matrix) -> None:
        """`median` and `unusual` are (features,)."""
        place = {reason: i for i, reason in enumerate(MODEL_REASONS)}
        self._pivot = np.array(
            [m if s.pivot is None else s.pivot for s, m in zip(FEATURE_REASONS, median, strict=True)], np.float64
        )
        self._extreme = np.array([math.inf if s.extreme is None else u for s, u in zip(FEATURE_REASONS, unusual, strict=True)])
        # (sides, features): unknown, below, above, extreme
        self._reason = np.array(
            [[place[r] for r in (s.unknown, s.below, s.above, s.extreme or s.above)] for s in FEATURE_REASONS], np.int64
        ).T
        self._columns = np.arange(len(FEATURES))

    def _places(self, matrix: Matrix) -> npt.NDArray[np.int64]:
        """The place in MODEL_REASONS of each value's code, (n, features)."""
        known = ~np.isnan(matrix)
        above = matrix > self._pivot
        side = known.astype(np.int64) + above + (above & (matrix > self._extreme))
        return self._reason[side, self._columns]

    def by_reason(self, matrix: Matrix, of_features: Floats) -> Floats:
        n, codes = len(matrix), len(MODEL_REASONS)
        flat = (self._places(matrix) + np.arange(n)[:, None] * codes).ravel()
        out: Floats = (
            np.bincount(flat, weights=of_features.ravel(), minlength=n * codes).reshape(n, codes).astype(np.float64, copy=False)
        )
        return out

    def reason_of(self, row: Matrix) -> list[Reason]:
        return [MODEL_REASONS[i] for i in self._places(row[None])[0].tolist()]


def leading_codes(of_reasons: Floats) -> list[list[Reason]]:
    """Of contributions by code (n, codes): the largest that raise the score, at most REASONS_MAX, each of REASON_SHARE_MIN or more."""
    raising = np.maximum(of_reasons, 0.0)
    least = REASON_SHARE_MIN * raising.sum(axis=1)
    largest = np.argsort(-raising, axis=1, kind="stable")[:, :REASONS_MAX]
    return [
        [MODEL_REASONS[i] for i in row if values[i] > 0 and values[i] >= floor]
        for row, values, floor in zip(largest.tolist(), raising, least.tolist(), strict=True)
    ]


def with_model_codes(reasons: Sequence[Reason], codes: Sequence[Reason]) -> list[Reason]:
    """A decision's reasons once its score is explained: those of its rules, most severe first, then the model's codes.

    At most REASONS_MAX, each once. MODEL_SCORE_HIGH stays only where no code took its place.
    """
    if not codes:
        return list(reasons)
    of_rules = [r for r in reasons if r is not Reason.MODEL_SCORE_HIGH]
    return list(dict.fromkeys([*of_rules, *codes]))[:REASONS_MAX]


def load_explainer(content: bytes, golden: Matrix, probability: npt.NDArray[np.floating]) -> Explainer:
    """The explainer of the file's bytes, proved to be the model's on its golden rows and their probabilities.

    Its margins must be those that the training library gave, and must rise with the probabilities, however those were calibrated.
    Raises `ExplanationError`.
    """
    explanation = decode_explanation(content)
    if len(explanation.golden_margin) != len(golden):
        raise ExplanationError(f"it has {len(explanation.golden_margin)} golden margins of {len(golden)} golden rows")
    explainer = Explainer(explanation)
    margin = explainer.margin(golden)
    difference = float(np.max(np.abs(margin - explanation.golden_margin)))
    if not difference <= MARGIN_TOLERANCE:
        raise ExplanationError(f"a golden row's margin differs by {difference:.2g}, at most {MARGIN_TOLERANCE:g} is allowed")
    order = np.argsort(margin, kind="stable")
    # Where the margin rises by more than rounding, the probability mustn't fall by more than rounding.
    highest = np.maximum.accumulate(probability[order].astype(np.float64))
    fall = float(np.max(highest - probability[order]))
    if not fall <= MARGIN_TOLERANCE:
        raise ExplanationError(f"the model's probability falls by {fall:.2g} while the margin rises: it explains another model")
    return explainer


def warm() -> None:
    """Has the kernels compiled, or loaded from where an earlier run left them."""
    one_split = Explanation(
        tree_starts=np.array([0, 3], np.int32),
        feature=np.array([0, NO_NODE, NO_NODE], np.int32),
        threshold=np.array([1, 0, 0], np.float32),
        left=np.array([1, NO_NODE, NO_NODE], np.int32),
        right=np.array([2, NO_NODE, NO_NODE], np.int32),
        missing_left=np.array([True, False, False]),
        value=np.array([0, -1, 1], np.float32),
        cover=np.array([2, 1, 1], np.float32),
        base_margin=np.zeros(1),
        golden_margin=np.zeros(0, np.float32),
        median=np.zeros(len(FEATURES), np.float32),
        unusual=np.zeros(len(FEATURES), np.float32),
    )
    check_explanation(one_split)
    row = np.zeros((1, len(FEATURES)), np.float32)
    for tables_bytes_max in (TABLES_BYTES_MAX, 0):
        explainer = Explainer(one_split, tables_bytes_max)
        explainer.codes(row)
        explainer.margin(row)


def _coalition_weights(longest: int) -> Floats:
    """(longest + 1, longest): k! (m - 1 - k)! / m! for a path of m features and coalitions of k others."""
    out = np.zeros((longest + 1, longest))
    for m in range(1, longest + 1):
        for k in range(m):
            out[m, k] = math.factorial(k) * math.factorial(m - 1 - k) / math.factorial(m)
    return out
