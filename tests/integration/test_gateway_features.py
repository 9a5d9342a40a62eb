"""The gateway's feature store on the real Redis: against a naive recount, and the observe script at its edges."""

from __future__ import annotations

import asyncio
import random
import secrets
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import numpy as np
import pytest

from deploy.stack import Stack
from gateway.contracts.features import ENTITIES, FEATURE_INDEX
from gateway.contracts.layout import HEAD_EVENT, HEAD_HEADER, head_events, head_key, idempotency_key, key_check
from gateway.contracts.settings import Settings
from gateway.contracts.transaction import Transaction
from gateway.redis.link import RedisLink
from gateway.redis.store import Observation, Store
from gateway.scoring.job import Job, requests_of
from tests.helpers import until
from tests.integration.overtaking import assert_counts_once_and_the_first_answer_stands, assert_observed_afterwards_once
from tests.oracle import Oracle, differences
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
    found = await store.observe(jobs, requests_of(jobs), 20.0, update)
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


@pytest.mark.parametrize("batch_rows", [1, 37])
def test_features_equal_a_naive_recount(stack: Stack, settings: Settings, batch_rows: int) -> None:
    assert stack.pid("redis")
    transactions = stream(batch_rows, 210)

    async def run(store: Store, _: RedisLink) -> list[Any]:
        batches = [transactions[i : i + batch_rows] for i in range(0, len(transactions), batch_rows)]
        return [(await observe(store, *[make_job(t) for t in batch])).matrix for batch in batches]

    matrix = np.concatenate(with_store(settings, run))
    oracle = Oracle()
    for t, row in zip(transactions, matrix.tolist(), strict=True):
        assert differences(oracle.observe(t), row) == [], t.transaction_id


def test_a_redelivery_keeps_its_place_and_sees_the_same(stack: Stack, settings: Settings) -> None:
    assert stack.pid("redis")
    run = secrets.token_hex(4)
    jobs = [make_job(make_transaction(f"{run}-{i}", card_id=run), offset=i) for i in range(3)]

    async def use(store: Store, _: RedisLink) -> tuple[Observation, Observation]:
        first = await observe(store, *jobs)
        # The answer was recorded and the Kafka transaction was not committed.
        store.record([(jobs[1], jobs[1].claim + b"answer")])
        return first, await observe(store, *jobs)

    first, again = with_store(settings, use)
    assert first.seq[:, 0].tolist() == again.seq[:, 0].tolist()
    assert np.diff(first.seq[:, 0]).tolist() == [1, 1]
    assert np.array_equal(first.matrix, again.matrix, equal_nan=True)
    assert again.settled == [None, None, None]


def test_an_answered_retry_is_settled_and_counts_once(stack: Stack, settings: Settings) -> None:
    assert stack.pid("redis")
    run = secrets.token_hex(4)
    job, copy = make_job(make_transaction(run, card_id=run)), make_job(make_transaction(run, card_id=run), offset=3)
    after = make_job(make_transaction(f"{run}-after", card_id=run))

    async def use(store: Store, _: RedisLink) -> tuple[Observation, Observation, Observation]:
        first = await observe(store, job)
        store.record([(job, job.claim + b"answer")])
        return first, await observe(store, job, copy), await observe(store, after)

    first, retries, last = with_store(settings, use)
    assert retries.settled == [job.claim + b"answer"] * 2
    assert last.seq[0, 0] == first.seq[0, 0] + 1


def test_what_was_decided_without_redis_is_observed_afterwards_once(stack: Stack, settings: Settings) -> None:
    assert stack.pid("redis")
    run = secrets.token_hex(4)

    async def use(store: Store, _: RedisLink) -> None:
        await assert_observed_afterwards_once(store, run)

    with_store(settings, use)


def test_who_overtakes_counts_once_and_of_two_answers_the_first_stands(stack: Stack, settings: Settings) -> None:
    assert stack.pid("redis")
    run = secrets.token_hex(4)

    async def use(store: Store, _: RedisLink) -> None:
        await assert_counts_once_and_the_first_answer_stands(store, store, run)

    with_store(settings, use)


def test_a_what_if_read_changes_nothing(stack: Stack, settings: Settings) -> None:
    assert stack.pid("redis")
    run = secrets.token_hex(4)
    real, what_if = (make_job(make_transaction(f"{run}-{i}", card_id=run)) for i in range(2))

    async def use(store: Store, link: RedisLink) -> tuple[int, Observation, list[Any]]:
        place = (await observe(store, real)).seq[0, 0]
        keys = (head_key("card", run), idempotency_key(what_if.transaction.transaction_id))
        before = [await link.call(("GET", key), 5) for key in keys]
        found = await observe(store, what_if, update=False)
        after = [await link.call(("GET", key), 5) for key in keys]
        assert before == after
        return int(place), found, after

    place, found, (_, claim) = with_store(settings, use)
    assert found.seq[0, 0] == place + 1
    assert claim is None


def test_a_full_head_drops_its_oldest_and_says_that_values_are_short(stack: Stack, settings: Settings) -> None:
    assert stack.pid("redis")
    run = secrets.token_hex(4)
    capacity = ENTITIES[0].head_events_max
    most = capacity + 1 + capacity // 4
    jobs = [make_job(make_transaction(f"{run}-{i}", card_id=run, merchant_id=f"m{i}-{run}")) for i in range(most + 2)]

    async def use(store: Store, link: RedisLink) -> tuple[Observation, bytes, bytes]:
        await observe(store, *jobs[:most])
        full = await link.call(("GET", head_key("card", run)), 5)
        await observe(store, jobs[most])
        dropped = await link.call(("GET", head_key("card", run)), 5)
        return await observe(store, jobs[most + 1]), full, dropped

    last, full, dropped = with_store(settings, use)
    assert (len(full) - HEAD_HEADER.size) // HEAD_EVENT.itemsize == most
    events = head_events(dropped, 0, key_check("card", run))
    # Those that the newest counts, and itself.
    assert len(events) == capacity + 1
    assert events["seq"].tolist() == list(range(most - capacity, most + 1))
    assert HEAD_HEADER.unpack_from(dropped)[6] == most - capacity
    assert last.stale.all()


@pytest.mark.parametrize("broken", [b"x", b"\x09" * 24, b"\x02" * 69, b"\x02" * 68])
def test_a_head_that_is_none_is_not_used_and_begins_anew(stack: Stack, settings: Settings, broken: bytes) -> None:
    assert stack.pid("redis")
    run = secrets.token_hex(4)
    first, second = (make_job(make_transaction(f"{run}-{i}", card_id=run)) for i in range(2))

    async def use(store: Store, link: RedisLink) -> tuple[Observation, Observation]:
        await link.call(("SET", head_key("card", run), broken), 5)
        return await observe(store, first), await observe(store, second)

    found, healed = with_store(settings, use)
    count = FEATURE_INDEX["card_count_5m"]
    # What shows by its length is begun anew at once; else it is refused, and begun anew when the card comes again.
    refused = len(broken) == HEAD_HEADER.size + HEAD_EVENT.itemsize
    assert np.array_equal(found.matrix[0, count], np.nan if refused else 0, equal_nan=True)
    assert healed.matrix[0, count] == (0 if refused else 1)
    assert found.stale.all()
    assert healed.stale.all()
