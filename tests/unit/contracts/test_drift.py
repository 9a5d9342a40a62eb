"""PSI, KS and the alarm rule: against values worked out by hand, by property, and on quiet and shifted payments."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import ks_2samp

from gateway.contracts import drift, reference
from gateway.contracts.drift import Rows, expected_of, look, thresholds, without_busiest
from gateway.contracts.reference import CLOCK, DAY_MS, MEASURE_INDEX, MEASURES, Reference, bins_of, clock_values, hour_of
from model_export.reference import make_reference
from tests.factories_drift import AMOUNT, START_MS, make_frauds, make_quiet, make_times

DAYS = 14


@pytest.fixture(scope="module")
def trained() -> Reference:
    t = make_times(60_000, DAYS)
    features = make_quiet(t)
    probability = np.random.default_rng(3).beta(0.3, 12, len(t))
    return make_reference(features, make_frauds(len(t)), t, probability, decision=(probability > 0.5) * 3)


def rows_of(trained: Reference, features: np.ndarray, t: np.ndarray, ids: np.ndarray | None = None) -> Rows:
    bins = np.full((len(t), len(MEASURES)), -1, np.int8)
    width = features.shape[1]
    bins[:, :width] = bins_of(trained.edges[:width], trained.bins[:width], features)
    clock = bins_of(trained.edges[CLOCK], trained.bins[CLOCK], clock_values(t))
    own = np.stack([np.arange(len(t))] * 4, axis=1) if ids is None else ids
    return Rows(bins, clock, hour_of(t).astype(np.int8), own)


def window(minutes: int = 10, rows: int = 300, at_hour: int = 12, seed: int = 5) -> np.ndarray:
    t = np.random.default_rng(seed).integers(0, minutes * 60_000, rows)
    return np.sort(t) + START_MS + (DAYS + 7) * DAY_MS + at_hour * 3_600_000


def test_psi_of_two_bins_is_what_its_formula_says() -> None:
    # (0.5 - 0.2) ln(0.5 / 0.2) + (0.5 - 0.8) ln(0.5 / 0.8); a million rows make the smoothing vanish.
    observed, expected = np.zeros((1, reference.BINS_MAX)), np.zeros((1, reference.BINS_MAX))
    observed[0, :2], expected[0, :2] = (500_000, 500_000), (200_000, 800_000)
    assert drift.psi(observed, expected, np.array([2]))[0] == pytest.approx(0.4159, abs=1e-4)


counts = st.lists(st.integers(0, 500), min_size=4, max_size=4)


@settings(max_examples=100)
@given(counts, counts.filter(any))
def test_psi_is_never_negative_and_nothing_for_equal_shares(observed: list[int], expected: list[int]) -> None:
    o, e = (np.zeros((1, reference.BINS_MAX)) for _ in range(2))
    o[0, :4], e[0, :4] = observed, expected
    bins = np.array([4])
    assert drift.psi(o, e, bins)[0] >= -1e-12
    assert drift.psi(e, e, bins)[0] == pytest.approx(0, abs=1e-3)
    assert 0 <= drift.ks(o, e, bins)[0] <= 1


def test_ks_over_bins_is_at_most_that_of_the_values_and_near_it() -> None:
    rng = np.random.default_rng(2)
    old, new = rng.normal(size=20_000), rng.normal(0.5, 1, 5_000)
    edges, bins = reference.padded([reference.value_edges(old)])
    o, e = (drift.histogram(bins_of(edges, bins, v[:, None])) for v in (new, old))
    exact = ks_2samp(old, new).statistic
    assert exact - 0.05 <= drift.ks(o, e, bins)[0] <= exact + 1e-9


def test_a_value_that_is_not_known_has_the_last_bin_and_an_edge_belongs_to_the_bin_below() -> None:
    edges, bins = reference.padded([np.array([1.0, 2.0])])
    assert bins_of(edges, bins, np.array([[0.5], [1.0], [1.5], [9.0], [np.nan]]))[:, 0].tolist() == [0, 0, 1, 2, 3]


def test_a_reference_comes_back_from_its_file_as_it_was(trained: Reference) -> None:
    back = reference.decode(reference.encode(trained))
    assert all(np.array_equal(getattr(back, name), getattr(trained, name)) for name in trained.__dataclass_fields__)


def test_a_file_that_is_no_reference_or_a_damaged_one_is_refused(trained: Reference) -> None:
    data = reference.encode(trained)
    for bad in (b"", b"no", data[: len(data) // 2]):
        with pytest.raises(reference.ReferenceRefusedError):
            reference.decode(bad)


def test_a_reference_of_other_features_is_refused(trained: Reference, monkeypatch: pytest.MonkeyPatch) -> None:
    data = reference.encode(trained)
    monkeypatch.setattr(reference, "FINGERPRINT", "0" * 16)
    with pytest.raises(reference.ReferenceRefusedError, match="features"):
        reference.decode(data)


def test_shares_of_each_measure_are_whole_in_each_hour(trained: Reference) -> None:
    assert np.allclose(trained.shares().sum(axis=1), 1)
    assert np.allclose(trained.shares_by_hour().sum(axis=2), 1)
    assert trained.label_rate == pytest.approx(0.01, abs=0.003)


@pytest.mark.parametrize("at_hour", [3, 12, 21])
def test_quiet_windows_of_any_hour_are_no_alarm_though_amounts_follow_the_clock(trained: Reference, at_hour: int) -> None:
    expected = expected_of(trained)
    for seed in range(60):
        t = window(at_hour=at_hour, seed=seed)
        seen = look(expected, rows_of(trained, make_quiet(t, seed + 100), t))
        assert not seen.alarm.any(), [MEASURES[i] for i in np.flatnonzero(seen.alarm)]


@pytest.mark.parametrize("feature", ["amount_minor", "card_count_24h", "ip_distinct_devices_24h", "hour", "weekday"])
def test_a_shift_of_one_feature_alarms_for_that_feature_alone(trained: Reference, feature: str) -> None:
    t = window()
    features = make_quiet(t, 9)
    i = MEASURE_INDEX[feature]
    features[:, i] = (
        (features[:, i] + 5) % 24 if feature == "hour" else (features[:, i] + 3) % 7 if feature == "weekday" else features[:, i] * 6
    )
    assert np.flatnonzero(look(expected_of(trained), rows_of(trained, features, t)).alarm).tolist() == [i]


def test_a_feature_that_is_suddenly_unknown_alarms(trained: Reference) -> None:
    t = window(rows=60)
    features = make_quiet(t, 9)
    features[:, AMOUNT] = np.nan
    assert look(expected_of(trained), rows_of(trained, features, t)).alarm[AMOUNT]


def test_one_busy_device_is_an_attack_and_no_drift(trained: Reference) -> None:
    t = window(rows=300)
    features = make_quiet(t, 9)
    burst = np.arange(300) % 3 == 0
    features[burst, AMOUNT] = 1
    ids = np.stack([np.arange(300)] * 4, axis=1)
    expected = expected_of(trained)
    assert look(expected, rows_of(trained, features, t, ids)).alarm[AMOUNT], "many devices: it is one"
    ids[burst, 2] = 7
    one = rows_of(trained, features, t, ids)
    assert not look(expected, one).alarm[AMOUNT]
    assert len(without_busiest(one)) <= 200


def test_rows_of_which_a_measure_says_nothing_are_not_counted_for_it(trained: Reference) -> None:
    t = window(rows=100)
    rows = rows_of(trained, make_quiet(t, 9), t)
    seen = look(expected_of(trained), rows)
    assert seen.rows[AMOUNT] == 100
    score = MEASURE_INDEX["risk_score"]
    assert (seen.rows[score], seen.psi[score], seen.alarm[score]) == (0, 0, False)
    rows.bins[:40, score] = 0
    assert look(expected_of(trained), rows).rows[score] == 40


def test_fewer_rows_ask_for_more_and_too_few_for_the_impossible(trained: Reference) -> None:
    at = [thresholds(trained, np.full(len(MEASURES), float(n)))[AMOUNT] for n in (10_000, 1_000, 100, drift.WINDOW_ROWS_MIN - 1)]
    assert at == sorted(at)
    assert at[0] < 0.3
    assert at[-1] == np.inf


def test_a_measure_that_still_moves_in_the_training_rows_gives_no_alarm() -> None:
    t = make_times(20_000, DAYS)
    features = make_quiet(t)
    features[:, MEASURE_INDEX["card_count_30d"]] *= np.linspace(0.1, 3, len(t))
    made = make_reference(features, make_frauds(len(t)), t)
    assert np.flatnonzero(~made.settled[: features.shape[1]]).tolist() == [MEASURE_INDEX["card_count_30d"]]
    late = window()
    assert thresholds(made, np.full(len(MEASURES), 1000.0))[MEASURE_INDEX["card_count_30d"]] == np.inf
    assert not look(expected_of(made), rows_of(made, make_quiet(late, 9), late)).alarm[MEASURE_INDEX["card_count_30d"]]


def test_without_scores_the_reference_has_no_measure_of_them() -> None:
    t = make_times(5_000, 3)
    made = make_reference(make_quiet(t), make_frauds(len(t)), t)
    assert made.rows_of()[-3:].tolist() == [0, 0, 0]
    assert np.isinf(thresholds(made, np.full(len(MEASURES), 1000.0))[-3:]).all()
