"""What the gateway says each feature contributes is what XGBoost says, and what Shapley's definition says, and adds up to the margin."""

from __future__ import annotations

import dataclasses
import itertools
import math

import numpy as np
import numpy.typing as npt
import pytest
import xgboost
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as from_numpy

from gateway.contracts.explanation import Explanation, decode_explanation
from gateway.contracts.features import FEATURE_NAMES
from gateway.contracts.model_meta import EXPLANATION_FILE
from gateway.explanations.explain import Explainer, load_explainer
from model_export.export import export
from model_export.probes import extreme_rows, split_probes, trees_of
from model_export.training import default_params, train
from tests.factories_model import make_features, make_training_set

Floats = npt.NDArray[np.float32]

# What the contributions and the expected margin may miss the margin by.
LOCAL_ACCURACY = 1e-5
# XGBoost adds hundreds of float32 numbers up in float32.
AGREEMENT = 1e-5
LARGEST = np.finfo(np.float32).max


@dataclasses.dataclass(frozen=True)
class Pair:
    """A model as XGBoost explains it and as the gateway does."""

    booster: xgboost.Booster
    explanation: Explanation
    explainer: Explainer


def make_pair(seed: int, rounds_max: int, depth: int = 5) -> Pair:
    data = make_training_set(4000, seed)
    # Splits around zero as well.
    centred = data.features.copy()
    centred[:, 40:] -= np.float32(1.5)
    if depth == 5:
        booster = train(dataclasses.replace(data, features=centred), threads=1, rounds_max=rounds_max).booster
    else:
        # Labels that no rule is behind, so that the trees grow as deep as they may and ask for features again on the way.
        noise = np.random.default_rng(seed).random(len(centred)) < 0.3
        params = default_params(0.3, 1) | {"max_depth": depth, "min_child_weight": 0.1}
        booster = xgboost.train(params, xgboost.QuantileDMatrix(centred, noise), num_boost_round=rounds_max)
    exported = export(booster, centred)
    content = exported.extras[EXPLANATION_FILE]
    loaded = load_explainer(content, exported.golden_features, exported.golden_probability)
    return Pair(booster, decode_explanation(content), loaded)


@pytest.fixture(
    scope="module",
    params=[(1, 1, 5), (2, 60, 5), (3, 400, 5), (4, 12, 8)],
    ids=["one tree", "some trees", "early stopping", "deep"],
)
def pair(request: pytest.FixtureRequest) -> Pair:
    return make_pair(*request.param)


def check(pair: Pair, rows: Floats) -> None:
    # XGBoost refuses infinity there; the largest number lies on the same side of every split.
    data = xgboost.DMatrix(np.clip(rows, -LARGEST, LARGEST))
    expected = pair.booster.predict(data, pred_contribs=True).astype(np.float64)
    margin = pair.booster.predict(data, output_margin=True).astype(np.float64)
    found = pair.explainer.contributions(rows)
    assert np.abs(found - expected[:, :-1]).max() <= AGREEMENT
    assert abs(pair.explainer.expected - expected[0, -1]) <= AGREEMENT
    assert np.abs(found.sum(axis=1) + pair.explainer.expected - margin).max() <= LOCAL_ACCURACY
    assert np.abs(pair.explainer.margin(rows) - margin).max() <= LOCAL_ACCURACY


def test_on_rows_it_has_and_has_not_seen(pair: Pair) -> None:
    for seed in (1, 99):
        check(pair, make_features(500, seed))


def test_on_missing_values(pair: Pair) -> None:
    rows = make_features(len(FEATURE_NAMES) + 1)
    rows[np.arange(len(FEATURE_NAMES)), np.arange(len(FEATURE_NAMES))] = np.nan
    rows[-1] = np.nan
    check(pair, rows)


def test_on_infinities_zeros_and_the_ends_of_float32(pair: Pair) -> None:
    check(pair, extreme_rows(make_features(20)))


def test_next_to_every_split(pair: Pair) -> None:
    check(pair, split_probes(trees_of(pair.booster), make_features(50), splits_max=500))


