"""What the HTTP door decided gets to Kafka in order and once, whatever the broker or the gateway does meanwhile."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from deploy.stack import Stack
from gateway.contracts.registry import SchemaRegistry
from gateway.contracts.settings import Settings
from gateway.contracts.topics import SCORED_BY_HTTP, SCORED_HEADER, TRANSACTIONS
from gateway.kafka.avro import SchemaBook, encode_transaction
from gateway.kafka.publisher import Publisher
from gateway.kafka.records import Record, send_all
from gateway.kafka.resumable import identity_of, open_producer, stop_producer
from gateway.kafka.spool import open_orphan, open_own
from gateway.metrics import Metrics
from tests.helpers import running_command, until
from tests.integration.gateway_helpers import Tail, make_transaction, name, post, ready_without, request
from tests.integration.kafka_faults import Receipts

pytestmark = pytest.mark.integration
READY_WITHIN_S = 60


@pytest.fixture
def tail(stack: Stack, settings: Settings) -> Iterator[Tail]:
    assert stack.pid("kafka")
    tail = Tail(settings, TRANSACTIONS)
    yield tail
    tail.close()


def make_records(count: int, prefix: str) -> list[Record]:
    """Of one card, hence of one partition."""
    some = [make_transaction(f"{prefix}-{i}", card_id=f"card-{prefix}") for i in range(count)]
    return [Record(TRANSACTIONS, t.card_id.encode(), encode_transaction(t), ((SCORED_HEADER, SCORED_BY_HTTP),)) for t in some]


def values_of(tail: Tail, records: list[Record]) -> list[bytes]:
    wanted = {r.payload for r in records}
    return [v for m in tail.messages if (v := (m.value() or b"")[5:]) in wanted]


async def resolved(settings: Settings) -> SchemaBook:
    schemas = SchemaBook(SchemaRegistry(settings.registry, settings.schemas_path))
    await schemas.resolve()
    return schemas


def test_the_same_delivery_by_another_producer_of_the_same_identity_is_no_duplicate(tail: Tail, settings: Settings) -> None:
    records = make_records(300, name("again"))

    async def send_twice() -> None:
        schemas = await resolved(settings)
        first = await open_producer(settings.bootstrap, None)
        for future in await send_all(first, records[:100], schemas):
            await future
        before = identity_of(first)
        for future in await send_all(first, records[100:200], schemas):
            await future
        await stop_producer(first)
        second = await open_producer(settings.bootstrap, before)
        for part in (records[100:200], records[200:]):
            for future in await send_all(second, part, schemas):
                await future
        await stop_producer(second)

    asyncio.run(send_twice())
    tail.read_until(lambda: len(values_of(tail, records)) >= len(records))
    assert values_of(tail, records) == [r.payload for r in records]


async def publish_across_a_stop(
    stack: Stack, settings: Settings, records: list[Record], folder: Path, *, log_bytes: int, buffer_max: int
) -> tuple[int, int]:
    """Send 100, then the rest while the broker stands still. How many groups of ten were taken at once, and how many waited for it."""
    broker = stack.pid("kafka")
    assert broker is not None
    publisher = Publisher(
        settings.bootstrap, await resolved(settings), Metrics(), buffer_max, lambda: open_own(folder, "0", log_bytes)
    )
    publisher.start()
    await publisher.send(records[:100])
    await until(lambda: publisher.buffered == 0, 20)
    os.kill(broker, signal.SIGSTOP)
    try:
        groups = [publisher.send(records[i : i + 10]) for i in range(100, len(records), 10)]
        at_once = sum(group.done() for group in groups)
        assert not any(group.cancelled() for group in groups)
        await asyncio.sleep(0.2)  # sleeps: while the broker stands still, nothing may be acknowledged
        assert publisher.buffered == len(records) - 100
    finally:
        os.kill(broker, signal.SIGCONT)
    await until(lambda: publisher.buffered == 0, 60)
    await asyncio.gather(*groups)
    await publisher.stop(1)
    return at_once, len(groups) - at_once


@pytest.mark.parametrize("buffer_max", [100_000, 500])
def test_while_the_broker_stands_still_the_log_takes_everything_at_once(
    stack: Stack, tail: Tail, settings: Settings, tmp_path: Path, buffer_max: int
) -> None:
    records = make_records(3000, name("stopped"))
    found = asyncio.run(publish_across_a_stop(stack, settings, records, tmp_path, log_bytes=2**24, buffer_max=buffer_max))
    assert found == (290, 0)
    tail.read_until(lambda: len(values_of(tail, records)) >= len(records))
    assert values_of(tail, records) == [r.payload for r in records]


def test_what_the_log_has_no_room_for_waits_in_memory_and_keeps_its_place(
    stack: Stack, tail: Tail, settings: Settings, tmp_path: Path
) -> None:
    records = make_records(600, name("no-room"))
    log_bytes = 25_000
    at_once, waited = asyncio.run(
        publish_across_a_stop(stack, settings, records, tmp_path, log_bytes=log_bytes, buffer_max=100_000)
    )
    assert at_once > 0
    assert waited > 0
    tail.read_until(lambda: len(values_of(tail, records)) >= len(records))
    assert values_of(tail, records) == [r.payload for r in records]


def test_what_a_dead_process_left_is_delivered_by_another(stack: Stack, tail: Tail, settings: Settings, tmp_path: Path) -> None:
    assert stack.pid("kafka")
    records = make_records(200, name("left"))
    left = open_own(tmp_path, "dead", 2**24)
    for i in range(0, len(records), 50):
        assert left.append(msgspec.msgpack.encode(records[i : i + 50]), 50)
    left.close()

    async def publish() -> None:
        publisher = Publisher(
            settings.bootstrap,
            await resolved(settings),
            Metrics(),
            1000,
            lambda: open_own(tmp_path, "alive", 2**24),
            lambda: open_orphan(tmp_path, 2**24),
        )
        publisher.start()
        # A log of which all is delivered has no files.
        await until(lambda: not list((tmp_path / "dead").glob("*.log")), 30)
        await publisher.stop(1)

    asyncio.run(publish())
    tail.read_until(lambda: len(values_of(tail, records)) >= len(records))
    assert values_of(tail, records) == [r.payload for r in records]


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_what_http_decided_while_the_broker_was_down_outlives_the_gateway_too(
    stack: Stack, settings: Settings, tmp_path: Path
) -> None:
    receipts, transactions = Receipts(settings), Tail(settings, TRANSACTIONS)
    own = dataclasses.replace(settings, feature_budget_ms=1000, decision_budget_ms=3000, spool_dir=str(tmp_path / "spool"))
    card = name("card")
    some = [make_transaction(f"{card}-{i}", card_id=card) for i in range(120)]
    answered: list[str] = []

    def pay(count: int) -> None:
        for t in some[len(answered) : len(answered) + count]:
            assert post(own, t)[0] == 200
            answered.append(t.transaction_id)

    # The broker goes while records are on their way to it, comes back, and goes again; the gateway is killed in each outage.
    for outage in range(2):
        with running_command(own, "serve", log_path=tmp_path / f"gateway-{outage}.log") as command:
            command.wait_until(lambda: ready_without(own, "redis", "kafka"), READY_WITHIN_S, "the gateway is ready")
            pay(20)
            stack.kill("kafka")
            pay(20)
            command.send_signal(signal.SIGKILL)
        with running_command(own, "serve", log_path=tmp_path / f"gateway-{outage}-down.log") as command:
            command.wait_until(lambda: ready_without(own, "redis"), READY_WITHIN_S, "the gateway is ready, without Kafka")
            pay(20)
            stack.start(["kafka"])
            receipts.read_until(lambda: receipts.decided(set(answered)) == len(answered), 90)
            assert request(own, "GET", "/readyz")[0] == 200
    transactions.read_until(lambda: len(transactions.messages) >= len(answered))
    assert [receipts.counts[i] for i in answered] == [1] * len(answered)
    in_order = [payload[1 : 1 + payload[0] // 2].decode() for m in transactions.messages if (payload := (m.value() or b"")[5:])]
    assert [i for i in in_order if i.startswith(card)] == answered
    print(f"\nbroker down twice, gateway killed in it: {len(answered)} answers, each receipt once and in order", flush=True)
    receipts.close()
    transactions.close()
