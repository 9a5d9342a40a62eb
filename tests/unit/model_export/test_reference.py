"""The reference that a package carries: of which rows, of which scores, and read again as it was written."""

from __future__ import annotations

import numpy as np
import pytest

from gateway.contracts import reference as contract
from gateway.contracts.features import FEATURE_NAMES
from gateway.contracts.model_meta import EXPLANATION_FILE, REFERENCE_FILE
from gateway.contracts.reference import DECISION, MEASURE_INDEX, RISK_SCORE, SCORE_BAND, Reference
from model_export.dataset import TrainingSet
from model_export.export import export
from model_export.policy_bands import read_bands
from model_export.reference import DISPERSION_UNKNOWN, make_reference, with_reference
from model_export.training import TrainedModel, train
from tests.factories_drift import make_frauds, make_quiet, make_times
from tests.factories_model import make_training_set


@pytest.fixture(scope="module")
def data() -> TrainingSet:
    return make_training_set()


@pytest.fixture(scope="module")
def model(data: TrainingSet) -> TrainedModel:
    return train(data, threads=1, rounds_max=40)


@pytest.fixture(scope="module")
def carried(data: TrainingSet, model: TrainedModel) -> Reference:
    exported = with_reference(export(model.booster, data.features), data, model, read_bands(""))
    assert set(exported.extras) == {EXPLANATION_FILE, REFERENCE_FILE}
    return contract.decode(exported.extras[REFERENCE_FILE])


def test_features_are_those_of_all_training_rows_and_scores_those_that_the_trees_were_not_grown_on(
    carried: Reference, data: TrainingSet, model: TrainedModel
) -> None:
    held = carried.rows_of()
    newest = model.split.test.stop - model.split.test.start
    assert (held[: len(FEATURE_NAMES)] == data.rows).all()
    assert [held[MEASURE_INDEX[name]] for name in (RISK_SCORE, SCORE_BAND, DECISION)] == [newest] * 3
    assert (carried.rows, carried.frauds) == (data.rows, data.frauds)
    assert (carried.from_ms, carried.to_ms) == (data.event_time_ms[0], data.event_time_ms[-1])


def test_outcomes_are_what_the_policys_bands_make_of_the_scores(carried: Reference) -> None:
    shares = carried.counts.sum(axis=0)[MEASURE_INDEX[DECISION]]
    # Some declines, mostly approvals, none unknown.
    assert shares[0] > shares[3] > 0
    assert shares[4:].sum() == 0


def test_unknown_values_have_a_bin_of_their_own(carried: Reference, data: TrainingSet) -> None:
    i = MEASURE_INDEX["card_count_24h"]
    unknown = np.isnan(data.features[:, i]).sum()
    assert carried.counts[:, i, carried.bins[i] - 1].sum() == unknown > 0


def test_too_few_windows_to_learn_from_make_the_alarms_careful() -> None:
    t = make_times(2_000, 0.3)
    assert make_reference(make_quiet(t), make_frauds(len(t)), t).dispersion.max() == DISPERSION_UNKNOWN


def test_rows_that_come_in_bursts_have_a_larger_dispersion_than_independent_ones() -> None:
    t = make_times(40_000, 14)
    features = make_quiet(t)
    i = MEASURE_INDEX["merchant_count_1h"]
    # All of one quarter of an hour share their value.
    features[:, i] = np.random.default_rng(1).lognormal(1, 1, int(t.max() // 900_000) + 1)[t // 900_000]
    made = make_reference(features, make_frauds(len(t)), t)
    assert made.dispersion[i] > 5 * np.median(made.dispersion)
    assert made.dispersion.min() >= 1


def test_days_that_differ_among_themselves_raise_what_counts_as_drift() -> None:
    t = make_times(40_000, 14)
    features = make_quiet(t)
    i = MEASURE_INDEX["merchant_count_24h"]
    features[:, i] *= np.random.default_rng(1).lognormal(0, 1, 40)[(t - t[0]) // 86_400_000]
    made = make_reference(features, make_frauds(len(t)), t)
    assert made.base[i] > 0.2 > 5 * np.median(made.base)
