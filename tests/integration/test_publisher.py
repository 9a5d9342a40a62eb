"""What the HTTP door decided gets to Kafka in order and once, whatever the broker or the gateway does meanwhile."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from deploy.stack import Stack
from gateway.avro import SchemaBook, encode_transaction
from gateway.contracts.registry import SchemaRegistry
from gateway.contracts.settings import Settings
from gateway.contracts.topics import SCORED_BY_HTTP, SCORED_HEADER, TRANSACTIONS
from gateway.metrics import Metrics
from gateway.publisher import Publisher
from gateway.records import Record, send_all
from gateway.resumable import identity_of, open_producer, stop_producer
from gateway.spool import Spool
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
    return [Record(TRANSACTIONS, t.card_id.encode(), encode_transaction(t), [(SCORED_HEADER, SCORED_BY_HTTP)]) for t in some]


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


@pytest.mark.slow
def test_a_broker_that_is_stopped_gets_everything_once_and_in_order(
    stack: Stack, tail: Tail, settings: Settings, tmp_path: Path
) -> None:
    records = make_records(5000, name("stopped"))
    metrics = Metrics()
    broker = stack.pid("kafka")
    assert broker is not None

    async def publish() -> None:
        publisher = Publisher(
            settings.bootstrap,
            await resolved(settings),
            metrics,
            100_000,
            lambda: Spool(tmp_path / "spool", 2**24),
            spool_after_s=0.02,
        )
        publisher.start()
        await publisher.send(records[:100])
        os.kill(broker, signal.SIGSTOP)
        try:
            for i in range(100, len(records), 10):
                # In the log, at once or after its time.
                await asyncio.wait_for(publisher.send(records[i : i + 10]), 5)
            assert publisher.buffered == len(records) - 100
        finally:
            os.kill(broker, signal.SIGCONT)
        await until(lambda: publisher.buffered == 0, 60)
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
