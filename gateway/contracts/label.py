"""A label: what became known about a transaction, when, and from whom."""

from __future__ import annotations

from typing import Literal

import msgspec

LabelSource = Literal["chargeback", "refund", "analyst"]
LabelState = Literal["reported", "confirmed", "false_positive", "reversed"]


class Label(msgspec.Struct, frozen=True, kw_only=True):
    """`reported_at_ms` is when the label became known (event time of the same clock as the transaction's)."""

    transaction_id: str
    card_id: str
    is_fraud: bool
    source: LabelSource
    state: LabelState
    reported_at_ms: int
