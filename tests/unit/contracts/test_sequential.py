"""Sequential tests keep their promise at every stopping time, and find what they are there to find. Seeded simulations."""

from __future__ import annotations

import math

import numpy as np
import pytest

from gateway.contracts.sequential import log_mean, paired_excess, split_buckets, split_excess

ALPHA = 0.05
ENOUGH = math.log(1 / ALPHA)
RUNS, LOOKS = 1000, 100


def counts(rng: np.random.Generator, p: list[float], per_look: int, runs: int = RUNS) -> np.ndarray:
    """(runs, looks, kinds): how often each of some kinds has been seen at each look."""
    drawn = rng.multinomial(per_look, [*p, 1 - sum(p)], size=(runs, LOOKS))
    return np.cumsum(drawn[:, :, :-1], axis=1)


def share_ever_over(logs: np.ndarray) -> float:
    return float((logs.max(axis=1) >= ENOUGH).mean())


@pytest.mark.parametrize(("p", "ratio"), [((0.01, 0.01, 0.01), 1.0), ((0.02, 0.0021, 0.0001), 1.1), ((0.0, 0.03, 0.02), 1.5)])
def test_pairs_at_the_edge_of_the_null_are_seldom_ever_taken_for_an_excess(p: tuple[float, ...], ratio: float) -> None:
    assert p[0] + p[1] <= ratio * (p[0] + p[2]) + 1e-12
    seen = counts(np.random.default_rng(1), list(p), 1000)
    assert share_ever_over(paired_excess(seen[..., 0], seen[..., 1], seen[..., 2], ratio)) <= ALPHA


def test_pairs_with_a_doubled_rate_are_found_soon() -> None:
    seen = counts(np.random.default_rng(2), [0.01, 0.01, 0.0], 20)
    logs = paired_excess(seen[..., 0], seen[..., 1], seen[..., 2], 1.1)
    found_at = np.where((logs >= ENOUGH).any(axis=1), (logs >= ENOUGH).argmax(axis=1) + 1, LOOKS) * 20
    assert np.quantile(found_at, 0.95) < 2000


def test_one_pair_is_counted_as_by_hand() -> None:
    assert paired_excess(0, 0, 0, 1.3) == pytest.approx(0)
    stakes = np.array([0.05, 0.2, 0.5, 0.95])
    assert paired_excess(0, 1, 0, 1.0) == pytest.approx(math.log(np.mean(1 + stakes)))
    assert paired_excess(0, 0, 1, 2.0) == pytest.approx(math.log(np.mean(1 - stakes)))
    assert paired_excess([0, 0], [1, 0], [0, 1], 2.0).shape == (2,)
    with pytest.raises(ValueError, match="at least 1"):
        paired_excess(1, 1, 1, 0.9)


def split_looks(
    rng: np.random.Generator, share: float, first: list[float], second: list[float], per_look: int, runs: int
) -> np.ndarray:
    """(runs, looks, 2, kinds): how many units of each arm fell into each kind."""
    in_first = rng.binomial(per_look, share, (runs, LOOKS))
    a = rng.multinomial(in_first, [*first, 1 - sum(first)])[..., :-1]
    b = rng.multinomial(per_look - in_first, [*second, 1 - sum(second)])[..., :-1]
    return np.cumsum(np.stack([a, b], axis=2), axis=1)


@pytest.mark.parametrize("share", [0.05, 0.5])
def test_two_equal_arms_are_seldom_ever_taken_for_different(share: float) -> None:
    p = [0.6, 0.2, 0.05, 0.01]
    seen = split_looks(np.random.default_rng(3), share, p, p, 200, 300)
    one = np.array([[split_excess(int(x[0, 3]), int(x[1, 3]), share) for x in run] for run in seen])
    all_ = np.array([[split_buckets(x[0].tolist(), x[1].tolist(), share) for x in run] for run in seen])
    assert share_ever_over(one) <= ALPHA
    assert share_ever_over(all_) <= ALPHA


def test_arms_whose_rates_move_together_are_still_equal() -> None:
    rng = np.random.default_rng(4)
    rate = np.repeat(np.array([0.001, 0.2, 0.03, 0.4]), LOOKS // 4)
    in_first = rng.binomial(200, 0.1, (300, LOOKS))
    a, b = np.cumsum(rng.binomial(in_first, rate), axis=1), np.cumsum(rng.binomial(200 - in_first, rate), axis=1)
    logs = np.array([[split_excess(int(x), int(y), 0.1) for x, y in zip(*run, strict=True)] for run in zip(a, b, strict=True)])
    assert share_ever_over(logs) <= ALPHA


def test_arms_that_differ_are_found() -> None:
    seen = split_looks(np.random.default_rng(5), 0.5, [0.5, 0.06], [0.5, 0.03], 200, 200)
    rate = np.array([[split_excess(int(x[0, 1]), int(x[1, 1]), 0.5) for x in run] for run in seen])
    assert share_ever_over(rate) > 0.99
    seen = split_looks(np.random.default_rng(6), 0.1, [0.3, 0.4], [0.4, 0.3], 200, 200)
    buckets = np.array([[split_buckets(x[0].tolist(), x[1].tolist(), 0.1) for x in run] for run in seen])
    assert share_ever_over(buckets) > 0.99


def test_evidence_of_several_tests_is_averaged() -> None:
    assert log_mean([math.log(3), math.log(1)]) == pytest.approx(math.log(2))
    assert log_mean([1000.0, 0.0]) == pytest.approx(1000 - math.log(2))
    assert log_mean([0.0, -math.inf], [0.25, 0.75]) == pytest.approx(math.log(0.25))
    with pytest.raises(ValueError, match="at most 1"):
        log_mean([0.0, 0.0], [0.6, 0.6])


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_a_split_that_is_none_is_refused(share: float) -> None:
    with pytest.raises(ValueError, match="share"):
        split_excess(1, 1, share)
