"""The open-loop generator: its schedule and arithmetic without a clock, and its driver against a real socket with an injected one."""

from __future__ import annotations

import json
import math
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import msgspec
import pytest

from deploy.population import DIGITS
from gateway.contracts.topics import DECISIONS, TOPICS
from gateway.contracts.transaction import check, decode_json, encode_json
from gateway.contracts.wire import frame
from loadtest.openloop.http import Driver, GeneratorError, request_bytes, status_and_size
from loadtest.openloop.kafka_out import number_of
from loadtest.openloop.payments import PREFIX, People, payments, run_name, transaction_id
from loadtest.openloop.schedule import BEHIND_P99_MS_MAX, Record, Schedule, Windows, is_void

NOW_MS = 1_795_500_000_000


def test_a_request_is_due_at_its_place_in_the_schedule_whatever_happened_to_the_others() -> None:
    schedule = Schedule(rate_per_s=1000.0, start_s=50.0, count=10)
    assert schedule.due_s(0) == 50.0
    assert schedule.due_s(7) == pytest.approx(50.007)
    assert [schedule.due_by(t) for t in (49.9, 50.0, 50.0005, 50.0011, 51.0)] == [0, 1, 1, 2, 10]


def test_no_payment_of_a_run_has_an_id_that_would_be_taken_for_a_card_number() -> None:
    run = run_name("soak")
    assert run != run_name("soak")
    for payment in payments(People(100, 10), run, 50, NOW_MS, 100.0, seed=1):
        number = int(payment.transaction_id.removeprefix(f"{run}-")) + 4_111_110_000
        check(msgspec.structs.replace(payment, transaction_id=transaction_id(run, number)), NOW_MS)


def test_a_schedule_without_a_rate_or_a_request_is_refused() -> None:
    for rate, count in ((0.0, 1), (-1.0, 1), (1.0, 0)):
        with pytest.raises(ValueError, match="schedule"):
            Schedule(rate, 0.0, count)


def test_each_request_belongs_to_the_window_it_is_due_in_and_the_warm_up_to_none() -> None:
    windows, schedule = Windows(1.0, 2.0, 3), Schedule(100.0, 0.0, 700)
    assert windows.total_s == 7.0
    assert [windows.requests(k, schedule) for k in range(3)] == [(100, 300), (300, 500), (500, 700)]


def test_latency_counts_from_the_intended_send_and_unanswered_requests_count_until_the_end() -> None:
    schedule, windows = Schedule(10.0, 100.0, 20), Windows(0.0, 1.0, 2)
    record = Record(20)
    for i in range(10):
        record.latency_s[i] = 0.005
        record.behind_s[i] = 0.001
    record.latency_s[10] = 0.5
    first, second = (record.window(k, windows, schedule, end_s=110.0) for k in range(2))
    assert first.p50_ms == pytest.approx(5.0) and first.p99_ms == pytest.approx(5.0)
    assert (first.censored, first.requests) == (0, 10)
    assert first.reached_rate and first.behind_p99_ms == pytest.approx(1.0)
    assert second.censored == 9
    # Due at 101.1 and without an answer at 110.
    assert second.max_ms == pytest.approx(8900.0)
    assert not second.reached_rate


def test_answers_that_come_too_slowly_show_as_a_rate_below_the_offered() -> None:
    schedule, windows = Schedule(100.0, 0.0, 100), Windows(0.0, 1.0, 1)
    record = Record(100)
    for i in range(100):
        # Each takes twice its time: the last is answered at 2 s.
        record.latency_s[i] = (i + 1) / 50 - i / 100
    window = record.window(0, windows, schedule, end_s=2.5)
    assert window.achieved_per_s == pytest.approx(50.0, abs=1)
    assert not window.reached_rate


def test_a_generator_behind_its_schedule_voids_the_window() -> None:
    assert not is_void(BEHIND_P99_MS_MAX, 20.0)
    assert is_void(BEHIND_P99_MS_MAX + 0.1, 20.0)
    assert is_void(math.nan, 20.0)
    # Beside seconds of latency 20 ms are nothing.
    assert not is_void(20.0, 5000.0)


def test_a_window_in_which_nothing_was_due_is_void() -> None:
    assert Record(5).window(0, Windows(10.0, 1.0, 1), Schedule(1.0, 0.0, 5), end_s=20.0).void


