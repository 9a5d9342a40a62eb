"""Which reason code a feature's contribution to a score counts for. Read by gateway/explanations/explain.py.

The same feature can speak for a fraud in two ways: ten payments in five minutes do, and so may none in a month. A code's text has to be
true of the payment, so a feature has a code for a value above its pivot, one for a value at or below it, and one for an unknown value.
The pivot is what the text compares with: a fixed number where that has a meaning (a ratio's 2, an indicator's 0.5), else the median of
the model's training rows, which travels with the model. What says "unusually" holds above their 95th percentile.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from gateway.contracts.features import FEATURES, Feature
from gateway.contracts.reasons import Reason


@dataclass(frozen=True)
class Sides:
    """The codes of a feature above its pivot, at or below it, and unknown. `pivot` None: the median of the training rows.

    `extreme`, where given, takes the place of `above` beyond the 95th percentile.
    """

    above: Reason
    below: Reason
    unknown: Reason
    pivot: float | None = None
    extreme: Reason | None = None

    @property
    def reasons(self) -> set[Reason]:
        return {self.above, self.below, self.unknown, self.extreme or self.above}


# A 1 of an indicator, and a second of what is counted.
_INDICATOR = 0.5
_SEVERAL = 1.5
# From here on an amount is far from what is usual, as a ratio and in standard deviations.
_FAR = 2.0
# km/h
_BY_ROAD = 200.0
_SHORT_WINDOWS = frozenset({"5m", "1h", "24h"})


def _one(reason: Reason) -> Sides:
    """The same code whatever the value, for what has no order."""
    return Sides(reason, reason, reason)


_R = Reason
_REQUEST: dict[str, Sides] = {
    "amount_minor": Sides(_R.AMOUNT_HIGH, _R.AMOUNT_SMALL, _R.AMOUNT_SMALL),
    "hour": _one(_R.UNUSUAL_HOUR),
    "weekday": _one(_R.UNUSUAL_HOUR),
    "is_night": _one(_R.UNUSUAL_HOUR),
    "is_weekend": _one(_R.UNUSUAL_HOUR),
    "channel": _one(_R.PAYMENT_CHANNEL),
    "mcc": _one(_R.MERCHANT_CATEGORY),
    "cross_border": Sides(_R.CROSS_BORDER, _R.PAYMENT_COUNTRY, _R.PAYMENT_COUNTRY, _INDICATOR),
}
_CARD_SPENDING = Sides(_R.SPENDING_HIGH, _R.SPENDING_LOW, _R.CARD_LITTLE_USED)
_USUAL_RATIO = Sides(_R.AMOUNT_UNUSUAL, _R.AMOUNT_AS_USUAL, _R.CARD_LITTLE_USED, _FAR)
_USUAL_ZSCORE = Sides(_R.AMOUNT_UNUSUAL, _R.AMOUNT_AS_USUAL, _R.CARD_LITTLE_USED, _FAR)
_SINCE_LAST = Sides(_R.CARD_LONG_UNUSED, _R.CARD_USED_JUST_BEFORE, _R.CARD_LITTLE_USED)
_CARD_DEVICES = Sides(_R.CARD_MANY_DEVICES, _R.CARD_DEVICES, _R.CARD_DEVICES, _SEVERAL)
_MERCHANT_FRAUDS = Sides(_R.MERCHANT_FRAUD_HISTORY, _R.MERCHANT_PROFILE, _R.MERCHANT_LITTLE_KNOWN, 0.0)
# Known only where there was a fraud.
_MERCHANT_FRAUD_TIMES = Sides(_R.MERCHANT_FRAUD_HISTORY, _R.MERCHANT_FRAUD_HISTORY, _R.MERCHANT_PROFILE, 0.0)
_MERCHANT_CARDS = Sides(_R.MERCHANT_MANY_CARDS, _R.MERCHANT_LITTLE_KNOWN, _R.MERCHANT_LITTLE_KNOWN)
# By entity and aggregate.
_OF_ENTITY: dict[tuple[str, str], Sides] = {
    ("card", "count"): Sides(_R.CARD_MUCH_USED, _R.CARD_LITTLE_USED, _R.CARD_LITTLE_USED),
    ("card", "sum"): _CARD_SPENDING,
    ("card", "mean"): _CARD_SPENDING,
    ("card", "max"): _CARD_SPENDING,
    ("card", "std"): _CARD_SPENDING,
    ("card", "ratio"): _USUAL_RATIO,
    ("card", "zscore"): _USUAL_ZSCORE,
    ("card", "ratio_before"): _USUAL_RATIO,
    ("card", "peak"): _CARD_SPENDING,
    ("card", "surge"): replace(_CARD_SPENDING, pivot=1.0),
    ("card", "distinct_a"): Sides(_R.CARD_MANY_MERCHANTS, _R.CARD_LITTLE_USED, _R.CARD_LITTLE_USED),
    ("card", "distinct_b"): Sides(_R.CARD_MANY_COUNTRIES, _R.PAYMENT_COUNTRY, _R.PAYMENT_COUNTRY, _SEVERAL),
    ("card", "distinct_c"): _CARD_DEVICES,
    ("card", "new_a"): Sides(_R.NEW_MERCHANT, _R.MERCHANT_PROFILE, _R.CARD_LITTLE_USED, _INDICATOR),
    ("card", "new_c"): Sides(_R.NEW_DEVICE, _R.CARD_DEVICES, _R.CARD_DEVICES, _INDICATOR),
    ("card", "changed_b"): Sides(_R.CARD_COUNTRY_CHANGED, _R.PAYMENT_COUNTRY, _R.CARD_LITTLE_USED, _INDICATOR),
    ("card", "since_last"): _SINCE_LAST,
    ("card", "speed"): Sides(_R.CARD_TRAVEL, _R.PAYMENT_COUNTRY, _R.PAYMENT_COUNTRY, _BY_ROAD),
    ("customer", "count"): Sides(_R.CUSTOMER_VELOCITY, _R.CUSTOMER_LITTLE_HISTORY, _R.CUSTOMER_LITTLE_HISTORY),
    ("customer", "sum"): _CARD_SPENDING,
    ("customer", "ratio"): _USUAL_RATIO,
    ("customer", "zscore"): _USUAL_ZSCORE,
    ("customer", "distinct_a"): _CARD_DEVICES,
    ("customer", "distinct_b"): Sides(_R.CUSTOMER_MANY_CARDS, _R.CUSTOMER_PROFILE, _R.CUSTOMER_LITTLE_HISTORY, _SEVERAL),
    ("customer", "since_last"): _SINCE_LAST,
    ("customer", "label_rate"): Sides(_R.CUSTOMER_FRAUD_HISTORY, _R.CUSTOMER_PROFILE, _R.CUSTOMER_LITTLE_HISTORY, 0.0),
    ("merchant", "count"): Sides(_R.MERCHANT_BUSY, _R.MERCHANT_LITTLE_KNOWN, _R.MERCHANT_LITTLE_KNOWN),
    ("merchant", "mean"): Sides(_R.MERCHANT_PROFILE, _R.MERCHANT_PROFILE, _R.MERCHANT_LITTLE_KNOWN),
    ("merchant", "ratio"): Sides(_R.MERCHANT_AMOUNT_UNUSUAL, _R.MERCHANT_PROFILE, _R.MERCHANT_LITTLE_KNOWN, 1.0),
    ("merchant", "zscore"): Sides(_R.MERCHANT_AMOUNT_UNUSUAL, _R.MERCHANT_PROFILE, _R.MERCHANT_LITTLE_KNOWN, 0.0),
    ("merchant", "distinct_a"): _MERCHANT_CARDS,
    ("merchant", "distinct_b"): _MERCHANT_CARDS,
    ("merchant", "label_rate"): _MERCHANT_FRAUDS,
    ("merchant", "frauds"): _MERCHANT_FRAUDS,
    ("merchant", "since_first_fraud"): _MERCHANT_FRAUD_TIMES,
    ("merchant", "since_last_fraud"): _MERCHANT_FRAUD_TIMES,
    ("merchant", "rate_since_fraud"): _MERCHANT_FRAUD_TIMES,
    ("merchant", "fraud_run"): _MERCHANT_FRAUDS,
    ("merchant", "since_fraud_run"): _MERCHANT_FRAUD_TIMES,
    ("merchant", "since_genuine"): _MERCHANT_FRAUD_TIMES,
    ("merchant", "payments_after_fraud"): _MERCHANT_FRAUD_TIMES,
    ("device", "count"): Sides(_R.DEVICE_BUSY, _R.DEVICE_LITTLE_KNOWN, _R.DEVICE_UNKNOWN),
    ("device", "distinct_a"): Sides(_R.DEVICE_MANY_CARDS, _R.DEVICE_LITTLE_KNOWN, _R.DEVICE_UNKNOWN, _SEVERAL),
    ("device", "distinct_b"): Sides(_R.DEVICE_MANY_ADDRESSES, _R.DEVICE_LITTLE_KNOWN, _R.DEVICE_UNKNOWN, _SEVERAL),
    ("device", "since_last"): Sides(_R.DEVICE_LITTLE_KNOWN, _R.DEVICE_BUSY, _R.DEVICE_UNKNOWN),
    ("ip", "count"): Sides(_R.IP_BUSY, _R.IP_LITTLE_KNOWN, _R.IP_UNKNOWN),
    ("ip", "distinct_a"): Sides(_R.IP_MANY_CARDS, _R.IP_LITTLE_KNOWN, _R.IP_UNKNOWN, _SEVERAL),
    ("ip", "distinct_b"): Sides(_R.IP_BUSY, _R.IP_LITTLE_KNOWN, _R.IP_UNKNOWN),
}


def _sides(f: Feature) -> Sides:
    if f.entity is None:
        return _REQUEST[f.name]
    sides = _OF_ENTITY[f.entity, f.aggregate]
    if (f.entity, f.aggregate) == ("card", "count") and f.window in _SHORT_WINDOWS:
        return replace(sides, extreme=Reason.CARD_VELOCITY)
    return sides


# By column of the model's input. A feature that no line above is for fails here, at import.
FEATURE_REASONS: tuple[Sides, ...] = tuple(_sides(f) for f in FEATURES)
assert set(_OF_ENTITY) == {(f.entity, f.aggregate) for f in FEATURES if f.entity is not None}, "a line for each, and none left over"
assert set(_REQUEST) == {f.name for f in FEATURES if f.entity is None}
# What isn't said together: of two windows of one entity one can be full and the other empty, which would read like a contradiction.
OPPOSITES: tuple[frozenset[Reason], ...] = tuple(
    frozenset(pair)
    for pair in (
        (Reason.AMOUNT_UNUSUAL, Reason.AMOUNT_AS_USUAL),
        (Reason.CARD_VELOCITY, Reason.CARD_LITTLE_USED),
        (Reason.CARD_MUCH_USED, Reason.CARD_LITTLE_USED),
        (Reason.CARD_MANY_MERCHANTS, Reason.CARD_LITTLE_USED),
        (Reason.CARD_USED_JUST_BEFORE, Reason.CARD_LONG_UNUSED),
        (Reason.CARD_MANY_DEVICES, Reason.CARD_DEVICES),
        (Reason.SPENDING_HIGH, Reason.SPENDING_LOW),
        (Reason.CUSTOMER_VELOCITY, Reason.CUSTOMER_LITTLE_HISTORY),
        (Reason.MERCHANT_BUSY, Reason.MERCHANT_LITTLE_KNOWN),
        (Reason.MERCHANT_MANY_CARDS, Reason.MERCHANT_LITTLE_KNOWN),
        (Reason.DEVICE_BUSY, Reason.DEVICE_LITTLE_KNOWN),
        (Reason.DEVICE_MANY_CARDS, Reason.DEVICE_LITTLE_KNOWN),
        (Reason.IP_BUSY, Reason.IP_LITTLE_KNOWN),
        (Reason.IP_MANY_CARDS, Reason.IP_LITTLE_KNOWN),
    )
)
# Codes that contributions count for, in a fixed order.
MODEL_REASONS: tuple[Reason, ...] = tuple(sorted({r for sides in FEATURE_REASONS for r in sides.reasons}, key=list(Reason).index))
assert Reason.MODEL_SCORE_HIGH not in MODEL_REASONS
