"""How far the payments of a window are from the training rows: PSI and KS of each measure, and when that is an alarm.

Pure functions of `Reference` and of binned rows; numpy alone. Used by the feature jobs (each minute), by the reports, and by
`model_export.reference`, which finds out with them what quiet windows look like. A window of 100 rows takes 0.3 ms, of 20,000 15 ms.

An alarm asks for two things: a PSI that counts (PSI_EFFECT_MIN above what days of the training rows differ by) and that chance
doesn't explain. Chance: n * PSI of n independent rows is about chi-square with (bins - 1) degrees of freedom; rows of a window are
not independent, so the quantile is scaled by the dispersion that quiet training windows showed. Quantile and dispersion stand in the
reference, for a chance `ALPHA` a measure and window. And it asks for breadth: one busy card, merchant, device or address must not
make it, so the measure must also be beyond its threshold without the rows of the most frequent of each. An attack on one merchant is
not drift.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from gateway.contracts.reference import BINS_MAX, CLOCK, HOURS, MEASURES, Bins, Counts, Floats, Reference, padded

WINDOW_MS = 600_000
# Windows end at full minutes.
STEP_MS = 60_000
assert WINDOW_MS % STEP_MS == 0
# Fewer rows say nothing.
WINDOW_ROWS_MIN = 20
# 101 measures, a window each minute of a week: 1,018,000 tests, that share many rows, so that under 1 % of weeks have a false alarm.
ALPHA = 9e-9
assert ALPHA * len(MEASURES) * 7 * 24 * 60 < 0.01
# The usual reading of PSI: under 0.1 nothing has changed.
PSI_EFFECT_MIN = 0.1
# What days of the training rows differ by is doubled: the days to come are more than those seen.
BASE_FACTOR = 2.0
# Rows added to each bin, in proportion to what is expected there and to the number of bins: an empty bin has no logarithm.
SMOOTHING_ROWS = 0.5


@dataclass(frozen=True)
class Expected:
    """What the clock and the training rows make one expect: shares by hour of the day, (HOURS, measures, BINS_MAX)."""

    reference: Reference
    by_hour: Floats

    def counts(self, hour_rows: Counts, clock: Bins) -> Floats:
        """Expected rows, (measures, BINS_MAX), of rows whose hours are counted in `hour_rows` (HOURS,) and whose clock features must lie in
        the bins `clock` (rows, 4)."""
        out: Floats = np.tensordot(hour_rows.astype(np.float64), self.by_hour, axes=1)
        out[CLOCK] = histogram(clock)
        return out


def expected_of(reference: Reference) -> Expected:
    return Expected(reference, reference.shares_by_hour())


def histogram(bins: Bins) -> Floats:
    """Rows by bin, (measures, BINS_MAX), of the bins (rows, measures)."""
    measures = bins.shape[1]
    flat = bins.astype(np.int64) + BINS_MAX * np.arange(measures)
    return np.bincount(flat.reshape(-1), minlength=measures * BINS_MAX).reshape(measures, BINS_MAX).astype(np.float64)


def psi(observed: Floats, expected: Floats, bins: Counts) -> Floats:
    """The population stability index, (measures,), of rows by bin (measures, BINS_MAX) against what was expected in the same unit.

    Both are smoothed towards what was expected, by SMOOTHING_ROWS a bin. 0 without rows.
    """
    n = observed.sum(axis=1, keepdims=True)
    total = np.maximum(expected.sum(axis=1, keepdims=True), 1e-12)
    e = expected / total
    # What can't be, by the clock, is still given a share, so that it counts without being infinite.
    used = np.arange(BINS_MAX) < bins[:, None]
    e = np.where(used, np.maximum(e, 1e-6), 0.0)
    e = e / e.sum(axis=1, keepdims=True)
    added = SMOOTHING_ROWS * bins[:, None]
    o = (observed + added * e) / (n + added)
    terms = np.zeros_like(o)
    np.log(o, out=terms, where=used)
    log_e = np.zeros_like(e)
    np.log(e, out=log_e, where=used)
    out: Floats = ((o - e) * (terms - log_e)).sum(axis=1)
    return out


def ks(observed: Floats, expected: Floats, bins: Counts) -> Floats:
    """The largest difference of the two distribution functions at a bin's end, (measures,), among the rows that aren't NaN.

    The bins hold about a tenth of the training rows each, so that it is a lower bound of the statistic of the values themselves. 0 where
    either has no such rows.
    """
    valued = np.arange(BINS_MAX) < bins[:, None] - 1

    def distribution(counts: Floats) -> Floats:
        kept = np.where(valued, counts, 0.0)
        out: Floats = np.cumsum(kept, axis=1) / np.maximum(kept.sum(axis=1, keepdims=True), 1e-12)
        return out

    gap = np.abs(distribution(observed) - distribution(expected)).max(axis=1)
    some = (np.where(valued, observed, 0).sum(axis=1) > 0) & (np.where(valued, expected, 0).sum(axis=1) > 0)
    out: Floats = np.where(some, gap, 0.0)
    return out


def thresholds(reference: Reference, rows: Floats) -> Floats:
    """The PSI from which a window is an alarm, (measures,), of `rows` rows (measures,); infinite where the measure can't give one."""
    held = reference.rows_of()
    with np.errstate(divide="ignore"):
        chance = reference.dispersion * reference.quantile * (1 / np.maximum(rows, 0) + 1 / held)
    out: Floats = PSI_EFFECT_MIN + BASE_FACTOR * reference.base + chance
    out[(held == 0) | ~reference.settled | (rows < WINDOW_ROWS_MIN)] = np.inf
    return out


