"""Admission: what a model must prove beyond a faithful export, and that small samples prove nothing against it."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from sklearn.metrics import average_precision_score

from gateway.contracts.features import FEATURE_INDEX
from gateway.contracts.model_meta import ADMISSION_FILE, GOLDEN_FILE, MODEL_FILE, sha256_file
from model_export.admission import (
    LATENCY_MS_MAX,
    Admission,
    Champion,
    admit,
    check_flips,
    check_latency,
    read_report,
    report,
    with_report,
)
from model_export.admission_quality import (
    SLICE_FRAUDS_MIN,
    Interval,
    Ranking,
    alerted,
    ap_floor,
    average_precision,
    is_worse,
    judge_slices,
    slices,
)
from model_export.checks import open_session
from model_export.dataset import TrainingSet
from model_export.export import Export, export, write_export
from model_export.policy_bands import read_bands
from model_export.training import TrainedModel, probabilities, train
from tests.factories_model import MERCHANTS, make_training_set

ROWS = 12_000
BANDS = read_bands("")


@pytest.fixture(scope="module")
def data() -> TrainingSet:
    return make_training_set(ROWS)


@pytest.fixture(scope="module")
def model(data: TrainingSet) -> TrainedModel:
    return train(data, threads=1, rounds_max=40)


@pytest.fixture(scope="module")
def exported(model: TrainedModel, data: TrainingSet) -> Export:
    return export(model.booster, data.features)


def trained_without(data: TrainingSet, rows: npt.NDArray[np.bool_]) -> tuple[TrainedModel, Export]:
    """A model to which the labels of `rows` were shown as genuine while it grew; its test part is as it was."""
    is_fraud = data.is_fraud.copy()
    newest = train(data, threads=1, rounds_max=1).split.test.start
    is_fraud[:newest] &= ~rows[:newest]
    blind = train(dataclasses.replace(data, is_fraud=is_fraud), threads=1, rounds_max=40)
    return blind, export(blind.booster, data.features)


def champion_of(exported: Export, training_end_ms: int | None = None) -> Champion:
    return Champion(version="7", onnx_bytes=exported.onnx_bytes, training_end_ms=training_end_ms)


def failed(admission: Admission) -> dict[str, str]:
    return {check.name: check.found for check in admission.failed()}


def test_the_champion_itself_is_as_good_as_the_champion(exported: Export, model: TrainedModel, data: TrainingSet) -> None:
    admission = admit(exported, model, data, BANDS, champion_of(exported))
    assert (admission.verdict, admission.champion, admission.failed()) == ("passed", "7", [])
    assert all(finding.recall == finding.champion for finding in admission.slices)


def test_a_model_that_learnt_nothing_is_refused_with_and_without_a_champion(exported: Export, data: TrainingSet) -> None:
    shuffled = np.random.default_rng(1).permutation(data.is_fraud)
    blind = train(dataclasses.replace(data, is_fraud=shuffled), threads=1, rounds_max=20)
    bad = export(blind.booster, data.features)
    assert "quality" in failed(admit(bad, blind, data, BANDS, None))
    assert "against champion version 7" in failed(admit(bad, blind, data, BANDS, champion_of(exported)))["quality"]


def test_a_slice_that_the_candidate_no_longer_sees_refuses_it_by_name(exported: Export, data: TrainingSet) -> None:
    # A fifth of the frauds are of one country, whose labels the candidate never saw; the rest of them it ranks as before.
    lost = (data.features[:, MERCHANTS] >= 6) & data.is_fraud
    country = np.where(lost, "XA", "DE").astype(object)
    narrowed = dataclasses.replace(data, country=country)
    blind, bad = trained_without(narrowed, lost)
    found = failed(admit(bad, blind, narrowed, BANDS, champion_of(exported)))
    assert "country XA recall" in found["slices"]
    assert "country DE" not in found["slices"]


def test_a_decision_changed_by_the_export_is_refused(exported: Export, model: TrainedModel, data: TrainingSet) -> None:
    session = open_session(exported.onnx_bytes)
    assert check_flips(session, model.booster, data.features, BANDS).passed

    class Nudged:
        """The session, but one payment near a threshold comes out just above it."""

        def run(self, names: list[str], rows: dict[str, Any]) -> list[npt.NDArray[np.float32]]:
            out = session.run(names, rows)[0].copy()
            out[0, 1] = 0.99
            return [out]

    check = check_flips(Nudged(), model.booster, data.features[~data.is_fraud][:100], BANDS)
    assert not check.passed
    assert "1 of 100 decisions changed" in check.found


def test_a_score_that_differs_within_one_outcome_is_counted_and_not_refused(
    exported: Export, model: TrainedModel, data: TrainingSet
) -> None:
    session = open_session(exported.onnx_bytes)

    class Nudged:
        def run(self, names: list[str], rows: dict[str, Any]) -> list[npt.NDArray[np.float32]]:
            out = session.run(names, rows)[0].copy()
            out[0, 1] = 0.1
            return [out]

    check = check_flips(Nudged(), model.booster, data.features[~data.is_fraud][:1], BANDS)
    assert check.passed
    assert "0 of 1 decisions changed, 1 scores by rounding" in check.found


@pytest.mark.parametrize("rows", LATENCY_MS_MAX)
def test_a_model_slower_than_the_ceiling_is_refused(exported: Export, data: TrainingSet, rows: int) -> None:
    session = open_session(exported.onnx_bytes)
    for part, passed in ((0.99, True), (1.01, False)):
        # Each reading is that part of the ceiling after the one before.
        ticks = itertools.count(0.0, part * LATENCY_MS_MAX[rows] / 1000)
        assert check_latency(session, data.features, rows, ticks.__next__).passed is passed


def test_rows_that_the_champion_was_grown_on_are_left_out_when_enough_are_newer(
    exported: Export, model: TrainedModel, data: TrainingSet
) -> None:
    test = model.split.test
    middle = int(data.event_time_ms[(test.start + test.stop) // 2])
    quality = {c.name: c.found for c in admit(exported, model, data, BANDS, champion_of(exported, middle)).checks}["quality"]
    assert f"on {test.stop - (test.start + test.stop) // 2 - 1} rows" in quality
    assert "which the champion wasn't grown on" in quality
    end = int(data.event_time_ms[-1])
    quality = {c.name: c.found for c in admit(exported, model, data, BANDS, champion_of(exported, end)).checks}["quality"]
    assert "some of which the champion was grown on" in quality


def test_the_report_travels_in_the_package(exported: Export, model: TrainedModel, data: TrainingSet, tmp_path: Path) -> None:
    assert read_report(tmp_path) is None
    admission = admit(exported, model, data, BANDS, None)
    write_export(with_report(exported, admission), tmp_path)
    assert (tmp_path / ADMISSION_FILE).is_file()
    assert read_report(tmp_path) == admission
    # It names the files that lie beside it.
    assert admission.files == {file: sha256_file(tmp_path / file) for file in (MODEL_FILE, GOLDEN_FILE)}
    text = report(admission)
    assert all(check.name in text for check in admission.checks)
    assert all(finding.name in text for finding in admission.slices)


def test_average_precision_is_that_of_scikit_learn_ties_and_weights_included() -> None:
    rng = np.random.default_rng(4)
    is_fraud = rng.random(500) < 0.1
    probability = np.round(rng.random(500), 1)
    for weight in (np.ones(500), rng.integers(0, 4, 500).astype(np.float64)):
        ours = Ranking(is_fraud, probability).average_precision(weight)
        assert ours == pytest.approx(average_precision_score(is_fraud, probability, sample_weight=weight), abs=1e-12)


def test_the_interval_of_a_difference_is_narrower_than_that_of_two_values(data: TrainingSet, model: TrainedModel) -> None:
    p = probabilities(model.booster, data.features).astype(np.float64)
    noisy = p + np.random.default_rng(1).normal(0, 0.01, len(p))
    alone, paired = average_precision(data.is_fraud, p), average_precision(data.is_fraud, p, noisy)
    assert alone.low < alone.value < alone.high
    assert paired.low <= paired.value <= paired.high
    assert paired.high - paired.low < alone.high - alone.low
    assert average_precision(data.is_fraud, p, p) == dataclasses.replace(paired, value=0.0, low=0.0, high=0.0)


@pytest.mark.parametrize(("noise", "refused"), [(0.3, 0), (0.55, 10)])
def test_an_equal_model_is_not_refused_for_luck_and_a_worse_one_is_refused(noise: float, refused: int) -> None:
    rng = np.random.default_rng(6)
    is_fraud = np.arange(6300) < 300
    found = 0
    for _ in range(10):
        risk = np.where(is_fraud, 3.2, 0.0) + rng.normal(0, 1, 6300)
        champion, candidate = risk + rng.normal(0, 0.3, 6300), risk + rng.normal(0, noise, 6300)
        found += is_worse(average_precision(is_fraud, candidate, champion))
    assert found == refused


def test_too_few_frauds_to_rule_out_a_large_loss_prove_nothing() -> None:
    assert is_worse(Interval(0.0, -0.11, 0.11))
    assert not is_worse(Interval(-0.05, -0.09, 0.01))
    assert is_worse(Interval(-0.03, -0.05, -0.01))
    assert not is_worse(Interval(-0.019, -0.03, -0.01))


def test_without_a_champion_three_times_chance_is_asked_for_or_half_way_to_perfect() -> None:
    assert ap_floor(0.01) == pytest.approx(0.03)
    assert ap_floor(0.4) == pytest.approx(0.7)


def test_rows_that_share_the_last_score_share_what_is_left_to_alert() -> None:
    share = alerted(np.array([0.9, 0.5, 0.5, 0.5, 0.1]), 2)
    assert share.tolist() == pytest.approx([1, 1 / 3, 1 / 3, 1 / 3, 0])
    assert alerted(np.array([0.2, 0.2]), 2).tolist() == [1, 1]


def sliced(frauds: int, lost: int) -> Iterator[tuple[str, float, bool]]:
    """Name, recall and verdict of a slice of that many frauds of which the candidate loses some that the champion caught."""
    others = 400
    is_fraud = np.zeros(4000, bool)
    is_fraud[: frauds + others] = True
    champion = np.where(is_fraud, 0.9, 0.1) + np.linspace(0, 0.01, 4000)
    candidate = champion.copy()
    candidate[:lost] = 0.0
    rows = np.zeros(4000, bool)
    rows[:frauds] = True
    for finding in judge_slices([("one", rows)], is_fraud, candidate, champion):
        yield finding.name, finding.recall, finding.passed


def test_a_slice_fails_for_a_loss_that_is_large_and_not_luck() -> None:
    # Of 20 frauds three are 15 points of recall, and may be luck; eight are not.
    assert [passed for _, _, passed in sliced(20, 3)] == [True]
    assert [passed for _, _, passed in sliced(20, 8)] == [False]
    # Of 200 frauds 15 are surely lost, but few enough; 30 are too many.
    assert [passed for _, _, passed in sliced(200, 15)] == [True]
    assert [passed for _, _, passed in sliced(200, 30)] == [False]


def without_champion(probability_of_frauds: float) -> list[tuple[float, bool]]:
    """Recall and verdict of a slice with 20 frauds among 400 payments, none of which is alerted, without a champion."""
    rng = np.random.default_rng(2)
    is_fraud = np.zeros(4000, bool)
    is_fraud[:20] = is_fraud[-500:] = True
    probability = rng.uniform(0.1, 0.2, 4000)
    probability[:20] = rng.uniform(0.1, 0.2, 20) * probability_of_frauds
    probability[-500:] = 0.9
    rows = np.zeros(4000, bool)
    rows[:400] = True
    return [(round(f.recall, 1), f.passed) for f in judge_slices([("one", rows)], is_fraud, probability, None)]


def test_without_a_champion_a_slice_may_be_hard_but_not_upside_down() -> None:
    # Nothing tells its frauds from genuine payments: no other model would either.
    assert without_champion(1.0) == [(0.0, True)]
    # They score lower than genuine payments.
    assert without_champion(0.8) == [(0.0, False)]


def test_the_more_slices_are_looked_at_the_more_one_must_show() -> None:
    is_fraud = np.zeros(4000, bool)
    is_fraud[:600] = True
    champion = np.where(is_fraud, 0.9, 0.1) + np.linspace(0, 0.01, 4000)
    candidate = champion.copy()
    candidate[:6] = 0.0
    first = np.zeros(4000, bool)
    first[:20] = True
    others = [(f"other {i}", np.roll(first, 20 * (i + 1))) for i in range(20)]
    alone = judge_slices([("first", first)], is_fraud, candidate, champion)
    among = judge_slices([("first", first), *others], is_fraud, candidate, champion)
    assert [f.passed for f in alone] == [False]
    assert all(f.passed for f in among)


def test_slices_are_those_with_enough_frauds() -> None:
    data = make_training_set(ROWS)
    features = data.features.copy()
    features[:, FEATURE_INDEX["mcc"]] = 5411
    features[:5, FEATURE_INDEX["mcc"]] = np.nan
    country = np.full(data.rows, "DE", object)
    frauds = np.flatnonzero(data.is_fraud)
    country[frauds[:SLICE_FRAUDS_MIN]] = "FR"
    country[frauds[SLICE_FRAUDS_MIN : 2 * SLICE_FRAUDS_MIN - 1]] = "BR"
    names = dict(slices(features, country, data.is_fraud, BANDS))
    assert {"mcc 5411", "country DE", "country FR", "20000 < amount <= 100000", "amount > 100000", "new cards"} == set(names)
    assert names["mcc 5411"].sum() == data.rows - 5


def test_a_training_set_without_countries_has_no_slices_of_them(data: TrainingSet) -> None:
    assert data.country is None
    assert not any(name.startswith("country") for name, _ in slices(data.features, None, data.is_fraud, BANDS))
