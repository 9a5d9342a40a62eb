import asyncio
import heapq
import random
import threading
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from aiokafka import TopicPartition
from aiokafka.partitioner import DefaultPartitioner

from gateway.contracts.reasons import Refusal
from gateway.contracts.registry import SchemaRegistry
from gateway.contracts.topics import SCORED_HEADER
from gateway.contracts.transaction import encode_json
from gateway.kafka.avro import SchemaBook
from gateway.kafka.door import SHARED_ROWS_MAX, KafkaDoor, by_event_time
from gateway.kafka.link import Membership, Polled
from gateway.kafka.records import partition_of
from gateway.metrics import Metrics
from gateway.scoring.job import Job, Result, Verdict
from tests.helpers import until
from tests.unit.gateway.factories import NOW_MS, make_transaction

TRACEPARENT = b"00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


def record_of(value: bytes, partition: int, offset: int, *, headers: tuple[tuple[str, bytes], ...] = ()) -> Polled:
    return Polled("transactions", partition, offset, NOW_MS, b"card", value, headers)


def test_partitions_are_merged_by_event_time_and_keep_their_own_order() -> None:
    order = by_event_time(np.array([0, 0, 0, 1, 1]), np.array([1, 9, 2, 3, 4]))
    assert ["abcde"[i] for i in order] == ["a", "d", "e", "b", "c"]


def test_any_partitions_are_merged_as_by_taking_the_earliest_of_their_next_events() -> None:
    random_ = random.Random(7)
    for _ in range(300):
        sizes = [random_.randrange(6) for _ in range(random_.randrange(5))]
        times = [[random_.randrange(8) for _ in range(size)] for size in sizes]
        places = iter(range(sum(sizes)))
        parts = [[(time, next(places)) for time in part] for part in times]
        wanted = [place for _, place in heapq.merge(*parts, key=lambda pair: pair[0])]
        partitions = np.repeat(np.arange(len(sizes), dtype=np.int64), sizes)
        assert by_event_time(partitions, np.array(sum(times, []), np.int64)) == wanted


def test_a_card_goes_where_every_other_producer_puts_it() -> None:
    choose = DefaultPartitioner()
    keys = [f"card-{i}".encode() for i in range(200)]
    assert [partition_of(k, 7) for k in keys] == [choose(k, list(range(7)), list(range(7))) for k in keys]


def test_a_chunk_is_sorted_out_message_by_message() -> None:
    schemas = SchemaBook(SchemaRegistry("http://127.0.0.1:9/"))
    unused: Any = SimpleNamespace(decide=None)
    door = KafkaDoor(unused, schemas, Metrics(), unused, batch_rows_max=10)
    good, other = (encode_json(make_transaction(name)) for name in ("good", "other"))
    polled = {
        TopicPartition("transactions", 0): [
            record_of(good, 0, 10),
            record_of(b"{", 0, 11),
            record_of(good, 0, 12, headers=(("fraudgate-scored", b"http"),)),
        ],
        TopicPartition("transactions", 1): [record_of(b"\0\0\0\0\1x", 1, 5), record_of(other, 1, 6)],
    }
    chunk = door._sort_out(polled, 0.0)
    assert [job.transaction.transaction_id for job in chunk.jobs] == ["good", "other"]
    assert [(job.partition, job.offset) for job in chunk.jobs] == [(0, 10), (1, 6)]
    assert chunk.refusals == [Refusal.MALFORMED_JSON, Refusal.UNKNOWN_SCHEMA_ID]
    assert [r.headers for r in chunk.quarantined] == [(("reason", b"malformed_json"),), (("reason", b"unknown_schema_id"),)]
    assert set(chunk.next_offsets.values()) == {13, 7}


@pytest.mark.anyio
async def test_while_somebody_waits_over_http_a_chunk_is_decided_in_small_parts() -> None:
    sizes: list[int] = []

    class Scorer:
        deciding = {"a payment over HTTP"}

        async def decide(self, jobs: Sequence[Job]) -> list[Result]:
            sizes.append(len(jobs))
            if len(sizes) == 2:
                self.deciding = set()
            return [Result(job, Verdict.DUPLICATE) for job in jobs]

    unused: Any = None
    scorer: Any = Scorer()
    door = KafkaDoor(scorer, SchemaBook(SchemaRegistry("http://127.0.0.1:9/")), Metrics(), unused, batch_rows_max=100)
    messages = [record_of(encode_json(make_transaction(f"t{i}")), 0, i) for i in range(300)]
    chunk, results, _ = await door._decide(messages, Membership(unused, frozenset({0})))
    assert sizes == [SHARED_ROWS_MAX, SHARED_ROWS_MAX, 100, 300 - 2 * SHARED_ROWS_MAX - 100]
    assert [result.job for result in results] == chunk.jobs


class AtRedis:
    """A scorer whose batches wait a while, for ever when Redis is `silent`; `most` is how many waited at a time."""

    def __init__(self, fails: str | None = None, *, silent: bool = False) -> None:
        self.deciding: set[str] = set()
        self.sizes: list[int] = []
        self.waiting = self.most = 0
        self._fails = fails
        self._silent = silent

    async def decide(self, jobs: Sequence[Job]) -> list[Result]:
        self.sizes.append(len(jobs))
        self.waiting += 1
        self.most = max(self.most, self.waiting)
        try:
            for _ in range(5):
                await asyncio.sleep(0)
            if self._silent:
                await asyncio.Event().wait()
        finally:
            self.waiting -= 1
        if any(job.transaction_id == self._fails for job in jobs):
            raise RuntimeError("this one can't be decided")
        return [Result(job, Verdict.DUPLICATE) for job in jobs]


