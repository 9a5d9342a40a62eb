"""What a model's training rows looked like, as histograms: the file reference.npz of a model package, and how live rows are binned by it.

Written at export (`model_export.reference`), read by the feature jobs and the reports. A measure is a feature, or one of the model's
score and outcome (`SCORE_MEASURES`). The last bin of each measure holds NaN. numpy alone.
"""

from __future__ import annotations

import io
import zipfile
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt

from gateway.contracts.decision import RISK_SCORE_MAX, Outcome
from gateway.contracts.features import FEATURE_NAMES, FINGERPRINT, REQUEST_FEATURES, RequestColumns

Floats = npt.NDArray[np.float64]
Counts = npt.NDArray[np.int64]
Bins = npt.NDArray[np.int8]

HOURS = 24
HOUR_MS = 3_600_000
DAY_MS = HOURS * HOUR_MS
FORMAT_VERSION = 1
# Bins for values, by the quantiles of the training rows: at most.
QUANTILE_BINS_MAX = 10
# Two more for what lies below and above all training rows.
VALUE_BINS_MAX = QUANTILE_BINS_MAX + 2
BINS_MAX = VALUE_BINS_MAX + 1
RISK_SCORE, SCORE_BAND, DECISION = "risk_score", "score_band", "decision"
SCORE_MEASURES = (RISK_SCORE, SCORE_BAND, DECISION)
MEASURES: tuple[str, ...] = (*FEATURE_NAMES, *SCORE_MEASURES)
MEASURE_INDEX = {name: i for i, name in enumerate(MEASURES)}
# Risk scores from which the bands of `score_band` begin: where the policy that ships challenges, reviews and declines a payment of 200
# to 1,000 units.
SCORE_BANDS = (400, 600, 850)
OUTCOME_CODE = {outcome.value: i for i, outcome in enumerate(Outcome)}
# Features that a payment's time alone decides: they are compared with the clock, not with the training rows.
CLOCK_FEATURES = ("hour", "weekday", "is_night", "is_weekend")
CLOCK = np.array([MEASURE_INDEX[name] for name in CLOCK_FEATURES])
# Training rows of an hour are worth as much as this many rows of all hours: what an hour has few of is taken from the day.
HOUR_PRIOR_ROWS = 50.0
# Added to each bin that the training rows left empty, so that a value never seen is rare and not impossible.
EMPTY_BIN_ROWS = 0.5


class ReferenceRefusedError(ValueError):
    """A file that is no reference, or one of other features. The message says which."""


@dataclass(frozen=True, kw_only=True)
class Reference:
    """Histograms of the training rows by hour of the day (UTC), and what a quiet time looks like in them.

    By measure, in the order of MEASURES: `edges` (measures, VALUE_BINS_MAX - 1) are the bins' upper ends, included, padded with infinity;
    `bins` (measures,) how many bins it has, that of NaN included; `counts` (HOURS, measures, BINS_MAX) rows. A measure that the training
    rows don't have has no counts. `dispersion` (measures,): by how much windows of quiet training rows differ more than independent rows
    would; `base` (measures,): the PSI by which days of the training rows differ from all of them; `quantile` (measures,): the chi-square
    value of the chance of a false alarm `alpha`; `settled` (measures,): False where the older half of the training rows differs from the
    newer one, so that no alarm can be told from the training rows' own movement.
    """

    edges: Floats
    bins: Counts
    counts: Counts
    dispersion: Floats
    base: Floats
    quantile: Floats
    settled: npt.NDArray[np.bool_]
    alpha: float
    rows: int
    frauds: int
    from_ms: int
    to_ms: int

    @property
    def label_rate(self) -> float:
        return self.frauds / self.rows

    def rows_of(self) -> Counts:
        """Training rows behind each measure, (measures,)."""
        out: Counts = self.counts[:, :, :].sum(axis=(0, 2))
        return out

    def shares(self) -> Floats:
        """The share of each bin over all hours, (measures, BINS_MAX); 0 beyond a measure's bins. Each used measure's sum to 1."""
        return _shares(self.counts.sum(axis=0).astype(np.float64), self.bins)

    def shares_by_hour(self) -> Floats:
        """(HOURS, measures, BINS_MAX): those of the hour's rows, drawn towards those of the whole day."""
        prior = self.counts + HOUR_PRIOR_ROWS * self.shares()
        return _shares(prior, self.bins)


def _shares(counts: Floats, bins: Counts) -> Floats:
    used = np.arange(BINS_MAX) < bins[:, None]
    filled = np.where(used, counts + np.where(counts == 0, EMPTY_BIN_ROWS, 0.0), 0.0)
    out: Floats = filled / filled.sum(axis=-1, keepdims=True)
    return out


