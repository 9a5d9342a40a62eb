"""Delivers what the HTTP door decided to Kafka: in order, once, whether or not the broker is up.

One delivery is under way at a time; while it is, the next one collects in memory. What Kafka hasn't acknowledged after `spool_after_s`
goes to a bounded local log (gateway/spool.py) and is as good as acknowledged for whoever waits; from then on everything goes there,
until what is left is one delivery. A delivery that may have happened is sent again under the same producer identity
(gateway/resumable.py), by this process or the next, so that the broker knows it. When the log is full the newest records are dropped,
counted and logged. While the broker answers in time, nothing is written to disk.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence

import msgspec
from aiokafka import AIOKafkaProducer
from aiokafka.errors import InvalidProducerEpoch, KafkaError, NodeNotReadyError, OutOfOrderSequenceNumber, UnknownProducerId

from gateway.avro import SchemaBook
from gateway.contracts.registry import RegistryUnavailableError
from gateway.metrics import Metrics
from gateway.records import Record, send_all
from gateway.resumable import DELIVERY_BYTES_MAX, Identity, identity_of, open_producer, stop_producer
from gateway.spool import Entry, Spool

log = logging.getLogger(__name__)

DELIVERY_RECORDS_MAX = 2000
RETRY_FIRST_S = 0.1
RETRY_MAX_S = 2.0
# How often another process's hold on the log is tried.
LOCKED_RETRY_S = 5.0
# What a record is on top of key and payload, at most: its place in a batch and our header.
RECORD_OVERHEAD_BYTES = 64


class Parcel(msgspec.Struct, array_like=True):
    """An entry of the log: records, and the identity they were sent under when that may have happened already."""

    identity: Identity | None
    records: list[tuple[str, bytes | None, bytes, list[tuple[str, bytes]]]]


Group = tuple[list[Record], asyncio.Future[None]]


class Publisher:
    """`buffer_max` is in records, in memory. `open_spool` makes the log; None: there is none, and what waits is in memory alone."""

    def __init__(
        self,
        bootstrap: str,
        schemas: SchemaBook,
        metrics: Metrics,
        buffer_max: int,
        open_spool: Callable[[], Spool] | None = None,
        *,
        spool_after_s: float = 0.015,
        sync_s: float = 1.0,
    ) -> None:
        self._bootstrap = bootstrap
        self._schemas = schemas
        self._metrics = metrics
        self._buffer_max = buffer_max
        self._open_spool = open_spool
        self._spool_after_s = spool_after_s
        self._sync_s = sync_s
        self._groups: deque[Group] = deque()
        self._records = 0
        self._wake = asyncio.Event()
        self._producer: AIOKafkaProducer | None = None
        # Whom the next delivery comes from: None until a producer was opened.
        self._identity: Identity | None = None
        # True once something of the delivery under way may have been sent, and how many groups in memory that are then.
        self._sent = False
        self._doubtful = 0
        # True when the identity that a delivery was sent under is of no use any more.
        self._distrust = False
        self._spool: Spool | None = None
        # True while new records go to the log.
        self._spooling = False
        # True from a failed delivery to the next that succeeds.
        self._in_trouble = False
        self._tasks: list[asyncio.Task[None]] = []
        self._attempts: set[asyncio.Task[None]] = set()
        self._dropping = False

    def start(self) -> None:
        self._tasks = [asyncio.create_task(self._deliver_forever())]
        if self._open_spool is not None:
            self._tasks.append(asyncio.create_task(self._keep_spool(self._open_spool)))

    async def stop(self, drain_s: float) -> None:
        """Deliver what waits for at most `drain_s` seconds, or until the log has it, then end."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(drain_s):
                while self._records or (self._spooled and not self._in_trouble):
                    futures = [future for _, future in self._groups]
                    await asyncio.wait(futures or [asyncio.ensure_future(asyncio.sleep(RETRY_FIRST_S))], timeout=RETRY_FIRST_S)
        if self._records:
            log.error("publisher: %d records were not delivered before the end", self._records)
        if self._spooled:
            log.warning("publisher: %d records stay in the local log until the next start", self._spooled)
        tasks = [*self._tasks, *self._attempts]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        await self._close()
        if self._spool is not None:
            self._spool.close()

    @property
    def buffered(self) -> int:
        """Records that wait, in memory or in the log."""
        return self._records + self._spooled

    @property
    def _spooled(self) -> int:
        return 0 if self._spool is None else self._spool.records

    def send(self, records: Sequence[Record]) -> asyncio.Future[None]:
        """Take `records` as one group. The future ends when Kafka has acknowledged all or the local log has them; nobody has to wait
        for it. It is cancelled at once when there is no room.
        """
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        if not records:
            future.set_result(None)
        elif self._spooling and self._spool is not None and not self._records:
            self._append(self._spool, [(list(records), future)], None)
            self._wake.set()
        elif self._records + len(records) > self._buffer_max:
            self._drop(len(records), future)
        else:
            self._dropping = False
            self._groups.append((list(records), future))
            self._records += len(records)
            self._metrics.buffer.set(self._records)
            self._wake.set()
        return future

    def _drop(self, records: int, future: asyncio.Future[None]) -> None:
        self._metrics.publish_dropped.inc(records)
        if not self._dropping:
            log.error("publisher: there is no room for more records, new ones are dropped")
        self._dropping = True
        future.cancel()

    async def _keep_spool(self, open_spool: Callable[[], Spool]) -> None:
        """Open the log, and then see to it that what is written gets to the disk."""
        told = False
        while self._spool is None:
            try:
                self._spool = await asyncio.to_thread(open_spool)
            except OSError as exc:
                if not told:
                    log.warning("publisher: the local log can't be used now (%r), records wait in memory alone", exc)
                told = True
                await asyncio.sleep(LOCKED_RETRY_S)
        if self._spool.records:
            log.info("publisher: %d records are in the local log from before", self._spool.records)
            self._wake.set()
        self._note_spool()
        while True:
            await asyncio.sleep(self._sync_s or LOCKED_RETRY_S)
            if self._sync_s:
                await asyncio.to_thread(self._spool.sync)
            self._note_spool()

    async def _deliver_forever(self) -> None:
        pause_s = RETRY_FIRST_S
        while True:
            await self._wake.wait()
            try:
                if self._spool is not None and self._spool.records:
                    await self._deliver_spooled(self._spool)
                else:
                    await self._deliver_groups()
            except (KafkaError, OSError, RegistryUnavailableError) as exc:
                if not self._in_trouble:
                    log.warning("publisher: Kafka can't take %d records now (%r), trying again", self.buffered, exc)
                self._in_trouble = True
                if isinstance(exc, (OutOfOrderSequenceNumber, InvalidProducerEpoch, UnknownProducerId)):
                    log.warning("publisher: the broker no longer knows our producer: the delivery under way may be repeated")
                    self._identity, self._distrust = None, True
                await self._close()
                if not self._doubtful or self._spool is not None:
                    self._put_aside()
                self._sent = False
                await asyncio.sleep(pause_s)
                pause_s = min(pause_s * 2, RETRY_MAX_S)
                continue
            if self._in_trouble:
                log.info("publisher: Kafka takes records again")
            self._in_trouble = False
            pause_s = RETRY_FIRST_S
            if not self._groups and not self._spooled:
                self._wake.clear()

    async def _deliver_groups(self) -> None:
        """What waits in memory, up to a delivery. Raises `KafkaError`, and leaves it in its place or in the log."""
        count = self._count_to_take()
        if not count:
            return
        records = [record for group, _ in list(self._groups)[:count] for record in group]
        attempt = self._start_attempt(records)
        try:
            await self._watch(attempt, count)
            await attempt
        except (KafkaError, OSError, RegistryUnavailableError):
            if self._sent and not self._spooled:
                self._doubtful = count
                self._put_aside()
            raise
        self._sent = False
        if self._spooled:
            # Put there by `_watch`, in front of everything.
            assert self._spool is not None
            self._delivered(self._spool, self._spool.read(1))
        else:
            self._doubtful = 0
            self._forget(count)

    async def _deliver_spooled(self, spool: Spool) -> None:
        """The oldest of the log, up to a delivery."""
        entries, parcels, identity = self._next_of(spool)
        if identity is not None and identity != self._identity:
            # Another process was at this.
            await self._close()
            self._identity = identity
        await self._ready()
        if identity is None:
            assert self._identity is not None
            spool.begin(entries[-1].end, msgspec.msgpack.encode(self._identity))
        attempt = self._start_attempt([Record(*fields) for parcel in parcels for fields in parcel.records])
        await self._watch(attempt, 0)
        await attempt
        self._sent = False
        self._delivered(spool, entries)

    def _delivered(self, spool: Spool, entries: list[Entry]) -> None:
        spool.delivered(entries)
        self._distrust = False
        # What is left fits in one delivery, and what comes now waits behind it in memory.
        self._spooling = spool.records > DELIVERY_RECORDS_MAX
        self._note_spool()

    async def _watch(self, attempt: asyncio.Task[None], count: int) -> None:
        """Wait for the attempt. While it takes too long, what waits goes to the log; the first `count` groups are what it sends."""
        while True:
            await asyncio.wait({attempt}, timeout=self._spool_after_s)
            if attempt.done():
                return
            if self._spool is None or not self._records:
                continue
            if count and not self._spooled:
                if not self._sent:
                    # Nothing was sent yet: it is like what waits behind it.
                    attempt.cancel()
                    await asyncio.wait({attempt})
                    self._put_aside()
                    raise NodeNotReadyError("no producer yet")
                self._doubtful = count
            self._put_aside()

    def _put_aside(self) -> None:
        """What waits in memory goes to the log, as far as there is room, and what comes from now on."""
        spool = self._spool
        if spool is None:
            return
        self._spooling = True
        if self._doubtful:
            groups = [self._groups[i] for i in range(self._doubtful)]
            if not self._append(spool, groups, self._identity, may_drop=False):
                return
            self._forget(self._doubtful)
            self._doubtful = 0
        while self._groups:
            self._append(spool, [self._groups[0]], None)
            self._forget(1)

    def _append(self, spool: Spool, groups: Sequence[Group], identity: Identity | None, *, may_drop: bool = True) -> bool:
        """One entry of the log for `groups`, whose waiters are told. False when there was no room and they are dropped."""
        records = [(r.topic, r.key, r.payload, r.headers) for group, _ in groups for r in group]
        try:
            taken = spool.append(msgspec.msgpack.encode(Parcel(identity, records)), len(records))
        except OSError as exc:
            log.warning("publisher: the local log can't be written: %r", exc)
            taken = False
        for group, future in groups if taken or may_drop else ():
            if not taken:
                self._drop(len(group), future)
            elif not future.done():
                future.set_result(None)
        if taken:
            self._dropping = False
            self._metrics.spooled.inc(len(records))
        self._note_spool()
        return taken

    def _count_to_take(self) -> int:
        """How many groups make the next delivery: those that may have been sent before, and no others, or as many as go into one."""
        if self._doubtful:
            return self._doubtful
        count = records = size = 0
        for group, _ in self._groups:
            records += len(group)
            size += sum(len(r.payload) + len(r.key or b"") + RECORD_OVERHEAD_BYTES for r in group)
            if count and (records > DELIVERY_RECORDS_MAX or size > DELIVERY_BYTES_MAX):
                break
            count += 1
        return count

    def _forget(self, count: int) -> None:
        """The first groups are acknowledged, in the log or dropped."""
        for _ in range(count):
            group, future = self._groups.popleft()
            self._records -= len(group)
            if not future.done():
                future.set_result(None)
        self._metrics.buffer.set(self._records)

    def _note_spool(self) -> None:
        spool = self._spool
        if spool is not None:
            self._metrics.spool_bytes.set(spool.bytes)
            self._metrics.spool_records.set(spool.records)
            age_s = 0.0 if spool.oldest_ms is None else time.time() - spool.oldest_ms / 1000
            self._metrics.spool_age_s.set(max(0.0, age_s))

    async def _close(self) -> None:
        if self._producer is not None:
            producer, self._producer = self._producer, None
            await stop_producer(producer)

    def _next_of(self, spool: Spool) -> tuple[list[Entry], list[Parcel], Identity | None]:
        """What to send next, and the identity it may have been sent under before."""
        if spool.pending is not None:
            end, note = spool.pending
            entries = spool.read(DELIVERY_BYTES_MAX, until=end)
            identity = msgspec.msgpack.decode(note, type=Identity)
            return entries, [_parcel(e) for e in entries], None if self._distrust else identity
        entries, parcels, records = [], [], 0
        for entry in spool.read(DELIVERY_BYTES_MAX):
            parcel = _parcel(entry)
            if entries and (parcel.identity is not None or records + entry.records > DELIVERY_RECORDS_MAX):
                break
            entries.append(entry)
            parcels.append(parcel)
            records += entry.records
            if parcel.identity is not None:
                break
        return entries, parcels, None if self._distrust else parcels[0].identity

    async def _ready(self) -> None:
        """A producer that goes on as `_identity`. Raises KafkaError, OSError, `RegistryUnavailableError`."""
        if not self._schemas.complete:
            await self._schemas.resolve()
        if self._producer is None:
            self._producer = await open_producer(self._bootstrap, self._identity)
            self._identity = identity_of(self._producer)

    def _start_attempt(self, records: Sequence[Record]) -> asyncio.Task[None]:
        attempt = asyncio.create_task(self._attempt(records))
        self._attempts.add(attempt)
        attempt.add_done_callback(self._attempts.discard)
        return attempt

    async def _attempt(self, records: Sequence[Record]) -> None:
        """Send `records` and wait until all are acknowledged. When it fails they may have been, under `_identity`."""
        await self._ready()
        assert self._producer is not None
        self._sent = True
        for future in await send_all(self._producer, records, self._schemas):
            await future
        self._identity = identity_of(self._producer)
        for topic, n in Counter(record.topic for record in records).items():
            self._metrics.published.labels(topic).inc(n)


def _parcel(entry: Entry) -> Parcel:
    return msgspec.msgpack.decode(entry.payload, type=Parcel)
