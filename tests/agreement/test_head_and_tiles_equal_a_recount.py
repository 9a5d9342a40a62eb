"""Head and tiles in a real Redis, through both Lua scripts, against the slow oracle: whenever and in whatever order tiles are
written, each event is counted exactly once."""

from __future__ import annotations

import random
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import redis
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from msgspec import structs

from deploy.toolchain import find_redis
from gateway.contracts import layout, windows
from gateway.contracts.features import ENTITIES, feature_matrix, request_columns
from gateway.contracts.transaction import Transaction
from tests.helpers import free_ports, wait_until
from tests.oracle import Oracle, differences

pytestmark = pytest.mark.integration

NOON_MS = 1_700_000_000_000 - 1_700_000_000_000 % windows.DAY_MS + 12 * windows.HOUR_MS
EPOCH = 7


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[redis.Redis]:
    port = free_ports(1)[0]
    directory: Path = tmp_path_factory.mktemp("redis")
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


class Store:
    """The least that can drive both scripts: one transaction at a time, and tiles whenever the test says so."""

    def __init__(self, client: redis.Redis) -> None:
        self.client = client
        client.flushall()
        self.observe_script = client.register_script(layout.OBSERVE_LUA)
        self.merge_script = client.register_script(layout.MERGE_LUA)
        self.batch_id = 0

    def observe(self, t: Transaction) -> list[float]:
        keys: list[str] = [layout.PROGRESS_KEY, layout.idempotency_key(t.transaction_id)]
        named = [(i, e, getattr(t, e.field)) for i, e in enumerate(ENTITIES) if getattr(t, e.field) is not None]
        args: list[bytes | str | int | float] = [
            1,
            600_000,
            layout.HEAD_TTL_MS,
            b"f" * 16 + layout.POSITION.pack(b"k", 0, 0, 1),
            len(named),
        ]
        for i, e, entity_id in named:
            keys += [layout.head_key(e.name, entity_id), layout.tiles_key(e.name, entity_id)]
            header = layout.HEAD_HEADER.pack(layout.LAYOUT_VERSION, i, 0, layout.key_check(e.name, entity_id), 0, 0)
            event = layout.HEAD_EVENT_PACK.pack(
                layout.txn_hash(t.transaction_id),
                t.event_time_ms,
                t.amount_minor,
                0,
                1_000,
                layout.dim_hash(getattr(t, e.dim_a)),
                layout.dim_hash(getattr(t, e.dim_b)),
                float("nan") if t.latitude is None else t.latitude,
                float("nan") if t.longitude is None else t.longitude,
                0,
            )
            args += [e.head_events_max, header, event]
        reply = self.observe_script(keys=keys, args=args)
        assert reply[1] is None
        known, heads, records, seqs = np.zeros((1, len(ENTITIES)), bool), [], [], []
        found = {i: reply[2 + 3 * n : 5 + 3 * n] for n, (i, _, _) in enumerate(named)}
        for i, e in enumerate(ENTITIES):
            head, tiles, seq = found.get(i, (b"", b"", 0))
            check = layout.key_check(e.name, getattr(t, e.field) or "")
            heads.append(layout.head_events(head, i, check) if head else np.zeros(0, layout.HEAD_EVENT))
            records.append(layout.tile_records(tiles, i, check) if tiles else np.zeros(0, layout.TILE))
            seqs.append(seq)
            known[0, i] = i in found
        aggregates = windows.aggregate(
            np.full(len(ENTITIES), t.event_time_ms, np.int64),
            np.array(seqs, np.int64),
            np.array([e.head_events_max for e in ENTITIES], np.int64),
            np.concatenate(heads),
            np.array([len(h) for h in heads], np.int64),
            np.concatenate(records),
            np.array([len(r) for r in records], np.int64),
        )
        return [float(x) for x in feature_matrix(request_columns([t]), aggregates, known)[0]]

    def tile(self, batch: list[Transaction], batch_id: int | None = None) -> list[int]:
        """Add a batch of transactions to the tiles, as the Spark job does; what each write replied."""
        if batch_id is None:
            self.batch_id += 1
            batch_id = self.batch_id
        replies = []
        for i, e in enumerate(ENTITIES):
            by_id: dict[str, list[Transaction]] = {}
            for t in batch:
                if getattr(t, e.field) is not None:
                    by_id.setdefault(getattr(t, e.field), []).append(t)
            for entity_id, events in by_id.items():
                check = layout.key_check(e.name, entity_id)
                value = self.client.get(layout.tiles_key(e.name, entity_id))
                assert value is None or isinstance(value, bytes)
                before = layout.tile_records(value, i, check) if value else np.zeros(0, layout.TILE)
                owner = np.zeros(len(events), np.int64)
                new, _ = windows.tiles_of(
                    np.array([t.event_time_ms for t in events], np.int64),
                    np.array([t.amount_minor for t in events], np.int64),
                    np.array([layout.dim_hash(getattr(t, e.dim_a)) for t in events], np.uint32),
                    np.array([layout.dim_hash(getattr(t, e.dim_b)) for t in events], np.uint32),
                    owner,
                    updated_min=0,
                )
                both = np.concatenate([before, new])
                merged, owners = windows.merge_tiles(both, np.zeros(len(both), np.int64))
                # An hour later by the wall clock, so that only retention by event time keeps anything.
                merged = merged[windows.keep_tiles(merged, owners, now_min=60)]
                packed = layout.pack_tiles(i, check, batch_id, EPOCH, merged)
                hashes = b"".join(layout.txn_hash(t.transaction_id).to_bytes(8, "little") for t in events)
                keys = [
                    layout.head_key(e.name, entity_id),
                    layout.tiles_key(e.name, entity_id),
                    layout.early_key(e.name, entity_id),
                ]
                limits = [
                    layout.HEAD_COMPACT_ABOVE,
                    layout.HEAD_KEPT_MIN,
                    2_000,
                    windows.HEAD_RETENTION_MS,
                    layout.EARLY_TTL_MS,
                    1_024,
                ]
                replies.append(self.merge_script(keys=keys, args=[packed, hashes, b"", len(events), layout.TILES_TTL_MS, *limits]))
        return replies


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


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@example(seed=9863, step_ms=20_000_000, disorder_ms=30_000, tile_chance=0.0)
@given(
    seed=st.integers(0, 2**32),
    step_ms=st.sampled_from([1_000, 60_000, 1_800_000, 20_000_000]),
    disorder_ms=st.sampled_from([0, 30_000, 240_000]),
    tile_chance=st.sampled_from([0.0, 0.1, 0.5]),
)
def test_each_event_counts_once_whenever_it_is_tiled(
    server: redis.Redis, seed: int, step_ms: int, disorder_ms: int, tile_chance: float
) -> None:
    store, oracle, rng = Store(server), Oracle(), random.Random(seed + 1)
    pending: list[Transaction] = []
    # Never more untiled events than a head holds (that has its own test), but more events than it counts.
    for t in make_stream(seed, 120, step_ms, disorder_ms):
        assert differences(oracle.observe(t), store.observe(t)) == [], t.transaction_id
        pending.append(t)
        full = len(pending) == min(e.head_events_max for e in ENTITIES)
        if full or rng.random() < tile_chance:
            take = len(pending) if full else rng.randrange(len(pending) + 1)
            store.tile(pending[:take])
            del pending[:take]


