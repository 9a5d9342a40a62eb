"""The admission of a model: the checks of its export, then of what it decides, how fast, and how well, each of which can refuse it.

Called by `fraudgate train` and `fraudgate retrain`. The report is the file admission.json of the package and travels with it; an
alias is only ever given to a version whose report says that every check passed. Takes some seconds for 100,000 rows.
"""

from __future__ import annotations

import dataclasses
import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import msgspec
import numpy as np
import numpy.typing as npt
import onnxruntime
import xgboost

from gateway.contracts.features import FEATURE_INDEX
from gateway.contracts.model_meta import (
    ADMISSION_FILE,
    GOLDEN_FILE,
    INPUT_NAME,
    METADATA_FILE,
    MODEL_FILE,
    OUTPUT_NAME,
    ModelMetadata,
)
from model_export.admission_quality import (
    AP_LOSS_LOW_MAX,
    AP_LOSS_MAX,
    SliceFinding,
    ap_floor,
    average_precision,
    is_worse,
    judge_slices,
    slices,
)
from model_export.checks import Check, check_export, open_session
from model_export.dataset import Floats, TrainingSet
from model_export.export import Export, golden_bytes
from model_export.policy_bands import Bands, risk_scores
from model_export.training import PART_FRAUDS_MIN, TrainedModel, probabilities

PASSED: Literal["passed"] = "passed"
REFUSED: Literal["refused"] = "refused"

# Decisions are compared on all rows up to this many, the newest.
FLIP_ROWS_MAX = 100_000
# What one call may take, by rows, as the median of repeats on one thread. A model of 85 trees took 0.008, 0.2 and 0.9 ms: the ceilings
# leave room for machines that are slow or busy; the gateway has 40 ms for all that is not Redis (docs/settings.md).
LATENCY_MS_MAX = {1: 2.0, 64: 8.0, 256: 20.0}
LATENCY_REPEATS = 50
LATENCY_WARM_UP = 5
# Slices that the message of a refusal names; the table has them all.
SLICES_NAMED_MAX = 3


class Admission(msgspec.Struct, frozen=True, kw_only=True):
    """The report. `champion` is the version that the candidate was compared with, None when there was none that could be.

    `files` has the sha256 of each file that was judged, so that a report can't be taken for another model's.
    """

    verdict: Literal["passed", "refused"]
    checked_at_ms: int
    champion: str | None
    checks: list[Check]
    slices: list[SliceFinding]
    files: dict[str, str]

    @property
    def passed(self) -> bool:
        return self.verdict == PASSED

    def failed(self) -> list[Check]:
        return [check for check in self.checks if not check.passed]


@dataclass(frozen=True, kw_only=True)
class Champion:
    """The model to be compared with: its version, its file, and the event time of the newest row it was grown on, if it says."""

    version: str
    onnx_bytes: bytes
    training_end_ms: int | None


def read_champion(package: Path) -> Champion:
    """From the verified files of a package."""
    metadata = msgspec.json.decode((package / METADATA_FILE).read_bytes(), type=ModelMetadata)
    return Champion(
        version=metadata.version,
        onnx_bytes=(package / MODEL_FILE).read_bytes(),
        training_end_ms=metadata.training_end_ms,
    )


def admit(
    exported: Export,
    model: TrainedModel,
    data: TrainingSet,
    bands: Bands,
    champion: Champion | None,
    no_champion: str = "no champion",
) -> Admission:
    """All checks. Those that score rows are left out when the export itself is refused. `no_champion` says why there is none."""
    checks = check_export(exported, model.booster, data.features)
    found: list[SliceFinding] = []
    if all(check.passed for check in checks):
        session = open_session(exported.onnx_bytes)
        checks.append(check_flips(session, model.booster, data.features[-FLIP_ROWS_MAX:], bands))
        checks += [check_latency(session, data.features, rows) for rows in LATENCY_MS_MAX]
        quality, found = _check_quality(session, model, data, bands, champion, no_champion)
        checks += quality
    return Admission(
        verdict=PASSED if all(check.passed for check in checks) else REFUSED,
        checked_at_ms=time.time_ns() // 1_000_000,
        champion=None if champion is None else champion.version,
        checks=checks,
        slices=found,
        files=judged_files(exported),
    )


def judged_files(exported: Export) -> dict[str, str]:
    """sha256 in hex of each file of an export."""
    contents = {
        MODEL_FILE: exported.onnx_bytes,
        GOLDEN_FILE: golden_bytes(exported.golden_features, exported.golden_probability),
        **exported.extras,
    }
    return {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}


def with_report(exported: Export, admission: Admission) -> Export:
    """The export with its report as one of the package's files."""
    return dataclasses.replace(exported, extras={**exported.extras, ADMISSION_FILE: report_bytes(admission)})


def report_bytes(admission: Admission) -> bytes:
    return msgspec.json.format(msgspec.json.encode(admission), indent=2)


def read_report(package: Path) -> Admission | None:
    """The report of a package, None when it has none. Raises msgspec.DecodeError when it can't be read."""
    try:
        return msgspec.json.decode((package / ADMISSION_FILE).read_bytes(), type=Admission)
    except FileNotFoundError:
        return None


def scored(session: onnxruntime.InferenceSession, rows: Floats) -> npt.NDArray[np.float64]:
    """The probability of fraud of each row, (rows,), as the gateway gets it."""
    out: npt.NDArray[np.float64] = session.run([OUTPUT_NAME], {INPUT_NAME: rows})[0][:, 1].astype(np.float64)
    return out


