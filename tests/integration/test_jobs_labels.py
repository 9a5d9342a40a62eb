"""The stream of labels on real Spark, Delta and Redis: frauds by hour against a recount, replays, lost data, and the gateway's reading."""

from __future__ import annotations

import dataclasses
import datetime as dt
import random
import subprocess
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pyarrow as pa
import pytest
import redis
from deltalake import DeltaTable, write_deltalake
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql.pandas.types import to_arrow_schema
from pyspark.sql.types import StructType

from deploy.ports import free_ports
from deploy.toolchain import find_redis
from feature_jobs import lake
from feature_jobs.label_changes import LABELLED_ENTITIES
from feature_jobs.label_values import ValueJob, write_partition
from feature_jobs.labels import Labels, rebuild_labels
from feature_jobs.metrics import Metrics
from feature_jobs.session import build_session
from feature_jobs.silver import CheckpointLostError
from feature_jobs.tiles import RedisUnavailableError
from gateway.contracts import layout, tables
from gateway.contracts.features import ENTITY_INDEX, FEATURE_NAMES
from gateway.contracts.label import Label, precedence_of
from gateway.contracts.settings import Settings
from gateway.contracts.transaction import Transaction
from gateway.contracts.windows import DAY_MS, LABELLED_RETENTION_MS
from tests.entities import Entities
from tests.helpers import wait_until
from tests.oracle import Oracle, differences
from tests.unit.gateway.factories import make_transaction

pytestmark = [
    pytest.mark.integration,
    pytest.mark.spark,
    # py4j leaves its sockets to the garbage collector, which says so.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning"),
]

FIRST_MS = 1_690_000_000_000 - 1_690_000_000_000 % DAY_MS
DAYS = 50
HOUR_MS = 3_600_000

Value = tuple[dict[int, int], int]


