"""Whether a candidate ranks frauds as well as the champion does, overall and in each slice, on payments that neither was grown on.

Called by model_export.admission. Pure functions of labels, probabilities and features; a second for 100,000 rows, most of it the
bootstrap. What is small is protected: a slice counts from SLICE_FRAUDS_MIN frauds on, and fails only for a loss that is both larger
than allowed and unlikely to be chance, given how many slices are looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import msgspec
import numpy as np
import numpy.typing as npt
from scipy.stats import binomtest, mannwhitneyu

from gateway.contracts.features import FEATURE_INDEX
from model_export.dataset import Bools, Floats
from model_export.policy_bands import Bands

Probabilities = npt.NDArray[np.float64]

RESAMPLES = 400
SEED = 20_180_815
# Two-sided 90 %: 5 % of the resamples lie below the lower end.
INTERVAL_TAIL = 0.05
# A candidate is refused for a loss of average precision of more than this, unless the interval says that it may be luck ...
AP_LOSS_MAX = 0.02
# ... and when the interval can't rule out a loss of more than this, be it for want of frauds. Simulated with pairs of equally good
# models, this refuses 1 in 10 when 30 frauds decide, 1 in 20 with 100, none of 60 with 300; of models worse by 0.06, 6 in 10, 17 in 20
# and all (tests/unit/model_export/test_admission.py has the case of 300).
AP_LOSS_LOW_MAX = 0.10
assert AP_LOSS_MAX < AP_LOSS_LOW_MAX
# Without a champion: this many times the fraud rate, which is what chance gets; or half-way from there to 1 where frauds are common.
AP_LIFT_MIN = 3.0

SLICE_FRAUDS_MIN = 20
SLICES_A_KIND_MAX = 20
# What of the champion's recall a slice may lose at the same alert rate.
SLICE_LOSS_MAX = 0.10
# Without a champion: what chance gets. A slice with few frauds, or with frauds that nothing tells from genuine payments, has a low recall
# under any model, and is no reason to go without one; one in which frauds score lower than genuine payments is.
SLICE_AUC_MIN = 0.5
# The chance that any of all slices fails for nothing but luck, at most.
SLICES_ALPHA = 0.10


class SliceFinding(msgspec.Struct, frozen=True, kw_only=True):
    """Recall of a slice's frauds when as many payments are alerted, over all slices together, as there are frauds.

    `auc` is within the slice, None where it has no genuine payment; `champion` is the champion's recall, None without one. `p_value` is
    how likely luck alone makes the slice look as bad as it does, or worse.
    """

    name: str
    rows: int
    frauds: int
    recall: float
    auc: float | None
    champion: float | None
    p_value: float
    passed: bool


@dataclass(frozen=True)
class Interval:
    value: float
    low: float
    high: float


class Ranking:
    """Rows from the riskiest to the safest, sorted once for many resamples."""

    def __init__(self, is_fraud: Bools, probability: Probabilities) -> None:
        self._order = np.argsort(-probability, kind="stable")
        falling = probability[self._order]
        # Equal scores are one step: their order says nothing.
        self._ends = np.append(np.flatnonzero(falling[1:] != falling[:-1]), len(falling) - 1)
        self._is_fraud = is_fraud[self._order]

    def average_precision(self, weight: npt.NDArray[np.float64]) -> float:
        """With each row counted `weight` times, (rows,); the same as scikit-learn's average_precision_score."""
        sorted_weight = weight[self._order]
        caught = np.cumsum(sorted_weight * self._is_fraud)[self._ends]
        alerted = np.cumsum(sorted_weight)[self._ends]
        # The first steps may have no weight at all in a resample, and then add nothing.
        precision = np.divide(caught, alerted, out=np.zeros_like(caught), where=alerted > 0)
        return float(np.sum(np.diff(caught, prepend=0.0) * precision) / caught[-1])


def average_precision(is_fraud: Bools, candidate: Probabilities, champion: Probabilities | None = None) -> Interval:
    """The candidate's average precision, less the champion's on the same rows where there is one, with its bootstrap interval.

    Frauds and genuine payments are resampled apart, so that no resample is without frauds. Seeded.
    """
    rankings = [Ranking(is_fraud, p) for p in (candidate, champion) if p is not None]

    def measured(weight: npt.NDArray[np.float64]) -> float:
        first, *rest = (ranking.average_precision(weight) for ranking in rankings)
        return first - sum(rest)

    rng = np.random.default_rng(SEED)
    groups = [np.flatnonzero(is_fraud), np.flatnonzero(~is_fraud)]
    assert all(len(group) for group in groups)
    resampled = np.empty(RESAMPLES)
    for i in range(RESAMPLES):
        weight = np.zeros(len(is_fraud))
        for group in groups:
            weight[group] = np.bincount(rng.integers(0, len(group), len(group)), minlength=len(group))
        resampled[i] = measured(weight)
    low, high = np.quantile(resampled, [INTERVAL_TAIL, 1 - INTERVAL_TAIL])
    return Interval(measured(np.ones(len(is_fraud))), float(low), float(high))


