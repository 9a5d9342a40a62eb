"""The gateway's store and the Spark job's tile writer on one real Redis, driven one transaction at a time."""

from __future__ import annotations

import asyncio
import random
import socket
import subprocess
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import hiredis
import msgspec
import numpy as np
import redis

from deploy.ports import free_ports
from deploy.toolchain import find_redis
from feature_jobs.redis_wire import Bulk, ClusterWire, bulk
from feature_jobs.tiles import Events, TileJob, merge_events
from gateway.contracts import layout, windows
from gateway.contracts.decision import Door
from gateway.contracts.features import ENTITIES, LABELLED
from gateway.contracts.transaction import Transaction
from gateway.kafka.avro import encode_transaction
from gateway.kernels.resp import replies_end
from gateway.redis.link import Sent, parsed
from gateway.redis.store import Observation, Store
from gateway.scoring.job import Job, fingerprint_of, kafka_position, requests_of
from tests.helpers import wait_until

EPOCH = 7
CLAIM_TTL_MS = 600_000
NOON_MS = 1_700_000_000_000 - 1_700_000_000_000 % windows.DAY_MS + 12 * windows.HOUR_MS
WALL_MS = 1_790_000_000_000


class DirectLink:
    """Stands for gateway.redis.link.RedisLink: each call is made at once, and waited for."""

    ready = True

    def __init__(self, client: redis.Redis) -> None:
        self._client = client
        at = client.connection_pool.connection_kwargs
        self._socket = socket.create_connection((at["host"], at["port"]), timeout=5)
        # Nobody closes a store.
        weakref.finalize(self, self._socket.close)
        self.greeting: list[tuple[Any, ...]] = []

    async def call(self, command: Sequence[Any], _timeout_s: float) -> Any:
        return self._client.execute_command(*command)  # type: ignore[no-untyped-call]

    def send(self, commands: Sequence[Any], replies: int | None = None, *, raw: bool = False) -> Sent:
        self._socket.sendall(b"".join(c if isinstance(c, bytes) else hiredis.pack_command(c) for c in commands))
        came, left = b"", len(commands) if replies is None else replies
        while replies_end(np.frombuffer(came, np.uint8), 0, left) != (len(came), 0):
            came += self._socket.recv(1_048_576)
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        future.set_result(came if raw else parsed(came))
        return Sent(self, None, future)  # type: ignore[arg-type]

    def in_time(self) -> None:
        """What `replies_of` tells a link."""


class Entities:
    """`hour` is how far the wall clock has gone since `wall_ms` (WALL_MS): it goes on by `hours_a_batch` with each batch of tiles.

    Of a payment that was made long before the wall clock the gateway first looks whether it has observed it already.
    """

    def __init__(self, client: redis.Redis, hours_a_batch: int = 1, wall_ms: int | None = None) -> None:
        client.flushall()
        self.client = client
        self._wire = wire_to(client)
        self.batch_id = 0
        self.hour = 0
        self._wall_ms = wall_ms
        self._hours_a_batch = hours_a_batch
        self._offset = 0
        self.store = Store(DirectLink(client), CLAIM_TTL_MS, now_ms=lambda: self.now_ms)  # type: ignore[arg-type]
        self.say_progress()

    @property
    def now_ms(self) -> int:
        return (WALL_MS if self._wall_ms is None else self._wall_ms) + self.hour * 3_600_000

    def say_progress(self) -> None:
        progress = layout.Progress(EPOCH, self.batch_id, self.now_ms, 0)
        self.client.set(layout.PROGRESS_KEY, msgspec.msgpack.encode(progress))

    def job(self, t: Transaction, again: bool = False) -> Job:
        """`again`: it arrived longer ago than its claim lives, as what Kafka delivers again after a long stop."""
        self._offset += 1
        return Job(
            transaction_id=t.transaction_id,
            card_id=t.card_id.encode(),
            payload=encode_transaction(t),
            claim=fingerprint_of(encode_transaction(t)) + kafka_position(0, self._offset),
            door=Door.KAFKA,
            arrived_ms=self.now_ms - CLAIM_TTL_MS * again,
            received_ms=self.now_ms,
            received_s=0.0,
            deadline_s=None,
        )

    def look(self, batch: Sequence[Transaction], update: bool = True, again: bool = False) -> Observation:
        """What the gateway's store says of a batch, which is then part of the past."""
        jobs = [self.job(t, again) for t in batch]
        found = asyncio.run(self.store.observe(jobs, requests_of(jobs), 10.0, update))
        assert found is not None
        return found

    def observe(self, t: Transaction, again: bool = False) -> list[float]:
        """The features of one transaction, which is then part of the past."""
        return [float(x) for x in self.look([t], again=again).matrix[0]]

    def tile(self, batch: Sequence[Transaction], batch_id: int | None = None, from_kafka: bool = True) -> int:
        """Add a batch to the tiles with the Spark job's own code; how many entities were written."""
        if batch_id is None:
            self.batch_id += 1
            batch_id = self.batch_id
            self.hour += self._hours_a_batch
        self._wire.load_script(layout.MERGE_LUA)
        job = TileJob("", EPOCH, batch_id, self.now_ms, retry_s=0)
        return merge_events(self._wire, job, events_of(batch, from_kafka))

    def label(self, t: Transaction, change: int) -> None:
        """It becomes known that `t` was fraud (1), or that it was not after all (-1)."""
        for i in LABELLED:
            entity = ENTITIES[i]
            name = (entity.name, getattr(t, entity.field))
            check = layout.key_check(*name)
            held = self.client.get(layout.labels_key(*name))
            assert held is None or isinstance(held, bytes)
            hours = {} if held is None else {int(r["hour"]): int(r["frauds"]) for r in layout.fraud_hours(held, i, check)}
            hour = t.event_time_ms // windows.HOUR_MS
            hours[hour] = hours.get(hour, 0) + change
            changes = 1 if held is None else layout.LABELS_HEADER.unpack_from(held)[6] + 1
            records = np.array(sorted(hours.items()), layout.FRAUD_HOUR)
            self.client.set(layout.labels_key(*name), layout.pack_frauds(i, check, changes, EPOCH, changes, records))