def door_of(scorer: AtRedis) -> KafkaDoor:
    unused: Any = None
    stub: Any = scorer
    return KafkaDoor(stub, SchemaBook(SchemaRegistry("http://127.0.0.1:9/")), Metrics(), unused, batch_rows_max=256)


def chunk_of(*names: str) -> list[Polled]:
    return [record_of(encode_json(make_transaction(name)), 0, i) for i, name in enumerate(names)]


@pytest.mark.anyio
async def test_a_large_chunk_is_at_redis_with_one_half_while_the_other_is_worked_out() -> None:
    scorer = AtRedis()
    chunk, results, _ = await door_of(scorer)._decide(chunk_of(*(f"t{i}" for i in range(301))), Membership(None, frozenset({0})))
    assert (scorer.sizes, scorer.most, scorer.waiting) == ([151, 150], 2, 0)
    assert [result.job for result in results] == chunk.jobs


@pytest.mark.anyio
async def test_a_small_chunk_is_one_batch() -> None:
    scorer = AtRedis()
    await door_of(scorer)._decide(chunk_of(*(f"t{i}" for i in range(64))), Membership(None, frozenset({0})))
    assert scorer.sizes == [64]


@pytest.mark.anyio
async def test_a_transaction_that_stands_in_a_chunk_twice_finds_its_first_decided() -> None:
    scorer = AtRedis()
    names = [f"t{i}" for i in range(200)]
    await door_of(scorer)._decide(chunk_of(*names, "t0"), Membership(None, frozenset({0})))
    assert (scorer.sizes, scorer.most) == ([101, 100], 1)


@pytest.mark.anyio
async def test_one_that_fails_leaves_nothing_under_way() -> None:
    scorer = AtRedis(fails="t7")
    chunk, results, records = await door_of(scorer)._decide(
        chunk_of(*(f"t{i}" for i in range(130))), Membership(None, frozenset({0}))
    )
    assert [result.job.transaction_id for result in results] == [f"t{i}" for i in range(130) if i != 7]
    assert (len(records), chunk.refusals, scorer.waiting) == (1, ["failed"], 0)


@pytest.mark.anyio
async def test_a_session_that_ends_takes_both_halves_with_it() -> None:
    scorer = AtRedis(silent=True)
    deciding = asyncio.create_task(
        door_of(scorer)._decide(chunk_of(*(f"t{i}" for i in range(130))), Membership(None, frozenset({0})))
    )
    await until(lambda: scorer.waiting == 2, 5)
    deciding.cancel()
    await asyncio.wait({deciding})
    assert deciding.cancelled()
    assert scorer.waiting == 0


class PublishedOverHttp:
    """A link whose every poll brings, at once, one transaction that the HTTP door has decided and published."""

    def __init__(self) -> None:
        self.polls = 0
        self.quiet = threading.Event()
        self.membership = Membership(None, frozenset({0}))

    def poll(self) -> tuple[Membership, list[Any]]:
        self.polls += 1
        return self.membership, [record_of(b"", 0, self.polls, headers=((SCORED_HEADER, b"http"),))]

    def end_of(self, _partition: int) -> None:
        return None

    def nothing(self, *_: Any) -> None:
        """Stands for what else a link does."""

    open = commit = abandon = close_producers = close_consumer = nothing


@pytest.mark.anyio
async def test_what_was_only_skipped_is_polled_no_more_often_than_chunks_begin() -> None:
    async def learn(_: Any) -> None:
        return None

    schemas: Any = SimpleNamespace(complete=True, learn=learn)
    scorer: Any = SimpleNamespace(decide=None)

    def door_of(link: Any, interval_s: float) -> KafkaDoor:
        return KafkaDoor(scorer, schemas, Metrics(), lambda: link, batch_rows_max=10, chunk_interval_s=interval_s)

    held, eager = PublishedOverHttp(), PublishedOverHttp()
    doors = [door_of(held, 0.5), door_of(eager, 0.0)]
    for door in doors:
        door.start()
    # The first one is committed at once; those behind it are not, for a second.
    await until(lambda: held.polls >= 2 and eager.polls >= 2, 10)
    before, at = held.polls, eager.polls
    # As often as the loop turns: hundreds in the time in which the other one waits.
    await until(lambda: eager.polls >= at + 200, 10)
    assert held.polls - before < 100
    for door in doors:
        await door.stop(0.1)


def test_a_records_trace_goes_with_its_transaction_where_there_is_a_tracer() -> None:
    traced, malformed, plain = (encode_json(make_transaction(name)) for name in ("traced", "malformed", "plain"))
    polled = {
        TopicPartition("transactions", 0): [
            record_of(traced, 0, 1, headers=(("other", b"x"), ("traceparent", TRACEPARENT))),
            record_of(malformed, 0, 2, headers=(("traceparent", b"00-1-2-01"),)),
            record_of(plain, 0, 3),
        ]
    }
    unused: Any = SimpleNamespace(decide=None)
    for tracer, found in ((unused, [TRACEPARENT, None, None]), (None, [None, None, None])):
        schemas = SchemaBook(SchemaRegistry("http://127.0.0.1:9/"))
        door = KafkaDoor(unused, schemas, Metrics(), unused, batch_rows_max=10, tracer=tracer)
        assert [job.traceparent for job in door._sort_out(polled, 0.0).jobs] == found
