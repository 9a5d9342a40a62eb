"""Redis restored from Delta by Spark: entity by entity what streaming had written, also while the gateway goes on scoring."""

from __future__ import annotations

import dataclasses
import datetime as dt
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import msgspec
import numpy as np
import pyarrow as pa
import pytest
import redis
from deltalake import CommitProperties, write_deltalake
from msgspec import structs
from pyspark.sql import SparkSession
from pyspark.sql.pandas.types import to_arrow_schema
from pyspark.sql.types import StructType

from feature_jobs import lake, rebuild, redis_client, restore
from feature_jobs.metrics import Metrics
from feature_jobs.rebuild import NothingToRebuildError, RedisInUseError, newest_batch
from feature_jobs.restore import HeadBusyError, RestoreJob, existing_events, read_history, restore_events
from feature_jobs.schemas import SchemaBook
from feature_jobs.session import build_session
from feature_jobs.silver import QUERY, TILES, Silver
from feature_jobs.tiles import ENTITY_LABELLED, PAIRS, TileJob, merge_events
from gateway.contracts import layout, tables
from gateway.contracts.features import ENTITIES, ENTITY_INDEX
from gateway.contracts.heads import kept_events
from gateway.contracts.settings import Settings
from gateway.contracts.tiles import Horizon, keep_tiles, merge_seen
from gateway.contracts.transaction import FIELDS, Transaction
from tests.entities import EPOCH, Entities, events_of, make_stream, redis_server, wire_to
from tests.oracle import Oracle, differences

pytestmark = [
    pytest.mark.integration,
    pytest.mark.spark,
    pytest.mark.slow,
    # py4j leaves its sockets to the garbage collector, which says so.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning"),
]

BATCH_ROWS = 60
Tag = tuple[str, str]


