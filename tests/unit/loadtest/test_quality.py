"""Detection quality agrees with scikit-learn."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score

from loadtest.latency import latency_of
from loadtest.quality import average_precision, precision_recall


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]) | st.floats(0, 1), st.booleans()), min_size=1, max_size=60))
def test_average_precision_equals_scikit_learn_with_and_without_ties(rows: list[tuple[float, bool]]) -> None:
    score = np.array([s for s, _ in rows])
    truth = np.array([t for _, t in rows])
    if truth.any():
        assert average_precision(score, truth) == pytest.approx(average_precision_score(truth, score), abs=1e-12)
    else:
        assert math.isnan(average_precision(score, truth))


def test_precision_and_recall_are_unknown_rather_than_zero_without_anything_to_divide_by() -> None:
    flagged, truth = np.array([True, True, False, False]), np.array([True, False, True, False])
    assert precision_recall(flagged, truth) == (0.5, 0.5)
    none = np.zeros(4, bool)
    precision, recall = precision_recall(none, truth)
    assert math.isnan(precision)
    assert recall == 0.0
    assert math.isnan(precision_recall(flagged, none)[1])


def test_latency_is_in_milliseconds_and_unknown_without_decisions() -> None:
    assert latency_of([0.001, 0.002, 0.003]).p50_ms == pytest.approx(2.0)
    assert latency_of([0.001, 0.002, 0.003]).max_ms == pytest.approx(3.0)
    assert math.isnan(latency_of([]).p99_ms)
