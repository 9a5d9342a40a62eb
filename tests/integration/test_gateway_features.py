"""The gateway's feature store on the real Redis: against a naive recount, and the observe script at its edges."""

from __future__ import annotations

import asyncio
import math
import random
import secrets
import statistics
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar

import numpy as np
import pytest

from deploy.stack import Stack
from gateway.contracts.features import ENTITIES, FEATURES, REQUEST_FEATURES, Feature, request_columns
from gateway.contracts.layout import HEAD_EVENT, HEAD_HEADER, dim_hash, head_key, idempotency_key
from gateway.contracts.settings import Settings
from gateway.contracts.transaction import Transaction
from gateway.contracts.windows import SKETCH_BITS, SKETCH_ESTIMATE, SQUARED_AMOUNT_MINOR_MAX, WINDOW_INDEX, WINDOWS, boundary, tail
from gateway.job import Job
from gateway.redis_link import RedisLink
from gateway.store import Observation, Store
from tests.helpers import until
from tests.unit.gateway.factories import NOW_MS, make_job, make_transaction

pytestmark = pytest.mark.integration
T = TypeVar("T")
HOUR_MS = 3_600_000


def with_store(settings: Settings, use: Callable[[Store, RedisLink], Awaitable[T]]) -> T:
    """Runs `use` with a store on a standing connection."""

    async def run() -> T:
        link = RedisLink(settings.redis, 5.0)
        store = Store(link, 60_000, now_ms=lambda: NOW_MS)
        link.start()
        try:
            await until(lambda: link.ready, 30)
            async with asyncio.timeout(30):
                return await use(store, link)
        finally:
            await link.stop()

    return asyncio.run(run())


async def observe(store: Store, *jobs: Job, update: bool = True) -> Observation:
    found = await store.observe(jobs, request_columns([j.transaction for j in jobs]), 20.0, update)
    assert found is not None
    return found


def stream(seed: int, count: int) -> list[Transaction]:
    """Transactions of few entities over three days, most in order, some late, some at the same instant."""
    rnd = random.Random(seed)
    run = secrets.token_hex(4)
    out = []
    for i in range(count):
        at_ms = NOW_MS - 72 * HOUR_MS + i * 72 * HOUR_MS // count // 60_000 * 60_000
        if rnd.random() < 0.5:
            at_ms = NOW_MS - rnd.randrange(20) * 30_000
        elif rnd.random() < 0.2:
            at_ms -= rnd.randrange(90 * 60_000)
        placed = rnd.random() < 0.7
        out.append(
            make_transaction(
                f"{run}-{i}",
                event_time_ms=at_ms,
                card_id=f"c{rnd.randrange(3)}-{run}",
                customer_id=f"k{rnd.randrange(3)}-{run}",
                merchant_id=f"m{rnd.randrange(2)}-{run}",
                amount_minor=rnd.choice([0, 1, 999, 12_345, 20_000_000]),
                country=rnd.choice(["DE", "FR", "US"]),
                device_id=None if rnd.random() < 0.2 else f"d{rnd.randrange(3)}-{run}",
                ip=None if rnd.random() < 0.2 else f"i{rnd.randrange(2)}-{run}",
                card_bin=rnd.choice([None, "400000", "510000"]),
                card_country=rnd.choice([None, "DE", "US"]),
                latitude=rnd.uniform(-90, 90) if placed else None,
                longitude=rnd.uniform(-180, 180) if placed else None,
            )
        )
    return out


