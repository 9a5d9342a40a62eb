"""Proof that an exported model is the trained one: each check says what it found, and any that fails refuses the export.

Called by `fraudgate train` before anything reaches the registry; takes a second or two, most of it the rows built for each split.
"""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import numpy as np
import onnx
import onnxruntime
import xgboost
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from onnxruntime.capi import onnxruntime_pybind11_state as ort_errors

from gateway.contracts.features import FEATURE_NAMES, FINGERPRINT
from gateway.contracts.model_meta import GOLDEN_TOLERANCE, INPUT_NAME, OUTPUT_NAME, PROP_FEATURES, PROP_FINGERPRINT
from model_export.dataset import Floats
from model_export.errors import ExportRefusedError
from model_export.export import Export
from model_export.probes import extreme_rows, split_probes, trees_of
from model_export.training import probabilities

FILE_BYTES_MAX = 64 * 2**20
# What a gateway is willing to run: trees, and the arithmetic that a converter may put around them.
OPERATORS_ALLOWED = frozenset(
    {
        ("ai.onnx.ml", "TreeEnsembleClassifier"),
        ("ai.onnx.ml", "TreeEnsembleRegressor"),
        ("", "Cast"),
        ("", "Concat"),
        ("", "Identity"),
        ("", "Reshape"),
        ("", "Sigmoid"),
        ("", "Sub"),
    }
)
# The newest operator sets that the gateway's ONNX Runtime is known to run here.
OPSETS_MAX = {"ai.onnx.ml": 3, "": 21}
SAMPLE_ROWS_MAX = 20_000
LOAD_ERRORS = (
    ort_errors.Fail,
    ort_errors.InvalidArgument,
    ort_errors.InvalidGraph,
    ort_errors.InvalidProtobuf,
    ort_errors.NotImplemented,
    ort_errors.RuntimeException,
)


class Check(msgspec.Struct, frozen=True, kw_only=True):
    """`found` is what was measured, for a person; `largest_difference` only for comparisons, of probabilities."""

    name: str
    passed: bool
    found: str
    largest_difference: float | None = None


def check_export(exported: Export, booster: xgboost.Booster, sample: Floats, *, bytes_max: int = FILE_BYTES_MAX) -> list[Check]:
    """All checks in order; the comparisons are left out when the file is not one that could be run.

    `sample` is (rows, features), at least one row; of many, SAMPLE_ROWS_MAX are compared, evenly chosen.
    """
    size = len(exported.onnx_bytes)
    checks = [Check(name="size", passed=size <= bytes_max, found=f"{size} bytes of at most {bytes_max}")]
    try:
        model = onnx.load_from_string(exported.onnx_bytes)
    except DecodeError as exc:
        return [*checks, Check(name="readable", passed=False, found=f"not an ONNX file: {_first_line(exc)}")]
    checks += [
        _check_validity(model),
        _check_external_data(model),
        _check_operators(model),
        _check_interface(model),
        _check_properties(model),
    ]
    if not all(check.passed for check in checks):
        return checks
    try:
        session = open_session(exported.onnx_bytes)
    except LOAD_ERRORS as exc:
        return [*checks, Check(name="loads", passed=False, found=f"ONNX Runtime refuses it: {_first_line(exc)}")]
    checks.append(Check(name="loads", passed=True, found=f"by ONNX Runtime {onnxruntime.__version__}"))
    return checks + _comparisons(session, exported, booster, sample)


def refuse_failed(checks: list[Check]) -> None:
    """Raises `ExportRefusedError`, naming each failed check with what it found: for a model that is not to be registered at all."""
    failed = [f"{check.name} ({check.found})" for check in checks if not check.passed]
    if failed:
        raise ExportRefusedError(f"the export failed {len(failed)} of {len(checks)} checks: {'; '.join(failed)}")


def _check_validity(model: onnx.ModelProto) -> Check:
    try:
        onnx.checker.check_model(model)
    except onnx.checker.ValidationError as exc:
        return Check(name="readable", passed=False, found=f"not a valid ONNX file: {_first_line(exc)}")
    return Check(name="readable", passed=True, found=f"a valid ONNX file, IR version {model.ir_version}")


def _check_external_data(model: onnx.ModelProto) -> Check:
    external = [t.name for t in model.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL]
    return Check(name="external data", passed=not external, found=f"{len(external)} tensors outside the file")


def _check_operators(model: onnx.ModelProto) -> Check:
    used = [(node.domain, node.op_type) for node in model.graph.node]
    opsets = {o.domain: o.version for o in model.opset_import}
    refused = sorted({f"{domain or 'ai.onnx'}.{op}" for domain, op in used if (domain, op) not in OPERATORS_ALLOWED})
    refused += [
        f"opset {domain or 'ai.onnx'} {version}" for domain, version in opsets.items() if version > OPSETS_MAX.get(domain, 0)
    ]
    refused += [f"function {f.name}" for f in model.functions]
    found = f"not allowed: {', '.join(refused)}" if refused else ", ".join(sorted({op for _, op in used}))
    return Check(name="operators", passed=not refused, found=found)