class World:
    """A gateway's store, the tile writer and Delta tables that take part in the same stream, one batch of silver after the other."""

    def __init__(self, spark: SparkSession, settings: Settings, client: redis.Redis) -> None:
        self.spark, self.settings, self.client = spark, settings, client
        self.entities, self.oracle = Entities(client), Oracle()
        self.seqs: dict[str, list[int]] = {}
        self.receipts: list[Transaction] = []
        self._schemas = {
            name: to_arrow_schema(cast(StructType, StructType.fromDDL(lake.DDL[name])))
            for name in (tables.SILVER, tables.DECISIONS)
        }

    def observe(self, t: Transaction) -> list[float]:
        """As the gateway does; the receipt goes into the next batch that is told to take it."""
        found = self.entities.look([t])
        self.seqs[t.transaction_id] = found.seq[0].tolist()
        self.receipts.append(t)
        return [float(x) for x in found.matrix[0]]

    def follow(self, stream: Sequence[Transaction]) -> None:
        for t in stream:
            self.oracle.observe(t)
            self.observe(t)

    def write(
        self, batch_id: int, transactions: Sequence[Transaction], *, scored_by: str | None = None, receipts: bool = True
    ) -> None:
        """What silver appends of a batch. With `receipts` also those of everything observed so far."""
        at = dt.datetime.fromtimestamp(self.entities.now_ms / 1000, tz=dt.UTC)
        source = {"partition": 0, "offset": 0, "kafka_timestamp": at, "batch_id": batch_id}
        rows = [{**{f: getattr(t, f) for f in FIELDS}, "scored_by": scored_by, **source} for t in transactions]
        self._append(tables.SILVER, rows, batch_id)
        if receipts:
            named = {
                t.transaction_id: {
                    "transaction_id": t.transaction_id,
                    "decided_at_ms": self.entities.now_ms,
                    "observed_seq": self.seqs[t.transaction_id],
                    **{e.field: getattr(t, e.field) for e in ENTITIES},
                    **source,
                }
                for t in self.receipts
            }
            self._append(tables.DECISIONS, list(named.values()), batch_id)
            self.receipts.clear()

    def _append(self, table: str, rows: list[dict[str, Any]], batch_id: int) -> None:
        if not rows:
            return
        wanted = self._schemas[table]
        values = pa.table([pa.array([row.get(f.name) for row in rows], f.type) for f in wanted], schema=wanted)
        note = CommitProperties(custom_metadata={"userMetadata": lake.commit_note(QUERY, batch_id)})
        write_deltalake(tables.table_uri(self.settings.tables, table), values, mode="append", commit_properties=note)

    def stream(self, batch: Sequence[Transaction]) -> None:
        """Observe a batch, and take it through the tables and the tiles."""
        self.follow(batch)
        self.write(self.entities.batch_id + 1, batch)
        self.entities.tile(batch)

    def job(self, batch_id: int | None = None, lost_at_ms: int = 0, epoch: int = EPOCH + 1) -> RestoreJob:
        through = self.entities.batch_id if batch_id is None else batch_id
        return RestoreJob(self.settings.redis, epoch, through, self.entities.now_ms, lost_at_ms, retry_s=5)

    def history(self, batch_id: int) -> restore.History:
        """What the workers would get, all of it here."""
        self.client.script_load(layout.RESTORE_LUA)
        return read_history(rebuild._history(self.spark, self.settings, batch_id).toArrow().to_batches())

    def dump(self) -> dict[bytes, bytes | None]:
        return {key: self.client.get(key) for key in self.client.scan_iter(match=f"{layout.PREFIX}:{{*")}  # type: ignore[misc]

    def tags(self) -> list[Tag]:
        keys = {key.decode().split("{", 1)[1].rsplit("}", 1)[0] for key in self.dump()}
        return [(tag.split(":", 1)[0], tag.split(":", 1)[1]) for tag in sorted(keys) if tag.split(":", 1)[0] in ENTITY_INDEX]

    def snapshot(self) -> dict[Tag, tuple[Any, Any]]:
        """What a reader may still need of each entity's tiles and head, whenever they were last pruned."""
        return {tag: (self._tiles(*tag), self.head(*tag)) for tag in self.tags()}

    def _tiles(self, entity: str, entity_id: str) -> Any:
        index = ENTITY_INDEX[entity]
        value = self.client.get(layout.tiles_key(entity, entity_id))
        assert value is None or isinstance(value, bytes)
        held = layout.unpack_tiles([value], [index], [layout.key_check(entity, entity_id)])
        newest = held.headers["newest_min"].astype(np.int64)
        horizon = Horizon(newest, newest, newest, newest)
        assert PAIRS[index] or not len(held.seen)
        kept = held.tiles[keep_tiles(held.tiles, held.owner, horizon, ENTITY_LABELLED[index : index + 1])]
        seen, _ = merge_seen(held.seen, held.seen_owner, horizon)
        return newest.tolist(), kept.tolist(), seen.tolist(), held.headers["early"].tolist()

    def head(self, entity: str, entity_id: str) -> list[tuple[Any, ...]]:
        """(absolute place, tiled, transaction, event time, amount, dimensions, coordinates) in order of observation."""
        value = self.client.get(layout.head_key(entity, entity_id))
        if value is None:
            return []
        assert isinstance(value, bytes)
        index = ENTITY_INDEX[entity]
        found, _ = existing_events([value], np.array([index]), [layout.key_check(entity, entity_id)], self.entities.now_ms)
        records = found.records
        edges = np.array([0, len(records)])
        kept = kept_events(found.owner, records["event_time_ms"], found.observed_ms, records["tiled"] == 1, edges)
        names = ("tiled", "transaction", "event_time_ms", "amount_minor", "dim_a", "dim_b", "dim_c")
        columns = [found.place, *(records[name] for name in names), records["latitude"].view("u4"), records["longitude"].view("u4")]
        rows = list(zip(*(column[kept].tolist() for column in columns), strict=True))
        return rows[-ENTITIES[index].head_events_max :]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[redis.Redis, str]]:
    with redis_server(tmp_path_factory.mktemp("redis")) as client:
        yield client, f"redis://127.0.0.1:{client.connection_pool.connection_kwargs['port']}/0"


