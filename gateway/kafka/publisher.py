"""Delivers what the HTTP door decided to Kafka: in order, once, whether or not the broker is up.

Each group of records is written to a bounded local log (gateway/kafka/spool.py) before its callers are answered, so that they need not wait
for Kafka and the end of the process loses nothing. It is delivered from memory; what no longer fits there is read from the log when its
turn comes. One delivery is under way at a time; while it is, the next one collects. A delivery that may have happened is sent again under
the same producer identity (gateway/kafka/resumable.py), by this process or the one that finds its log, so that the broker knows it.

While the log can't be written, for want of room or of a disk, records wait in memory alone and their callers for Kafka. When there is no
room there either the newest are dropped, counted and logged.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import msgspec
from aiokafka import AIOKafkaProducer
from aiokafka.errors import InvalidProducerEpoch, KafkaError, OutOfOrderSequenceNumber, UnknownProducerId

from gateway.contracts.registry import RegistryUnavailableError
from gateway.kafka.avro import SchemaBook
from gateway.kafka.records import Record, of_today, send_all
from gateway.kafka.resumable import DELIVERY_BYTES_MAX, Identity, identity_of, open_producer, stop_producer
from gateway.kafka.spool import Entry, Position, Spool
from gateway.metrics import Metrics

log = logging.getLogger(__name__)

# Putting a record into a batch takes 1 to 2 us of the event loop: so many keep it for some 3 ms, also when minutes of them have piled up.
# A delivery costs half a millisecond whatever is in it.
DELIVERY_RECORDS_MAX = 2000
RETRY_FIRST_S = 0.1
RETRY_MAX_S = 2.0
# How often the log is looked after, and how often a log is looked for that a dead process left.
LOOK_S = 1.0
ORPHANS_S = 5.0
# At the end, Kafka gets so long to take what is in the log anyway.
LOGGED_DRAIN_S = 2.0
# What a record is on top of key and payload, at most: its place in a batch and our header.
RECORD_OVERHEAD_BYTES = 64

_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(list[Record])
_identity_decoder = msgspec.msgpack.Decoder(Identity)


@dataclass(slots=True)
class _Group:
    """Records that came together. `entry` is theirs in the log; without one somebody may wait for `acknowledged`."""

    records: list[Record]
    entry: Entry | None
    acknowledged: asyncio.Future[None] | None = None


@dataclass(slots=True)
class _Delivery:
    """What is sent at a time, either all of it from a log or nothing. `identity` is whom it may have been sent by before."""

    groups: list[_Group]
    spool: Spool | None
    identity: Identity | None = None

    @property
    def records(self) -> list[Record]:
        return [record for group in self.groups for record in group.records]

    @property
    def entries(self) -> list[Entry]:
        return [group.entry for group in self.groups if group.entry is not None]


class _Lane:
    """What waits in one place, in order: groups in memory and, behind them, what is in the log alone."""

    def __init__(self) -> None:
        self.spool: Spool | None = None
        self.groups: deque[_Group] = deque()
        self.records = 0
        # True while the log holds entries behind those in memory.
        self.behind = False
        # Up to where a delivery may have happened before this process, and whose it was.
        self._before: tuple[Position, Identity] | None = None

    def attach(self, spool: Spool) -> None:
        """What `spool` holds comes behind what is in memory, and what is added from now on."""
        self.spool = spool
        self.behind = spool.records > 0
        if spool.pending is not None:
            end, note = spool.pending
            try:
                self._before = end, _identity_decoder.decode(note)
            except msgspec.DecodeError as exc:
                log.warning("publisher: whose the delivery under way was can't be read, it may be repeated: %s", exc)

    @property
    def empty(self) -> bool:
        return not self.groups and not self.behind

    def add(self, group: _Group) -> None:
        self.groups.append(group)
        self.records += len(group.records)

    def next(self) -> _Delivery | None:
        """The oldest groups that make one delivery. They stay here until `delivered`."""
        if not self.groups and self.behind:
            self._read_on()
        if not self.groups:
            return None
        logged = self.groups[0].entry is not None
        if logged and self._before is not None:
            (end, identity), self._before = self._before, None
            again = [g for g in self.groups if g.entry is not None and g.entry.start < end]
            if again:
                return _Delivery(again, self.spool, identity)
        groups: list[_Group] = []
        records = size = 0
        for group in self.groups:
            records += len(group.records)
            size += sum(len(r.payload) + len(r.key or b"") + RECORD_OVERHEAD_BYTES for r in group.records)
            if groups and (records > DELIVERY_RECORDS_MAX or size > DELIVERY_BYTES_MAX or (group.entry is not None) != logged):
                break
            groups.append(group)
        return _Delivery(groups, self.spool if logged else None)

    def delivered(self, delivery: _Delivery) -> None:
        for _ in delivery.groups:
            group = self.groups.popleft()
            self.records -= len(group.records)
            if group.acknowledged is not None and not group.acknowledged.done():
                group.acknowledged.set_result(None)
        if delivery.spool is not None:
            try:
                delivery.spool.delivered(delivery.entries)
            except OSError as exc:
                log.warning(
                    "publisher: the local log can't note what is delivered, which may be repeated by the next process: %r", exc
                )

    def _read_on(self) -> None:
        assert self.spool is not None
        until = None if self._before is None else self._before[0]
        found = self.spool.read(DELIVERY_BYTES_MAX, until)
        for entry, payload in found:
            try:
                records = [of_today(record) for record in _decoder.decode(payload)]
            except msgspec.DecodeError as exc:
                log.error("publisher: %d records of the local log are lost, they can't be read: %s", entry.records, exc)  # noqa: TRY400
                records = []
            self.add(_Group(records, entry))
        self.behind = bool(found) and found[-1][0].end != self.spool.tail


class Publisher:
    """`buffer_max` is in records, in memory.

    `open_spool` makes the log of this process, None: there is none, and what waits is in memory alone. `open_orphan` finds one that another
    process left something in. Records collect for `linger_s` unless somebody waits for them.
    """

    def __init__(
        self,
        bootstrap: str,
        schemas: SchemaBook,
        metrics: Metrics,
        buffer_max: int,
        open_spool: Callable[[], Spool] | None = None,
        open_orphan: Callable[[], Spool | None] = lambda: None,
        *,
        linger_s: float = 0.02,
        sync_s: float = 1.0,
    ) -> None:
        self._bootstrap = bootstrap
        self._schemas = schemas
        self._metrics = metrics
        self._buffer_max = buffer_max
        self._open_spool = open_spool
        self._open_orphan = open_orphan
        self._linger_s = linger_s
        self._sync_s = sync_s
        self._own = _Lane()
        self._orphan: _Lane | None = None
        self._wake = asyncio.Event()
        self._producer: AIOKafkaProducer | None = None
        # Whom the next delivery comes from: None until a producer was opened.
        self._identity: Identity | None = None
        self._hurry = False
        # True from a failed delivery to the next that succeeds.
        self._in_trouble = False
        self._dropping = False
        self._unwritable = False
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        """Opens the log, when it can be: what it holds from before is delivered first."""
        if self._open_spool is not None:
            self._try_to_open(self._open_spool)
            self._tasks.append(asyncio.create_task(self._look_after(self._open_spool)))
        self._tasks.append(asyncio.create_task(self._deliver_forever()))

    async def stop(self, drain_s: float) -> None:
        """Deliver what waits for at most `drain_s` seconds, or until all of it is in the log while Kafka is down, then end."""
        self._hurry = True
        self._wake.set()
        begin_s = time.monotonic()
        while not self._own.empty:
            patience_s = drain_s if self._waiting_in_memory else 0.0 if self._in_trouble else min(drain_s, LOGGED_DRAIN_S)
            if time.monotonic() - begin_s >= patience_s:
                break
            await asyncio.sleep(RETRY_FIRST_S / 10)
        if self._waiting_in_memory:
            log.error("publisher: %d records were not delivered before the end", self._waiting_in_memory)
        if self._spooled:
            log.warning("publisher: %d records stay in the local log until the next start", self._spooled)
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        await self._close()
        for lane in self._lanes():
            if lane.spool is not None:
                lane.spool.close()

    @property
    def buffered(self) -> int:
        """Records that Kafka hasn't acknowledged, in memory or in the log."""
        return self._spooled + self._waiting_in_memory

    @property
    def _spooled(self) -> int:
        return sum(lane.spool.records for lane in self._lanes() if lane.spool is not None)

    @property
    def _waiting_in_memory(self) -> int:
        """Records that are nowhere else."""
        return sum(len(group.records) for group in self._own.groups if group.entry is None)

    def _lanes(self) -> list[_Lane]:
        """The orphan's first: what it holds is older."""
        return [self._own] if self._orphan is None else [self._orphan, self._own]

    def send(self, records: Sequence[Record]) -> asyncio.Future[None]:
        """Take `records` as one group. The future is done at once when the local log has them, else when Kafka has acknowledged all;
        nobody has to wait for it. It is cancelled when there is no room.
        """
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        if not records:
            future.set_result(None)
            return future
        own, group = self._own, list(records)
        entry = self._write(group)
        fits = not own.behind and own.records + len(group) <= self._buffer_max
        if entry is not None:
            future.set_result(None)
            if fits:
                own.add(_Group(group, entry))
            else:
                own.behind = True
        elif fits:
            own.add(_Group(group, None, future))
        else:
            self._drop(len(group), future)
            return future
        self._dropping = False
        self._metrics.buffer.set(own.records)
        self._wake.set()
        return future

    def _write(self, records: list[Record]) -> Entry | None:
        """The records' entry in the log, None when it can't be written."""
        spool = self._own.spool
        if spool is None:
            return None
        try:
            entry = spool.append(_encoder.encode(records), len(records))
        except OSError as exc:
            if not self._unwritable:
                log.warning("publisher: the local log can't be written: %r", exc)
            self._unwritable = True
            return None
        self._unwritable = False
        if entry is not None:
            self._metrics.spooled.inc(len(records))
        return entry

    def _drop(self, records: int, future: asyncio.Future[None]) -> None:
        self._metrics.publish_dropped.inc(records)
        if not self._dropping:
            log.error("publisher: there is no room for more records, new ones are dropped")
        self._dropping = True
        future.cancel()

    def _try_to_open(self, open_spool: Callable[[], Spool]) -> None:
        try:
            spool = open_spool()
        except OSError as exc:
            if not self._unwritable:
                log.warning("publisher: the local log can't be used now (%r), records wait in memory alone", exc)
            self._unwritable = True
            return
        self._unwritable = False
        if spool.records:
            log.info("publisher: %d records are in the local log from before", spool.records)
        self._own.attach(spool)
        self._wake.set()

    async def _look_after(self, open_spool: Callable[[], Spool]) -> None:
        """Open the log when that failed, get to the disk what Kafka doesn't take soon, and adopt what dead processes left."""
        looks_s = 0.0
        while True:
            pause_s = min(LOOK_S, self._sync_s or LOOK_S)
            await asyncio.sleep(pause_s)
            looks_s += pause_s
            if self._own.spool is None:
                self._try_to_open(open_spool)
            for lane in self._lanes():
                spool = lane.spool
                if spool is not None and self._sync_s and self._age_s(spool) >= self._sync_s:
                    with contextlib.suppress(OSError):
                        await asyncio.to_thread(spool.sync)
            if self._orphan is None and not self._in_trouble and looks_s >= ORPHANS_S:
                looks_s = 0.0
                await self._adopt()
            self._note_spool()

    async def _adopt(self) -> None:
        try:
            # Reading a full log takes longer than the event loop may stand still.
            spool = await asyncio.to_thread(self._open_orphan)
        except OSError as exc:
            log.warning("publisher: the local log of another process can't be read: %r", exc)
            return
        if spool is not None:
            log.info("publisher: %d records are in the local log %s, whose process is gone", spool.records, spool.directory.name)
            self._orphan = _Lane()
            self._orphan.attach(spool)
            self._wake.set()

    @staticmethod
    def _age_s(spool: Spool) -> float:
        return 0.0 if spool.oldest_ms is None else max(0.0, time.time() - spool.oldest_ms / 1000)

    def _note_spool(self) -> None:
        spools = [lane.spool for lane in self._lanes() if lane.spool is not None]
        self._metrics.spool_bytes.set(sum(s.bytes for s in spools))
        self._metrics.spool_records.set(sum(s.records for s in spools))
        self._metrics.spool_age_s.set(max(map(self._age_s, spools), default=0.0))

    async def _deliver_forever(self) -> None:
        while True:
            await self._wake.wait()
            lane = self._lanes()[0]
            try:
                delivery = lane.next()
            except OSError as exc:
                log.warning("publisher: the local log can't be read: %r", exc)
                await asyncio.sleep(RETRY_MAX_S)
                continue
            if delivery is None:
                self._finished(lane)
                continue
            pause_s = RETRY_FIRST_S
            while not await self._tried(delivery):
                await asyncio.sleep(pause_s)
                pause_s = min(pause_s * 2, RETRY_MAX_S)
            lane.delivered(delivery)
            self._metrics.buffer.set(self._own.records)
            self._note_spool()
            if self._may_linger(lane, delivery):
                await asyncio.sleep(self._linger_s)

    def _may_linger(self, lane: _Lane, delivery: _Delivery) -> bool:
        """Whether the next delivery may wait for more records: nobody waits for these, and they don't fill one already."""
        waits_elsewhere = self._hurry or lane is not self._own or delivery.spool is None
        return self._linger_s > 0 and not waits_elsewhere and not lane.behind and lane.records < DELIVERY_RECORDS_MAX

    def _finished(self, lane: _Lane) -> None:
        """`lane` has nothing more to deliver."""
        if lane is self._own:
            self._wake.clear()
        else:
            assert lane.spool is not None
            lane.spool.close()
            self._orphan = None

    async def _tried(self, delivery: _Delivery) -> bool:
        """True when Kafka has all of it."""
        try:
            await self._attempt(delivery)
        except (KafkaError, OSError, RegistryUnavailableError) as exc:
            if not self._in_trouble:
                log.warning("publisher: Kafka can't take %d records now (%r), trying again", self.buffered, exc)
            self._in_trouble = True
            if isinstance(exc, (OutOfOrderSequenceNumber, InvalidProducerEpoch, UnknownProducerId)):
                log.warning("publisher: the broker no longer knows our producer: the delivery under way may be repeated")
                delivery.identity = self._identity = None
            await self._close()
            return False
        except Exception:
            # A bug, or a client's: the delivery is kept and tried again, and the log tells.
            log.exception("publisher: a delivery of %d records failed", len(delivery.records))
            self._in_trouble = True
            await self._close()
            return False
        if self._in_trouble:
            log.info("publisher: Kafka takes records again")
        self._in_trouble = False
        return True

    async def _attempt(self, delivery: _Delivery) -> None:
        """Send it under its identity and wait until all is acknowledged. When that fails it may have been, under that identity."""
        if not self._schemas.complete:
            await self._schemas.resolve()
        if delivery.identity is not None and delivery.identity != self._identity:
            # Another process, or another attempt of ours, was at this.
            await self._close()
            self._identity = delivery.identity
        if self._producer is None:
            self._producer = await open_producer(self._bootstrap, self._identity)
            self._identity = identity_of(self._producer)
        if delivery.identity is None:
            delivery.identity = self._identity
            if delivery.spool is not None:
                try:
                    delivery.spool.begin(delivery.entries[-1].end, _encoder.encode(self._identity))
                except OSError as exc:
                    log.warning(
                        "publisher: the local log can't note a delivery, which may be repeated if this process dies: %r", exc
                    )
        records = delivery.records
        for future in await send_all(self._producer, records, self._schemas):
            await future
        self._identity = identity_of(self._producer)
        for topic, n in Counter(record.topic for record in records).items():
            self._metrics.published.labels(topic).inc(n)

    async def _close(self) -> None:
        if self._producer is not None:
            producer, self._producer = self._producer, None
            await stop_producer(producer)
