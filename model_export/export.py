"""XGBoost to ONNX, and the golden rows that let a reader of the ONNX file prove it computes what XGBoost computed.

Called by `fraudgate train` after training; takes about a second. Whether an export is good is for model_export.checks to say.
"""

from __future__ import annotations

import io
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt
import onnx
import xgboost
from onnxmltools import convert_xgboost
from onnxmltools.convert.common.data_types import FloatTensorType

from gateway.contracts.features import FEATURE_NAMES, FINGERPRINT
from gateway.contracts.model_meta import (
    GOLDEN_FILE,
    INPUT_NAME,
    MODEL_FILE,
    OUTPUT_NAME,
    PACKAGE_FILES,
    PROP_FEATURES,
    PROP_FINGERPRINT,
    is_file_name,
)
from model_export.dataset import Floats
from model_export.probes import extreme_rows, split_probes, trees_of
from model_export.training import probabilities

GOLDEN_ROWS = 256
GRAPH_NAME = "fraudgate"


@dataclass(frozen=True, kw_only=True)
class Export:
    """`onnx_bytes` is the model file. `golden_features` (rows, features) and `golden_probability` (rows,) are XGBoost's.

    `extras` are further files of the package, by name (gateway/contracts/model_meta.py), which travel with it.
    """

    onnx_bytes: bytes
    golden_features: Floats
    golden_probability: npt.NDArray[np.float32]
    extras: dict[str, bytes] = field(default_factory=dict)


def export(booster: xgboost.Booster, sample: Floats) -> Export:
    """The booster as ONNX with golden rows. `sample` is (rows, features): rows of the kind it will score, at least one."""
    golden = golden_rows(booster, sample)
    return Export(
        onnx_bytes=to_onnx(booster),
        golden_features=golden,
        golden_probability=probabilities(booster, golden),
    )


def to_onnx(booster: xgboost.Booster) -> bytes:
    """One TreeEnsembleClassifier: input "features" float32 (None, features), output "probabilities" float32 (None, 2).

    The same booster gives the same bytes. The converter knows columns as f0, f1, ... only, so the booster must have been trained on
    an array; which column is which feature stands in the file's metadata.
    """
    assert booster.feature_names is None, "trained on an array, without names"
    # The converter guesses what a bare Booster is from its statistics, and takes a classifier at its word.
    classifier = xgboost.XGBClassifier()
    classifier.load_model(bytearray(booster.save_raw("ubj")))
    width = booster.num_features()
    model = convert_xgboost(classifier, initial_types=[(INPUT_NAME, FloatTensorType([None, width]))], name=GRAPH_NAME)
    probability = next(o for o in model.graph.output if o.name == OUTPUT_NAME)
    # The label, the converter's other output, is the policy's business.
    del model.graph.output[:]
    model.graph.output.append(onnx.helper.make_tensor_value_info(probability.name, onnx.TensorProto.FLOAT, [None, 2]))
    properties = {PROP_FINGERPRINT: FINGERPRINT, PROP_FEATURES: msgspec.json.encode(FEATURE_NAMES).decode()}
    onnx.helper.set_model_props(model, properties)
    out: bytes = model.SerializeToString(deterministic=True)
    return out


def golden_rows(booster: xgboost.Booster, sample: Floats) -> Floats:
    """(GOLDEN_ROWS, features): half ordinary rows over the range of scores, half missing values, extremes and values at splits."""
    half = GOLDEN_ROWS // 2
    by_score = np.argsort(probabilities(booster, sample), kind="stable")
    ordinary = sample[by_score[np.linspace(0, len(sample) - 1, half).astype(np.int64)]]
    extremes = extreme_rows(ordinary)
    probed = split_probes(trees_of(booster), ordinary, splits_max=half)
    quarter = half // 2
    rows = np.concatenate([ordinary, _spread(extremes, quarter), _spread(probed, half - quarter)])
    assert rows.shape == (GOLDEN_ROWS, sample.shape[1])
    return rows


def _spread(rows: Floats, count: int) -> Floats:
    """`count` of `rows`, evenly over them, the first one always; repeated where there are fewer."""
    return rows[np.linspace(0, len(rows) - 1, count).astype(np.int64)]


def golden_bytes(features: Floats, probability: npt.NDArray[np.float32]) -> bytes:
    """The file golden.npz."""
    buffer = io.BytesIO()
    np.savez(buffer, features=features, probability=probability)
    return buffer.getvalue()


def write_export(exported: Export, directory: Path) -> None:
    """model.onnx, golden.npz and the extras into an existing directory."""
    for name, content in exported.extras.items():
        assert is_file_name(name), name
        assert name not in PACKAGE_FILES, name
        (directory / name).write_bytes(content)
    (directory / MODEL_FILE).write_bytes(exported.onnx_bytes)
    (directory / GOLDEN_FILE).write_bytes(golden_bytes(exported.golden_features, exported.golden_probability))