def recount(feature: Feature, t: Transaction, before: Sequence[Transaction]) -> float:
    """The value of an entity's feature by its definition, event by event. `before`: all of the stream observed before `t`."""
    entity = next(e for e in ENTITIES if e.name == feature.entity)
    entity_id = getattr(t, entity.field)
    if entity_id is None:
        return math.nan
    own = [p for p in before if getattr(p, entity.field) == entity_id]
    last = own[-entity.head_events_max :]
    if feature.aggregate in ("since_last", "speed"):
        past = sorted((p for p in last if p.event_time_ms <= t.event_time_ms), key=lambda p: p.event_time_ms)
        if not past:
            return math.nan
        gap_ms = t.event_time_ms - past[-1].event_time_ms
        return gap_ms / 1000 if feature.aggregate == "since_last" else speed(past[-1], t, max(gap_ms, 1000))
    assert feature.window is not None
    window = WINDOWS[WINDOW_INDEX[feature.window]]
    at = np.array([t.event_time_ms])
    edge, start = int(boundary(at)[0]), int(tail(at, window)[0])
    counted = [p for p in last if p.event_time_ms >= edge or window.tail_ms == 0]
    if window.tail_ms:
        counted += [p for p in own if p.event_time_ms < edge]
    inside = [p for p in counted if start <= p.event_time_ms <= t.event_time_ms]
    amounts = [p.amount_minor for p in inside]
    mean = statistics.fmean(amounts) if amounts else math.nan
    match feature.aggregate:
        case "count":
            return len(inside)
        case "sum":
            return sum(amounts)
        case "mean":
            return mean
        case "max":
            return max(amounts, default=math.nan)
        case "ratio":
            return t.amount_minor / mean if amounts and mean else math.nan
        case "std" | "zscore":
            if len(amounts) < 2:
                return math.nan
            squares = statistics.fmean(min(a, SQUARED_AMOUNT_MINOR_MAX) ** 2 for a in amounts)
            std = math.sqrt(max(squares - mean * mean, 0.0))
            return std if feature.aggregate == "std" else (t.amount_minor - mean) / std if std else math.nan
        case "distinct_a" | "distinct_b":
            dim = entity.dim_a if feature.aggregate == "distinct_a" else entity.dim_b
            return float(SKETCH_ESTIMATE[len({dim_hash(getattr(p, dim)) % SKETCH_BITS for p in inside})])
    raise AssertionError(feature.aggregate)


def speed(a: Transaction, b: Transaction, gap_ms: int) -> float:
    """Kilometres an hour along the great circle; places are kept as float32."""
    if a.latitude is None or b.latitude is None or a.longitude is None or b.longitude is None:
        return math.nan
    lat1, lon1, lat2, lon2 = (math.radians(float(np.float32(v))) for v in (a.latitude, a.longitude, b.latitude, b.longitude))
    h = math.sin((lat2 - lat1) / 2) ** 2 + math.cos(lat1) * math.cos(lat2) * math.sin((lon2 - lon1) / 2) ** 2
    return 2 * 6371.0 * math.asin(math.sqrt(min(h, 1.0))) / (gap_ms / HOUR_MS)


@pytest.mark.parametrize("batch_rows", [1, 37])
def test_features_equal_a_naive_recount(stack: Stack, settings: Settings, batch_rows: int) -> None:
    assert stack.pid("redis")
    transactions = stream(batch_rows, 210)

    async def run(store: Store, _: RedisLink) -> list[Any]:
        batches = [transactions[i : i + batch_rows] for i in range(0, len(transactions), batch_rows)]
        return [(await observe(store, *[make_job(t) for t in batch])).matrix for batch in batches]

    matrix = np.concatenate(with_store(settings, run))
    for column, feature in enumerate(FEATURES):
        if feature.entity is None:
            assert feature.name in REQUEST_FEATURES
            continue
        expected = [recount(feature, t, transactions[:i]) for i, t in enumerate(transactions)]
        np.testing.assert_allclose(matrix[:, column], np.array(expected, np.float32), rtol=2e-6, err_msg=feature.name)


def test_a_redelivery_keeps_its_place_and_sees_the_same(stack: Stack, settings: Settings) -> None:
    assert stack.pid("redis")
    run = secrets.token_hex(4)
    jobs = [make_job(make_transaction(f"{run}-{i}", card_id=run), offset=i) for i in range(3)]

    async def use(store: Store, _: RedisLink) -> tuple[Observation, Observation]:
        first = await observe(store, *jobs)
        # The answer was recorded and the Kafka transaction was not committed.
        store.record([(jobs[1], b"answer")])
        return first, await observe(store, *jobs)

    first, again = with_store(settings, use)
    assert first.seq[:, 0].tolist() == again.seq[:, 0].tolist() == [0, 1, 2]
    assert np.array_equal(first.matrix, again.matrix, equal_nan=True)
    assert again.settled == [None, None, None]