@pytest.fixture(scope="module")
def spark(settings: Settings) -> Iterator[SparkSession]:
    session = build_session(settings)
    yield session
    session.stop()


@pytest.fixture
def world(spark: SparkSession, settings: Settings, server: tuple[redis.Redis, str], tmp_path: Path) -> World:
    own = dataclasses.replace(
        settings,
        redis_url=server[1],
        redis_retry_s=5,
        tables_uri=str(tmp_path / "tables"),
        checkpoints_uri=str(tmp_path / "checkpoints"),
    )
    return World(spark, own, server[0])


def make_batches(seed: int, count: int, step_ms: int = 600_000) -> list[list[Transaction]]:
    stream = make_stream(seed, count * BATCH_ROWS, step_ms, 240_000)
    return [stream[i : i + BATCH_ROWS] for i in range(0, len(stream), BATCH_ROWS)]


def test_a_rebuild_equals_what_streaming_wrote_as_of_any_batch(world: World) -> None:
    first, second, third = make_batches(1, 3)
    world.stream(first)
    history = [structs.replace(t, transaction_id=f"{t.transaction_id}-history") for t in second[:20]]
    world.write(2, history, scored_by="history", receipts=False)
    events = dataclasses.replace(events_of(history), from_kafka=np.zeros(len(events_of(history).owner), bool))
    merge_events(wire_to(world.client), TileJob("", EPOCH, 2, world.entities.now_ms, 0), events)
    world.entities.batch_id = 2
    world.stream(second)
    then, then_ms, at_that_time = world.snapshot(), time.time_ns() // 1_000_000, world.job()
    world.stream(third)
    streamed = world.snapshot()
    assert len(streamed) > 10

    world.client.flushall()
    done = rebuild.rebuild(world.spark, world.settings, world.job())
    assert (done.transactions, done.entities, done.left_out) == (3 * BATCH_ROWS + 20, len(streamed), 0)
    assert world.snapshot() == streamed
    before = world.dump()
    rebuild.rebuild(world.spark, world.settings, world.job())
    assert world.dump() == before

    # As of a time, and by the rule of the command: into an empty Redis only.
    with pytest.raises(RedisInUseError):
        rebuild.by_hand(world.spark, world.settings, TILES, 11, then_ms)
    assert lake.load_epoch(world.spark, world.settings, TILES) is None
    world.client.flushall()
    assert newest_batch(world.spark, world.settings, then_ms) == at_that_time.batch_id == 3
    assert newest_batch(world.spark, world.settings) == 4
    with pytest.raises(NothingToRebuildError):
        newest_batch(world.spark, world.settings, then_ms - 86_400_000)
    rebuild.rebuild(world.spark, world.settings, at_that_time)
    assert world.snapshot() == then


def follow_exactly(world: World, stream: Sequence[Transaction]) -> None:
    for t in stream:
        assert differences(world.oracle.observe(t), world.observe(t)) == [], t.transaction_id


def test_what_is_scored_after_a_rebuild_equals_the_slow_oracle(world: World) -> None:
    first, second, following = make_batches(2, 3, step_ms=1_800_000)
    world.stream(first)
    world.stream(second)
    places = world.seqs[second[-1].transaction_id]
    world.client.flushall()
    rebuild.rebuild(world.spark, world.settings, world.job())
    world.entities.say_progress()
    follow_exactly(world, following)
    # The order of observation goes on where it was.
    of_card = [world.seqs[t.transaction_id][0] for t in [*second, *following] if t.card_id == second[-1].card_id]
    after = of_card.index(places[0])
    assert of_card[after:] == list(range(places[0], places[0] + len(of_card) - after))