@lru_cache(maxsize=4)
def wire_to(client: redis.Redis | redis.RedisCluster) -> Bulk:
    """The Spark job's kind of connection to the same Redis; one a client."""
    if isinstance(client, redis.RedisCluster):
        return ClusterWire(client)
    where = client.connection_pool.connection_kwargs
    return bulk(f"redis://{where['host']}:{where['port']}/{where.get('db', 0)}")


def events_of(batch: Sequence[Transaction], from_kafka: bool = True) -> Events:
    """The events of every entity of `batch`, as a worker of the Spark job gets them: by entity, then by time."""
    rows = [
        (f"{e.name}:{entity_id}", t.event_time_ms, t, e.dims)
        for e in ENTITIES
        for t in batch
        if (entity_id := getattr(t, e.field)) is not None
    ]
    rows.sort(key=lambda row: (row[0], row[1]))
    tags = sorted({row[0] for row in rows})
    owner = {tag: i for i, tag in enumerate(tags)}
    return Events(
        tags=tags,
        owner=np.array([owner[tag] for tag, *_ in rows], np.int64),
        transaction=np.array([layout.txn_hash(t.transaction_id) for _, _, t, _ in rows], np.uint64),
        event_time_ms=np.array([t.event_time_ms for _, _, t, _ in rows], np.int64),
        amount_minor=np.array([t.amount_minor for _, _, t, _ in rows], np.int64),
        dims=tuple(np.array([layout.dim_hash(getattr(t, dims[i])) for _, _, t, dims in rows], np.uint32) for i in range(3)),
        from_kafka=np.full(len(rows), from_kafka),
    )


@contextmanager
def redis_server(directory: Path) -> Iterator[redis.Redis]:
    """A Redis of its own, for a test that may empty it."""
    port = free_ports(1)[0]
    command = [str(find_redis()), "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", str(directory)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    client = redis.Redis(port=port)

    def answers() -> bool:
        try:
            return bool(client.ping())
        except redis.ConnectionError:
            return False

    try:
        wait_until(answers, 10, "redis-server starts")
        yield client
    finally:
        client.close()
        process.terminate()
        process.wait(10)


def make_stream(seed: int, events: int, step_ms: int, disorder_ms: int) -> list[Transaction]:
    """A stream with bursts, ties, tile edges, missing entities and mild disorder, in order of observation."""
    rng = random.Random(seed)
    t_ms, stream = NOON_MS, []
    for n in range(events):
        t_ms += rng.choice([0, 0, 1, 1000, step_ms, rng.randrange(1, 2 * step_ms + 1)])
        if rng.random() < 0.1:
            t_ms += windows.BOUNDARY_MS - t_ms % windows.BOUNDARY_MS  # exactly on an edge
        here = rng.random() < 0.7
        stream.append(
            Transaction(
                transaction_id=f"t{n}-{rng.randrange(10**6)}",
                event_time_ms=max(NOON_MS, t_ms - rng.choice([0, 0, 0, rng.randrange(disorder_ms + 1)])),
                card_id=f"c{rng.randrange(3)}",
                customer_id=f"u{rng.randrange(2)}",
                merchant_id=f"m{rng.randrange(4)}",
                amount_minor=rng.choice([1, 999, 10**9, rng.randrange(1, 100_000)]),
                currency="EUR",
                channel=rng.choice(["pos", "ecom"]),
                mcc="5411",
                country=rng.choice(["DE", "FR", "BR"]),
                device_id=f"d{rng.randrange(2)}" if rng.random() < 0.8 else None,
                ip="10.0.0.1" if rng.random() < 0.5 else None,
                card_bin="400000",
                card_country=rng.choice(["DE", None]),
                latitude=rng.uniform(-80, 80) if here else None,
                longitude=rng.uniform(-170, 170) if here else None,
            )
        )
    return stream
