"""How far a day's payments are from the champion's training rows, and how the label rate moves as labels mature. For `fraudgate drift`.

The same statistics as the stream's (gateway/contracts/drift.py), over a whole day of event time (UTC), computed from the receipts in Delta
again: it needs neither the stream nor its table, whose alarms it lists where they are. 20,000 receipts take some 4 s.
"""

from __future__ import annotations

from dataclasses import dataclass

import msgspec
import numpy as np
import numpy.typing as npt
import pyarrow.compute as pc
from deltalake import DeltaTable
from deltalake.exceptions import TableNotFoundError

from gateway.contracts import tables
from gateway.contracts.decision import Outcome, Route
from gateway.contracts.drift import Rows, expected_of, histogram, look
from gateway.contracts.features import FEATURE_NAMES
from gateway.contracts.model_meta import MODEL_FILE, REFERENCE_FILE, read_manifest
from gateway.contracts.reference import (
    CLOCK,
    DECISION,
    HOURS,
    MEASURE_INDEX,
    MEASURES,
    SCORE_MEASURES,
    Reference,
    ReferenceRefusedError,
    bins_of,
    clock_values,
    decode,
    hour_of,
    score_values,
)
from gateway.contracts.settings import Settings
from model_export.compare import MATURE_DAYS, share
from model_export.errors import ModelExportError
from model_export.live import DAY_MS, Receipts, newest_receipt_ms, read_labels, read_payments, read_receipts
from model_export.offpolicy import CONFIDENCE, Interval, effective_labels

# Days of payments whose label rate is shown, the day of the report being the last.
LABEL_DAYS = 30
OUTCOMES = tuple(outcome.value for outcome in Outcome)


class NoReferenceError(ModelExportError):
    """The champion of the model directory has no training reference."""


class MeasureDrift(msgspec.Struct, frozen=True, kw_only=True):
    """`edges`: upper ends of the bins, the last but one having none and the last being of unknown values; shares by bin."""

    measure: str
    rows: int
    psi: float
    ks: float
    threshold: float | None
    alarm: bool
    edges: list[float]
    expected: list[float]
    observed: list[float]


class Hour(msgspec.Struct, frozen=True, kw_only=True):
    """Receipts of an hour of the day, the shares of their outcomes, and their mean risk score where a model scored."""

    hour: int
    receipts: int
    outcomes: dict[str, float]
    mean_score: float | None


class LabelDay(msgspec.Struct, frozen=True, kw_only=True):
    """Payments of an event day, of which so many are known as fraud; `rate` counts many payments of one card for less than as many cards'.

    `known_share`: the share of labels that come by this age, as older days had it; `expected_rate`: what the rate comes to when they all
    have. `mature`: old enough. `differs`: mature, and further from the training rows' rate than one of LABEL_DAYS days would be by chance.
    """

    day_ms: int
    payments: int
    frauds: int
    rate: Interval
    known_share: float | None
    expected_rate: float | None
    mature: bool
    differs: bool


class StreamAlarm(msgspec.Struct, frozen=True, kw_only=True):
    """A row of the table `drift` that is an alarm."""

    window_end_ms: int
    measure: str
    psi: float


class DriftReport(msgspec.Struct, frozen=True, kw_only=True):
    """`measures` by falling PSI in parts of their threshold; those without one last."""

    day_ms: int
    model: str
    reference_rows: int
    reference_from_ms: int
    reference_to_ms: int
    reference_label_rate: float
    receipts: int
    left_out: int
    measures: list[MeasureDrift]
    hours: list[Hour]
    labels: list[LabelDay]
    alarms: list[StreamAlarm]


@dataclass(frozen=True)
class Trained:
    """The champion and what it was trained on."""

    name: str
    digest: str
    reference: Reference


