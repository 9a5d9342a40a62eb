"""What decisions cost, and the score thresholds that cost the least, by amount band. Pure functions.

A payment that goes through costs its amount if it was fraud (less what is recovered). One that is declined costs nothing if it was fraud,
and the trouble of a good customer if it was not. One that is reviewed costs the analyst's time, and is then decided rightly but for the
share of frauds that a review misses; a challenge likewise costs little, and lets more of them pass. Called by `fraudgate evaluate` and
`fraudgate backtest`. Money is in minor units throughout.

With calibrated probabilities the best threshold follows from Bayes' rule (Elkan, "The foundations of cost-sensitive learning", 2001):
decline when p * cost of letting through exceeds (1 - p) * cost of a wrong decline. `thresholds` finds it on data instead, which
also holds where calibration doesn't.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from gateway.contracts.decision import RISK_SCORE_MAX

Bools = npt.NDArray[np.bool_]
Int64s = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

# The amounts up to which the bands of the policy that ships reach; then any. Minor units.
BANDS_UP_TO_MINOR = (2_000, 20_000, 100_000)
# Scores at which a threshold may lie; 1,001 is never reached.
GRID = np.append(np.arange(5, RISK_SCORE_MAX + 1, 5), RISK_SCORE_MAX + 1)


@dataclass(frozen=True, kw_only=True)
class CostModel:
    """Shares of the amount, and minor units a case. The defaults are assumptions, to be replaced by the business's own figures."""

    fraud_lost_share: float = 1.0
    chargeback_fee_minor: int = 1_500
    wrong_decline_minor: int = 500
    # Of the amount, besides: a margin not earned and a customer who may not come back.
    wrong_decline_share: float = 0.10
    review_minor: int = 300
    review_misses_share: float = 0.10
    # What a customer has to type in once more, and the frauds that know the answer.
    challenge_minor: int = 10
    challenge_misses_share: float = 0.30

    def __post_init__(self) -> None:
        for name in ("fraud_lost_share", "wrong_decline_share", "review_misses_share", "challenge_misses_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie in 0..1")
        for name in ("chargeback_fee_minor", "wrong_decline_minor", "review_minor", "challenge_minor"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative")

    def of_approving(self, amount_minor: Int64s, is_fraud: Bools) -> Floats:
        """(rows,)"""
        return np.where(is_fraud, amount_minor * self.fraud_lost_share + self.chargeback_fee_minor, 0.0)

    def of_challenging(self, amount_minor: Int64s, is_fraud: Bools) -> Floats:
        return self.challenge_minor + self.challenge_misses_share * self.of_approving(amount_minor, is_fraud)

    def of_reviewing(self, amount_minor: Int64s, is_fraud: Bools) -> Floats:
        return self.review_minor + self.review_misses_share * self.of_approving(amount_minor, is_fraud)

    def of_declining(self, amount_minor: Int64s, is_fraud: Bools) -> Floats:
        return np.where(is_fraud, 0.0, amount_minor * self.wrong_decline_share + self.wrong_decline_minor)

    def of(self, severity: Int64s, amount_minor: Int64s, is_fraud: Bools) -> Floats:
        """(rows,), by the outcome's place in SEVERITY."""
        each = (self.of_approving, self.of_challenging, self.of_reviewing, self.of_declining)
        out: Floats = np.choose(severity, [cost(amount_minor, is_fraud) for cost in each])
        return out


@dataclass(frozen=True, kw_only=True)
class BandThresholds:
    """Amounts up to `up_to_minor` (None: any): review from one score, decline from another. Costs of the band's payments, minor units.

    `cost_curve` is the cost by the score from which payments are declined, none reviewed, at each score of GRID.
    """

    up_to_minor: int | None
    payments: int
    frauds: int
    review: int
    decline: int
    cost: float
    cost_of_approving_all: float
    cost_curve: Floats


def thresholds(
    amount_minor: Int64s, is_fraud: Bools, score: Int64s, costs: CostModel, bands: tuple[int, ...] = BANDS_UP_TO_MINOR
) -> list[BandThresholds]:
    """For each band the pair of thresholds, review <= decline, of the least cost on these payments; of equal ones the highest.

    All arrays are (rows,). A band without payments gets thresholds that are never reached.
    """
    edges = [-1, *bands, None]
    return [_band(amount_minor, is_fraud, score, costs, low, high) for low, high in itertools.pairwise(edges) if low is not None]


def _band(
    amount_minor: Int64s, is_fraud: Bools, score: Int64s, costs: CostModel, over_minor: int, up_to_minor: int | None
) -> BandThresholds:
    here = amount_minor > over_minor
    if up_to_minor is not None:
        here &= amount_minor <= up_to_minor
    amount, fraud = amount_minor[here], is_fraud[here]
    # The cost of the payments below each score of the grid, by what is done to them.
    place = np.searchsorted(GRID, score[here], side="right")
    approved, reviewed, declined = (
        np.concatenate([[0.0], np.cumsum(np.bincount(place, cost, len(GRID) + 1))])
        for cost in (costs.of_approving(amount, fraud), costs.of_reviewing(amount, fraud), costs.of_declining(amount, fraud))
    )
    below = np.arange(1, len(GRID) + 1)
    # total[r, d]: reviewed from GRID[r], declined from GRID[d].
    total = (
        approved[below][:, None] + (reviewed[below][None, :] - reviewed[below][:, None]) + (declined[-1] - declined[below])[None, :]
    )
    total[np.tril_indices(len(GRID), -1)] = np.inf
    # The last of the least: doing nothing wins where it costs the same.
    flat = total.ravel()[::-1]
    r, d = divmod(total.size - 1 - int(np.argmin(flat)), len(GRID))
    return BandThresholds(
        up_to_minor=up_to_minor,
        payments=int(here.sum()),
        frauds=int(fraud.sum()),
        review=int(GRID[r]),
        decline=int(GRID[d]),
        cost=float(total[r, d]),
        cost_of_approving_all=float(approved[-1]),
        cost_curve=approved[below] + declined[-1] - declined[below],
    )


def cost_of(amount_minor: Int64s, is_fraud: Bools, score: Int64s, costs: CostModel, chosen: list[BandThresholds]) -> float:
    """What deciding by `chosen` costs on other payments than those it was chosen on, minor units."""
    total = 0.0
    over = -1
    for band in chosen:
        here = amount_minor > over
        if band.up_to_minor is not None:
            here &= amount_minor <= band.up_to_minor
            over = band.up_to_minor
        amount, fraud, s = amount_minor[here], is_fraud[here], score[here]
        cost = np.where(
            s >= band.decline,
            costs.of_declining(amount, fraud),
            np.where(s >= band.review, costs.of_reviewing(amount, fraud), costs.of_approving(amount, fraud)),
        )
        total += float(cost.sum())
    return total
