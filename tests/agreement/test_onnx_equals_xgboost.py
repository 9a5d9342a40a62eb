"""The exported model, as the gateway runs it, gives what XGBoost gives: on data, at every split, on missing and extreme values."""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt
import onnxruntime
import pytest
import xgboost
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as from_numpy

from gateway.contracts.features import FEATURE_NAMES
from gateway.contracts.model_meta import GOLDEN_TOLERANCE, INPUT_NAME, OUTPUT_NAME
from model_export.export import export
from model_export.probes import extreme_rows, split_probes, trees_of
from model_export.training import train
from tests.factories_model import make_features, make_training_set

Floats = npt.NDArray[np.float32]


@dataclasses.dataclass(frozen=True)
class Pair:
    """A model in both forms."""

    booster: xgboost.Booster
    session: onnxruntime.InferenceSession

    def onnx(self, rows: Floats) -> Floats:
        out: Floats = self.session.run([OUTPUT_NAME], {INPUT_NAME: rows})[0]
        assert out.shape == (len(rows), 2)
        assert out.dtype == np.float32
        return out

    def largest_difference(self, rows: Floats) -> float:
        """Against XGBoost's other way of predicting than the one the export's checks use; it refuses infinity, so that is clipped
        to the largest number, which lies on the same side of every split."""
        largest = np.finfo(np.float32).max
        expected = self.booster.predict(xgboost.DMatrix(np.clip(rows, -largest, largest))).astype(np.float64)
        return float(np.abs(self.onnx(rows) - np.stack([1 - expected, expected], axis=1)).max())


def make_pair(seed: int, rounds_max: int) -> Pair:
    data = make_training_set(4000, seed)
    # Splits at values around zero as well, where the two zeros and the smallest numbers meet them.
    centred = data.features.copy()
    centred[:, 40:] -= np.float32(1.5)
    model = train(dataclasses.replace(data, features=centred), threads=1, rounds_max=rounds_max)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(export(model.booster, centred).onnx_bytes, options, providers=["CPUExecutionProvider"])
    return Pair(model.booster, session)


@pytest.fixture(scope="module", params=[(1, 1), (2, 60), (3, 400)], ids=["one tree", "some trees", "early stopping"])
def pair(request: pytest.FixtureRequest) -> Pair:
    seed, rounds_max = request.param
    return make_pair(seed, rounds_max)


def test_on_rows_it_has_and_has_not_seen(pair: Pair) -> None:
    for seed in (1, 99):
        assert pair.largest_difference(make_features(5000, seed)) <= GOLDEN_TOLERANCE


def test_in_every_batch_size_the_same_bits(pair: Pair) -> None:
    rows = make_features(256)
    whole = pair.onnx(rows)
    for size in (1, 7, 64):
        parts = [pair.onnx(rows[i : i + size]) for i in range(0, len(rows), size)]
        assert np.array_equal(np.concatenate(parts), whole)


def test_on_missing_values(pair: Pair) -> None:
    rows = make_features(len(FEATURE_NAMES) + 1)
    rows[np.arange(len(FEATURE_NAMES)), np.arange(len(FEATURE_NAMES))] = np.nan
    rows[-1] = np.nan
    assert pair.largest_difference(rows) <= GOLDEN_TOLERANCE


def test_on_infinities_zeros_and_the_ends_of_float32(pair: Pair) -> None:
    assert pair.largest_difference(extreme_rows(make_features(50))) <= GOLDEN_TOLERANCE


def test_next_to_every_split(pair: Pair) -> None:
    assert pair.largest_difference(split_probes(trees_of(pair.booster), make_features(50))) <= GOLDEN_TOLERANCE


@pytest.fixture(scope="module")
def one_pair() -> Pair:
    return make_pair(5, 60)


@given(rows=from_numpy.arrays(np.float32, (4, len(FEATURE_NAMES)), elements=st.floats(width=32), fill=st.just(np.float32(np.nan))))
@settings(max_examples=100, deadline=None)
def test_on_anything_that_float32_can_hold(one_pair: Pair, rows: Floats) -> None:
    assert one_pair.largest_difference(rows) <= GOLDEN_TOLERANCE