@dataclasses.dataclass
class World:
    """Tables, checkpoints and a Redis of their own; what a batch of silver would have appended is put there by hand."""

    spark: SparkSession
    settings: Settings
    client: redis.Redis
    metrics: Metrics = dataclasses.field(default_factory=Metrics)
    payments: list[Transaction] = dataclasses.field(default_factory=list)
    labels: list[Label] = dataclasses.field(default_factory=list)
    silver_batch: int = 0

    def put(self, payments: list[Transaction], labels: list[Label]) -> int:
        """One batch of silver; its number."""
        self.silver_batch += 1
        self._append(tables.SILVER, payments, len(self.payments))
        self._append(tables.LABELS, labels, len(self.labels))
        self.payments += payments
        self.labels += labels
        return self.silver_batch

    def _append(self, table: str, values: Sequence[Transaction | Label], first_offset: int) -> None:
        now = dt.datetime.now(dt.UTC)
        source = [
            {"partition": i % 2, "offset": first_offset + i, "kafka_timestamp": now, "batch_id": self.silver_batch}
            for i in range(len(values))
        ]
        rows = [msgspec.structs.asdict(value) | place for value, place in zip(values, source, strict=True)]
        columns = StructType.fromDDL(lake.DDL[table])
        assert isinstance(columns, StructType)
        write_deltalake(self.uri(table), pa.Table.from_pylist(rows, to_arrow_schema(columns, timestamp_utc=True)), mode="append")

    def uri(self, table: str) -> str:
        return tables.table_uri(self.settings.tables, table)

    def create(self) -> None:
        for table in (tables.SILVER, tables.LABELS, tables.LABEL_CHANGES):
            self._append(table, [], 0)

    def stream(self) -> Labels:
        """As after a start of the jobs: it has nothing in memory."""
        return Labels(self.spark, self.settings, self.metrics)

    def run_stream(self) -> None:
        """Through everything that is there, as `fraudgate jobs --once` does."""
        self.stream().writer().trigger(availableNow=True).start().awaitTermination()

    def begin_checkpoint(self) -> None:
        """What a query that was started once leaves there, for tests that hand batches to the stream themselves."""
        self.stream()
        (Path(self.settings.checkpoints) / "labels/stream/offsets").mkdir(parents=True)

    def batch(self, silver_batch: int) -> DataFrame:
        """The labels of a batch of silver, as the stream would hand them over."""
        return self.spark.read.format("delta").load(self.uri(tables.LABELS)).where(f"batch_id = {silver_batch}")

    def changes(self) -> list[dict[str, Any]]:
        """The rows of label_changes in the order in which they were applied."""
        rows: list[dict[str, Any]] = DeltaTable(self.uri(tables.LABEL_CHANGES)).to_pyarrow_table().to_pylist()
        rows.sort(key=lambda r: (r["batch_id"], r["place"]))
        return rows

    def value(self, entity: str, entity_id: str) -> Value | None:
        """(frauds by hour, without hours that have none; the counter of changes)"""
        held = self.client.get(layout.labels_key(entity, entity_id))
        if held is None:
            return None
        assert isinstance(held, bytes)
        hours = layout.fraud_hours(held, ENTITY_INDEX[entity], layout.key_check(entity, entity_id))
        return {int(r["hour"]): int(r["frauds"]) for r in hours if r["frauds"]}, layout.LABELS_HEADER.unpack_from(held)[6]

    def values(self) -> dict[tuple[str, str], Value]:
        found = {}
        for e in LABELLED_ENTITIES:
            for entity_id in {getattr(t, e.field) for t in self.payments}:
                value = self.value(e.name, entity_id)
                if value is not None:
                    found[e.name, entity_id] = value
        return found

    def recount(self, batch_ids: int | None = None) -> dict[tuple[str, str], Value]:
        """What `values` must be by the rows of label_changes, of the batches before `batch_ids`."""
        rows = [r for r in self.changes() if r["change"] and (batch_ids is None or r["batch_id"] < batch_ids)]
        out = {}
        for e in LABELLED_ENTITIES:
            for entity_id in {r[e.field] for r in rows}:
                mine = [r for r in rows if r[e.field] == entity_id]
                frauds: Counter[int] = Counter()
                for r in mine:
                    frauds[r["event_time_ms"] // HOUR_MS] += r["change"]
                out[e.name, entity_id] = (retained(frauds, mine), len(mine))
        return out


def retained(frauds: Counter[int], changed: list[dict[str, Any]]) -> dict[int, int]:
    newest = max(r["event_time_ms"] // HOUR_MS for r in changed)
    return {hour: n for hour, n in frauds.items() if n and (newest - hour) * HOUR_MS <= LABELLED_RETENTION_MS}


def make_payment(n: int, rnd: random.Random, event_time_ms: int | None = None) -> Transaction:
    at_ms = FIRST_MS + rnd.randrange(DAYS * DAY_MS) if event_time_ms is None else event_time_ms
    customer, merchant = f"u{rnd.randrange(7)}", f"m{rnd.randrange(4)}"
    return make_transaction(f"t{n}", event_time_ms=at_ms, card_id=f"c{customer}", customer_id=customer, merchant_id=merchant)


def make_label(t: Transaction, is_fraud: bool, state: str, after_ms: int, source: str = "chargeback") -> Label:
    return Label(
        transaction_id=t.transaction_id,
        card_id=t.card_id,
        is_fraud=is_fraud,
        source=source,  # type: ignore[arg-type]
        state=state,  # type: ignore[arg-type]
        reported_at_ms=t.event_time_ms + after_ms,
    )


def labels_of(t: Transaction, n: int) -> list[Label]:
    """The labels that payment `n` gets, in the order of their reports."""
    reported = make_label(t, True, "reported", DAY_MS)
    return [
        [reported],
        [reported, make_label(t, True, "confirmed", 2 * DAY_MS)],
        [reported, make_label(t, False, "reversed", 3 * DAY_MS)],
        [reported, make_label(t, False, "false_positive", 2 * DAY_MS), make_label(t, True, "confirmed", 4 * DAY_MS)],
        [make_label(t, False, "false_positive", DAY_MS)],
        [make_label(t, True, "confirmed", DAY_MS), make_label(t, False, "false_positive", 2 * DAY_MS, "analyst")],
        [make_label(t, False, "false_positive", DAY_MS, "analyst"), make_label(t, True, "reported", 20 * DAY_MS)],
    ][n % 7]


@pytest.fixture(scope="module")
def spark(settings: Settings) -> Iterator[SparkSession]:
    session = build_session(settings)
    yield session
    session.stop()


@pytest.fixture(scope="module")
def redis_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    port = free_ports(1)[0]
    directory = str(tmp_path_factory.mktemp("redis"))
    command = [str(find_redis()), "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", directory]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)

    def answers() -> bool:
        try:
            with redis.Redis(port=port) as client:
                return bool(client.ping())
        except redis.ConnectionError:
            return False

    try:
        wait_until(answers, 10, "redis-server starts")
        yield f"redis://127.0.0.1:{port}/0"
    finally:
        process.terminate()
        process.wait(10)


@pytest.fixture
def world(spark: SparkSession, settings: Settings, redis_url: str, tmp_path: Path) -> Iterator[World]:
    own = dataclasses.replace(
        settings,
        redis_url=redis_url,
        redis_retry_s=1,
        tables_uri=str(tmp_path / "tables"),
        checkpoints_uri=str(tmp_path / "checkpoints"),
    )
    with redis.Redis.from_url(redis_url) as client:
        client.flushall()
        made = World(spark, own, client)
        made.create()
        yield made


def labelled(world: World, count: int, seed: int) -> Labels:
    """`count` payments with a fraud each, through the stream's own code as batch 0."""
    rnd = random.Random(seed)
    payments = [make_payment(n, rnd) for n in range(count)]
    number = world.put(payments, [make_label(t, True, "reported", DAY_MS) for t in payments])
    world.begin_checkpoint()
    stream = world.stream()
    stream.write(world.batch(number), 0)
    return stream


def test_frauds_by_hour_equal_a_recount_however_labels_arrive(world: World) -> None:
    rnd = random.Random(3)
    payments = [make_payment(n, rnd) for n in range(400)]
    labels = [label for n, t in enumerate(payments[::2]) for label in labels_of(t, n)]
    # In any order, so that many are reported before what is known already; and a third of the payments come after their labels, which
    # wait meanwhile, over a restart of the stream too.
    rnd.shuffle(labels)
    world.put(payments[:270], labels[:250])
    world.run_stream()
    missing = {t.transaction_id for t in payments[270:]}
    came = world.metrics.labels_unmatched._value.get()
    assert came == sum(label.transaction_id in missing for label in labels[:250]) > 0
    world.put(payments[270:], labels[250:])
    world.run_stream()

    rows = world.changes()
    asked = Counter((label.transaction_id, label.is_fraud, label.state, label.reported_at_ms) for label in labels)
    assert Counter((r["transaction_id"], r["is_fraud"], r["state"], r["reported_at_ms"]) for r in rows) == asked
    source = DeltaTable(world.uri(tables.LABELS)).to_pyarrow_table().to_pylist()
    assert {(r["partition"], r["offset"], r["kafka_timestamp"]) for r in rows} == {
        (r["partition"], r["offset"], r["kafka_timestamp"]) for r in source
    }
    assert all([r["place"] for r in rows if r["batch_id"] == n] == list(range(count)) for n, count in batches(rows).items())
    # What is known of a payment in the end is what stands of its labels, however they came.
    newest = {label.transaction_id: label.is_fraud for label in sorted(labels, key=precedence_of)}
    known: Counter[str] = Counter()
    for r in rows:
        known[r["transaction_id"]] += r["change"]
        assert known[r["transaction_id"]] in (0, 1)
    assert {i: bool(known[i]) for i in newest} == newest
    expected: dict[tuple[str, str], Counter[int]] = defaultdict(Counter)
    for t in payments:
        if newest.get(t.transaction_id):
            for e in LABELLED_ENTITIES:
                expected[e.name, getattr(t, e.field)][t.event_time_ms // HOUR_MS] += 1
    for name, (frauds, counted) in world.values().items():
        field = next(e.field for e in LABELLED_ENTITIES if e.name == name[0])
        changed = [r for r in rows if r["change"] and r[field] == name[1]]
        assert counted == len(changed)
        assert frauds == retained(expected[name], changed), name
    assert world.values().keys() == expected.keys()


def batches(rows: list[dict[str, Any]]) -> Counter[int]:
    return Counter(r["batch_id"] for r in rows)


@pytest.mark.slow
def test_a_label_before_its_payment_waits_for_it_also_over_a_restart_and_counts_once(world: World) -> None:
    rnd = random.Random(1)
    first, second, other = (make_payment(n, rnd) for n in range(3))
    world.begin_checkpoint()
    stream = world.stream()
    early = [make_label(t, True, "reported", DAY_MS) for t in (first, second)]
    stream.write(world.batch(world.put([other], early)), 0)
    assert world.changes() == []
    stream.write(world.batch(world.put([first], [make_label(other, True, "reported", DAY_MS)])), 1)
    assert {r["transaction_id"]: r["batch_id"] for r in world.changes()} == {"t0": 1, "t2": 1}
    assert world.metrics.labels_waiting._value.get() == 1
    restarted = world.stream()
    restarted.write(world.batch(world.put([second], [])), 2)
    restarted.write(world.batch(world.put([], [make_label(other, False, "reversed", 2 * DAY_MS)])), 3)
    assert [(r["transaction_id"], r["change"]) for r in world.changes() if r["batch_id"] > 1] == [("t1", 1), ("t2", -1)]
    assert world.metrics.labels_unmatched._value.get() == 2
    assert world.values() == world.recount()


@pytest.mark.slow
def test_a_replayed_batch_changes_nothing_and_a_value_that_expired_comes_back_with_its_whole_counter(world: World) -> None:
    stream = labelled(world, 6, seed=4)
    rows, values = world.changes(), {key: world.client.get(key) for key in world.client.keys("*")}
    assert values
    stream.write(world.batch(1), 0)
    world.stream().write(world.batch(1), 0)
    assert world.changes() == rows
    assert {key: world.client.get(key) for key in world.client.keys("*")} == values
    payment = world.payments[0]
    world.client.delete(layout.labels_key("merchant", payment.merchant_id))
    stream.write(world.batch(world.put([], [make_label(payment, False, "reversed", 2 * DAY_MS)])), 1)
    assert world.values() == world.recount()


def test_a_kill_between_table_and_redis_is_repaired_by_the_replay(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    labelled(world, 6, seed=5)
    rnd = random.Random(6)
    more = [make_payment(100 + n, rnd) for n in range(4)]
    number = world.put(more, [make_label(t, True, "reported", DAY_MS) for t in more])

    def killed(_self: Labels, _tags: list[str], _batch_id: int) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Labels, "_write_values", killed)
        world.stream().write(world.batch(number), 1)
    rows = world.changes()
    assert batches(rows) == {0: 6, 1: 4}
    assert world.values() == world.recount(batch_ids=1)
    world.stream().write(world.batch(number), 1)
    assert world.changes() == rows
    assert world.values() == world.recount()
    # What Redis lost of the batch alone comes back too, when the batch is replayed once more.
    merchant = rows[-1]["merchant_id"]
    world.client.delete(layout.labels_key("merchant", merchant))
    world.stream().write(world.batch(number), 1)
    assert world.values() == world.recount()


@pytest.mark.slow
def test_an_emptied_redis_is_filled_by_the_next_batch_and_also_while_nothing_comes(world: World) -> None:
    stream = labelled(world, 12, seed=7)
    expected, epoch = world.values(), stream.epoch
    world.client.flushall()
    stream.restore()
    assert world.values() == expected
    assert stream.epoch != epoch
    stream.restore()
    assert world.metrics.label_rebuilds._value.get() == 1
    world.client.flushall()
    late = world.payments[0]
    number = world.put([], [make_label(late, False, "reversed", 2 * DAY_MS)])
    restarted = world.stream()
    assert restarted.epoch == stream.epoch
    restarted.write(world.batch(number), 1)
    assert world.values() == world.recount()
    assert world.metrics.label_rebuilds._value.get() == 2


@pytest.mark.slow
def test_values_as_of_an_earlier_time_are_those_of_that_time(world: World) -> None:
    stream = labelled(world, 12, seed=9)
    expected = world.values()
    between = dt.datetime.now(dt.UTC)
    number = world.put([], [make_label(t, False, "reversed", 2 * DAY_MS) for t in world.payments[:6]])
    stream.write(world.batch(number), 1)
    assert world.values() != expected
    for through, until in ((1, between), (0, None)):
        world.client.flushall()
        assert rebuild_labels(world.spark, world.settings, 99, through, until) == len(expected)
        assert world.values() == expected


def test_a_lost_checkpoint_is_refused_while_the_table_has_rows(world: World) -> None:
    row = pa.Table.from_pylist([{"batch_id": 4}], pa.schema([("batch_id", pa.int64())]))
    write_deltalake(world.uri(tables.LABEL_CHANGES), row, mode="append", schema_mode="merge")
    with pytest.raises(CheckpointLostError):
        world.stream().writer()


def test_the_gateway_reads_the_rates_that_the_oracle_counts(world: World) -> None:
    rnd = random.Random(12)
    entities, oracle = Entities(world.client), Oracle()
    payments = [make_payment(n, rnd, FIRST_MS + n * 6 * HOUR_MS) for n in range(160)]
    for t in payments:
        assert differences(oracle.observe(t), entities.observe(t)) == []
        entities.tile([t])
    labels = [label for n, t in enumerate(payments[::3]) for label in labels_of(t, n)]
    rnd.shuffle(labels)
    world.put(payments, labels[:60])
    world.run_stream()
    world.put([], labels[60:])
    world.run_stream()
    by_id = {t.transaction_id: t for t in payments}
    for r in world.changes():
        if r["change"]:
            oracle.label(by_id[r["transaction_id"]], r["change"])
    rates = []
    for n in range(12):
        t = make_payment(1000 + n, rnd, payments[-1].event_time_ms + n * HOUR_MS)
        found = entities.look([t])
        row = [float(x) for x in found.matrix[0]]
        assert differences(oracle.observe(t), row) == []
        rates.append(row[FEATURE_NAMES.index("merchant_fraud_rate_30d")])
        counters = [sum(r["change"] != 0 for r in world.changes() if r[e.field] == getattr(t, e.field)) for e in LABELLED_ENTITIES]
        assert found.label_changes[0].tolist() == counters
    assert max(rates) > 0


def hours_batch(tag: str, *hours: tuple[int, int, int]) -> pa.RecordBatch:
    hour, frauds, changes = zip(*hours, strict=True)
    return pa.RecordBatch.from_pydict({"tag": [tag] * len(hours), "hour": hour, "frauds": frauds, "changes": changes})


def test_a_worker_writes_once_a_batch_and_loads_a_script_that_redis_lost(world: World) -> None:
    job = ValueJob(world.settings.redis, epoch=5, batch_id=3, retry_s=1)
    world.client.script_flush()
    first, second = hours_batch("merchant:m1", (460_000, 2, 2)), hours_batch("merchant:m1", (460_001, 1, 3))
    (out,) = write_partition(job)([first, second])
    assert out.to_pydict() == {"written": [1], "unchanged": [0]}
    assert world.value("merchant", "m1") == ({460_000: 2, 460_001: 1}, 5)
    for batch_id, epoch, written in ((3, 5, 0), (2, 5, 0), (4, 5, 1), (0, 6, 1)):
        (out,) = write_partition(dataclasses.replace(job, batch_id=batch_id, epoch=epoch))([first])
        assert out.to_pydict() == {"written": [written], "unchanged": [1 - written]}
    assert world.value("merchant", "m1") == ({460_000: 2}, 2)
    assert 0 < world.client.pttl(layout.labels_key("merchant", "m1")) <= layout.TILES_TTL_MS


def test_a_redis_that_stays_down_fails_the_worker_within_its_time() -> None:
    job = ValueJob("redis://127.0.0.1:1", 1, 1, retry_s=0)
    (out,) = write_partition(job)([])
    assert out.to_pydict() == {"written": [0], "unchanged": [0]}
    with pytest.raises(RedisUnavailableError):
        list(write_partition(job)([hours_batch("merchant:m1", (460_000, 1, 1))]))