def test_in_every_batch_size_the_same_bits(pair: Pair) -> None:
    rows = make_features(64, 5)
    whole = pair.explainer.contributions(rows)
    for size in (1, 7):
        parts = [pair.explainer.contributions(rows[i : i + size]) for i in range(0, len(rows), size)]
        assert np.array_equal(np.concatenate(parts), whole)


def test_contributions_add_up_to_the_margin_of_the_probability_that_onnx_gives(pair: Pair) -> None:
    rows = make_features(300, 11)
    p = pair.booster.predict(xgboost.DMatrix(rows)).astype(np.float64)
    odds = 1 / (1 + np.exp(-(pair.explainer.contributions(rows).sum(axis=1) + pair.explainer.expected)))
    assert np.abs(odds - p).max() <= LOCAL_ACCURACY


@pytest.fixture(scope="module")
def one_pair() -> Pair:
    return make_pair(5, 60)


@given(rows=from_numpy.arrays(np.float32, (4, len(FEATURE_NAMES)), elements=st.floats(width=32), fill=st.just(np.float32(np.nan))))
@settings(max_examples=100, deadline=None)
def test_on_anything_that_float32_can_hold(one_pair: Pair, rows: Floats) -> None:
    check(one_pair, rows)


def known_value(e: Explanation, node: int, row: Floats, known: frozenset[int]) -> float:
    """What a tree gives on average to training rows that are like `row` in the features `known`, by TreeSHAP's path-dependent reading."""
    if e.feature[node] < 0:
        return float(e.value[node])
    left, right = int(e.left[node]), int(e.right[node])
    f = int(e.feature[node])
    if f in known:
        goes_left = bool(e.missing_left[node]) if np.isnan(row[f]) else row[f] < e.threshold[node]
        return known_value(e, left if goes_left else right, row, known)
    a, b = float(e.cover[left]), float(e.cover[right])
    return (a * known_value(e, left, row, known) + b * known_value(e, right, row, known)) / (a + b)


def contributions_by_definition(e: Explanation, row: Floats) -> npt.NDArray[np.float64]:
    """Shapley values, (features,), over every coalition of the features of each tree."""
    out = np.zeros(len(FEATURE_NAMES))
    for start, end in itertools.pairwise(e.tree_starts.tolist()):
        players = sorted({int(f) for f in e.feature[start:end] if f >= 0})
        m = len(players)
        for size in range(m):
            weight = math.factorial(size) * math.factorial(m - 1 - size) / math.factorial(m)
            for others in itertools.combinations(players, size):
                without = known_value(e, start, row, frozenset(others))
                for f in set(players) - set(others):
                    out[f] += weight * (known_value(e, start, row, frozenset((*others, f))) - without)
    return out


@pytest.mark.parametrize(
    ("known", "depth"), [(len(FEATURE_NAMES), 3), (4, 6)], ids=["many features", "few features, asked for again"]
)
def test_they_are_shapleys_by_definition(known: int, depth: int) -> None:
    noise = np.random.default_rng(6).random(2000) < 0.3
    rows = make_features(2000, 6)
    rows[:, known:] = np.nan
    params = default_params(0.3, 1) | {"max_depth": depth, "colsample_bytree": 1.0}
    booster = xgboost.train(params, xgboost.QuantileDMatrix(rows, noise), num_boost_round=4)
    exported = export(booster, rows)
    e = decode_explanation(exported.extras[EXPLANATION_FILE])
    explainer = Explainer(e)
    probes = np.concatenate([rows[:6], split_probes(trees_of(booster), rows[:10], splits_max=5)])
    for row, found in zip(probes, explainer.contributions(probes), strict=True):
        assert np.abs(found - contributions_by_definition(e, row)).max() <= 1e-12


def test_a_wrong_share_would_be_seen() -> None:
    pair = make_pair(2, 20)
    cover = pair.explanation.cover.copy()
    # Of the first tree's root, whose children no longer have the rows that they had.
    cover[pair.explanation.left[0]] *= np.float32(1.1)
    wrong = Explainer(dataclasses.replace(pair.explanation, cover=cover))
    rows = make_features(100)
    expected = pair.booster.predict(xgboost.DMatrix(rows), pred_contribs=True)
    assert np.abs(wrong.contributions(rows) - expected[:, :-1]).max() > AGREEMENT
