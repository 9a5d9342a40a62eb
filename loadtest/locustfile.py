"""The SLA scenario for Locust: mixed traffic to POST /score, and exit status 1 when p99 or the error budget is broken.

Of a hundred requests 86 are ordinary payments, 4 have a large amount, 5 repeat an earlier payment of the same user with the same body
and 5 are inputs that must be refused. An answer is an error unless it is the one that the request deserves: 200 with a decision, or the
documented refusal. `fraudgate loadtest` (make loadtest) starts it; by hand: `locust -f loadtest/locustfile.py --host http://...`.
Locust waits for each answer before the next request of a user: for the tail at a constant rate there is `fraudgate bench`.
"""

from __future__ import annotations

import itertools
import os
import random
import time
from collections import deque
from typing import Any

import msgspec
from locust import FastHttpUser, constant_throughput, events, task

from gateway.contracts.transaction import Transaction, encode_json
from loadtest.openloop.payments import COUNTRIES, MCCS, People, id_of

PATH = "/score"
REQUESTS_A_SECOND_AND_USER = 10
REMEMBERED = 20
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
_run = f"locust-{os.getpid():x}-{time.time_ns() // 1_000_000:x}"
_numbers = itertools.count()


def payment(rng: random.Random, number: int, **changes: Any) -> Transaction:
    card, merchant = rng.randrange(PEOPLE.cards), int(PEOPLE.merchants * rng.random() ** 3)
    online = rng.random() < 0.5
    fields: dict[str, Any] = {
        "transaction_id": f"{_run}-{number}",
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


class PaymentService(FastHttpUser):  # type: ignore[misc]
    """A caller with a steady need of decisions."""

    wait_time = constant_throughput(REQUESTS_A_SECOND_AND_USER)
    connection_timeout = network_timeout = 10.0

    def on_start(self) -> None:
        self.rng = random.Random()
        self.sent: deque[bytes] = deque(maxlen=REMEMBERED)

    @task(86)  # type: ignore[untyped-decorator]
    def ordinary(self) -> None:
        self.score("ordinary", encode_json(payment(self.rng, next(_numbers))))

    @task(4)  # type: ignore[untyped-decorator]
    def large(self) -> None:
        amount = LARGE_MINOR + self.rng.randrange(LARGE_MINOR)
        self.score("large amount", encode_json(payment(self.rng, next(_numbers), amount_minor=amount)))

    @task(5)  # type: ignore[untyped-decorator]
    def again(self) -> None:
        if self.sent:
            self.score("retry", self.rng.choice(self.sent))

    @task(5)  # type: ignore[untyped-decorator]
    def refused(self) -> None:
        changes, status, reason = self.rng.choice(REFUSED)
        body = msgspec.json.encode(msgspec.to_builtins(payment(self.rng, next(_numbers))) | changes)
        self.score("refused", body, status, reason)

    def score(self, name: str, body: bytes, status: int = 200, reason: str | None = None) -> None:
        headers = {"Content-Type": "application/json"}
        with self.client.post(PATH, data=body, headers=headers, name=name, catch_response=True) as response:
            wrong = complaint(response.status_code, response.content or b"", status, reason)
            if wrong is not None:
                response.failure(wrong)
                return
            response.success()
        if reason is None and name != "retry":
            self.sent.append(body)


@events.init_command_line_parser.add_listener  # type: ignore[untyped-decorator]
def add_options(parser: Any) -> None:
    parser.add_argument("--p99-ms", type=float, default=P99_MS_MAX, help="longest p99 of all requests, milliseconds")
    parser.add_argument("--error-budget", type=float, default=ERROR_BUDGET, help="largest share of failed requests")


@events.quitting.add_listener  # type: ignore[untyped-decorator]
def judge(environment: Any, **_: Any) -> None:
    total, options = environment.stats.total, environment.parsed_options
    p99_ms = total.get_response_time_percentile(0.99) or 0.0
    broken = verdict(p99_ms, total.num_failures, total.num_requests, options.p99_ms, options.error_budget)
    print(f"{total.num_requests} requests, {total.num_failures} failed, p99 {p99_ms:.0f} ms")
    for line in broken:
        print(f"broken: {line}")
    environment.process_exit_code = 1 if broken else 0