def value_edges(values: Floats) -> Floats:
    """Upper ends of the bins of one measure, increasing, of (rows,) values without NaN: just below the least value, and its quantiles up to
    the largest. Of few values each is one. Beyond the last end lies what is larger than any."""
    if not len(values):
        return np.empty(0)
    least = np.nextafter(np.float32(values.min()), np.float32(-np.inf)).astype(np.float64)
    distinct = np.unique(values)
    if len(distinct) > QUANTILE_BINS_MAX:
        distinct = np.unique(np.quantile(values, np.linspace(0, 1, QUANTILE_BINS_MAX + 1)[1:], method="inverted_cdf"))
    return np.concatenate([[least], distinct])


def padded(edges: list[Floats]) -> tuple[Floats, Counts]:
    """(edges, bins) of a Reference from each measure's own edges."""
    out = np.full((len(edges), VALUE_BINS_MAX - 1), np.inf)
    for row, own in zip(out, edges, strict=True):
        row[: len(own)] = own
    return out, np.array([len(own) + 2 for own in edges], np.int64)


def bins_of(edges: Floats, bins: Counts, values: npt.NDArray[np.floating]) -> Bins:
    """The bin of each value, (rows, measures) int8, by `edges` and `bins` of those measures. Costs about 20 ns a value."""
    out = np.empty(values.shape, np.int8)
    for i in range(values.shape[1]):
        column = values[:, i]
        out[:, i] = np.searchsorted(edges[i, : bins[i] - 2], column, side="left")
        out[np.isnan(column), i] = bins[i] - 1
    return out


def clock_values(event_time_ms: npt.NDArray[np.int64]) -> Floats:
    """What CLOCK_FEATURES must be, (rows, 4)."""
    unknown = np.full(len(event_time_ms), np.nan)
    request = RequestColumns(event_time_ms, np.zeros(len(event_time_ms), np.int64), *([unknown] * 6))
    return np.stack([REQUEST_FEATURES[name](request) for name in CLOCK_FEATURES], axis=1)


def hour_of(event_time_ms: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Hour of the day, UTC."""
    out: npt.NDArray[np.int64] = event_time_ms % DAY_MS // HOUR_MS
    return out


def score_values(
    risk_score: npt.NDArray[np.integer] | Floats, decision: npt.NDArray[np.integer] | Floats | None = None
) -> npt.NDArray[np.float64]:
    """The values of SCORE_MEASURES, (rows, 3). `risk_score` is NaN where no model scored; `decision` holds OUTCOME_CODE."""
    score = np.asarray(risk_score, np.float64)
    assert not (score > RISK_SCORE_MAX).any(), "a risk score is 0..1000"
    band = np.searchsorted(SCORE_BANDS, score, side="right").astype(np.float64)
    band[np.isnan(score)] = np.nan
    outcome = np.full(len(score), np.nan) if decision is None else np.asarray(decision, np.float64)
    return np.stack([score, band, outcome], axis=1)


def encode(reference: Reference) -> bytes:
    """The file reference.npz."""
    buffer = io.BytesIO()
    arrays = {f.name: np.asarray(getattr(reference, f.name)) for f in fields(Reference)}
    head = {"version": np.array(FORMAT_VERSION), "fingerprint": np.array(FINGERPRINT), "measures": np.array(MEASURES)}
    np.savez_compressed(buffer, allow_pickle=False, **head, **arrays)
    return buffer.getvalue()


def decode(data: bytes) -> Reference:
    """Raises `ReferenceRefusedError` for what isn't a reference of this code's features."""
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as held:
            version, fingerprint = int(held["version"]), str(held["fingerprint"])
            if version != FORMAT_VERSION:
                raise ReferenceRefusedError(f"the reference has format {version}, this code reads {FORMAT_VERSION}")
            if fingerprint != FINGERPRINT or tuple(held["measures"].tolist()) != MEASURES:
                raise ReferenceRefusedError(f"the reference is of features {fingerprint}, this code computes {FINGERPRINT}")
            arrays = {f.name: held[f.name] for f in fields(Reference)}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as exc:
        if isinstance(exc, ReferenceRefusedError):
            raise
        raise ReferenceRefusedError(f"the reference can't be read: {exc}") from exc
    n = len(MEASURES)
    shapes = {"edges": (n, VALUE_BINS_MAX - 1), "counts": (HOURS, n, BINS_MAX)} | dict.fromkeys(
        ("bins", "dispersion", "base", "quantile", "settled"), (n,)
    )
    for name, shape in shapes.items():
        if arrays[name].shape != shape:
            raise ReferenceRefusedError(f"{name} of the reference has shape {arrays[name].shape}, not {shape}")
    if not ((arrays["bins"] >= 2) & (arrays["bins"] <= BINS_MAX)).all() or arrays["rows"] < 1:
        raise ReferenceRefusedError("the reference has impossible sizes")
    values: dict[str, Any] = dict(arrays) | {name: int(arrays[name]) for name in ("rows", "frauds", "from_ms", "to_ms")}
    return Reference(**values | {"alpha": float(arrays["alpha"])})