def test_an_answered_retry_is_settled_and_counts_once(stack: Stack, settings: Settings) -> None:
    assert stack.pid("redis")
    run = secrets.token_hex(4)
    job, copy = make_job(make_transaction(run, card_id=run)), make_job(make_transaction(run, card_id=run), offset=3)
    after = make_job(make_transaction(f"{run}-after", card_id=run))

    async def use(store: Store, _: RedisLink) -> tuple[Observation, Observation]:
        await observe(store, job)
        store.record([(job, b"answer")])
        return await observe(store, job, copy), await observe(store, after)

    retries, last = with_store(settings, use)
    assert retries.settled == [job.claim + b"answer"] * 2
    assert last.seq[0, 0] == 1


def test_a_what_if_read_changes_nothing(stack: Stack, settings: Settings) -> None:
    assert stack.pid("redis")
    run = secrets.token_hex(4)
    real, what_if = (make_job(make_transaction(f"{run}-{i}", card_id=run)) for i in range(2))

    async def use(store: Store, link: RedisLink) -> tuple[Observation, list[Any]]:
        await observe(store, real)
        keys = (head_key("card", run), idempotency_key(what_if.transaction.transaction_id))
        before = [await link.call(("GET", key), 5) for key in keys]
        found = await observe(store, what_if, update=False)
        after = [await link.call(("GET", key), 5) for key in keys]
        assert before == after
        return found, after

    found, (_, claim) = with_store(settings, use)
    assert found.seq[0, 0] == 1
    assert claim is None


def test_a_full_head_drops_its_oldest_and_says_that_values_are_short(stack: Stack, settings: Settings) -> None:
    assert stack.pid("redis")
    run = secrets.token_hex(4)
    capacity = ENTITIES[0].head_events_max
    most = capacity + capacity // 4
    jobs = [make_job(make_transaction(f"{run}-{i}", card_id=run, merchant_id=f"m{i}-{run}")) for i in range(most + 2)]

    async def use(store: Store, link: RedisLink) -> tuple[Observation, bytes, bytes]:
        await observe(store, *jobs[:most])
        full = await link.call(("GET", head_key("card", run)), 5)
        await observe(store, jobs[most])
        dropped = await link.call(("GET", head_key("card", run)), 5)
        return await observe(store, jobs[most + 1]), full, dropped

    last, full, dropped = with_store(settings, use)
    assert (len(full) - HEAD_HEADER.size) // HEAD_EVENT.itemsize == most
    events = np.frombuffer(dropped, HEAD_EVENT, offset=HEAD_HEADER.size)
    assert len(events) == capacity
    assert events["seq"].tolist() == list(range(most + 1 - capacity, most + 1))
    assert HEAD_HEADER.unpack_from(dropped)[4:] == (most + 1, most + 1 - capacity)
    assert last.stale.all()


@pytest.mark.parametrize("broken", [b"x", b"\x09" * 16, b"\x01" * 65])
def test_a_head_that_is_none_is_not_used_and_begins_anew(stack: Stack, settings: Settings, broken: bytes) -> None:
    assert stack.pid("redis")
    run = secrets.token_hex(4)
    first, second = (make_job(make_transaction(f"{run}-{i}", card_id=run)) for i in range(2))

    async def use(store: Store, link: RedisLink) -> tuple[Observation, Observation]:
        await link.call(("SET", head_key("card", run), broken), 5)
        return await observe(store, first), await observe(store, second)

    found, healed = with_store(settings, use)
    columns = [i for i, f in enumerate(FEATURES) if f.entity == "card"]
    assert np.isnan(found.matrix[0, columns]).all()
    assert found.stale.all()
    assert healed.matrix[0, [i for i, f in enumerate(FEATURES) if f.name == "card_count_5m"]] == 1
