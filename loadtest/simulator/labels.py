"""What becomes known about payments, and when: chargebacks days later, analysts' verdicts, reversals, refunds.

Delays are log-normal and capped. Most genuine payments never get a label; some fraud is never reported.
"""

from __future__ import annotations

import math

import numpy as np

from gateway.contracts.label import Label, LabelSource, LabelState
from loadtest.simulator.config import DAY_MS, HOUR_MS

# Of fraud:
ANALYST_SHARE = 0.25  # an analyst confirms it within hours
UNREPORTED_SHARE = 0.05  # nobody ever notices
ANALYST_MEDIAN_MS, ANALYST_SIGMA = 5 * HOUR_MS, 0.8
CHARGEBACK_MEDIAN_MS, CHARGEBACK_SIGMA = 4 * DAY_MS, 0.7
CONFIRM_MEDIAN_MS, CONFIRM_SIGMA = 3 * DAY_MS, 0.5
# Of genuine payments:
FALSE_POSITIVE_SHARE = 0.003  # an analyst looked and found nothing
MISTAKEN_SHARE = 0.0007  # charged back by mistake, reversed later
REFUND_SHARE = 0.004
DELAY_MIN_MS, DELAY_MAX_MS = 10 * 60_000, 60 * DAY_MS
assert ANALYST_SHARE + UNREPORTED_SHARE < 1
assert FALSE_POSITIVE_SHARE + MISTAKEN_SHARE + REFUND_SHARE < 1


def _delay(rng: np.random.Generator, median_ms: int, sigma: float) -> int:
    delay = median_ms * math.exp(float(rng.normal(0.0, sigma)))
    return int(min(max(delay, DELAY_MIN_MS), DELAY_MAX_MS))


def labels_of(
    transaction_id: str, card_id: str, event_time_ms: int, is_fraud: bool, chance: float, rng: np.random.Generator
) -> list[Label]:
    """The labels that a payment will get, by the `chance` drawn for it in [0, 1). Usually none for a genuine one."""

    def label(fraud: bool, source: LabelSource, state: LabelState, at_ms: int) -> Label:
        return Label(
            transaction_id=transaction_id, card_id=card_id, is_fraud=fraud, source=source, state=state, reported_at_ms=at_ms
        )

    if is_fraud:
        if chance < UNREPORTED_SHARE:
            return []
        if chance < UNREPORTED_SHARE + ANALYST_SHARE:
            return [label(True, "analyst", "confirmed", event_time_ms + _delay(rng, ANALYST_MEDIAN_MS, ANALYST_SIGMA))]
        reported = event_time_ms + _delay(rng, CHARGEBACK_MEDIAN_MS, CHARGEBACK_SIGMA)
        confirmed = reported + _delay(rng, CONFIRM_MEDIAN_MS, CONFIRM_SIGMA)
        return [label(True, "chargeback", "reported", reported), label(True, "chargeback", "confirmed", confirmed)]
    if chance < FALSE_POSITIVE_SHARE:
        return [label(False, "analyst", "false_positive", event_time_ms + _delay(rng, ANALYST_MEDIAN_MS, ANALYST_SIGMA))]
    if chance < FALSE_POSITIVE_SHARE + MISTAKEN_SHARE:
        reported = event_time_ms + _delay(rng, CHARGEBACK_MEDIAN_MS, CHARGEBACK_SIGMA)
        reversed_ms = reported + _delay(rng, CONFIRM_MEDIAN_MS, CONFIRM_SIGMA)
        return [label(True, "chargeback", "reported", reported), label(False, "chargeback", "reversed", reversed_ms)]
    if chance < FALSE_POSITIVE_SHARE + MISTAKEN_SHARE + REFUND_SHARE:
        return [label(False, "refund", "confirmed", event_time_ms + _delay(rng, CONFIRM_MEDIAN_MS, CONFIRM_SIGMA))]
    return []


GENUINE_LABEL_SHARE = FALSE_POSITIVE_SHARE + MISTAKEN_SHARE + REFUND_SHARE
