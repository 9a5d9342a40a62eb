"""Training cuts by time, learns what can be learnt, stops early and says how good the result is."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import xgboost

from model_export.dataset import FRAUDS_MIN, TrainingSet
from model_export.errors import TrainingSetError
from model_export.metrics import quality
from model_export.training import EARLY_STOPPING_ROUNDS, PART_FRAUDS_MIN, Split, probabilities, time_split, train
from tests.factories_model import make_training_set, risky_row, safe_row


def parts(split: Split) -> tuple[slice, slice, slice]:
    return split.train, split.validation, split.test


def labelled(data: TrainingSet, frauds: list[int]) -> TrainingSet:
    is_fraud = np.zeros(data.rows, bool)
    is_fraud[frauds] = True
    return dataclasses.replace(data, is_fraud=is_fraud)


def test_each_part_is_older_than_the_next_and_no_row_is_left_out() -> None:
    data = make_training_set(3000)
    split = time_split(data)
    assert [p.stop - p.start for p in parts(split)] == [2100, 450, 450]
    assert split.train.start == 0
    assert split.test.stop == data.rows
    times = data.event_time_ms
    for older, newer in ((split.train, split.validation), (split.validation, split.test)):
        assert times[older].max() < times[newer].min()


def test_rows_of_one_instant_stay_in_one_part() -> None:
    data = make_training_set(3000)
    data = dataclasses.replace(data, event_time_ms=data.event_time_ms // 1_000_000)
    split = time_split(data)
    assert len(np.unique(data.event_time_ms)) < 60
    for older, newer in ((split.train, split.validation), (split.validation, split.test)):
        assert data.event_time_ms[older].max() < data.event_time_ms[newer].min()


def test_frauds_bunched_in_time_are_still_spread_over_the_parts() -> None:
    data = labelled(make_training_set(3000), list(range(1000, 1200, 2)))
    split = time_split(data)
    assert [int(data.is_fraud[p].sum()) for p in parts(split)] == [70, 15, 15]
    assert data.event_time_ms[split.train].max() < data.event_time_ms[split.validation].min()


def test_frauds_of_one_instant_cannot_be_cut_by_time() -> None:
    data = labelled(make_training_set(3000), list(range(1000, 1100)))
    times = data.event_time_ms.copy()
    times[1000:1100] = times[1000]
    with pytest.raises(TrainingSetError, match="can't be cut by time"):
        time_split(dataclasses.replace(data, event_time_ms=times))


def test_the_fewest_frauds_allowed_can_be_cut_unless_too_many_share_an_instant() -> None:
    data = labelled(make_training_set(3000), list(range(500, 500 + 2 * FRAUDS_MIN, 2)))
    assert min(int(data.is_fraud[p].sum()) for p in parts(time_split(data))) >= PART_FRAUDS_MIN
    times = data.event_time_ms.copy()
    times[500 + 2 * (FRAUDS_MIN - 10) :] = times[-1]
    with pytest.raises(TrainingSetError, match=f"of at least {PART_FRAUDS_MIN}"):
        time_split(dataclasses.replace(data, event_time_ms=times))


def test_the_rule_in_the_data_is_learnt() -> None:
    model = train(make_training_set(6000), threads=1)
    assert model.metrics["test_auc"] > 0.9
    assert model.metrics["test_average_precision"] > 0.8
    assert probabilities(model.booster, risky_row())[0] > 0.7
    assert probabilities(model.booster, safe_row())[0] < 0.02


def test_probabilities_are_not_inflated_by_weighting() -> None:
    model = train(make_training_set(6000), threads=1)
    assert model.metrics["test_mean_probability"] == pytest.approx(model.metrics["test_fraud_rate"], rel=0.3)


def test_only_trees_up_to_the_best_round_are_kept() -> None:
    model = train(make_training_set(3000), threads=1)
    assert model.rounds_run == model.trees + EARLY_STOPPING_ROUNDS
    assert model.booster.num_boosted_rounds() == model.trees


def test_metrics_are_those_of_the_newest_rows_alone() -> None:
    data = make_training_set(3000)
    model = train(data, threads=1)
    expected = quality(data.is_fraud[2550:], probabilities(model.booster, data.features[2550:]))
    assert {k.removeprefix("test_"): v for k, v in model.metrics.items() if k.startswith("test_")} == pytest.approx(
        expected, nan_ok=True
    )


def test_the_newest_rows_teach_nothing() -> None:
    data = make_training_set(3000)
    flipped = data.is_fraud.copy()
    flipped[2550:] = ~flipped[2550:]
    one, other = train(data, threads=1), train(dataclasses.replace(data, is_fraud=flipped), threads=1)
    assert one.booster.save_raw("json") == other.booster.save_raw("json")


def test_the_same_rows_give_the_same_trees() -> None:
    one, other = (train(make_training_set(2000), threads=1) for _ in range(2))
    assert one.booster.save_raw("json") == other.booster.save_raw("json")


def test_infinite_values_are_ordered_beyond_every_number() -> None:
    model = train(make_training_set(2000), threads=1)
    rows = np.repeat(risky_row(), 2, axis=0)
    rows[0, :], rows[1, :] = np.inf, np.finfo(np.float32).max
    assert probabilities(model.booster, rows)[0] == probabilities(model.booster, rows)[1]


def test_a_missing_value_goes_where_training_sent_it() -> None:
    data = make_training_set(2000)
    model = train(data, threads=1)
    expected = model.booster.predict(xgboost.DMatrix(data.features))
    assert np.isnan(data.features).any()
    assert np.array_equal(probabilities(model.booster, data.features), expected)


def test_quality_of_a_hand_counted_example() -> None:
    is_fraud = np.array([True, False, True, False, False])
    found = quality(is_fraud, np.array([0.9, 0.7, 0.6, 0.1, 0.0], np.float32))
    assert found["auc"] == pytest.approx(5 / 6)
    assert found["average_precision"] == pytest.approx((1 + 2 / 3) / 2)
    assert found["precision_at_0.4"] == pytest.approx(2 / 3)
    assert found["recall_at_0.4"] == 1.0
    assert (found["precision_at_0.85"], found["recall_at_0.85"], found["alert_rate_at_0.85"]) == (1.0, 0.5, 0.2)


def test_precision_of_no_alert_is_unknown() -> None:
    assert np.isnan(quality(np.array([True, False]), np.array([0.1, 0.0], np.float32))["precision_at_0.85"])
