"""Why a model gives the scores it gives: contributions of features to the margin, and the reason codes that follow from them.

An `Explainer` is made of the file explanation.npz beside the model and refuses one that isn't the model's. Evaluation holds no lock of
Python and waits for nothing, so it runs in a thread beside the event loop (gateway/explanations/reasons.py); docs/models.md has its cost.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from gateway.contracts.explanation import NO_NODE, Explanation, ExplanationError, check_explanation, decode_explanation
from gateway.contracts.feature_reasons import FEATURE_REASONS, MODEL_REASONS, OPPOSITES
from gateway.contracts.features import FEATURES
from gateway.contracts.reasons import REASONS_MAX, Reason
from gateway.kernels.treeshap import PATH_FEATURES_MAX, STATES, contributions, edges, factors, tree_margins

# Of all trees, evaluated in one call: about 3 ms, after which whoever has a deadline may look at the clock.
NODES_AT_ONCE = 200_000
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

    `rows_at_once` is how many rows one call may have where somebody waits for it.
    """

    def __init__(self, explanation: Explanation) -> None:
        """Raises `ExplanationError` for trees whose paths have too many features."""
        e = self._e = explanation
        nodes = len(e.feature)
        self._earlier, sizes = np.empty(nodes, np.int32), np.empty(nodes, np.int32)
        share, weight = np.empty(nodes), np.empty(nodes)
        longest = int(edges(e.feature, e.left, e.right, e.cover, self._earlier, share, weight, sizes))
        if longest > PATH_FEATURES_MAX:
            raise ExplanationError(f"a path has {longest} different features, at most {PATH_FEATURES_MAX} are allowed")
        # Exact for polynomials of a degree under twice the points; that of a path of m features is m - 1.
        points, weights = np.polynomial.legendre.leggauss(max((longest + 1) // 2, 1))
        self._down, self._up = (np.empty((nodes, STATES, len(points))) for _ in range(2))
        # From [-1, 1] to [0, 1].
        factors(e.feature, e.value, self._earlier, share, (points + 1) / 2, weights / 2, self._down, self._up)
        self.expected = float(e.base_margin[0]) + math.fsum((weight * e.value).tolist())
        self.rows_at_once = max(1, NODES_AT_ONCE // nodes)
        self._sides = _Sides(e.median, e.unusual)

    @property
    def trees(self) -> int:
        return self._e.trees

    @property
    def nodes(self) -> int:
        """Of all trees."""
        return len(self._e.feature)

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
            self._earlier,
            self._down,
            self._up,
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


_OPPOSED: dict[Reason, frozenset[Reason]] = {
    reason: frozenset(other for pair in OPPOSITES if reason in pair for other in pair - {reason}) for reason in MODEL_REASONS
}


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
    """Of contributions by code (n, codes): the largest that raise the score, at most REASONS_MAX, each of REASON_SHARE_MIN or more.

    Of two that contradict each other the larger is named.
    """
    raising = np.maximum(of_reasons, 0.0)
    least = REASON_SHARE_MIN * raising.sum(axis=1)
    # So many can be as large as that.
    largest = np.argsort(-raising, axis=1, kind="stable")[:, : round(1 / REASON_SHARE_MIN)]
    found = []
    for row, values, floor in zip(largest.tolist(), raising, least.tolist(), strict=True):
        codes: list[Reason] = []
        for i in row:
            if len(codes) == REASONS_MAX or values[i] <= 0 or values[i] < floor:
                break
            if _OPPOSED[MODEL_REASONS[i]].isdisjoint(codes):
                codes.append(MODEL_REASONS[i])
        found.append(codes)
    return found


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
    explainer = Explainer(one_split)
    explainer.codes(row)
    explainer.margin(row)