def check_flips(session: onnxruntime.InferenceSession, booster: xgboost.Booster, rows: Floats, bands: Bands) -> Check:
    """Whether the exported model decides anything otherwise than XGBoost's, at the policy's thresholds for the row's amount."""
    exported, native = scored(session, rows), probabilities(booster, rows).astype(np.float64)
    amount = rows[:, FEATURE_INDEX["amount_minor"]]
    score, native_score = risk_scores(exported), risk_scores(native)
    flipped = bands.severity(score, amount) != bands.severity(native_score, amount)
    largest = float(np.abs(exported - native).max())
    return Check(
        name="label flips",
        passed=not flipped.any(),
        found=f"{int(flipped.sum())} of {len(rows)} decisions changed, {int((score != native_score).sum())} scores by rounding, "
        f"the largest difference {largest:.1e}",
        largest_difference=largest,
    )


def check_latency(
    session: onnxruntime.InferenceSession, sample: Floats, rows: int, clock_s: Callable[[], float] = time.perf_counter
) -> Check:
    """The median of repeated calls with a batch of `rows`, against its ceiling."""
    batch = sample[np.arange(rows) % len(sample)]
    took_ms = np.empty(LATENCY_REPEATS)
    for i in range(-LATENCY_WARM_UP, LATENCY_REPEATS):
        started = clock_s()
        session.run([OUTPUT_NAME], {INPUT_NAME: batch})
        took_ms[max(i, 0)] = (clock_s() - started) * 1000
    median, ceiling = float(np.median(took_ms)), LATENCY_MS_MAX[rows]
    return Check(
        name=f"latency at batch {rows}",
        passed=median <= ceiling,
        found=f"{median:.3f} ms, the median of {LATENCY_REPEATS}, of at most {ceiling:g}",
    )


def _check_quality(
    session: onnxruntime.InferenceSession,
    model: TrainedModel,
    data: TrainingSet,
    bands: Bands,
    champion: Champion | None,
    no_champion: str,
) -> tuple[list[Check], list[SliceFinding]]:
    """Quality and slices on the newest part of the rows, which the candidate was not grown on."""
    part, note = _rows_to_compare(data, model, champion)
    features, is_fraud = data.features[part], data.is_fraud[part]
    candidate = scored(session, features)
    before = None if champion is None else scored(open_session(champion.onnx_bytes), features)
    interval = average_precision(is_fraud, candidate, before)
    on = f"on {len(is_fraud)} rows with {int(is_fraud.sum())} frauds{note}"
    if champion is None:
        floor = ap_floor(float(is_fraud.mean()))
        quality = Check(
            name="quality",
            passed=interval.value >= floor and interval.low > float(is_fraud.mean()),
            found=f"{no_champion}: average precision {interval.value:.4f} ({interval.low:.4f} to {interval.high:.4f}) of at least "
            f"{floor:.4f} {on}",
        )
    else:
        quality = Check(
            name="quality",
            passed=not is_worse(interval),
            found=f"average precision {interval.value:+.4f} ({interval.low:+.4f} to {interval.high:+.4f}) against champion version "
            f"{champion.version}, allowed {-AP_LOSS_MAX:+g} and from {-AP_LOSS_LOW_MAX:+g}, {on}",
        )
    country = None if data.country is None else data.country[part]
    found = judge_slices(list(slices(features, country, is_fraud, bands)), is_fraud, candidate, before)
    return [quality, _check_slices(found)], found


def _rows_to_compare(data: TrainingSet, model: TrainedModel, champion: Champion | None) -> tuple[slice, str]:
    """The candidate's test rows; of them those that the champion wasn't grown on either, where they have enough frauds."""
    test = model.split.test
    if champion is None or champion.training_end_ms is None:
        return test, ""
    fresh = slice(max(test.start, int(np.searchsorted(data.event_time_ms, champion.training_end_ms, side="right"))), test.stop)
    if fresh == test:
        return test, ""
    frauds = int(data.is_fraud[fresh].sum())
    if frauds < PART_FRAUDS_MIN or frauds == fresh.stop - fresh.start:
        return test, ", some of which the champion was grown on"
    return fresh, ", the newest, which the champion wasn't grown on"


def _check_slices(found: list[SliceFinding]) -> Check:
    if not found:
        return Check(name="slices", passed=True, found="none has enough frauds to be judged")
    refused = [f for f in found if not f.passed]
    named = (refused or found)[: SLICES_NAMED_MAX if refused else 1]
    text = "; ".join(_told(f) for f in named) + (f"; and {len(refused) - len(named)} more" if len(refused) > len(named) else "")
    return Check(
        name="slices",
        passed=not refused,
        found=f"{len(refused)} of {len(found)} fall below their floor{': ' if refused else ', the weakest: '}{text}",
    )


def _told(f: SliceFinding) -> str:
    against = f", the champion's {f.champion:.3f}" if f.champion is not None else ""
    return f"{f.name} recall {f.recall:.3f}{against}, AUC {_number(f.auc)}, {f.frauds} frauds"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def report(admission: Admission) -> str:
    """The report as tables for a terminal."""
    lines = [f"  {'ok' if check.passed else 'FAILED':<7}{check.name:<29}{check.found}" for check in admission.checks]
    if admission.slices:
        lines += ["", f"  {'slice':<32}{'rows':>8}{'frauds':>8}{'recall':>8}{'champion':>10}{'AUC':>8}{'p':>9}"]
        lines += [
            f"  {f.name:<32}{f.rows:>8}{f.frauds:>8}{f.recall:>8.3f}{_number(f.champion):>10}{_number(f.auc):>8}{f.p_value:>9.2g}"
            f"{'' if f.passed else '  FAILED'}"
            for f in admission.slices
        ]
    return "\n".join(lines)