@dataclass(frozen=True)
class Rows:
    """Binned rows, (rows,) each but `bins` (rows, measures) and `clock` (rows, 4): the hour of the day, and the ids of card, merchant,
    device and address as numbers (rows, 4), -1 where there is none. A bin of -1: the measure says nothing of this row."""

    bins: Bins
    clock: Bins
    hour: npt.NDArray[np.int8]
    ids: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.hour)

    def take(self, chosen: npt.NDArray[np.bool_] | npt.NDArray[np.int64]) -> Rows:
        return Rows(self.bins[chosen], self.clock[chosen], self.hour[chosen], self.ids[chosen])


@dataclass(frozen=True)
class Window:
    """What one window showed, (measures,) each: rows, `psi`, `ks`, the alarm's threshold for this many rows, and whether it is one."""

    rows: Floats
    psi: Floats
    ks: Floats
    threshold: Floats
    alarm: npt.NDArray[np.bool_]


def look(expected: Expected, rows: Rows) -> Window:
    """PSI, KS and alarms of the rows of a window."""
    n, index, gap = _compare(expected, rows)
    threshold = thresholds(expected.reference, n)
    alarm = index >= threshold
    if alarm.any():
        # Asked only then, since it is seldom.
        fewer, broad, _ = _compare(expected, without_busiest(rows))
        alarm &= broad >= thresholds(expected.reference, fewer)
    return Window(n, index, gap, threshold, alarm)


def _compare(expected: Expected, rows: Rows) -> tuple[Floats, Floats, Floats]:
    """(rows, PSI, KS) by measure."""
    bins = expected.reference.bins
    says = rows.bins >= 0
    if says.all():
        observed = histogram(rows.bins)
        wanted = expected.counts(np.bincount(rows.hour, minlength=HOURS), rows.clock)
        return observed.sum(axis=1), psi(observed, wanted, bins), ks(observed, wanted, bins)
    # Measures fall into few groups that say something of the same rows.
    n, index, gap = np.zeros(len(bins)), np.zeros(len(bins)), np.zeros(len(bins))
    patterns, group = np.unique(says, axis=1, return_inverse=True)
    for i in range(patterns.shape[1]):
        of = group.reshape(-1) == i
        part = rows.take(patterns[:, i])
        observed = histogram(np.maximum(part.bins, 0))
        wanted = expected.counts(np.bincount(part.hour, minlength=HOURS), part.clock)
        n[of] = len(part)
        index[of] = psi(observed, wanted, bins)[of]
        gap[of] = ks(observed, wanted, bins)[of]
    return n, index, gap


def without_busiest(rows: Rows) -> Rows:
    """The rows that are not of the most frequent card, merchant, device or address."""
    kept = np.ones(len(rows), bool)
    for column in rows.ids.T:
        named = column[column >= 0]
        if len(named):
            ids, count = np.unique(named, return_counts=True)
            kept &= column != ids[count.argmax()]
    return rows.take(kept)


def categories(counts: int) -> tuple[Floats, Counts]:
    """(edges, bins) of one measure with the values 0..counts-1."""
    return padded([np.arange(counts - 1, dtype=np.float64)])