@pytest.mark.parametrize(
    ("data", "found"),
    [
        (b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}", (200, 40)),
        (b"HTTP/1.1 429 Too Many\r\nServer: x\r\nContent-Length: 0\r\n\r\n", (429, 55)),
        (b"HTTP/1.1 200 OK\r\ncontent-len", None),
    ],
)
def test_status_and_size_of_an_answer_are_read_from_its_head(data: bytes, found: tuple[int, int] | None) -> None:
    assert status_and_size(data) == found


def test_an_answer_without_a_length_is_refused() -> None:
    with pytest.raises(GeneratorError):
        status_and_size(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")


def test_payments_are_valid_and_their_event_times_follow_the_rate() -> None:
    made = list(payments(People(100, 20), "r1", 200, NOW_MS, 1000.0, seed=3))
    for t in made:
        check(t, NOW_MS + 1000)
        assert decode_json(encode_json(t), NOW_MS) == t
    assert [t.event_time_ms - NOW_MS for t in made[:3]] == [0, 1, 2]
    assert [t.transaction_id for t in made[:2]] == ["r1-0", "r1-1"]
    assert 60 < sum(t.device_id is not None and t.ip is not None for t in made) < 140
    assert list(payments(People(100, 20), "r1", 200, NOW_MS, 1000.0, seed=3)) == made


def test_a_benchs_cards_are_those_of_the_month_that_redis_is_filled_with() -> None:
    assert PREFIX == DIGITS


def first_field(text: bytes) -> bytes:
    """Avro's string (zigzag length, then the bytes) and something behind it."""
    twice = len(text) * 2
    length = bytes([twice]) if twice < 128 else bytes([twice & 0x7F | 0x80, twice >> 7])
    return length + text + b"\x0cothers"


def test_the_number_of_a_decision_is_read_from_the_first_field_of_its_receipt() -> None:
    assert json.loads(TOPICS[DECISIONS].schema_text)["fields"][0] == {"name": "transaction_id", "type": "string"}
    assert number_of(frame(3, first_field(b"bench-a-1234")), b"bench-a-") == 1234
    assert number_of(frame(3, first_field(b"bench-a-" + b"0" * 55 + b"7")), b"bench-a-") == 7
    assert number_of(frame(3, first_field(b"somebody-else")), b"bench-a-") == -1


class Ticking:
    """A monotonic clock that moves when somebody naps on it, and a little with each look."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        self.now_s += 1e-5
        return self.now_s

    def nap(self, seconds: float) -> None:
        self.now_s += seconds


@contextmanager
def server(*, answers: int | None = None) -> Iterator[tuple[str, int]]:
    """Answers each request of one connection with a tiny 200, only the first `answers` when given."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        connection, _ = listener.accept()
        given = 0
        with connection:
            while data := connection.recv(65_536):
                if data.endswith(b"{}") and (answers is None or given < answers):
                    given += 1
                    connection.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}")

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        host, port = listener.getsockname()
        yield host, port
    finally:
        listener.close()
        thread.join(5)


def test_every_request_is_sent_and_the_edges_of_the_windows_are_told() -> None:
    clock = Ticking()
    edges: list[int] = []
    with server() as address:
        windows, schedule = Windows(0.1, 0.2, 2), Schedule(100.0, clock.now_s + 1.0, 50)
        requests = [request_bytes("x", "/score", b"{}")] * 50
        driver = Driver(
            address, requests, schedule, windows, connections=1, clock_s=clock, nap=clock.nap, on_edge=lambda k, _: edges.append(k)
        )
        driver.run()
    assert edges == [0, 1, 2]
    assert driver.sent == 50
    # The clock runs ahead of the real answers: what came by the end came with a latency, the rest is censored.
    assert driver.done + sum(1 for s in driver.record.latency_s if s < 0) == 50


def test_a_server_that_falls_silent_ends_in_censored_requests_and_not_in_a_hang() -> None:
    clock = Ticking()
    with server(answers=3) as address:
        windows, schedule = Windows(0.0, 0.5, 1), Schedule(100.0, clock.now_s + 0.1, 50)
        driver = Driver(
            address, [request_bytes("x", "/score", b"{}")] * 50, schedule, windows, connections=1, clock_s=clock, nap=clock.nap
        )
        driver.run()
    window = driver.record.window(0, windows, schedule, driver.end_s)
    assert window.censored >= 47
    assert window.p99_ms > 9_000
    assert not window.reached_rate