def _check_interface(model: onnx.ModelProto) -> Check:
    """One float32 input (any, features) and one float32 output (any, 2), by the names of the contract."""
    expected = [(INPUT_NAME, onnx.TensorProto.FLOAT, len(FEATURE_NAMES)), (OUTPUT_NAME, onnx.TensorProto.FLOAT, 2)]
    values = [*model.graph.input, *model.graph.output]
    if len(model.graph.input) != 1 or len(model.graph.output) != 1:
        names = ", ".join(v.name for v in values)
        return Check(name="interface", passed=False, found=f"{len(values)} inputs and outputs ({names}), one of each was expected")
    found = []
    for value in values:
        tensor = value.type.tensor_type
        dims = [d.dim_value for d in tensor.shape.dim]
        found.append((value.name, tensor.elem_type, dims[1] if len(dims) == 2 and dims[0] == 0 else None))
    text = ", ".join(f"{name} {onnx.TensorProto.DataType.Name(kind).lower()} (any, {width})" for name, kind, width in found)
    return Check(name="interface", passed=found == expected, found=text)


def _check_properties(model: onnx.ModelProto) -> Check:
    properties = {p.key: p.value for p in model.metadata_props}
    fingerprint = properties.get(PROP_FINGERPRINT)
    if fingerprint != FINGERPRINT:
        return Check(name="fingerprint", passed=False, found=f"features {fingerprint}, the contract's are {FINGERPRINT}")
    if properties.get(PROP_FEATURES) != msgspec.json.encode(FEATURE_NAMES).decode():
        return Check(name="fingerprint", passed=False, found="the names of the columns differ from the contract's")
    return Check(name="fingerprint", passed=True, found=f"features {fingerprint}")


def _comparisons(session: onnxruntime.InferenceSession, exported: Export, booster: xgboost.Booster, sample: Floats) -> list[Check]:
    chosen = sample[:: -(-len(sample) // SAMPLE_ROWS_MAX)]
    all_missing = np.full((1, sample.shape[1]), np.nan, np.float32)
    rows: dict[str, Callable[[], Floats]] = {
        "training rows": lambda: chosen,
        "missing values": lambda: np.concatenate([all_missing, _with_missing(chosen)]),
        "infinities, zeros, extremes": lambda: extreme_rows(chosen),
        "values at each split": lambda: split_probes(trees_of(booster), chosen),
    }
    checks = [_compare(name, session, make(), lambda x: probabilities(booster, x)) for name, make in rows.items()]
    checks.append(_compare("golden rows", session, exported.golden_features, lambda _: exported.golden_probability))
    return checks


def _with_missing(rows: Floats) -> Floats:
    """The rows with one column unknown in each, in turn."""
    out = rows.copy()
    out[np.arange(len(out)), np.arange(len(out)) % out.shape[1]] = np.nan
    return out


def _compare(name: str, session: onnxruntime.InferenceSession, rows: Floats, truth: Callable[[Floats], Floats]) -> Check:
    """Both columns of the output against XGBoost's probability: the first is its complement."""
    try:
        out = session.run([OUTPUT_NAME], {INPUT_NAME: rows})[0]
    except LOAD_ERRORS as exc:
        return Check(name=name, passed=False, found=f"ONNX Runtime fails: {_first_line(exc)}")
    if out.shape != (len(rows), 2):
        return Check(name=name, passed=False, found=f"{len(rows)} rows gave an output of shape {out.shape}")
    unusable = int((~np.isfinite(out)).any(axis=1).sum())
    if unusable:
        return Check(name=name, passed=False, found=f"{unusable} of {len(rows)} rows have a probability that is no number")
    expected = truth(rows).astype(np.float64)
    difference = np.abs(out.astype(np.float64) - np.stack([1 - expected, expected], axis=1)).max(axis=1)
    largest = float(difference.max())
    differing = int((difference > GOLDEN_TOLERANCE).sum())
    return Check(
        name=name,
        passed=differing == 0,
        found=f"{differing} of {len(rows)} rows differ from XGBoost by more than {GOLDEN_TOLERANCE:g}, the largest {largest:.1e}",
        largest_difference=largest,
    )


def open_session(onnx_bytes: bytes) -> onnxruntime.InferenceSession:
    """As the gateway opens it: one thread. Raises one of LOAD_ERRORS."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    return onnxruntime.InferenceSession(onnx_bytes, options, providers=["CPUExecutionProvider"])


def _first_line(exc: Exception) -> str:
    return str(exc).strip().split("\n", 1)[0][:200]
