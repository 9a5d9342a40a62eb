"""Detection quality against the truth: precision, recall, average precision. Exact, in a few lines of numpy."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

Bools = npt.NDArray[np.bool_]


def precision_recall(flagged: Bools, is_fraud: Bools) -> tuple[float, float]:
    """(precision, recall) of `flagged`; NaN where nothing is flagged, or nothing is fraud. Both (payments,)."""
    hits = int((flagged & is_fraud).sum())
    return _share(hits, int(flagged.sum())), _share(hits, int(is_fraud.sum()))


def average_precision(score: npt.NDArray[np.float64], is_fraud: Bools) -> float:
    """Sum over the distinct scores, from the highest, of the precision there times the recall gained. NaN without fraud.

    Ties count as one step, as in scikit-learn's average_precision_score.
    """
    frauds = int(is_fraud.sum())
    if frauds == 0:
        return math.nan
    order = np.argsort(-score, kind="stable")
    last_of_tie = np.append(np.flatnonzero(np.diff(score[order])), len(score) - 1)
    hits = np.cumsum(is_fraud[order])[last_of_tie]
    gained = np.diff(hits, prepend=0) / frauds
    return float((gained * hits / (last_of_tie + 1)).sum())


def _share(part: int, whole: int) -> float:
    return part / whole if whole else math.nan
