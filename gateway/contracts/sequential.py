"""Sequential tests: evidence that may be looked at after each event, by whoever waits for it to be enough.

Each function returns the logarithm of an e-process: under the null hypothesis that its docstring names, its expectation is at most 1
at any stopping time, so the chance that it ever reaches 1/alpha is at most alpha (Ville's inequality; Ramdas, Gruenwald, Vovk, Shafer,
"Game-theoretic statistics and safe anytime-valid inference", Statistical Science 38, 2023). All of them need counts alone, which add up
over processes and may come in any order. Means of e-processes, with weights fixed beforehand, are e-processes again: `log_mean`.

Used by the gateway's guard (pairs of decisions) and by whoever compares two models on live traffic (two arms of a random split).
A call costs some 20 us, whatever the counts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

# How much of the most that may be bet each bettor bets: the larger finds a large excess soon, the smaller a small one at last.
STAKES: Floats = np.array([0.05, 0.2, 0.5, 0.95])


def log_mean(logs: npt.ArrayLike, weights: npt.ArrayLike | None = None) -> float:
    """The logarithm of the weighted mean of numbers given by their logarithms. Weights (default: equal) must sum to at most 1."""
    values = np.asarray(logs, np.float64)
    shares = np.full(len(values), 1 / len(values)) if weights is None else np.asarray(weights, np.float64)
    if not len(values) or len(values) != len(shares) or shares.min() < 0 or shares.sum() > 1 + 1e-9:
        raise ValueError("there must be as many weights as logarithms, at least one, not negative, and in sum at most 1")
    top = float(values.max())
    if top == -math.inf:
        return -math.inf
    return top + math.log(float((shares * np.exp(values - top)).sum()))


def paired_excess(both: npt.ArrayLike, first_only: npt.ArrayLike, second_only: npt.ArrayLike, ratio: npt.ArrayLike) -> Floats:
    """Log evidence that the first of two does something more than `ratio` times as often as the second, each asked about every case.

    Of the cases, `both` did it, `first_only`, `second_only`; arrays of equal shape (`ratio` may be one too) give arrays.
    Null hypothesis: whatever came before,
    P(first does) <= ratio * P(second does). Betting against the mean of X = [first] - ratio * [second], which is then at most 0, with
    a mixture of stakes (Waudby-Smith and Ramdas, "Estimating means of bounded random variables by betting", JRSS B 86, 2024). Cases in
    which neither does it bear nothing, so they need not be counted.
    """
    at_most = np.asarray(ratio, np.float64)[..., None]
    if not (at_most >= 1).all():
        raise ValueError("ratio must be at least 1")
    # Both doing it gives X = 1 - ratio, the second alone -ratio: wealth stays positive for stakes below 1/ratio.
    stakes = STAKES / at_most
    n_both, n_first, n_second = (np.asarray(n, np.float64)[..., None] for n in (both, first_only, second_only))
    wealth = n_both * np.log1p(stakes * (1 - at_most)) + n_first * np.log1p(stakes) + n_second * np.log1p(-STAKES)
    top = wealth.max(axis=-1, keepdims=True)
    out: Floats = (top + np.log(np.exp(wealth - top).mean(axis=-1, keepdims=True)))[..., 0]
    return out


def _log_beta(a: float, b: float) -> float:
    return math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)


def split_excess(first: int, second: int, share: float, prior: float = 0.5) -> float:
    """Log evidence that two arms of a random split differ in how often something happens: it happened `first` and `second` times.

    Each unit (card) goes to the first arm with probability `share`, known and independent of everything else, and is counted at
    most once. Null hypothesis: what happens to a unit doesn't depend on its arm. Given that it happened, the unit's arm is then a
    draw with probability `share`, whatever the rates are and however they change with time. A mixture, Beta(2 * prior *
    share, 2 * prior * (1 - share)), whose mean is `share`, against that (the mixture method of Robbins, Annals of Math. Statistics 41,
    1970; two streams as in Turner, Ly and Gruenwald, "Generic E-variables for exact sequential k-sample tests", 2024).
    """
    if not 0 < share < 1 or first < 0 or second < 0 or prior <= 0:
        raise ValueError("share must be between 0 and 1, counts not negative, prior positive")
    a, b = 2 * prior * share, 2 * prior * (1 - share)
    marginal = _log_beta(a + first, b + second) - _log_beta(a, b)
    return marginal - first * math.log(share) - second * math.log1p(-share)


def split_buckets(first: Sequence[int], second: Sequence[int], share: float, prior: float = 0.5) -> float:
    """Log evidence that two arms of a random split differ in a distribution over buckets, of which each unit fell into one, once.

    Null hypothesis as for `split_excess`: the bucket doesn't depend on the arm. Given its bucket, each unit's arm is a draw with
    probability `share`; each bucket has a mixture of its own and their product is an e-process (a multinomial against Dirichlet
    mixture, conditional on the buckets: Lindon and Malek, "Anytime-valid inference for multinomial count data", NeurIPS 2022).
    """
    if len(first) != len(second):
        raise ValueError("both arms must have the same buckets")
    return sum(split_excess(a, b, share, prior) for a, b in zip(first, second, strict=True))
