"""What the SLA scenario sends and what it demands, without Locust: `loadtest/locustfile.py` drives it.

Of a hundred requests 86 are ordinary payments, 4 have a large amount, 5 repeat an earlier payment of the same user with the same body
and 5 are inputs that must be refused. An answer is an error unless it is the one that the request deserves: 200 with a decision, or the
documented refusal.
"""

from __future__ import annotations

import itertools
import random
import time
from typing import Any

import msgspec

from gateway.contracts.transaction import Transaction
from loadtest.openloop.payments import COUNTRIES, MCCS, People, id_of, run_name

LARGE_MINOR = 5_000_000
P99_MS_MAX = 100.0
ERROR_BUDGET = 0.001
# What must be refused, with the status and reason that the documentation gives it.
REFUSED: tuple[tuple[dict[str, Any], int, str], ...] = (
    ({"currency": "XQQ"}, 422, "unknown_currency"),
    ({"mcc": "54"}, 422, "bad_format"),
    ({"amount_minor": "12"}, 422, "wrong_type"),
    ({"surprise": 1}, 422, "unknown_field"),
    ({"card_id": "4111111111111111"}, 422, "card_number"),
)
PEOPLE = People()
RUN = run_name("locust-")
NUMBERS = itertools.count()


def payment(rng: random.Random, number: int, **changes: Any) -> Transaction:
    card, merchant = rng.randrange(PEOPLE.cards), int(PEOPLE.merchants * rng.random() ** 3)
    online = rng.random() < 0.5
    fields: dict[str, Any] = {
        "transaction_id": f"{RUN}-{number}",
        "event_time_ms": time.time_ns() // 1_000_000,
        "card_id": id_of("card", card),
        "customer_id": id_of("customer", card),
        "merchant_id": id_of("merchant", merchant),
        "amount_minor": max(1, int(rng.lognormvariate(8, 1.2))),
        "currency": "EUR",
        "channel": "ecom" if online else "pos",
        "mcc": MCCS[merchant % len(MCCS)],
        "country": COUNTRIES[card % len(COUNTRIES)],
        "device_id": id_of("device", card) if online else None,
        "ip": id_of("ip", card) if online else None,
    }
    return Transaction(**(fields | changes))


def complaint(status: int, body: bytes, wanted_status: int, wanted_reason: str | None) -> str | None:
    """What is wrong with an answer, None when it is the right one."""
    if status != wanted_status:
        return f"status {status} instead of {wanted_status}"
    try:
        answer = msgspec.json.decode(body)
    except msgspec.DecodeError:
        return "the body is no JSON"
    if wanted_reason is None:
        return None if answer.get("decision") else "no decision"
    return None if answer.get("reason") == wanted_reason else f"reason {answer.get('reason')} instead of {wanted_reason}"


def verdict(p99_ms: float, errors: int, requests: int, p99_ms_max: float, budget: float) -> list[str]:
    """What of the promise is broken; empty when it is kept."""
    broken = []
    if requests == 0:
        return ["no request was made"]
    if p99_ms > p99_ms_max:
        broken.append(f"p99 is {p99_ms:.0f} ms, {p99_ms_max:g} are allowed")
    if errors > budget * requests:
        broken.append(f"{errors} of {requests} requests failed, {budget:.2%} are allowed")
    return broken
