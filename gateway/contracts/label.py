"""A label: what became known about a transaction, when, and from whom."""

from __future__ import annotations

from typing import Literal

import msgspec

LabelSource = Literal["chargeback", "refund", "analyst"]
LabelState = Literal["reported", "confirmed", "false_positive", "reversed"]


class Label(msgspec.Struct, frozen=True, kw_only=True):
    """`reported_at_ms` is when the label became known (event time of the same clock as the transaction's).

    `amount_minor` is how much of the payment it is about (a partial refund or chargeback), minor units of the transaction's currency;
    None: all of it. `effective_at_ms` is from when it holds, for instance the day on which a scheme books a chargeback; None: since
    `reported_at_ms`. Labels written before these fields were there read None.
    """

    transaction_id: str
    card_id: str
    is_fraud: bool
    source: LabelSource
    state: LabelState
    reported_at_ms: int
    amount_minor: int | None = None
    effective_at_ms: int | None = None
