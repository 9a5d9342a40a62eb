"""The training reference: what the rows that a model was trained on looked like, written with the model as reference.npz.

Called at export; some seconds for 300,000 rows. What is in it and how it is read: gateway/contracts/reference.py. What a quiet time
looks like is learnt here from the training rows themselves, so that the alarms of feature_jobs.drift need no tuning.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt
from scipy.stats import chi2

from gateway.contracts import reference as contract
from gateway.contracts.decision import Outcome
from gateway.contracts.drift import ALPHA, WINDOW_MS, WINDOW_ROWS_MIN, expected_of, histogram, psi
from gateway.contracts.features import FEATURE_INDEX
from gateway.contracts.model_meta import REFERENCE_FILE
from gateway.contracts.reference import (
    BINS_MAX,
    CLOCK,
    DAY_MS,
    HOURS,
    MEASURES,
    SCORE_BANDS,
    SCORE_MEASURES,
    Bins,
    Counts,
    Floats,
    Reference,
    bins_of,
    clock_values,
    hour_of,
    padded,
    score_values,
    value_edges,
)
from model_export.dataset import TrainingSet
from model_export.export import Export
from model_export.policy_bands import Bands, risk_scores
from model_export.training import TrainedModel, probabilities

# Windows of training rows that dispersion is learnt from: at most the newest of these, which is four weeks.
WINDOWS_MAX = 4032
# With fewer, chance is taken to be what independent rows have, times DISPERSION_UNKNOWN.
WINDOWS_MIN = 50
DISPERSION_UNKNOWN = 3.0
# What the windows seen showed is exceeded by those to come.
DISPERSION_FACTOR = 1.25
# Parts of a day whose differences count as quiet.
PART_MS = DAY_MS // 4
PART_ROWS_MIN = 500
# The halves of the training rows of a measure that has come to rest differ by less.
SETTLED_PSI_MAX = 0.1


def make_reference(
    features: npt.NDArray[np.float32],
    is_fraud: npt.NDArray[np.bool_],
    event_time_ms: npt.NDArray[np.int64],
    probability: npt.NDArray[np.floating] | None = None,
    scored: slice | npt.NDArray[np.bool_] = slice(None),
    decision: npt.NDArray[np.integer] | None = None,
    alpha: float = ALPHA,
) -> Reference:
    """The reference of training rows in order of time: `features` (rows, features), the others (rows,).

    `probability` is the model's of the rows `scored`, which should be rows that its trees were not grown on: it knows those too well.
    `decision` are the outcomes of the same rows as OUTCOME_CODE. Without them their measures are left out.
    """
    values = np.full((len(features), len(MEASURES)), np.nan)
    values[:, : features.shape[1]] = features
    own = np.zeros(values.shape, bool)
    own[:, : features.shape[1]] = True
    if probability is not None:
        values[scored, -len(SCORE_MEASURES) :] = score_values(risk_scores(probability), decision)
        own[scored, -len(SCORE_MEASURES) :] = [True, True, decision is not None]
    edges, bins = _edges(values)
    binned = bins_of(edges, bins, values)
    binned[~own] = -1
    hour = hour_of(event_time_ms)
    counts = np.stack([_histogram(binned[hour == h]) for h in range(HOURS)]).astype(np.int64)
    held = counts.sum(axis=(0, 2))
    measures = len(MEASURES)
    plain = Reference(
        edges=edges,
        bins=bins,
        counts=counts,
        dispersion=np.ones(measures),
        base=np.zeros(measures),
        quantile=chi2.isf(alpha, _free(counts)),
        settled=held > 0,
        alpha=alpha,
        rows=len(features),
        frauds=int(is_fraud.sum()),
        from_ms=int(event_time_ms[0]),
        to_ms=int(event_time_ms[-1]),
    )
    clock = bins_of(edges[CLOCK], bins[CLOCK], clock_values(event_time_ms))
    seen = _Seen(plain, binned, clock, hour, event_time_ms)
    return dataclasses.replace(
        plain,
        dispersion=_dispersion(seen, ~is_fraud),
        base=_base(seen),
        settled=(held > 0) & (seen.halves_differ_by() <= SETTLED_PSI_MAX),
    )


def with_reference(exported: Export, data: TrainingSet, model: TrainedModel, bands: Bands) -> Export:
    """The export with reference.npz among its extras: of all rows of the training set, and of the scores of the newest ones, which the
    trees were not grown on. The outcomes are what the policy's `bands` make of those scores.
    """
    newest = model.split.test
    rows = data.features[newest]
    probability = probabilities(model.booster, rows)
    decision = bands.severity(risk_scores(probability), rows[:, FEATURE_INDEX["amount_minor"]])
    reference = make_reference(data.features, data.is_fraud, data.event_time_ms, probability, newest, decision)
    return dataclasses.replace(exported, extras={**exported.extras, REFERENCE_FILE: contract.encode(reference)})


def _edges(values: Floats) -> tuple[Floats, Counts]:
    """By quantiles; of what has few values, each value has its own bin."""
    known = {"score_band": len(SCORE_BANDS) + 1, "decision": len(Outcome)}
    edges = []
    for i, name in enumerate(MEASURES):
        if name in known:
            edges.append(np.arange(known[name] - 1, dtype=np.float64))
            continue
        column = values[~np.isnan(values[:, i]), i]
        edges.append(value_edges(column))
    return padded(edges)


def _histogram(bins: Bins) -> Floats:
    """Like drift.histogram, of which bins -1 are left out."""
    shifted = np.where(bins < 0, BINS_MAX - 1, bins).astype(np.int8)
    out = histogram(shifted)
    out[:, BINS_MAX - 1] -= (bins < 0).sum(axis=0)
    return out


def _free(counts: Counts) -> Counts:
    """Degrees of freedom of each measure: of bins that training rows fill, all but one."""
    out: Counts = np.maximum((counts.sum(axis=0) > 0).sum(axis=1) - 1, 1)
    return out


class _Seen:
    """The binned training rows, and how parts of them compare with all of them."""

    def __init__(
        self,
        reference: Reference,
        bins: Bins,
        clock: Bins,
        hour: npt.NDArray[np.int64],
        event_time_ms: npt.NDArray[np.int64],
    ) -> None:
        self.reference, self.bins, self.clock, self.hour, self.t_ms = reference, bins, clock, hour, event_time_ms
        self.expected = expected_of(reference)

    def compare(self, rows: slice | npt.NDArray[np.int64]) -> tuple[Floats, Floats]:
        """(rows, PSI) by measure of the training rows `rows`."""
        observed = _histogram(self.bins[rows])
        wanted = self.expected.counts(np.bincount(self.hour[rows], minlength=HOURS), self.clock[rows])
        return observed.sum(axis=1), psi(observed, wanted, self.reference.bins)

    def parts(self, length_ms: int, chosen: npt.NDArray[np.int64] | None = None) -> list[npt.NDArray[np.int64]]:
        """Places of the rows of each full stretch of `length_ms`, the newest last."""
        place = np.arange(len(self.t_ms)) if chosen is None else chosen
        t_ms = self.t_ms[place]
        cuts = np.searchsorted(t_ms, np.arange(t_ms[0] // length_ms * length_ms + length_ms, t_ms[-1] + 1, length_ms))
        return np.split(place, cuts)

    def halves_differ_by(self) -> Floats:
        """PSI of the older half of each measure's rows against the newer one, (measures,)."""
        middle = len(self.t_ms) // 2
        old, new = _histogram(self.bins[:middle]), _histogram(self.bins[middle:])
        both = (old.sum(axis=1) > 0) & (new.sum(axis=1) > 0)
        found = psi(old, new + contract.EMPTY_BIN_ROWS, self.reference.bins)
        # What few rows differ by, by chance.
        least = np.minimum(old.sum(axis=1), new.sum(axis=1))
        chance = self.reference.quantile * 2 / np.maximum(least, 1)
        out: Floats = np.where(both, np.maximum(found - chance, 0.0), 0.0)
        out[CLOCK] = 0.0
        return out


