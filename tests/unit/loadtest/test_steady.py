"""The sender of the soak: its payments, and its one retry against servers that answer late, hang up, refuse or mix answers up."""

from __future__ import annotations

import json
import socket
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from deploy.soak.topics import id_of, number_of
from gateway.contracts.transaction import check, decode_json
from gateway.contracts.wire import frame
from loadtest.openloop import steady
from loadtest.openloop.outcomes import (
    FAILED,
    MIXED_UP,
    NOT_DUE,
    Log,
    degraded_bits,
    degraded_names,
    is_kafka,
    load,
    outcome_number,
    reasons_hash,
)
from loadtest.openloop.shoppers import COMMUNITIES, SKEWS_MS, Shoppers, Span, card_prefix
from loadtest.openloop.steady import ANSWER_MS, DEADLINE_MS, DEADLINE_MS_LEAST, FIRST_TRY_S, WAY_MS, Call, Caller, RetryBudget

NOW_MS = 1_795_500_000_000
WITHIN_S = 20.0
# What a server does with a request: the answer, or None to say nothing, or "" to hang up.
Behaviour = Callable[[int, dict[str, object]], str | None]


def answer(transaction_id: object, status: int = 200) -> str:
    body = json.dumps(
        {
            "transaction_id": transaction_id,
            "decision": "review",
            "risk_score": 417,
            "probability": 0.417,
            "reasons": [{"code": "AMOUNT_LIMIT", "text": "t", "cardholder_text": "c"}],
            "rule_hits": [],
            "model": None,
            "degraded": ["stale_features"],
            "latency_ms": 1.0,
        }
    )
    return f"HTTP/1.1 {status} X\r\ncontent-length: {len(body)}\r\n\r\n{body}"