def test_a_head_born_while_redis_was_empty_goes_on_behind_the_restored_events(world: World) -> None:
    first, second, newborn, following = make_batches(3, 4)
    world.stream(first)
    world.stream(second)
    world.client.flushall()
    world.follow(newborn)
    # Of what came meanwhile silver has seen a part; of that not every receipt is there.
    world.write(3, newborn[:40], receipts=False)
    world.entities.batch_id = 3
    rebuild.rebuild(world.spark, world.settings, world.job(lost_at_ms=world.entities.now_ms))
    world.entities.say_progress()
    hashes = {layout.txn_hash(t.transaction_id): t for t in newborn}
    tiled = {layout.txn_hash(t.transaction_id) for t in newborn[:40]}
    checked = 0
    for tag in world.tags():
        index = ENTITY_INDEX[tag[0]]
        head = world.head(*tag)
        places = [event[0] for event in head]
        assert places == sorted(set(places))
        for place, is_tiled, transaction, *_ in head:
            if transaction in hashes:
                assert place == world.seqs[hashes[transaction].transaction_id][index]
                assert is_tiled == (transaction in tiled)
                checked += 1
        born = [event[2] in hashes for event in head]
        assert born == sorted(born), "restored events come first"
    assert checked > BATCH_ROWS
    before = world.dump()
    rebuild.rebuild(world.spark, world.settings, world.job(lost_at_ms=world.entities.now_ms))
    assert world.dump() == before
    follow_exactly(world, following)
    # And once every receipt is there, nothing moves any more.
    world.write(4, [*newborn[40:], *following])
    world.entities.batch_id = 4
    before_receipts = world.snapshot()
    rebuild.rebuild(world.spark, world.settings, world.job())
    places_now = {tag: [event[0] for event in head] for tag, (_, head) in world.snapshot().items()}
    assert places_now == {tag: [event[0] for event in head] for tag, (_, head) in before_receipts.items()}