def _dispersion(seen: _Seen, genuine: npt.NDArray[np.bool_]) -> Floats:
    """How much more windows of genuine rows differ than independent rows would, (measures,), at least 1.

    By the mean of n * PSI against the chi-square's, and by its largest against the largest that so many windows of independent rows
    would show. Of genuine rows: an attack is one busy merchant or device, which the alarm leaves out.
    """
    free = _free(seen.reference.counts)
    found = []
    for rows in seen.parts(WINDOW_MS, np.flatnonzero(genuine))[-WINDOWS_MAX:]:
        if len(rows) >= WINDOW_ROWS_MIN:
            n, index = seen.compare(rows)
            found.append(np.where(n >= WINDOW_ROWS_MIN, n * index, np.nan))
    out = np.full(len(free), DISPERSION_UNKNOWN)
    if found:
        all_of = np.array(found)
        windows = (~np.isnan(all_of)).sum(axis=0)
        enough = windows >= WINDOWS_MIN
        largest = np.nanmax(all_of[:, enough], axis=0) / chi2.isf(1 / windows[enough], free[enough])
        mean = np.nanmean(all_of[:, enough], axis=0) / free[enough]
        out[enough] = DISPERSION_FACTOR * np.maximum(np.maximum(largest, mean), 1.0)
    out[CLOCK] = 1.0
    return out


def _base(seen: _Seen) -> Floats:
    """The largest PSI of a day, or a quarter of one, of the training rows against all of them, less what chance adds; (measures,)."""
    free = _free(seen.reference.counts)
    out = np.zeros(len(free))
    for length_ms in (DAY_MS, PART_MS):
        # The first and the last stretch are cut short.
        for rows in seen.parts(length_ms)[1:-1]:
            n, index = seen.compare(rows)
            chance = free / np.maximum(n, 1)
            out = np.maximum(out, np.where(n >= PART_ROWS_MIN, index - chance, 0.0))
    out[CLOCK] = 0.0
    return out
