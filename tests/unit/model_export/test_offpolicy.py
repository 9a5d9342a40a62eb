"""Estimates from labels of which exploration lets through a share: against the truth, which the simulator knows."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import pytest

from loadtest.simulator import Simulator, SimulatorConfig
from loadtest.simulator.config import DAY_MS
from loadtest.simulator.exploration import explore
from model_export.offpolicy import Interval, Logged, naive_worth, worth

SEEDS = range(5)
REPETITIONS = 8
SHARE = 0.05
LOSS_MAX_MINOR_PER_DAY = 2_000_000


def covers(interval: Interval, truth: float) -> bool:
    assert interval.low is not None
    assert interval.high is not None
    return interval.low <= truth <= interval.high


@pytest.mark.slow
def test_naive_estimates_miss_the_truth_and_corrected_ones_cover_it(capsys: pytest.CaptureFixture[str]) -> None:
    """Five simulated worlds, eight draws of the exploration in each; what the champion declines, which differs, has no label."""
    held: dict[tuple[str, str, str], list[bool]] = defaultdict(list)
    off: dict[tuple[str, str, str], list[float]] = defaultdict(list)
    for seed in SEEDS:
        events = list(Simulator(SimulatorConfig(seed=seed, cards=4_000, fraud_rate=0.03, events_per_day=5_000)).events(30_000))
        fraud = np.array([e.is_fraud for e in events])
        amount = np.array([e.transaction.amount_minor for e in events])
        t_ms = np.array([e.transaction.event_time_ms for e in events])
        card = np.unique([e.transaction.card_id for e in events], return_inverse=True)[1]
        rng = np.random.default_rng(seed)
        # Two models that know different things of each payment.
        one = rng.normal(size=len(fraud)) + 3.2 * fraud
        other = 0.6 * one + 0.6 * (rng.normal(size=len(fraud)) + 3.2 * fraud)
        declined, challenger = one > 2.6, other > 2.4
        for repetition in range(REPETITIONS):
            seen = explore(
                declined,
                amount,
                t_ms,
                share=SHARE,
                amount_max_minor=10**9,
                loss_max_minor_per_day=LOSS_MAX_MINOR_PER_DAY,
                seed=1_000 * seed + repetition,
            )
            assert seen.spent_minor_a_day_most <= LOSS_MAX_MINOR_PER_DAY
            # Nobody knows of the others whether they were fraud.
            logged = Logged(card, amount.astype(np.float64), fraud & seen.let_through, seen.let_through, seen.chance)
            for name, flagged in (("champion", declined), ("challenger", challenger)):
                truth = {
                    "precision": fraud[flagged].mean(),
                    "recall": (fraud & flagged).sum() / fraud.sum(),
                    "frauds_caught": float((fraud & flagged).sum()),
                    "fraud_stopped_minor": float(amount[fraud & flagged].sum()),
                }
                for method, found in (("corrected", worth(logged, flagged)), ("naive", naive_worth(logged, flagged))):
                    for what, value in truth.items():
                        interval = getattr(found, what)
                        held[name, what, method].append(covers(interval, value))
                        off[name, what, method].append(interval.value / value)
    runs = len(SEEDS) * REPETITIONS
    with capsys.disabled():
        print(f"\n{runs} runs, {SHARE:.0%} of declined payments explored; 95 % intervals that hold the truth, and estimate / truth")
        for key, values in held.items():
            print(f"  {key[0]:<10} {key[1]:<20} {key[2]:<10} {np.mean(values):5.0%}   {np.mean(off[key]):.3f}")
    for (name, what, method), values in held.items():
        if method == "corrected":
            # 40 intervals at 95 %: fewer than 34 that hold would happen once in 300 times.
            assert sum(values) >= 34, (name, what)
            assert np.mean(off[name, what, method]) == pytest.approx(1, abs=0.05)
        elif (name, what) != ("champion", "precision"):
            assert sum(values) <= 2, (name, what)


def logged_of(fraud: np.ndarray, seen: np.ndarray, chance: np.ndarray) -> Logged:
    return Logged(np.arange(len(fraud)), np.full(len(fraud), 100.0), fraud, seen, chance)


def test_without_exploration_nothing_is_claimed_of_declined_payments() -> None:
    fraud = np.zeros(1000, bool)
    declined = np.arange(1000) < 100
    found = worth(logged_of(fraud, ~declined, np.where(declined, 0.0, 1.0)), declined)
    assert (found.labels, found.explored, found.unreachable) == (0, 0, 100)
    assert found.precision.low is not None
    assert found.precision.high is not None
    assert found.precision.low < 0.01
    assert found.precision.high > 0.99


def test_where_every_label_is_seen_both_ways_agree_with_the_counts() -> None:
    rng = np.random.default_rng(1)
    fraud, flagged = rng.random(5_000) < 0.05, rng.random(5_000) < 0.1
    whole = logged_of(fraud, np.ones(5_000, bool), np.ones(5_000))
    for found in (worth(whole, flagged), naive_worth(whole, flagged)):
        assert found.precision.value == pytest.approx(fraud[flagged].mean())
        assert found.recall.value == pytest.approx((fraud & flagged).sum() / fraud.sum())
        assert found.fraud_stopped_minor.value == pytest.approx(100 * (fraud & flagged).sum())
        assert found.good_flagged.value == pytest.approx((~fraud & flagged).sum())
        assert covers(found.precision, 0.05)


def test_twenty_explored_frauds_of_twenty_do_not_claim_certainty() -> None:
    declined = np.arange(2_000) < 400
    seen = ~declined | (np.arange(2_000) < 20)
    found = worth(logged_of(declined & seen, seen, np.where(declined, 0.05, 1.0)), declined)
    assert found.precision.value == 1.0
    assert found.precision.low is not None
    assert 0.8 < found.precision.low < 0.95


def test_many_payments_of_one_card_count_less_than_those_of_many_cards() -> None:
    fraud = np.arange(400) < 200
    many = Logged(np.arange(400), np.ones(400), fraud, np.ones(400, bool), np.ones(400))
    few = Logged(np.arange(400) // 40, np.ones(400), fraud, np.ones(400, bool), np.ones(400))
    all_of = np.ones(400, bool)
    widths = [found.precision.high - found.precision.low for found in (worth(many, all_of), worth(few, all_of))]  # type: ignore[operator]
    assert widths[1] > 3 * widths[0]


def test_a_model_that_flags_nothing_has_no_precision() -> None:
    fraud = np.arange(100) < 5
    found = worth(logged_of(fraud, np.ones(100, bool), np.ones(100)), np.zeros(100, bool))
    assert found.precision.value is None
    assert found.recall.value == 0
    assert found.frauds_missed.value == 5


def test_a_label_that_had_no_chance_to_be_seen_is_refused() -> None:
    with pytest.raises(ValueError, match="no chance"):
        logged_of(np.zeros(2, bool), np.ones(2, bool), np.array([1.0, 0.0]))


def test_exploration_stays_within_its_share_its_amount_and_the_days_loss() -> None:
    rng = np.random.default_rng(3)
    declined = rng.random(20_000) < 0.5
    amount = rng.integers(1, 10_000, 20_000)
    t_ms = np.sort(rng.integers(0, 4 * DAY_MS, 20_000))
    found = explore(declined, amount, t_ms, share=0.1, amount_max_minor=5_000, loss_max_minor_per_day=100_000, seed=1)
    explored = declined & found.let_through
    assert amount[explored].max() <= 5_000
    assert np.bincount(t_ms[explored] // DAY_MS, amount[explored]).max() == found.spent_minor_a_day_most <= 100_000
    assert (found.chance[explored] == 0.1).all()
    assert found.let_through[~declined].all()
    assert (found.chance[~declined] == 1).all()
    with pytest.raises(ValueError, match="share"):
        explore(declined, amount, t_ms, share=1.1, amount_max_minor=1, loss_max_minor_per_day=1, seed=1)
