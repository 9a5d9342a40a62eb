"""An idempotent producer that another process can go on with: what it sends again, the broker knows by its sequence numbers.

The broker recognises a batch by producer id, epoch and first sequence number, keeps the last 5 batches of each partition, and keeps them
over its own restarts for a day. So whoever sends the same records again under the same `Identity` makes no duplicate, whether or not
the first attempt had arrived. aiokafka has no public way to take up an identity; what is used of it is pinned by pyproject.toml and
held by tests/integration/test_publisher.py.
"""

from __future__ import annotations

import asyncio
import logging

import msgspec
from aiokafka import AIOKafkaProducer
from aiokafka.errors import KafkaError
from aiokafka.structs import TopicPartition

from gateway.kafka.records import BATCH_BYTES_MAX, REQUEST_BYTES_MAX

log = logging.getLogger(__name__)

START_TIMEOUT_S = 10.0
STOP_TIMEOUT_S = 2.0
REQUEST_TIMEOUT_MS = 30_000
# Of one delivery, so that no partition gets more batches than the broker remembers.
REMEMBERED_BATCHES = 5
DELIVERY_BYTES_MAX = 3 * BATCH_BYTES_MAX
assert DELIVERY_BYTES_MAX // BATCH_BYTES_MAX + 1 < REMEMBERED_BATCHES


class Identity(msgspec.Struct, frozen=True, array_like=True):
    """Who sends, and the next sequence number of each (topic, partition)."""

    producer_id: int
    epoch: int
    sequences: list[tuple[str, int, int]]


async def open_producer(bootstrap: str, identity: Identity | None) -> AIOKafkaProducer:
    """A started producer that goes on as `identity`, or as a new one. Raises KafkaError, OSError."""
    producer = AIOKafkaProducer(
        bootstrap_servers=bootstrap,
        enable_idempotence=True,
        max_batch_size=BATCH_BYTES_MAX,
        max_request_size=REQUEST_BYTES_MAX,
        request_timeout_ms=REQUEST_TIMEOUT_MS,
    )
    if identity is not None:
        state = producer._txn_manager
        state.set_pid_and_epoch(identity.producer_id, identity.epoch)
        for topic, partition, sequence in identity.sequences:
            state._sequence_numbers[TopicPartition(topic, partition)] = sequence
    try:
        async with asyncio.timeout(START_TIMEOUT_S):
            await producer.start()
    except (KafkaError, OSError, asyncio.CancelledError):
        await stop_producer(producer)
        raise
    return producer


def identity_of(producer: AIOKafkaProducer) -> Identity:
    """Its identity now. Only between two deliveries."""
    state = producer._txn_manager
    sequences = [(tp.topic, tp.partition, n) for tp, n in state._sequence_numbers.items()]
    return Identity(state.producer_id, state.producer_epoch, sequences)


async def stop_producer(producer: AIOKafkaProducer, timeout_s: float = STOP_TIMEOUT_S) -> None:
    """Stop a producer whether or not its broker still answers."""
    try:
        async with asyncio.timeout(timeout_s):
            await producer.stop()
    except (KafkaError, OSError) as exc:
        log.debug("publisher: the producer didn't stop cleanly: %r", exc)
        sender = producer._sender
        if sender.sender_task is not None:
            sender.sender_task.cancel()
            await asyncio.wait({sender.sender_task}, timeout=timeout_s)
        await producer.client.close()