def test_a_replayed_batch_of_tiles_changes_nothing(server: redis.Redis) -> None:
    store, stream = Store(server), make_stream(3, 20, 60_000, 0)
    for t in stream:
        store.observe(t)
    assert set(store.tile(stream)) == {1}
    before = {key: server.get(key) for key in server.keys("fg1:{*")}
    assert set(store.tile(stream, batch_id=store.batch_id)) == {0}
    assert {key: server.get(key) for key in server.keys("fg1:{*")} == before


def test_observing_a_transaction_again_returns_what_it_saw_the_first_time(server: redis.Redis) -> None:
    store, stream = Store(server), make_stream(5, 12, 60_000, 0)
    first = [store.observe(t) for t in stream]
    server.delete(layout.idempotency_key(stream[4].transaction_id))
    assert differences(first[4], store.observe(stream[4])) == []


def test_events_that_leave_a_full_head_before_they_are_tiled_are_counted(server: redis.Redis) -> None:
    store = Store(server)
    stream = [t for t in make_stream(9, 400, 1_000, 0) if t.device_id == "d0"][:100]
    for t in stream:
        store.observe(t)
    head = server.get(layout.head_key("device", "d0"))
    assert isinstance(head, bytes)
    lost = layout.HEAD_HEADER.unpack_from(head)[5]
    held = (len(head) - layout.HEAD_HEADER.size) // layout.RECORD_BYTES
    assert lost > 0
    assert lost + held == len(stream)
    store.tile(stream)
    head = server.get(layout.head_key("device", "d0"))
    assert isinstance(head, bytes)
    assert layout.HEAD_HEADER.unpack_from(head)[5] == 0, "once Spark has tiled them, nothing is missing any more"


def test_a_burst_over_the_heads_bound_counts_as_many_as_the_definition_says(server: redis.Redis) -> None:
    store, oracle = Store(server), Oracle()
    burst = [t for t in make_stream(9, 800, 1, 0) if t.card_id == "c0"][:150]
    stream = [structs.replace(t, event_time_ms=NOON_MS + 100 * n) for n, t in enumerate(burst)]
    for n, t in enumerate(stream):
        assert differences(oracle.observe(t), store.observe(t)) == [], n
        if n % 30 == 29:
            store.tile(stream[n - 29 : n + 1])
