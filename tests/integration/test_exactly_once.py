"""Each transaction has one receipt for a reader of committed records, whatever is done to gateways and broker."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from confluent_kafka import Consumer, TopicPartition

from deploy.stack import Stack
from gateway.contracts.registry import SchemaRegistry
from gateway.contracts.settings import Settings
from gateway.contracts.topics import TRANSACTIONS
from gateway.contracts.transaction import encode_json
from gateway.kafka.avro import SchemaBook
from gateway.kafka.link import SESSION_TIMEOUT_MS, TRANSACTION_TIMEOUT_MS, Link, LinkLostError, Membership, Polled
from tests.helpers import wait_until
from tests.integration.gateway_helpers import make_transaction, name, produce
from tests.integration.kafka_faults import READY_WITHIN_S, Flow, Receipts, assert_each_decided_once, gateways

pytestmark = pytest.mark.integration

RATE = 300
# A stopped gateway is thrown out, its open transaction is aborted (the broker looks every 10 s), and another has gone on.
STOPPED_S = (SESSION_TIMEOUT_MS + TRANSACTION_TIMEOUT_MS) / 1000 + 15


@pytest.fixture
def tail(stack: Stack, settings: Settings) -> Iterator[Receipts]:
    assert stack.pid("kafka")
    tail = Receipts(settings)
    yield tail
    tail.close()


def make_link(settings: Settings, group: str, instance: str) -> Link:
    schemas = SchemaBook(SchemaRegistry(settings.registry, settings.schemas_path))
    return Link(settings.bootstrap, group, instance, schemas, exactly_once=True)


def poll_until_messages(link: Link) -> tuple[Membership, list[Polled]]:
    deadline_s = time.monotonic() + READY_WITHIN_S
    while time.monotonic() < deadline_s:
        membership, messages = link.poll()
        if messages:
            assert membership is not None
            return membership, messages
    raise AssertionError("no messages came")


def next_offsets(messages: list[Polled]) -> dict[int, int]:
    return {m.partition: m.offset + 1 for m in messages}


def test_a_member_whose_partitions_went_to_another_can_not_commit(stack: Stack, settings: Settings) -> None:
    group = name("group")
    t = make_transaction(name("t"))
    produce(settings, [(t.card_id, encode_json(t))])
    one, two = make_link(settings, group, "one"), make_link(settings, group, "two")
    try:
        one.open()
        stale, messages = poll_until_messages(one)
        two.open()
        # Both take part in the rebalance, as when the first wakes up and finds itself thrown out.
        joined = threading.Thread(
            target=wait_until, args=(lambda: two.poll()[0] is not None, READY_WITHIN_S, "the second has joined")
        )
        joined.start()
        wait_until(lambda: one.poll()[0] is not stale and one.membership is not None, READY_WITHIN_S, "the first has joined anew")
        joined.join()
        with pytest.raises(LinkLostError):
            one.commit([], next_offsets(messages), stale)
    finally:
        for link in (one, two):
            link.close_producers()
            link.close_consumer()


def test_a_second_gateway_of_the_same_name_fences_the_first(stack: Stack, settings: Settings) -> None:
    group = name("group")
    t = make_transaction(name("t"))
    produce(settings, [(t.card_id, encode_json(t))])
    one, two = make_link(settings, group, "same"), make_link(settings, group, "same")
    try:
        one.open()
        membership, messages = poll_until_messages(one)
        two.open()
        with pytest.raises(LinkLostError):
            one.commit([], next_offsets(messages), membership)
    finally:
        for link in (one, two):
            link.close_producers()
            link.close_consumer()


def test_while_anothers_transaction_holds_the_offsets_back_nothing_is_read_from_the_beginning(
    stack: Stack, settings: Settings
) -> None:
    """What was decided longer ago than the idempotency window would be decided again."""
    group = name("group")
    t = make_transaction(name("t"))
    produce(settings, [(t.card_id, encode_json(t))])
    link = make_link(settings, group, "one")
    try:
        link.open()
        membership, messages = poll_until_messages(link)
        committed = next_offsets(messages)
        link.commit([], committed, membership)
        # As of a gateway that was stopped in the middle of a chunk; the broker aborts it later.
        stopped = link._producers[0]
        stopped.begin_transaction()
        stopped.send_offsets_to_transaction([TopicPartition(TRANSACTIONS, p, o) for p, o in committed.items()], membership.metadata)
        aborted = threading.Timer(2.0, stopped.abort_transaction)
        aborted.start()
        link._rewind()
        aborted.join()
        produce(settings, [(t.card_id, encode_json(make_transaction(name("t"), card_id=t.card_id)))])
        _, later = poll_until_messages(link)
        assert all(m.offset >= committed.get(m.partition, 0) for m in later)
    finally:
        link.close_producers()
        link.close_consumer()


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_gateways_killed_again_and_again(tail: Receipts, settings: Settings, tmp_path: Path) -> None:
    flow = Flow(settings, RATE)
    try:
        for _ in range(4):
            with gateways(settings, tmp_path, 2) as running:
                tail.read_some(RATE * 4)
                running[0][0].send_signal(signal.SIGKILL)
                tail.read_some(RATE)
                running[1][0].send_signal(signal.SIGKILL)
    finally:
        sent = flow.end()
    with gateways(settings, tmp_path, 1):
        assert_each_decided_once(tail, sent, "two gateways killed four times each")


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_gateway_stopped_past_its_session_and_resumed(tail: Receipts, settings: Settings, tmp_path: Path) -> None:
    flow = Flow(settings, RATE)
    try:
        with gateways(settings, tmp_path, 2) as running:
            for command, _ in [*running, *running]:
                tail.read_some(RATE * 3)
                command.send_signal(signal.SIGSTOP)
                took_s = tail.wait_decided(set(flow.sent), STOPPED_S)
                print(f"\nthe other has decided all that was due {took_s:.1f} s after the stop", flush=True)
                # Past its session in any case, also when nothing of its partitions was due.
                tail.read_for(SESSION_TIMEOUT_MS / 1000 + 2 - took_s)
                command.send_signal(signal.SIGCONT)
            tail.read_some(RATE * 3)
            sent = flow.end()
            assert_each_decided_once(tail, sent, "gateways stopped past their session four times")
    finally:
        flow.end()


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_rebalance_every_5_seconds_for_two_minutes(tail: Receipts, settings: Settings, tmp_path: Path) -> None:
    flow = Flow(settings, RATE)
    rebalances = 0
    options = {
        "bootstrap.servers": settings.bootstrap,
        "group.id": settings.consumer_group,
        "enable.auto.commit": False,
        "log_level": 0,
    }
    try:
        with gateways(settings, tmp_path, 2):
            until_s = time.monotonic() + 120
            while time.monotonic() < until_s:
                # A member that joins, holds its partitions for a moment and leaves: two rebalances.
                visitor = Consumer(options)
                visitor.subscribe([TRANSACTIONS])
                visitor.poll(2)
                tail.read_for(2.5)
                visitor.close()
                tail.read_for(2.5)
                rebalances += 2
            sent = flow.end()
            assert_each_decided_once(tail, sent, f"{rebalances} rebalances in two minutes")
    finally:
        flow.end()


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_the_broker_killed_and_restarted(stack: Stack, tail: Receipts, settings: Settings, tmp_path: Path) -> None:
    flow = Flow(settings, RATE)
    try:
        with gateways(settings, tmp_path, 2):
            for _ in range(3):
                tail.read_some(RATE * 3)
                stack.kill("kafka")
                stack.start(["kafka"])
                try:
                    took_s = tail.wait_decided(set(flow.sent), 90)
                finally:
                    print(f"\nthe flow: {flow.state()}", flush=True)
                print(f"\ndecided all that was due {took_s:.1f} s after the broker was back", flush=True)
            sent = flow.end()
            assert_each_decided_once(tail, sent, "the broker killed three times")
    finally:
        flow.end()


@pytest.mark.parametrize("after_polls", range(0, 40, 4))
def test_a_link_that_is_closed_while_it_joins_does_not_hang(stack: Stack, settings: Settings, after_polls: int) -> None:
    link = make_link(settings, name("group"), "brief")
    link.open()
    moments = iter([False] * after_polls + [True])
    wait_until(lambda: next(moments), 10, "a moment has passed")
    link.abandon()
    link.close_producers()
    link.close_consumer()
    assert link.membership is None
