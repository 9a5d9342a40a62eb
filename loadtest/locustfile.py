"""`loadtest/sla.py` for Locust: mixed traffic to POST /score, and exit status 1 when p99 or the error budget is broken.

`fraudgate loadtest` (make loadtest) starts it; by hand: `locust -f loadtest/locustfile.py --host http://...`. Locust waits for each
answer before the next request of a user: for the tail at a constant rate there is `fraudgate bench`.
"""

from __future__ import annotations

import random
from collections import deque
from typing import Any

import msgspec
from locust import FastHttpUser, constant_throughput, events, task

from gateway.contracts.settings import client_headers, load_settings
from gateway.contracts.transaction import encode_json
from loadtest.sla import ERROR_BUDGET, LARGE_MINOR, NUMBERS, P99_MS_MAX, REFUSED, complaint, payment, verdict

PATH = "/score"
REQUESTS_A_SECOND_AND_USER = 10
REMEMBERED = 20
HEADERS = {"Content-Type": "application/json"} | client_headers(load_settings())


class PaymentService(FastHttpUser):  # type: ignore[misc]
    """A caller with a steady need of decisions."""

    wait_time = constant_throughput(REQUESTS_A_SECOND_AND_USER)
    connection_timeout = network_timeout = 10.0

    def on_start(self) -> None:
        self.rng = random.Random()
        self.sent: deque[bytes] = deque(maxlen=REMEMBERED)

    @task(86)  # type: ignore[untyped-decorator]
    def ordinary(self) -> None:
        self.score("ordinary", encode_json(payment(self.rng, next(NUMBERS))))

    @task(4)  # type: ignore[untyped-decorator]
    def large(self) -> None:
        amount = LARGE_MINOR + self.rng.randrange(LARGE_MINOR)
        self.score("large amount", encode_json(payment(self.rng, next(NUMBERS), amount_minor=amount)))

    @task(5)  # type: ignore[untyped-decorator]
    def again(self) -> None:
        if self.sent:
            self.score("retry", self.rng.choice(self.sent))

    @task(5)  # type: ignore[untyped-decorator]
    def refused(self) -> None:
        changes, status, reason = self.rng.choice(REFUSED)
        body = msgspec.json.encode(msgspec.to_builtins(payment(self.rng, next(NUMBERS))) | changes)
        self.score("refused", body, status, reason)

    def score(self, name: str, body: bytes, status: int = 200, reason: str | None = None) -> None:
        headers = HEADERS
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
