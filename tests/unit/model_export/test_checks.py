"""Each check of an export refuses what it is there for, and the reason names it. Known bad exports have a corpus: test_bad_exports.py."""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from gateway.contracts.features import FEATURE_NAMES
from gateway.contracts.model_meta import GOLDEN_TOLERANCE, PROP_FINGERPRINT
from model_export.checks import Check, check_export, refuse_failed
from model_export.dataset import TrainingSet
from model_export.errors import ExportRefusedError
from model_export.export import GOLDEN_ROWS, Export, to_onnx
from model_export.training import TrainedModel
from tests.unit.model_export.exports import attribute, edited

COMPARISONS = ["training rows", "missing values", "infinities, zeros, extremes", "values at each split", "golden rows"]


def failed(checks: list[Check]) -> set[str]:
    return {check.name for check in checks if not check.passed}


def refused(broken: Export, model: TrainedModel, data: TrainingSet) -> set[str]:
    """The names of the checks that fail; they are the ones that the refusal names."""
    checks = check_export(broken, model.booster, data.features)
    with pytest.raises(ExportRefusedError) as caught:
        refuse_failed(checks)
    assert all(name in str(caught.value) for name in failed(checks))
    return failed(checks)


def test_a_true_export_passes_every_check(exported: Export, model: TrainedModel, data: TrainingSet) -> None:
    checks = check_export(exported, model.booster, data.features)
    refuse_failed(checks)
    assert [check.name for check in checks if check.largest_difference is not None] == COMPARISONS
    assert all(check.largest_difference is None or check.largest_difference < GOLDEN_TOLERANCE for check in checks)


def test_the_same_model_gives_the_same_bytes(exported: Export, model: TrainedModel) -> None:
    assert to_onnx(model.booster) == exported.onnx_bytes


def test_golden_rows_hold_missing_values_infinities_and_both_zeros(exported: Export) -> None:
    rows = exported.golden_features
    assert rows.shape == (GOLDEN_ROWS, len(FEATURE_NAMES))
    assert np.isnan(rows).all(axis=1).any()
    assert np.isposinf(rows).any()
    assert np.isneginf(rows).any()
    assert (np.signbit(rows) & (rows == 0)).any()
    assert exported.golden_probability.max() - exported.golden_probability.min() > 0.5


def test_a_split_that_takes_the_threshold_itself_is_refused(exported: Export, model: TrainedModel, data: TrainingSet) -> None:
    with edited(exported) as (proto, result):
        modes = attribute(proto, "nodes_modes")
        inclusive = [b"BRANCH_LEQ" if m == b"BRANCH_LT" else m for m in modes.strings]
        del modes.strings[:]
        modes.strings.extend(inclusive)
        assert "values at each split" in refused(result(), model, data)


def test_missing_values_sent_the_other_way_are_refused(exported: Export, model: TrainedModel, data: TrainingSet) -> None:
    with edited(exported) as (proto, result):
        tracks = attribute(proto, "nodes_missing_value_tracks_true")
        other = [1 - v for v in tracks.ints]
        del tracks.ints[:]
        tracks.ints.extend(other)
        assert {"missing values", "golden rows"} <= refused(result(), model, data)


def test_a_file_over_the_limit_is_refused(exported: Export, model: TrainedModel, data: TrainingSet) -> None:
    size = len(exported.onnx_bytes)
    assert failed(check_export(exported, model.booster, data.features, bytes_max=size)) == set()
    assert failed(check_export(exported, model.booster, data.features, bytes_max=size - 1)) == {"size"}


def test_another_input_name_is_refused(exported: Export, model: TrainedModel, data: TrainingSet) -> None:
    with edited(exported) as (proto, result):
        proto.graph.input[0].name = proto.graph.node[0].input[0] = "input"
        assert refused(result(), model, data) == {"interface"}


def test_a_second_output_is_refused(exported: Export, model: TrainedModel, data: TrainingSet) -> None:
    with edited(exported) as (proto, result):
        proto.graph.output.append(helper.make_tensor_value_info("label", onnx.TensorProto.INT64, [None]))
        assert refused(result(), model, data) == {"interface"}


def test_another_fingerprint_is_refused(exported: Export, model: TrainedModel, data: TrainingSet) -> None:
    with edited(exported) as (proto, result):
        next(p for p in proto.metadata_props if p.key == PROP_FINGERPRINT).value = "0123456789abcdef"
        assert refused(result(), model, data) == {"fingerprint"}


def test_metadata_that_names_the_columns_differently_is_refused(exported: Export, model: TrainedModel, data: TrainingSet) -> None:
    with edited(exported) as (proto, result):
        next(p for p in proto.metadata_props if p.key != PROP_FINGERPRINT).value = '["f0"]'
        assert refused(result(), model, data) == {"fingerprint"}


def test_an_operator_off_the_list_is_refused(exported: Export, model: TrainedModel, data: TrainingSet) -> None:
    with edited(exported) as (proto, result):
        proto.graph.node.append(helper.make_node("RandomUniform", [], ["noise"], shape=[1]))
        proto.opset_import.append(helper.make_opsetid("", 15))
        assert refused(result(), model, data) == {"operators"}


def test_an_opset_newer_than_the_gateway_knows_is_refused(exported: Export, model: TrainedModel, data: TrainingSet) -> None:
    with edited(exported) as (proto, result):
        proto.opset_import[0].version = 4
        assert "operators" in refused(result(), model, data)


def test_data_outside_of_the_file_is_refused(exported: Export, model: TrainedModel, data: TrainingSet) -> None:
    with edited(exported) as (proto, result):
        tensor = numpy_helper.from_array(np.zeros(1, np.float32), "elsewhere")
        tensor.ClearField("raw_data")
        tensor.data_location = onnx.TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value="../secret")
        proto.graph.initializer.append(tensor)
        assert "external data" in refused(result(), model, data)


def test_golden_rows_of_another_model_are_refused(exported: Export, model: TrainedModel, data: TrainingSet) -> None:
    foreign = dataclasses.replace(exported, golden_probability=exported.golden_probability[::-1].copy())
    assert refused(foreign, model, data) == {"golden rows"}
