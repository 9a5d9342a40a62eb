"""The SLA scenario's payments, what it takes for an error, and when it breaks the promise."""

from __future__ import annotations

import random

import msgspec
import pytest

from gateway.contracts.transaction import RefusedError, check, decode_json
from loadtest import sla
from loadtest.sla import REFUSED, complaint, payment, verdict


def test_ordinary_payments_are_valid() -> None:
    rng = random.Random(1)
    for number in range(200):
        t = payment(rng, number)
        check(t, t.event_time_ms)


def test_what_is_sent_to_be_refused_is_refused_for_that_reason() -> None:
    t = payment(random.Random(1), 1)
    for changes, _, reason in REFUSED:
        with pytest.raises(RefusedError) as refused:
            decode_json(msgspec.json.encode(msgspec.to_builtins(t) | changes), t.event_time_ms)
        assert refused.value.reason.value == reason


def test_only_the_answer_that_the_request_deserves_is_right() -> None:
    decision, problem = b'{"decision":"approve"}', b'{"reason":"bad_format"}'
    assert complaint(200, decision, 200, None) is None
    assert complaint(422, problem, 422, "bad_format") is None
    for wrong in (
        complaint(503, problem, 200, None),
        complaint(200, decision, 422, "bad_format"),
        complaint(422, problem, 422, "wrong_type"),
        complaint(200, b"{}", 200, None),
        complaint(200, b"<html>", 200, None),
    ):
        assert wrong is not None


def test_the_promise_is_broken_by_a_slow_p99_by_errors_over_the_budget_and_by_no_requests_at_all() -> None:
    assert verdict(99.0, 1, 1000, 100.0, 0.001) == []
    assert len(verdict(101.0, 1, 1000, 100.0, 0.001)) == 1
    assert len(verdict(101.0, 2, 1000, 100.0, 0.001)) == 2
    assert len(verdict(0.0, 0, 0, 100.0, 0.001)) == 1


def test_the_name_of_a_run_lends_its_payments_no_digits() -> None:
    assert sla.RUN.startswith("locust-")
    assert not any(c.isdigit() for c in sla.RUN)
