"""Writes the list in docs/features.md from the features themselves: python -m deploy.pages.features (make docs).

What stands below the mark was measured and is written by hand.
"""

from __future__ import annotations

from pathlib import Path

from gateway.contracts.features import AGGREGATES, ENTITIES, ENTITY_INDEX, FEATURES, FINGERPRINT, Feature
from gateway.contracts.windows import LABEL_DELAY_MS, LABEL_WINDOWS, MINUTE_MS, PAIR_WINDOW, SETTLE_MS, WINDOWS, Window

PAGE_PATH = Path(__file__).resolve().parents[2] / "docs/features.md"
MARK = "<!-- Written by hand from here on; above, by make docs. -->\n"
DAY_MS = 86_400_000

HEADER = """\
# Features

What the model sees: {count} values, in this order, fingerprint `{fingerprint}`. The list is `gateway/contracts/features.py`; the gateway,
the Spark job, the backfill, the training set, the parity check and the slow oracle of the tests follow it. A new feature is one line
in `FEATURES`; an aggregate of a new kind is one function in `AGGREGATES` and one in `tests/oracle.py`.

## What a value means

- A value at time t covers the entity's payments that were **observed before** this one with event times in the window; the payment
  itself is not in it. At the same event time, what was observed before counts.
- Unknown is NaN, and the model is trained on NaN: a mean of no payments, the speed of a card without a last place, everything of an
  entity that the payment doesn't name.
- Money is in integer minor units, sums are exact, so values don't depend on the order of addition. An amount enters a sum of squares
  capped at 100,000.00.
- Windows are sawtooth: exact to the event at the newer end; the older end is rounded down, so a window is up to that much longer.
- The newest {settle} s to {boundary} minutes come from the entity's recent events (its head), of which the last so many observed count:
  {heads}.
- Distinct counts are estimated from 64 buckets (linear counting): exact up to a few, within about 10 % at 40, saturated at 266.
- A *new* merchant or device is one that the card wasn't seen with in {pair} (15 bits of a hash: one in 32,768 is taken for known).
- Label windows end {delay} days before t, for labels take days to come; their older end is a midnight. Frauds count up to the full hour,
  payments up to the end of that day (how many there were is known without labels), and the rate is the one over the other. A label counts
  from the moment it was applied; a correction takes it back.
- A payment that arrives late counts from then on, in whatever window its event time lies; receipts written before keep what they saw.

| window | length | older end rounded down to | newer end |
| --- | --- | --- | --- |
{windows}

## The list

| # | feature | entity | aggregate | window |
| --- | --- | --- | --- | --- |
{rows}

"""
MEANING = {
    "amount_minor": "the amount, minor units",
    "hour": "hour of the day, UTC",
    "weekday": "0 is Monday",
    "is_night": "1 from 0 to 7 h, UTC",
    "is_weekend": "1 on Saturday and Sunday",
    "channel": "0 pos, 1 ecom, 2 atm, 3 moto",
    "mcc": "merchant category code as a number",
    "cross_border": "1 when the card's country isn't the payment's; unknown without the former",
    "count": "payments",
    "sum": "sum of amounts",
    "mean": "mean amount",
    "max": "largest amount",
    "std": "standard deviation of amounts; two payments at least",
    "ratio": "the amount over the entity's mean",
    "zscore": "(amount - mean) / standard deviation",
    "ratio_before": "the amount over the mean of the longest window without this one",
    "peak": "largest amount over the mean of the longest window",
    "surge": "mean amount over the mean of the longest window",
    "distinct_a": "distinct {dim_a}",
    "distinct_b": "distinct {dim_b}",
    "distinct_c": "distinct {dim_c}",
    "label_rate": "share of payments labelled fraud",
    "label_count": "payments old enough to be labelled",
    "frauds": "payments labelled fraud",
    "since_first_fraud": "seconds since the first hour with a payment labelled fraud, in the longest label window",
    "since_last_fraud": "seconds since the last such hour",
    "rate_since_fraud": "share of payments labelled fraud since the day of the first",
    "fraud_run": "payments labelled fraud since the last whole day with one that isn't, in the longest label window",
    "since_fraud_run": "seconds since the first of the days with those began",
    "since_genuine": "seconds since the last whole day with a payment not labelled fraud began; known where there is a fraud",
    "payments_after_fraud": "payments of the whole days after the last fraud's, in the longest label window",
    "new_a": "1 when this {dim_a} is new to the entity",
    "new_c": "1 when this {dim_c} is new to the entity",
    "changed_b": "1 when the last payment had another {dim_b}",
    "since_last": "seconds since the last payment, within 31 days",
    "speed": "km/h from the last payment's place, great circle, a second at least",
}
assert AGGREGATES.keys() <= MEANING.keys()


def _length(ms: int) -> str:
    return (
        f"{ms // DAY_MS} days"
        if ms >= 2 * DAY_MS
        else f"{ms // (60 * MINUTE_MS)} h"
        if ms >= 60 * MINUTE_MS
        else f"{ms // MINUTE_MS} min"
    )


def _window(w: Window) -> str:
    name = f"{w.name} of labels" if w.delay_ms else w.name
    tail = _length(w.tail_ms) if w.tail_ms else "exact"
    end = f"{w.delay_ms // DAY_MS} days before" if w.delay_ms else "the payment"
    return f"| {name} | {_length(w.length_ms)} | {tail} | {end} |"


def _row(place: int, f: Feature) -> str:
    meaning = MEANING[f.aggregate]
    if f.entity is not None:
        e = ENTITIES[ENTITY_INDEX[f.entity]]
        meaning = meaning.format(dim_a=e.dim_a, dim_b=e.dim_b, dim_c=e.dim_c)
    return f"| {place} | `{f.name}` | {f.entity or 'request'} | {meaning} | {f.window or ''} |"


def generated() -> str:
    return HEADER.format(
        count=len(FEATURES),
        fingerprint=FINGERPRINT,
        settle=SETTLE_MS // 1000,
        boundary=(SETTLE_MS + WINDOWS[0].length_ms) // MINUTE_MS,
        heads=", ".join(f"{e.head_events_max} of a {e.name}" for e in ENTITIES),
        pair=PAIR_WINDOW.name,
        delay=LABEL_DELAY_MS // DAY_MS,
        windows="\n".join(_window(w) for w in (*WINDOWS, *LABEL_WINDOWS)),
        rows="\n".join(_row(i, f) for i, f in enumerate(FEATURES)),
    )


def page(old: str) -> str:
    """The page, with what stands below the mark in `old`."""
    return generated() + MARK + old.partition(MARK)[2]


if __name__ == "__main__":
    PAGE_PATH.write_text(page(PAGE_PATH.read_text() if PAGE_PATH.exists() else ""))
    print(f"{PAGE_PATH} written")
