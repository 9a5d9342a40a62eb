"""Delivers what the HTTP door decided to Kafka: in order, from a bounded buffer, whether or not the broker is up.

One delivery is under way at a time; while it is, the next one collects. A failed delivery stays in front and is tried again with
a new producer. When the buffer is full the newest records are dropped, counted and logged.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter, deque
from collections.abc import Sequence

from aiokafka import AIOKafkaProducer
from aiokafka.errors import KafkaError

from gateway.avro import SchemaBook
from gateway.contracts.registry import RegistryUnavailableError
from gateway.metrics import Metrics
from gateway.records import BATCH_BYTES_MAX, REQUEST_BYTES_MAX, Record, send_all

log = logging.getLogger(__name__)

DELIVERY_RECORDS_MAX = 4000
RETRY_FIRST_S = 0.1
RETRY_MAX_S = 2.0
START_TIMEOUT_S = 10.0
STOP_TIMEOUT_S = 2.0
REQUEST_TIMEOUT_MS = 30_000


class Publisher:
    """`buffer_max` is in records."""

    def __init__(self, bootstrap: str, schemas: SchemaBook, metrics: Metrics, buffer_max: int) -> None:
        self._bootstrap = bootstrap
        self._schemas = schemas
        self._metrics = metrics
        self._buffer_max = buffer_max
        self._groups: deque[tuple[list[Record], asyncio.Future[None]]] = deque()
        self._records = 0
        self._wake = asyncio.Event()
        self._producer: AIOKafkaProducer | None = None
        self._task: asyncio.Task[None] | None = None
        self._dropping = False

    def start(self) -> None:
        self._task = asyncio.create_task(self._deliver_forever())

    async def stop(self, drain_s: float) -> None:
        """Deliver what is buffered for at most `drain_s` seconds, then end."""
        futures = [future for _, future in self._groups]
        if futures:
            await asyncio.wait(futures, timeout=drain_s)
        if self._records:
            log.error("publisher: %d records were not delivered before the end", self._records)
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task})
        await self._close()

    @property
    def buffered(self) -> int:
        return self._records

    def send(self, records: Sequence[Record]) -> asyncio.Future[None]:
        """Buffer `records` as one group. The future ends when Kafka has acknowledged all; nobody has to wait for it.

        It is cancelled at once when the buffer is full.
        """
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        if not records:
            future.set_result(None)
        elif self._records + len(records) > self._buffer_max:
            self._metrics.publish_dropped.inc(len(records))
            if not self._dropping:
                log.error("publisher: the buffer of %d records is full, new ones are dropped", self._buffer_max)
            self._dropping = True
            future.cancel()
        else:
            self._dropping = False
            self._groups.append((list(records), future))
            self._records += len(records)
            self._metrics.buffer.set(self._records)
            self._wake.set()
        return future

    async def _deliver_forever(self) -> None:
        pause_s = RETRY_FIRST_S
        while True:
            await self._wake.wait()
            try:
                await self._deliver()
            except (KafkaError, OSError, RegistryUnavailableError) as exc:
                if pause_s == RETRY_FIRST_S:
                    log.warning("publisher: Kafka can't take %d records now (%r), trying again", self._records, exc)
                await self._close()
                await asyncio.sleep(pause_s)
                pause_s = min(pause_s * 2, RETRY_MAX_S)
                continue
            if pause_s != RETRY_FIRST_S:
                log.info("publisher: Kafka takes records again")
            pause_s = RETRY_FIRST_S

    async def _deliver(self) -> None:
        """Everything that is buffered now, up to DELIVERY_RECORDS_MAX. Raises `KafkaError` and leaves it in place."""
        if not self._schemas.complete:
            await self._schemas.resolve()
        if self._producer is None:
            self._producer = await self._open()
        taken: list[Record] = []
        groups = 0
        for records, _ in self._groups:
            if taken and len(taken) + len(records) > DELIVERY_RECORDS_MAX:
                break
            taken += records
            groups += 1
        if taken:
            for future in await send_all(self._producer, taken, self._schemas):
                await future
        for _ in range(groups):
            records, group_future = self._groups.popleft()
            self._records -= len(records)
            if not group_future.done():
                group_future.set_result(None)
        for topic, n in Counter(record.topic for record in taken).items():
            self._metrics.published.labels(topic).inc(n)
        self._metrics.buffer.set(self._records)
        if not self._groups:
            self._wake.clear()

    async def _open(self) -> AIOKafkaProducer:
        producer = AIOKafkaProducer(
            bootstrap_servers=self._bootstrap,
            enable_idempotence=True,
            max_batch_size=BATCH_BYTES_MAX,
            max_request_size=REQUEST_BYTES_MAX,
            request_timeout_ms=REQUEST_TIMEOUT_MS,
        )
        try:
            async with asyncio.timeout(START_TIMEOUT_S):
                await producer.start()
        except (KafkaError, OSError, asyncio.CancelledError):
            await stop_producer(producer)
            raise
        return producer

    async def _close(self) -> None:
        if self._producer is not None:
            producer, self._producer = self._producer, None
            await stop_producer(producer)


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