def test_a_head_that_changes_between_reading_and_writing_is_read_again(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    first, during, following = make_batches(4, 3)
    world.stream(first)
    world.client.flushall()
    history = world.history(1)
    waiting = list(during[:25])
    pipelined = redis_client.pipelined
    turned_away: list[int] = []

    def interrupted(client: redis.Redis, commands: Sequence[tuple[object, ...]]) -> list[Any]:
        replies = pipelined(client, commands)
        if commands[0][0] == "GET" and waiting:
            world.follow(waiting[:5])
            del waiting[:5]
        if commands[0][0] == "EVALSHA":
            turned_away.append(replies.count(-1))
        return replies

    monkeypatch.setattr(restore, "pipelined", interrupted)
    job = world.job(lost_at_ms=world.entities.now_ms)
    assert restore_events(world.client, job, history) == len(history.tags)
    assert turned_away[0] > 0
    assert turned_away[-1] == 0
    world.entities.say_progress()
    follow_exactly(world, following)


def test_a_head_that_never_rests_ends_the_rebuild_after_its_tries(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    (first,) = make_batches(5, 1)
    world.stream(first)
    history = world.history(1)
    pipelined = redis_client.pipelined

    def always(client: redis.Redis, commands: Sequence[tuple[object, ...]]) -> list[Any]:
        return [-1] * len(commands) if commands[0][0] == "EVALSHA" else pipelined(client, commands)

    monkeypatch.setattr(restore, "pipelined", always)
    with pytest.raises(HeadBusyError):
        restore_events(world.client, world.job(), history)


def test_a_rebuild_of_an_older_batch_is_refused_by_what_streaming_wrote_since(world: World) -> None:
    first, second = make_batches(6, 2)
    world.stream(first)
    world.stream(second)
    before = world.dump()
    late = restore_events(world.client, world.job(batch_id=1, epoch=EPOCH), world.history(1))
    written = {tag for t in second for tag in ((e.name, getattr(t, e.field)) for e in ENTITIES)}
    assert late == len([tag for tag in world.tags() if tag not in written])
    assert {key: value for key, value in world.dump().items() if key.endswith(b":t")}.keys() <= before.keys()


def test_after_a_loss_answers_are_stale_until_the_last_receipt_of_before_is_restored(world: World) -> None:
    first, second, lost, following = make_batches(7, 4)
    silver = Silver(world.spark, world.settings, SchemaBook.__new__(SchemaBook), Metrics())
    # As if its stream had begun.
    Path(silver.checkpoint.uri, "offsets").mkdir(parents=True)
    world.follow(first)
    now_ms = world.entities.now_ms
    world.write(0, first)

    def take(batch_id: int, rows: Sequence[Transaction], ingested_ms: int) -> None:
        frame = world.spark.read.format("delta").load(tables.table_uri(world.settings.tables, tables.SILVER))
        batch = frame.where(frame.batch_id == batch_id) if rows else None
        silver._write_tiles(batch, batch_id, now_ms, now_ms, ingested_ms)

    take(0, first, now_ms)
    world.follow(second)
    world.write(1, second)
    take(1, second, now_ms)
    assert silver.progress is not None
    assert (silver.progress.batch_id, silver.progress.lost_at_ms) == (1, 0)
    # Observed, and then Redis is lost before silver has seen any of it: not even their receipts.
    world.follow(lost)
    late_receipts = list(world.receipts)
    world.receipts.clear()
    world.client.flushall()
    world.write(2, lost[:30], receipts=False)
    take(2, lost[:30], now_ms)
    progress = silver.progress
    assert (progress.batch_id, progress.rebuilt_batch_id) == (2, 1)
    assert progress.lost_at_ms > now_ms
    assert world.entities.look(following[:1], update=False).stale.all()
    # Another driver goes on from what Redis says.
    silver = Silver(world.spark, world.settings, SchemaBook.__new__(SchemaBook), Metrics())
    world.receipts = late_receipts
    world.write(3, lost[30:])
    take(3, lost[30:], progress.lost_at_ms + rebuild.RECEIPTS_WITHIN_MS - 1)
    assert silver.progress is not None
    assert silver.progress.lost_at_ms == progress.lost_at_ms
    take(4, [], progress.lost_at_ms + rebuild.RECEIPTS_WITHIN_MS)
    assert (silver.progress.batch_id, silver.progress.lost_at_ms) == (4, 0)
    assert not world.entities.look(following[:1], update=False).stale.any()
    held = {event[2] for tag in world.tags() for event in world.head(*tag)}
    assert {layout.txn_hash(t.transaction_id) for t in lost[-10:]} <= held
    before = world.dump()
    take(4, [], progress.lost_at_ms + rebuild.RECEIPTS_WITHIN_MS)
    assert world.dump() == before
    follow_exactly(world, following)


def test_by_hand_redis_is_restored_as_of_now_and_of_a_time(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    # What arrived more than forty days ago would have expired by now.
    monkeypatch.setattr("tests.entities.WALL_MS", time.time_ns() // 1_000_000 - 36_000_000)
    first, second = make_batches(8, 2)
    world.stream(first)
    then_ms = time.time_ns() // 1_000_000
    then = world.snapshot()
    world.stream(second)
    now = world.snapshot()
    world.client.flushall()
    done, batch_id = rebuild.by_hand(world.spark, world.settings, TILES, 41, then_ms)
    assert (done.transactions, batch_id) == (BATCH_ROWS, 1)
    assert world.snapshot() == then
    held = world.client.get(layout.PROGRESS_KEY)
    assert isinstance(held, bytes)
    progress = msgspec.msgpack.decode(held, type=layout.Progress)
    assert (progress.epoch, progress.batch_id, progress.lost_at_ms) == (42, 1, 0)
    assert lake.load_epoch(world.spark, world.settings, TILES) == 42
    rebuild.by_hand(world.spark, world.settings, TILES, 42, None)
    order = {tag: [event[1:] for event in head] for tag, (_, head) in world.snapshot().items()}
    assert order == {tag: [event[1:] for event in head] for tag, (_, head) in now.items()}
    held = world.client.get(layout.PROGRESS_KEY)
    assert isinstance(held, bytes)
    progress = msgspec.msgpack.decode(held, type=layout.Progress)
    assert (progress.epoch, progress.batch_id, progress.rebuilt_batch_id) == (43, 2, 2)
    assert progress.lost_at_ms > then_ms
