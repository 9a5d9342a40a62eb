"""Writing tiles on a real Redis: fences, the marks in the heads, compaction, and what the gateway had not observed yet."""

from __future__ import annotations

import dataclasses
import secrets
import struct
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pytest
import redis

from deploy.stack import Stack
from feature_jobs.redis_wire import connected
from feature_jobs.tiles import Events, RedisUnavailableError, TileJob, merge_events, merge_into_redis
from gateway.contracts import layout
from gateway.contracts.features import ENTITIES
from gateway.contracts.settings import Settings
from gateway.contracts.windows import HEAD_RETENTION_MS

pytestmark = pytest.mark.integration

NOW_MS = 1_700_000_000_000
LONG_AGO_S = NOW_MS // 1000 - 10_000
CARD = ENTITIES[0]
CAPACITY = CARD.head_events_max
# With one event more a head is full: it keeps what its newest counts, and the newest.
FULL = CAPACITY + 1 + CAPACITY // 4


@dataclasses.dataclass
class Card:
    """One card of its own in Redis, and the calls of both writers for it."""

    client: redis.Redis
    url: str
    card_id: str

    @property
    def job(self) -> TileJob:
        return TileJob(self.url, epoch=5, batch_id=1, now_ms=NOW_MS, retry_s=1)

    def observe(self, hash_: int, t_ms: int = NOW_MS, observed_s: int = NOW_MS // 1000, counted: bool = False) -> None:
        """As the gateway does for a transaction of the Kafka door."""
        check = layout.key_check(CARD.name, self.card_id)
        header = layout.HEAD_HEADER.pack(layout.LAYOUT_VERSION, 0, 0, check, NOW_MS * 1000, 0, 0)
        event = layout.HEAD_EVENT_PACK.pack(hash_, t_ms, 100, layout.SEQ_NEXT, observed_s % 65_536, 0, counted, 0.0, 0.0, 1, 2, 3)
        claim = secrets.token_bytes(16) + layout.POSITION.pack(b"k", 0, 0, hash_)
        keys = [layout.idempotency_key(f"{self.card_id}-{hash_}"), self.head_key]
        capacities = struct.pack("<H", CAPACITY)
        arguments: list[bytes | int] = [60_000, layout.HEAD_TTL_MS, layout.EARLY_MAX, capacities, b"0", claim, header + event]
        self.client.eval(layout.OBSERVE_LUA, len(keys), *keys, *arguments)

    def merge(
        self, hashes: list[int], times_ms: list[int] | None = None, *, from_kafka: bool = True, job: TileJob | None = None
    ) -> int:
        self.client.script_load(layout.MERGE_LUA)
        with connected(self.url) as wire:
            return merge_events(wire, job or self.job, self.events(hashes, times_ms, from_kafka))

    def events(self, hashes: list[int], times_ms: list[int] | None = None, from_kafka: bool = True) -> Events:
        n = len(hashes)
        return Events(
            tags=[f"{CARD.name}:{self.card_id}"],
            owner=np.zeros(n, np.int64),
            transaction=np.array(hashes, np.uint64),
            event_time_ms=np.array(times_ms or [NOW_MS] * n, np.int64),
            amount_minor=np.full(n, 100, np.int64),
            dims=(np.ones(n, np.uint32),) * 3,
            from_kafka=np.full(n, from_kafka),
        )

    @property
    def head_key(self) -> str:
        return layout.head_key(CARD.name, self.card_id)

    @property
    def tiles_key(self) -> str:
        return layout.tiles_key(CARD.name, self.card_id)

    def raw(self) -> bytes:
        value = self.client.get(self.head_key)
        assert isinstance(value, bytes)
        return value

    def head(self) -> npt.NDArray[np.void]:
        return layout.head_events(self.raw(), 0, layout.key_check(CARD.name, self.card_id))

    def early(self) -> int:
        """How many transactions the tiles are ahead of the gateway by, as their header says."""
        value = self.client.get(self.tiles_key)
        assert isinstance(value, bytes)
        return int(layout.TILES_HEADER.unpack_from(value)[6])

    def lost(self) -> int:
        value = self.client.getrange(self.head_key, 20, 23)
        assert isinstance(value, bytes)
        return int(struct.unpack("<I", value)[0])

    def counts(self) -> list[int]:
        """Transactions in the tiles, by resolution, from the finest."""
        value = self.client.get(self.tiles_key)
        assert isinstance(value, bytes)
        tiles = layout.unpack_tiles([value], [0], [layout.key_check(CARD.name, self.card_id)]).tiles
        return [int(tiles["count"][tiles["resolution_min"] == minutes].sum()) for minutes in (5, 60, 1440)]


@pytest.fixture
def card(stack: Stack, settings: Settings) -> Iterator[Card]:
    with redis.Redis.from_url(settings.redis) as client:
        yield Card(client, settings.redis, f"tiles-{secrets.token_hex(6)}")


def test_a_replayed_batch_changes_nothing(card: Card) -> None:
    assert card.merge([1, 2]) == 1
    before = card.client.get(card.tiles_key)
    assert card.merge([1, 2]) == 0
    assert card.client.get(card.tiles_key) == before


def test_the_next_batch_adds_and_an_older_one_is_refused(card: Card) -> None:
    card.merge([1, 2])
    later = dataclasses.replace(card.job, batch_id=2)
    assert card.merge([3], job=later) == 1
    assert card.counts() == [3, 3, 3]
    assert card.merge([4], job=card.job) == 0
    assert card.counts() == [3, 3, 3]


def test_a_fence_the_worker_could_not_see_yet_holds_in_the_script(card: Card) -> None:
    card.merge([1])
    value = card.client.get(card.tiles_key)
    assert isinstance(value, bytes)
    keys = (card.head_key, card.tiles_key, layout.early_key(CARD.name, card.card_id))
    other = value[:24] + b"\0" * 24
    arguments: list[bytes | int] = [
        other,
        b"",
        b"",
        0,
        layout.TILES_TTL_MS,
        6,
        4,
        90,
        HEAD_RETENTION_MS,
        layout.EARLY_TTL_MS,
        64,
        layout.HEAD_TTL_MS,
    ]
    assert card.client.eval(layout.MERGE_LUA, 3, *keys, *arguments) == 0
    assert card.client.get(card.tiles_key) == value


def test_tiles_of_another_epoch_are_not_built_upon(card: Card) -> None:
    card.merge([1, 2], job=dataclasses.replace(card.job, epoch=4, batch_id=99))
    assert card.merge([7]) == 1
    assert card.counts() == [1, 1, 1]


def test_just_the_events_of_the_batch_are_marked_as_tiled(card: Card) -> None:
    for i in range(1, 6):
        card.observe(i)
    card.merge([2, 4])
    assert card.head()["tiled"].tolist() == [0, 1, 0, 1, 0]
    assert card.head()["transaction"].tolist() == [1, 2, 3, 4, 5]


def test_a_hash_that_straddles_two_events_marks_neither(card: Card) -> None:
    card.observe(1)
    card.observe(2)
    value = card.client.get(card.head_key)
    assert isinstance(value, bytes)
    straddling = int.from_bytes(value[24 + 41 : 24 + 49], "little")
    card.merge([straddling])
    assert card.head()["tiled"].tolist() == [0, 0]


def test_compaction_keeps_the_untiled_the_lately_observed_and_what_a_reader_needs(card: Card) -> None:
    old_ms = NOW_MS - 2 * HEAD_RETENTION_MS
    for i in range(1, 31):
        card.observe(i, old_ms + i, LONG_AGO_S)
    card.observe(31, old_ms)
    card.observe(32, NOW_MS)
    card.merge([i for i in range(1, 33) if i != 7], [old_ms] * 30 + [NOW_MS])
    # 7 is untiled, 31 was observed just now, 32 is the newest, and 27 to 30 are the newest few before the retention.
    assert card.head()["transaction"].tolist() == [7, 27, 28, 29, 30, 31, 32]


def test_compaction_drops_what_nobody_needs_and_keeps_the_order_of_observation(card: Card) -> None:
    old_ms = NOW_MS - 3 * HEAD_RETENTION_MS
    for i in range(1, 21):
        card.observe(i, old_ms + i, LONG_AGO_S)
    for i in range(21, 27):
        card.observe(i, NOW_MS + i)
    card.merge(list(range(1, 27)), [old_ms + i for i in range(1, 21)] + [NOW_MS + i for i in range(21, 27)])
    # All within the retention, and the newest four before it.
    assert card.head()["transaction"].tolist() == list(range(17, 27))
    assert card.head()["seq"].tolist() == list(range(16, 26))
    card.observe(99)
    assert card.head()["seq"].tolist()[-1] == 26


def test_events_that_were_evicted_before_they_were_tiled_are_missed_only_until_they_are(card: Card) -> None:
    total = FULL + 1
    for i in range(1, total + 1):
        card.observe(i)
    evicted = card.lost()
    assert evicted == total - CAPACITY - 1
    card.merge(list(range(1, total + 1)))
    assert card.lost() == 0


def test_what_spark_tiles_before_the_gateway_observes_it_counts_once(card: Card) -> None:
    card.merge([1, 2])
    card.observe(2)
    card.observe(3)
    assert card.head()["transaction"].tolist() == [2, 3]
    assert card.head()["tiled"].tolist() == [1, 0]
    assert card.early() == 1
    # A later batch doesn't forget what is still to come.
    card.merge([3], job=dataclasses.replace(card.job, batch_id=2))
    card.observe(1)
    assert card.head()["tiled"].tolist() == [1, 1, 1]
    assert card.early() == 0
    assert card.client.exists(layout.early_key(CARD.name, card.card_id)) == 0


def test_a_head_that_an_early_list_marks_is_read_like_any_other(card: Card) -> None:
    card.merge([1, 2, 3])
    card.observe(9)
    assert (len(card.raw()) - layout.HEAD_HEADER.size) % layout.HEAD_EVENT_BYTES == layout.EARLY_MARK.size
    card.merge([9], job=dataclasses.replace(card.job, batch_id=2))
    for i in (1, 2, 8, 3):
        card.observe(i)
    assert card.head()["transaction"].tolist() == [9, 1, 2, 8, 3]
    assert card.head()["seq"].tolist() == [0, 1, 2, 3, 4]
    assert card.head()["tiled"].tolist() == [1, 1, 1, 0, 1]
    # The list is empty: the head is of the usual length again.
    assert (len(card.raw()) - layout.HEAD_HEADER.size) % layout.HEAD_EVENT_BYTES == 0


def test_a_head_lives_on_with_each_batch_of_tiles_and_takes_no_more_than_it_needs(card: Card) -> None:
    for i in range(1, 4):
        card.observe(i)
    card.client.pexpire(card.head_key, 60_000)
    card.merge([1, 2, 3])
    assert card.client.pttl(card.head_key) > layout.HEAD_TTL_MS - 60_000
    assert (card.client.memory_usage(card.head_key) or 0) < len(card.raw()) + 150


def test_what_a_head_evicted_is_not_waited_for(card: Card) -> None:
    total = FULL + 1
    for i in range(1, total + 1):
        card.observe(i)
    card.merge(list(range(1, total + 3)))
    assert card.early() == 2, "two that the gateway has not come to yet"


def test_what_a_forgotten_early_list_held_counts_once_by_its_arrival(card: Card) -> None:
    card.merge([1, 2])
    card.client.delete(layout.early_key(CARD.name, card.card_id))
    card.observe(1, counted=True)
    card.observe(3, counted=False)
    assert card.head()["tiled"].tolist() == [1, 0]


def test_history_that_no_gateway_will_observe_leaves_no_early_list(card: Card) -> None:
    card.merge([1, 2], from_kafka=False)
    assert card.client.exists(layout.early_key(CARD.name, card.card_id)) == 0


def test_a_value_of_another_layout_is_refused_and_left_alone(card: Card) -> None:
    card.client.set(card.tiles_key, b"\x63" + b"\0" * 71)
    with pytest.raises(layout.UnknownLayoutError):
        card.merge([1])
    assert card.client.get(card.tiles_key) == b"\x63" + b"\0" * 71


def _batch(card: Card) -> pa.RecordBatch:
    return pa.RecordBatch.from_pydict(
        {
            "tag": [f"card:{card.card_id}"] * 2,
            "txn": [struct.pack("<Q", i) for i in (1, 2)],
            "event_time_ms": [NOW_MS] * 2,
            "amount_minor": [100] * 2,
            "dim_a": pa.array([1, 1], pa.int64()),
            "dim_b": pa.array([1, 1], pa.int64()),
            "dim_c": pa.array([1, 1], pa.int64()),
            "from_kafka": [True] * 2,
        }
    )


def test_a_redis_that_lost_its_scripts_and_an_entity_split_over_two_arrow_batches_write_once(card: Card) -> None:
    card.client.script_flush()
    batch = _batch(card)
    (out,) = merge_into_redis(card.job)([batch.slice(0, 1), batch.slice(1)])
    assert out.to_pydict() == {"written": [1], "unchanged": [0]}
    assert card.counts() == [2, 2, 2]


def test_an_empty_partition_asks_nothing_of_redis() -> None:
    (out,) = merge_into_redis(TileJob("redis://127.0.0.1:1", 1, 1, NOW_MS, 0))([])
    assert out.to_pydict() == {"written": [0], "unchanged": [0]}


def test_a_redis_that_stays_down_fails_the_batch_within_its_time(card: Card) -> None:
    job = TileJob("redis://127.0.0.1:1", 1, 1, NOW_MS, retry_s=0)
    with pytest.raises(RedisUnavailableError):
        list(merge_into_redis(job)([_batch(card)]))
