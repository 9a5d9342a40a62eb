"""The corpus of known bad exports: each is a mistake that exporters are known to make, made on a real model, and each is refused.

| bad export | refused by |
| --- | --- |
| base score lost | training rows |
| early stopping ignored | training rows |
| column order changed, in the trees | training rows |
| column order changed, in the names | fingerprint |
| float64 splits rounded to six digits | values at each split |
| float64 splits rounded to the next float32 | values at each split |
| file truncated | readable |
| width wrong, as declared | interface |
| width wrong, as trained | interface |
| output NaN | training rows |

Each goes through the whole admission, as `fraudgate train` asks for it: the verdict is what keeps a model from getting an alias.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import msgspec
import numpy as np
import pytest
import xgboost

from gateway.contracts.features import FEATURE_NAMES
from gateway.contracts.model_meta import PROP_FEATURES
from model_export.admission import admit
from model_export.dataset import TrainingSet
from model_export.export import Export, to_onnx
from model_export.policy_bands import read_bands
from model_export.training import TrainedModel, default_params
from tests.unit.model_export.exports import attribute, edited


def refused_by(bad: Export, model: TrainedModel, data: TrainingSet) -> set[str]:
    """The checks that refuse it."""
    admission = admit(bad, model, data, read_bands(""), None)
    assert not admission.passed
    return {check.name for check in admission.failed()}


def test_a_good_export_is_admitted(exported: Export, model: TrainedModel, data: TrainingSet) -> None:
    admission = admit(exported, model, data, read_bands(""), None)
    assert (admission.verdict, admission.failed()) == ("passed", [])


def test_a_lost_base_score_is_refused(exported: Export, model: TrainedModel, data: TrainingSet) -> None:
    with edited(exported) as (proto, bad):
        proto.graph.node[0].attribute.remove(attribute(proto, "base_values"))
        assert "training rows" in refused_by(bad(), model, data)


def test_ignored_early_stopping_is_refused(exported: Export, model: TrainedModel, data: TrainingSet) -> None:
    split = model.split
    grown_on = xgboost.QuantileDMatrix(data.features[split.train], data.is_fraud[split.train].astype(np.float32), nthread=1)
    params = default_params(float(data.is_fraud[split.train].mean()), 1)
    all_rounds = xgboost.train(params, grown_on, num_boost_round=model.trees + 30)
    assert "training rows" in refused_by(dataclasses.replace(exported, onnx_bytes=to_onnx(all_rounds)), model, data)


def test_columns_in_another_order_are_refused(exported: Export, model: TrainedModel, data: TrainingSet) -> None:
    with edited(exported) as (proto, bad):
        features = attribute(proto, "nodes_featureids")
        swapped = [len(FEATURE_NAMES) - 1 - f for f in features.ints]
        del features.ints[:]
        features.ints.extend(swapped)
        assert "training rows" in refused_by(bad(), model, data)


def test_names_of_columns_in_another_order_are_refused(exported: Export, model: TrainedModel, data: TrainingSet) -> None:
    with edited(exported) as (proto, bad):
        names = next(p for p in proto.metadata_props if p.key == PROP_FEATURES)
        names.value = msgspec.json.encode(FEATURE_NAMES[::-1]).decode()
        assert refused_by(bad(), model, data) == {"fingerprint"}


def rounded_to_six_digits(threshold: float) -> float:
    return float(f"{threshold:.6g}")


def rounded_to_the_next_float(threshold: float) -> float:
    return float(np.nextafter(np.float32(threshold), np.float32(np.inf), dtype=np.float32))


@pytest.mark.parametrize("rounded", [rounded_to_six_digits, rounded_to_the_next_float])
def test_rounded_splits_are_refused(
    exported: Export, model: TrainedModel, data: TrainingSet, rounded: Callable[[float], float]
) -> None:
    with edited(exported) as (proto, bad):
        values = attribute(proto, "nodes_values")
        thresholds = [rounded(v) for v in values.floats]
        del values.floats[:]
        values.floats.extend(thresholds)
        assert "values at each split" in refused_by(bad(), model, data)


@pytest.mark.parametrize("kept", [0, 1, 500, -1])
def test_a_truncated_file_is_refused(exported: Export, model: TrainedModel, data: TrainingSet, kept: int) -> None:
    bad = dataclasses.replace(exported, onnx_bytes=exported.onnx_bytes[:kept])
    assert len(bad.onnx_bytes) < len(exported.onnx_bytes)
    assert "readable" in refused_by(bad, model, data)


def test_a_wrong_declared_width_is_refused(exported: Export, model: TrainedModel, data: TrainingSet) -> None:
    with edited(exported) as (proto, bad):
        proto.graph.input[0].type.tensor_type.shape.dim[1].dim_value = len(FEATURE_NAMES) + 1
        assert refused_by(bad(), model, data) == {"interface"}


def test_a_model_of_one_column_less_is_refused(exported: Export, model: TrainedModel, data: TrainingSet) -> None:
    split = model.split
    narrow = xgboost.QuantileDMatrix(data.features[split.train, :-1], data.is_fraud[split.train].astype(np.float32), nthread=1)
    booster = xgboost.train(default_params(0.1, 1), narrow, num_boost_round=5)
    assert refused_by(dataclasses.replace(exported, onnx_bytes=to_onnx(booster)), model, data) == {"interface"}


def test_a_probability_that_is_no_number_is_refused(exported: Export, model: TrainedModel, data: TrainingSet) -> None:
    with edited(exported) as (proto, bad):
        attribute(proto, "class_weights").floats[0] = float("nan")
        assert "training rows" in refused_by(bad(), model, data)