@contextmanager
def server(behaviour: Behaviour) -> Iterator[tuple[str, int]]:
    """`behaviour(n, body)` for the n-th request of all, from 0."""
    listener = socket.create_server(("127.0.0.1", 0))
    served: list[socket.socket] = [listener]
    requests = iter(range(1_000_000))

    def serve(connection: socket.socket) -> None:
        with connection, connection.makefile("rb") as lines:
            while head := lines.readline():
                size = 0
                while (line := lines.readline()) not in (b"\r\n", b""):
                    if line.lower().startswith(b"content-length:"):
                        size = int(line.split(b":")[1])
                assert head.startswith(b"POST /score")
                said = behaviour(next(requests), json.loads(lines.read(size)))
                if said == "":
                    return
                if said is not None:
                    connection.sendall(said.encode())

    def accept() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            served.append(connection)
            threading.Thread(target=serve, args=(connection,), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield listener.getsockname()
    finally:
        for s in served:
            try:
                s.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass
            s.close()


def call(address: tuple[str, int], count: int = 1, first_try_s: float = WITHIN_S, rate_per_s: float = 1000.0) -> Log:
    """`count` payments one after the other, each until it has its outcome. The retry budget is that of `rate_per_s`."""
    log = Log(count)
    caller = Caller(address, "r", log, RetryBudget(rate_per_s), first_try_s)
    for i in range(count):
        now = time.monotonic()
        body = json.dumps({"transaction_id": f"r-{i}"}).encode()
        caller.submit(Call(i, now, body), now)
        give_up = now + WITHIN_S
        while caller.under_way:
            assert time.monotonic() < give_up
            caller.turn()
    caller.close()
    return log


def test_a_second_attempt_is_told_what_is_left() -> None:
    payment = Call(0, 10.0, b"{}")
    payment.attempts = 1
    assert payment.deadline_ms(10.09) == DEADLINE_MS
    payment.attempts = 2
    assert [payment.deadline_ms(at) for at in (10.0, 10.065, 11.0)] == [DEADLINE_MS, ANSWER_MS - WAY_MS - 65, DEADLINE_MS_LEAST]


def test_an_answer_is_noted_with_what_it_says() -> None:
    with server(lambda _, body: answer(body["transaction_id"])) as address:
        log = call(address, 3)
    assert list(log.status) == [200] * 3 and list(log.attempts) == [1] * 3
    assert (log.outcome[0], log.score[0]) == (outcome_number("review"), 417)
    assert degraded_names(log.degraded[0]) == ["stale_features"]
    assert log.reasons[0] == reasons_hash(["AMOUNT_LIMIT"]) == zlib.crc32(b"AMOUNT_LIMIT")
    assert all(us > 0 for us in log.latency_us)


@pytest.mark.parametrize("first", ["", None, answer("r-0", 503)], ids=["hangs up", "says nothing", "is draining"])
def test_what_fails_once_is_sent_once_more_on_another_connection(first: str | None) -> None:
    bodies = []

    def behaviour(n: int, body: dict[str, object]) -> str | None:
        bodies.append(body)
        return answer(body["transaction_id"]) if n else first

    with server(behaviour) as address:
        log = call(address, first_try_s=FIRST_TRY_S if first is None else WITHIN_S)
    assert (log.status[0], log.attempts[0]) == (200, 2)
    assert bodies == [{"transaction_id": "r-0"}] * 2
    if first is None:
        # The wait for the first attempt is part of what the caller waited.
        assert log.latency_us[0] >= FIRST_TRY_S * 1e6


def test_what_fails_twice_has_failed() -> None:
    with server(lambda *_: "") as address:
        log = call(address)
    assert (log.status[0], log.attempts[0]) == (FAILED, 2)


def test_past_the_budget_what_fails_is_not_sent_again() -> None:
    with server(lambda *_: "") as address:
        log = call(address, 150, rate_per_s=0.0)
    attempts = list(log.attempts)
    assert set(log.status) == {FAILED}
    # Saved up are ten seconds of ten retries; then a fifth of what is sent, and ten a second.
    assert attempts[:100] == [2] * 100
    assert 1 in attempts[100:]


def test_a_budget_grows_with_what_is_sent_and_with_time_and_holds_ten_seconds_of_both() -> None:
    budget = RetryBudget(rate_per_s=100.0)
    budget.sent(0.0)

    def taken() -> int:
        return sum(budget.take() for _ in range(10_000))

    assert taken() == 300
    for i in range(100):
        budget.sent(i / 100)
    assert taken() == pytest.approx(30, abs=1)
    budget.sent(3600.0)
    assert taken() == 300


def test_nobody_listening_is_a_failure_and_no_crash() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = listener.getsockname()
    log = call(address)
    assert (log.status[0], log.attempts[0]) == (FAILED, 2)


def test_who_is_told_to_come_later_is_not_sent_again() -> None:
    with server(lambda _, body: answer(body["transaction_id"], 429)) as address:
        log = call(address)
    assert (log.status[0], log.attempts[0]) == (429, 1)


def test_who_waits_for_a_connection_goes_before_who_comes_later(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steady, "CONNECTIONS", 1)
    monkeypatch.setattr(steady, "CONNECTIONS_MAX", 2)
    arrived: list[object] = []
    answered = [threading.Event() for _ in range(4)]

    def behaviour(n: int, body: dict[str, object]) -> str:
        arrived.append(body["transaction_id"])
        assert answered[n].wait(WITHIN_S)
        return answer(body["transaction_id"])

    with server(behaviour) as address:
        log = Log(4)
        caller = Caller(address, "r", log, RetryBudget(1000.0), WITHIN_S)

        def submit(*numbers: int) -> None:
            now = time.monotonic()
            for i in numbers:
                caller.submit(Call(i, now, json.dumps({"transaction_id": f"r-{i}"}).encode()), now)

        def turn_until(condition: Callable[[], bool]) -> None:
            give_up = time.monotonic() + WITHIN_S
            while not condition():
                assert time.monotonic() < give_up
                caller.turn()

        submit(0, 1, 2)
        turn_until(lambda: len(arrived) == 2)
        assert caller.peaks() == (2, 1)
        answered[0].set()
        turn_until(lambda: caller.answered == 1)
        # A connection is free now, or may be opened.
        submit(3)
        turn_until(lambda: len(arrived) == 3)
        assert arrived[2] == "r-2"
        for event in answered:
            event.set()
        turn_until(lambda: caller.under_way == 0)
        assert caller.peaks() == (2, 1), "since the last time"
        assert caller.peaks()[1] == 0
        caller.close()
    assert list(log.status) == [200] * 4


def test_an_answer_of_another_payment_is_noted_as_such() -> None:
    with server(lambda *_: answer("r-99")) as address:
        log = call(address)
    assert log.status[0] == MIXED_UP


def test_outcomes_are_read_as_they_were_written(tmp_path: Path) -> None:
    log = Log(3)
    log.status[1], log.score[1], log.latency_us[1] = 200, 999, 12_345
    log.save(tmp_path / "answers.npz")
    found = load(tmp_path / "answers.npz")
    assert found["status"].tolist() == [NOT_DUE, 200, NOT_DUE]
    assert (found["score"][1], found["latency_us"][1]) == (999, 12_345)


def test_degraded_kinds_are_bits() -> None:
    assert degraded_names(degraded_bits(["rules_only", "stale_features"])) == ["stale_features", "rules_only"]


def test_payments_are_valid_and_follow_from_their_numbers() -> None:
    shoppers = Shoppers("r", 3, 1000.0, NOW_MS)
    made = shoppers.block(128, 64)
    assert made == Shoppers("r", 3, 1000.0, NOW_MS).block(128, 64)
    for i, (card, body) in enumerate(made, 128):
        t = decode_json(body, NOW_MS)
        check(t, NOW_MS + 1000)
        assert (t.transaction_id, t.card_id, t.event_time_ms) == (f"r-{i}", card, NOW_MS + i)
    assert made != Shoppers("r", 4, 1000.0, NOW_MS).block(128, 64)


def test_communities_never_meet() -> None:
    shoppers = Shoppers("r", 3, 1000.0, NOW_MS)
    owner: dict[str, str] = {}
    for first in range(0, 6400, 64):
        for card, body in shoppers.block(first, 64):
            t = decode_json(body, NOW_MS)
            mine = card[: len(card_prefix(0))]
            for entity in (t.card_id, t.customer_id, t.merchant_id, t.device_id, t.ip):
                if entity is not None:
                    assert owner.setdefault(entity, mine) == mine
    assert set(owner.values()) == {card_prefix(g) for g in range(COMMUNITIES)}


def test_clocks_are_wrong_for_every_fifth_payment_while_they_are_and_for_none_otherwise() -> None:
    shoppers = Shoppers("r", 3, 10.0, NOW_MS, [Span(5.0, 7.0)])
    off = [shoppers.event_time_ms(i) - NOW_MS - i * 100 for i in range(100)]
    assert [i for i in range(100) if off[i]] == [50, 55, 60, 65]
    assert {off[i] for i in (50, 55, 60, 65)} == set(SKEWS_MS)


def test_one_payment_in_ten_goes_to_kafka() -> None:
    assert np.flatnonzero([is_kafka(i) for i in range(30)]).tolist() == [9, 19, 29]


def test_a_transactions_id_is_read_from_either_form() -> None:
    [(_, body)] = Shoppers("soak1", 3, 10.0, NOW_MS).block(0, 1)
    assert id_of(body) == "soak1-0"
    assert id_of(frame(7, b"\x0esoak1-5rest")) == "soak1-5"
    assert [id_of(value) for value in (b"", b"\0", b"\0\0\0\0\0", b'{"card_id":"x"}', b"\xff\xfe")] == [""] * 5


@pytest.mark.parametrize(
    ("name", "number"), [("r-0", 0), ("r-99", 99), ("r-100", None), ("q-5", None), ("r-", None), ("r-5x", None), ("5", None)]
)
def test_only_a_payment_of_the_run_has_a_number(name: str, number: int | None) -> None:
    assert number_of(name, "r-", 100) == number