def report(settings: Settings, day_ms: int | None = None) -> DriftReport:
    """Of the UTC day that begins at `day_ms` (default: the newest with receipts). Raises a `ModelExportError`."""
    trained = read_trained(settings)
    if day_ms is None:
        day_ms = newest_receipt_ms(settings) // DAY_MS * DAY_MS
    receipts = read_receipts(settings, day_ms, day_ms + DAY_MS)
    reference = trained.reference
    return DriftReport(
        day_ms=day_ms,
        model=trained.name,
        reference_rows=reference.rows,
        reference_from_ms=reference.from_ms,
        reference_to_ms=reference.to_ms,
        reference_label_rate=reference.label_rate,
        receipts=len(receipts),
        left_out=receipts.left_out,
        measures=measure_drifts(trained, receipts),
        hours=_hours(receipts),
        labels=label_days(settings, day_ms, reference.label_rate),
        alarms=_alarms(settings, day_ms),
    )


def read_trained(settings: Settings) -> Trained:
    """Raises `NoReferenceError`."""
    try:
        entry = read_manifest(settings.models_path).routes.get(Route.CHAMPION.value)
        if entry is None:
            raise NoReferenceError(f"the model directory {settings.models_path} has no champion; bring one with: fraudgate pull")
        if REFERENCE_FILE not in entry.files:
            raise NoReferenceError(f"{entry.name} version {entry.version} was trained before there were references; train anew")
        reference = decode((settings.models_path / entry.directory / REFERENCE_FILE).read_bytes())
    except FileNotFoundError as exc:
        raise NoReferenceError(f"there is no champion at {settings.models_path}; bring one with: fraudgate pull") from exc
    except (OSError, msgspec.DecodeError, ReferenceRefusedError) as exc:
        raise NoReferenceError(f"the champion's training reference can't be read: {exc}") from exc
    return Trained(f"{entry.name} version {entry.version}", entry.files[MODEL_FILE], reference)


def measure_drifts(trained: Trained, receipts: Receipts) -> list[MeasureDrift]:
    reference = trained.reference
    rows = _binned(trained, receipts)
    expected = expected_of(reference)
    seen = look(expected, rows)
    found = []
    for i, name in enumerate(MEASURES):
        says = rows.bins[:, i] >= 0
        if not says.any() or not reference.rows_of()[i]:
            continue
        mine = rows.take(says)
        observed = histogram(np.maximum(mine.bins, 0))[i]
        wanted = expected.counts(np.bincount(mine.hour, minlength=HOURS), mine.clock)[i]
        n = int(reference.bins[i])
        threshold = float(seen.threshold[i])
        found.append(
            MeasureDrift(
                measure=name,
                rows=int(seen.rows[i]),
                psi=float(seen.psi[i]),
                ks=float(seen.ks[i]),
                threshold=threshold if np.isfinite(threshold) else None,
                alarm=bool(seen.alarm[i]),
                edges=reference.edges[i, : n - 2].tolist(),
                expected=(wanted / wanted.sum())[:n].tolist(),
                observed=(observed / observed.sum())[:n].tolist(),
            )
        )
    return sorted(found, key=lambda m: (m.threshold is None, -m.psi / (m.threshold or 1.0)))


def _binned(trained: Trained, receipts: Receipts) -> Rows:
    """Features of answers that had them all; scores and outcomes of the champion's own receipts."""
    reference, width = trained.reference, len(FEATURE_NAMES)
    values = np.full((len(receipts), len(MEASURES)), np.nan)
    values[:, :width] = receipts.features
    own = receipts.whole & (receipts.model_digest == trained.digest)
    values[:, -len(SCORE_MEASURES) :] = score_values(np.where(own, receipts.score, np.nan), receipts.policy_decision)
    bins = bins_of(reference.edges, reference.bins, values)
    bins[~receipts.full, :width] = -1
    bins[~own, width:] = -1
    if not reference.rows_of()[MEASURE_INDEX[DECISION]]:
        bins[:, MEASURE_INDEX[DECISION]] = -1
    clock = bins_of(reference.edges[CLOCK], reference.bins[CLOCK], clock_values(receipts.event_time_ms))
    ids = np.full((len(receipts), 4), -1, np.int64)
    ids[:, 0] = receipts.card
    return Rows(bins, clock, hour_of(receipts.event_time_ms).astype(np.int8), ids)


