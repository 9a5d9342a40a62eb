"""Payments of `fraudgate chaos`: cheap to make, since the sender shares the machine with the gateway."""

from __future__ import annotations

import time
from collections.abc import Callable

CARDS = 20_000
_BODY = (
    '{"transaction_id":"%s-%d","event_time_ms":%d,"card_id":"card-%d","customer_id":"customer-%d","merchant_id":"m-%d",'
    '"amount_minor":%d,"currency":"EUR","channel":"pos","mcc":"5411","country":"DE"}'
)


def payments(prefix: str) -> Callable[[int], tuple[str, bytes]]:
    """The i-th payment, of one of CARDS cards."""

    def payment(i: int) -> tuple[str, bytes]:
        card = i * 7919 % CARDS
        at_ms = time.time_ns() // 1_000_000
        return f"{prefix}-{i}", (_BODY % (prefix, i, at_ms, card, card, i % 500, 100 + i % 9000)).encode()

    return payment
