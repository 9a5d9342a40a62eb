"""The blocking half of the Kafka door where the broker tells less than it should: faults that a real broker shows too seldom."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from confluent_kafka import OFFSET_BEGINNING, OFFSET_INVALID, KafkaError, TopicPartition

from gateway.contracts.registry import SchemaRegistry
from gateway.contracts.topics import SCORED_BY_HTTP, SCORED_HEADER, TRANSACTIONS
from gateway.kafka.avro import SchemaBook
from gateway.kafka.link import Link, LinkLostError, Membership, _messages
from tests.helpers import HOST


class Answering:
    """Stands for a consumer that is asked where partition 0 goes on."""

    def __init__(self, offset: int, error: KafkaError | None = None) -> None:
        self._answer = SimpleNamespace(partition=0, offset=offset, error=error)
        self.sought: list[int] = []

    def committed(self, partitions: list[TopicPartition], timeout: float) -> list[Any]:
        assert [p.partition for p in partitions] == [0]
        return [self._answer]

    def seek(self, partition: TopicPartition) -> None:
        self.sought.append(partition.offset)


def link_with(consumer: Answering) -> Link:
    # Nobody listens there, and nobody is asked.
    link = Link(f"{HOST}:9", "group", "one", SchemaBook(SchemaRegistry(f"http://{HOST}:9")), exactly_once=False)
    link._consumer = consumer
    link.membership = Membership(None, frozenset({0}))
    return link


def test_messages_of_an_unknown_owner_are_read_again_from_what_is_committed() -> None:
    consumer = Answering(17)
    link_with(consumer)._rewind()
    assert consumer.sought == [17]


def test_a_partition_of_which_nothing_was_ever_committed_begins_at_its_beginning() -> None:
    consumer = Answering(OFFSET_INVALID)
    link_with(consumer)._rewind()
    assert consumer.sought == [OFFSET_BEGINNING]


@pytest.mark.parametrize("error", [KafkaError(KafkaError.ILLEGAL_GENERATION), KafkaError(KafkaError._TIMED_OUT)])
def test_a_broker_that_does_not_tell_is_no_reason_to_begin_at_the_beginning(error: KafkaError) -> None:
    consumer = Answering(OFFSET_INVALID, error)
    with pytest.raises(LinkLostError, match="partition 0"):
        link_with(consumer)._rewind()
    assert consumer.sought == []


def test_nor_is_one_that_knows_nothing_of_what_was_committed_here() -> None:
    consumer = Answering(OFFSET_INVALID)
    link = link_with(consumer)
    link._moved.add(0)
    with pytest.raises(LinkLostError):
        link._rewind()
    assert consumer.sought == []


class Came:
    """Stands for a message of confluent_kafka."""

    def __init__(self, partition: int, offset: int, *, scored: bool) -> None:
        self._partition, self._offset, self._scored = partition, offset, scored

    def error(self) -> None:
        return None

    def topic(self) -> str:
        return TRANSACTIONS

    def partition(self) -> int:
        return self._partition

    def offset(self) -> int:
        return self._offset

    def timestamp(self) -> tuple[int, int]:
        return (1, 1_000 + self._offset)

    def key(self) -> bytes:
        return b"card"

    def value(self) -> bytes:
        return b"value"

    def headers(self) -> list[tuple[str, bytes]] | None:
        return [("traceparent", b"00"), (SCORED_HEADER, SCORED_BY_HTTP)] if self._scored else None


def test_of_what_was_scored_over_http_the_last_of_a_run_stands_for_all() -> None:
    came = [
        Came(0, 5, scored=True),
        Came(1, 8, scored=True),
        Came(0, 6, scored=True),
        Came(0, 7, scored=False),
        Came(1, 9, scored=True),
        Came(0, 8, scored=True),
        Came(0, 10, scored=True),
    ]
    found = [(m.partition, m.offset, m.records, m.value) for m in _messages(came)]
    assert found == [(0, 6, 2, None), (1, 9, 2, None), (0, 7, 1, b"value"), (0, 10, 2, None)]
    # Where each partition goes on is behind the last of it, as the door reckons.
    assert {partition: offset for partition, offset, *_ in found} == {0: 10, 1: 9}