def _hours(receipts: Receipts) -> list[Hour]:
    hour = hour_of(receipts.event_time_ms)
    found = []
    for h in range(HOURS):
        mine = hour == h
        n = int(mine.sum())
        counts = np.bincount(receipts.decision[mine], minlength=len(OUTCOMES))
        scored = mine & np.isfinite(receipts.probability)
        found.append(
            Hour(
                hour=h,
                receipts=n,
                outcomes={name: int(k) / n if n else 0.0 for name, k in zip(OUTCOMES, counts, strict=True)},
                mean_score=float(receipts.score[scored].mean()) if scored.any() else None,
            )
        )
    return found


def label_days(settings: Settings, day_ms: int, reference_rate: float, as_of_ms: int | None = None) -> list[LabelDay]:
    """The label rate by event day of the LABEL_DAYS through the day of the report, with the labels known at `as_of_ms` (default: all)."""
    first_ms = day_ms - (LABEL_DAYS - 1) * DAY_MS
    ids, t_ms, card = read_payments(settings, first_ms, day_ms + DAY_MS)
    if not len(t_ms):
        return []
    labels = read_labels(settings, ids, as_of_ms)
    as_of_ms = max(int(t_ms.max()), labels.newest_ms) if as_of_ms is None else as_of_ms
    old = labels.is_fraud & (t_ms < as_of_ms - 2 * MATURE_DAYS * DAY_MS)
    delays = np.sort(labels.reported_ms[old] - t_ms[old])
    found = []
    for start in range(first_ms, day_ms + DAY_MS, DAY_MS):
        mine = (t_ms >= start) & (t_ms < start + DAY_MS)
        n, k = int(mine.sum()), int((mine & labels.is_fraud).sum())
        if not n:
            continue
        age_ms = as_of_ms - start - DAY_MS // 2
        known = float(np.searchsorted(delays, age_ms, side="right") / len(delays)) if len(delays) else None
        mature = as_of_ms >= start + DAY_MS + MATURE_DAYS * DAY_MS
        rate = _clustered(labels.is_fraud[mine], card[mine], CONFIDENCE)
        wide = _clustered(labels.is_fraud[mine], card[mine], 1 - (1 - CONFIDENCE) / LABEL_DAYS)
        outside = wide.low is not None and wide.high is not None and not wide.low <= reference_rate <= wide.high
        found.append(
            LabelDay(
                day_ms=start,
                payments=n,
                frauds=k,
                rate=rate,
                known_share=known,
                expected_rate=min(1.0, k / n / known) if known else None,
                mature=mature,
                differs=mature and outside,
            )
        )
    return found


def _clustered(is_fraud: npt.NDArray[np.bool_], card: npt.NDArray[np.int64], confidence: float) -> Interval:
    k, n = effective_labels(np.ones(len(is_fraud)), is_fraud, card)
    found = share(k, n, confidence)
    return Interval(value=float(is_fraud.mean()), low=found.low, high=found.high)


def _alarms(settings: Settings, day_ms: int) -> list[StreamAlarm]:
    """Of the stream's windows that ended on that day; none where it has not run."""
    uri = tables.table_uri(settings.tables, tables.DRIFT).replace("s3a://", "s3://", 1)
    try:
        held = DeltaTable(uri).to_pyarrow_dataset()
    except TableNotFoundError:
        return []
    wanted = pc.field("alarm") & (pc.field("window_end_ms") > day_ms) & (pc.field("window_end_ms") <= day_ms + DAY_MS)
    rows = held.to_table(columns=["window_end_ms", "measure", "psi"], filter=wanted)
    return [StreamAlarm(**row) for row in rows.sort_by([("window_end_ms", "ascending"), ("measure", "ascending")]).to_pylist()]