def is_worse(difference: Interval) -> bool:
    """Whether a candidate's average precision, less the champion's, refuses it."""
    return (difference.value < -AP_LOSS_MAX and difference.high < 0) or difference.low < -AP_LOSS_LOW_MAX


def ap_floor(fraud_rate: float) -> float:
    """The least average precision of a model that has no champion to be compared with."""
    return min(AP_LIFT_MIN * fraud_rate, (1 + fraud_rate) / 2)


def alerted(probability: Probabilities, count: int) -> npt.NDArray[np.float64]:
    """How much of each row is alerted, 0..1, when the `count` riskiest are: rows that share the last score share what is left."""
    assert 0 < count <= len(probability)
    last = np.partition(probability, len(probability) - count)[len(probability) - count]
    above, at = probability > last, probability == last
    out: npt.NDArray[np.float64] = above + at * ((count - above.sum()) / at.sum())
    return out


def slices(features: Floats, country: npt.NDArray[np.object_] | None, is_fraud: Bools, bands: Bands) -> Iterator[tuple[str, Bools]]:
    """Name and rows of each slice with enough frauds: mcc, country (where the training set has it), amount band, new cards.

    Of mcc and country those with the most frauds, at most SLICES_A_KIND_MAX each. A card is new when it paid nothing within 30 days.
    """

    def largest(
        kind: str, values: npt.NDArray[np.float64] | npt.NDArray[np.object_], text: Callable[..., str]
    ) -> Iterator[tuple[str, Bools]]:
        found, counts = np.unique(values[is_fraud], return_counts=True)
        for value in found[np.argsort(-counts, kind="stable")][:SLICES_A_KIND_MAX]:
            yield f"{kind} {text(value)}", values == value

    mcc = np.nan_to_num(features[:, FEATURE_INDEX["mcc"]].astype(np.float64), nan=-1.0)
    candidates = [*largest("mcc", mcc, lambda v: "unknown" if v < 0 else f"{v:04.0f}")]
    if country is not None:
        candidates += largest("country", country, str)
    amount = features[:, FEATURE_INDEX["amount_minor"]]
    band = bands.of(amount)
    candidates += [(name, band == i) for i, name in enumerate(bands.names())]
    candidates.append(("new cards", ~(features[:, FEATURE_INDEX["card_count_30d"]] > 0)))
    for name, rows in candidates:
        if int((rows & is_fraud).sum()) >= SLICE_FRAUDS_MIN:
            yield name, rows


def judge_slices(
    found: list[tuple[str, Bools]], is_fraud: Bools, candidate: Probabilities, champion: Probabilities | None
) -> list[SliceFinding]:
    """A finding for each slice, from the largest loss, or the lowest recall, on.

    With a champion a slice fails whose recall at the same alert rate is more than SLICE_LOSS_MAX below the champion's; without one, a
    slice whose AUC is below SLICE_AUC_MIN. Either must be unlikely to be luck.
    """
    count = int(is_fraud.sum())
    caught = alerted(candidate, count)
    before = None if champion is None else alerted(champion, count)
    alpha = SLICES_ALPHA / max(len(found), 1)
    out = []
    for name, rows in found:
        frauds, genuine = rows & is_fraud, rows & ~is_fraud
        recall = float(caught[frauds].mean())
        auc, worse_than_chance = _auc(candidate[frauds], candidate[genuine])
        if before is None:
            reference, p_value = None, worse_than_chance
            low = auc is not None and auc < SLICE_AUC_MIN
        else:
            reference = float(before[frauds].mean())
            p_value = _lost_by_luck(caught[frauds] - before[frauds])
            low = recall < reference - SLICE_LOSS_MAX
        out.append(
            SliceFinding(
                name=name,
                rows=int(rows.sum()),
                frauds=int(frauds.sum()),
                recall=recall,
                auc=auc,
                champion=reference,
                p_value=p_value,
                passed=not low or p_value >= alpha,
            )
        )
    return sorted(out, key=lambda f: (f.recall - (f.champion or 0.0), f.name))


def _auc(frauds: Probabilities, genuine: Probabilities) -> tuple[float | None, float]:
    """How often a fraud scores above a genuine payment, and how likely it is so low when there is no difference: the rank-sum test."""
    if not len(genuine):
        return None, 1.0
    test = mannwhitneyu(frauds, genuine, alternative="less", method="asymptotic")
    # All scores equal: nothing is told from anything, and the test has no answer.
    p_value = float(test.pvalue)
    return float(test.statistic) / (len(frauds) * len(genuine)), p_value if np.isfinite(p_value) else 1.0


def _lost_by_luck(gain: npt.NDArray[np.float64]) -> float:
    """The sign test on frauds that one model alerts and the other doesn't: how likely this many are lost when either is as likely."""
    lost, won = int((gain < -0.5).sum()), int((gain > 0.5).sum())
    return float(binomtest(lost, lost + won, 0.5, alternative="greater").pvalue) if lost + won else 1.0
