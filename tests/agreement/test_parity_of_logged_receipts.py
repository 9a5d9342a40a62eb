"""The parity check over receipts that the gateway's store really gave, and over receipts that were spoilt afterwards."""

from __future__ import annotations

import json
import random
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import redis
from deltalake import write_deltalake
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec import structs

from feature_jobs.parity import NoReceiptsError, Report, check_parity
from gateway.contracts import layout, tables
from gateway.contracts.features import ENTITIES, FEATURE_NAMES, FEATURES, FINGERPRINT
from gateway.contracts.settings import Settings
from gateway.contracts.topics import SCORED_NEVER
from gateway.contracts.transaction import FIELDS, Transaction
from tests.entities import WALL_MS, Entities, make_stream, redis_server
from tests.helpers import local_settings, run_command, running_command

pytestmark = pytest.mark.integration

TEXT = {f: pa.string() for f in FIELDS}
SILVER = pa.schema(
    [
        *(
            TEXT | {"event_time_ms": pa.int64(), "amount_minor": pa.int64(), "latitude": pa.float64(), "longitude": pa.float64()}
        ).items(),
        ("scored_by", pa.string()),
        ("kafka_timestamp", pa.timestamp("us", "UTC")),
    ]
)
RECEIPT = pa.schema(
    [
        ("transaction_id", pa.string()),
        ("feature_fingerprint", pa.string()),
        ("features", pa.list_(pa.float32())),
        ("observed_seq", pa.list_(pa.int64())),
        ("label_changes", pa.list_(pa.int64())),
        ("degraded", pa.list_(pa.string())),
        ("received_at_ms", pa.int64()),
    ]
)
CARD_HEAD = next(e.head_events_max for e in ENTITIES if e.name == "card")
CHANGE = pa.schema([("transaction_id", pa.string()), ("change", pa.int32()), ("batch_id", pa.int64()), ("place", pa.int64())])


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[redis.Redis]:
    with redis_server(tmp_path_factory.mktemp("redis")) as client:
        yield client


@dataclass
class Log:
    """What streaming leaves in the tables, written down while the gateway's store is driven."""

    entities: Entities
    silver: list[dict[str, Any]] = field(default_factory=list)
    receipts: list[dict[str, Any]] = field(default_factory=list)
    changes: list[dict[str, Any]] = field(default_factory=list)

    def arrive(self, t: Transaction, scored_by: str | None = None, minutes: int = 0) -> None:
        self.silver.append(structs.asdict(t) | {"scored_by": scored_by, "kafka_timestamp": (WALL_MS + minutes * 60_000) * 1000})

    def score(self, t: Transaction, minutes: int = 0) -> None:
        found = self.entities.look([t])
        if found.settled[0] is not None:
            return
        self.receipts.append(
            {
                "transaction_id": t.transaction_id,
                "feature_fingerprint": FINGERPRINT,
                "features": found.matrix[0].tolist(),
                "observed_seq": found.seq[0].tolist(),
                "label_changes": found.label_changes[0].tolist(),
                "degraded": ["stale_features"] if found.stale[0] else [],
                "received_at_ms": WALL_MS + minutes * 60_000,
            }
        )

    def label(self, t: Transaction, change: int) -> None:
        self.entities.label(t, change)
        self.changes.append({"transaction_id": t.transaction_id, "change": change, "batch_id": len(self.changes), "place": 0})

    def check(self, home: Path, **options: Any) -> Report:
        return check_parity(self.write(home), **options)

    def write(self, home: Path) -> Settings:
        """The tables, in a home of their own."""
        made = local_settings(home)
        for name, rows, schema in (
            (tables.SILVER, self.silver, SILVER),
            (tables.DECISIONS, self.receipts, RECEIPT),
            (tables.LABEL_CHANGES, self.changes, CHANGE),
        ):
            write_deltalake(tables.table_uri(made.tables, name), pa.Table.from_pylist(rows, schema), mode="overwrite")
        return made


def drive(log: Log, stream: list[Transaction], seed: int, tile_chance: float) -> None:
    """Score a stream with retries, labels and tiles at any time, as streaming would."""
    rng = random.Random(seed)
    pending: list[Transaction] = []
    labelled: set[str] = set()
    for n, t in enumerate(stream):
        log.arrive(t)
        log.score(t)
        pending.append(t)
        if rng.random() < 0.1:
            log.score(stream[rng.randrange(n + 1)])
        if rng.random() < 0.15:
            about = stream[rng.randrange(n + 1)]
            log.label(about, -1 if about.transaction_id in labelled else 1)
            labelled ^= {about.transaction_id}
        if len(pending) == min(e.head_events_max for e in ENTITIES) or rng.random() < tile_chance:
            log.entities.tile(pending)
            pending.clear()


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 2**32),
    step_ms=st.sampled_from([1, 1_000, 60_000, 1_800_000, 20_000_000]),
    disorder_ms=st.sampled_from([0, 30_000, 240_000, 3_000_000]),
    tile_chance=st.sampled_from([0.0, 0.1, 0.5]),
)
def test_every_receipt_is_recomputed_to_the_bit(
    server: redis.Redis, tmp_path: Path, seed: int, step_ms: int, disorder_ms: int, tile_chance: float
) -> None:
    log = Log(Entities(server, hours_a_batch=0))
    stream = make_stream(seed, 150, step_ms, disorder_ms)
    drive(log, stream, seed, tile_chance)
    report = log.check(tmp_path)
    assert report.examples == []
    assert report.different_values == 0
    assert report.rows + report.stale_rows == len(stream)
    assert report.stale_rows == 0
    assert report.unverifiable_rows == report.missing_rows == 0
    if disorder_ms == 0:
        assert report.late_rows == 0


def make_log(server: redis.Redis, events: int = 120, disorder_ms: int = 0) -> Log:
    log = Log(Entities(server, hours_a_batch=0))
    drive(log, make_stream(4, events, 600_000, disorder_ms), 4, 0.1)
    return log


def shifted(row: dict[str, Any]) -> None:
    row["features"][FEATURE_NAMES.index("card_count_24h")] += 1


def swapped(row: dict[str, Any]) -> None:
    row["features"][FEATURE_NAMES.index("card_count_24h")] = float("nan")


@pytest.mark.parametrize("spoil", [shifted, swapped])
def test_one_spoilt_value_is_found_and_named(server: redis.Redis, tmp_path: Path, spoil: Callable[[dict[str, Any]], None]) -> None:
    log = make_log(server)
    spoil(log.receipts[70])
    report = log.check(tmp_path)
    assert report.different_values == report.different["card_count_24h"] == 1
    assert [(d.transaction_id, d.feature) for d in report.examples] == [(log.receipts[70]["transaction_id"], "card_count_24h")]


def test_a_payment_that_was_counted_twice_is_found(server: redis.Redis, tmp_path: Path) -> None:
    log = Log(Entities(server, hours_a_batch=0))
    stream = make_stream(4, 60, 600_000, 0)
    for t in stream[:40]:
        log.arrive(t)
        log.score(t)
    log.entities.tile(stream[:40])
    # The mutation: a batch is added a second time under another id.
    log.entities.tile(stream[20:40])
    for t in stream[40:]:
        log.arrive(t)
        log.score(t)
    assert log.check(tmp_path).different_values > 0


def test_a_late_payment_that_its_tile_lacks_is_found(server: redis.Redis, tmp_path: Path) -> None:
    log = Log(Entities(server, hours_a_batch=0))
    stream = make_stream(4, 60, 600_000, 0)
    late = structs.replace(stream[10], transaction_id="late", event_time_ms=stream[10].event_time_ms - 900_000)
    for t in [*stream[:40], late]:
        log.arrive(t)
        log.score(t)
    log.entities.tile(stream[:40])
    # The mutation: it is marked as tiled and stands in no tile.
    for entity in ENTITIES:
        entity_id = getattr(late, entity.field)
        if entity_id is not None:
            key = layout.head_key(entity.name, entity_id)
            head = server.get(key)
            assert isinstance(head, bytes)
            server.setrange(key, len(head) - 44 + 26, b"\1")
    for t in stream[40:]:
        log.arrive(t)
        log.score(t)
    assert log.check(tmp_path).different_values > 0


def test_late_payments_are_counted_as_late_and_recomputed_as_observed(server: redis.Redis, tmp_path: Path) -> None:
    report = make_log(server, disorder_ms=3_000_000).check(tmp_path)
    assert report.late_rows > 0
    assert report.recounted > 0
    assert report.different_values == 0


def test_receipts_without_features_are_missing_and_stale_ones_are_not_compared(server: redis.Redis, tmp_path: Path) -> None:
    log = make_log(server)
    log.receipts[-1]["observed_seq"] = [-1] * len(ENTITIES)
    log.receipts[-2]["degraded"] = ["stale_features"]
    shifted(log.receipts[-2])
    report = log.check(tmp_path)
    assert (report.missing_rows, report.stale_rows, report.different_values) == (1, 1, 0)
    assert report.to_json()["missing"] == len(FEATURES)


def test_what_rests_on_a_receipt_that_was_lost_is_unverifiable_and_not_different(server: redis.Redis, tmp_path: Path) -> None:
    log = make_log(server)
    del log.receipts[30]
    report = log.check(tmp_path)
    assert report.unverifiable_rows > 0
    assert report.different_values == 0


def test_a_payment_that_was_observed_after_its_decision_has_the_place_that_is_missing(server: redis.Redis, tmp_path: Path) -> None:
    log = make_log(server)
    for n, row in enumerate(log.receipts):
        row["received_at_ms"] += 10_000 * n
    log.receipts[30]["observed_seq"] = [-1] * len(ENTITIES)
    report = log.check(tmp_path)
    assert (report.missing_rows, report.unverifiable_rows, report.different_values) == (1, 0, 0)
    # The second one of the same card was received before some that have no place for it: those can't be told.
    again = next(i for i, t in enumerate(log.silver) if i > 35 and t["card_id"] == log.silver[30]["card_id"])
    late = log.receipts[again]
    late["observed_seq"], late["received_at_ms"] = [-1] * len(ENTITIES), log.receipts[33]["received_at_ms"]
    report = log.check(tmp_path)
    assert report.missing_rows == 2
    assert report.unverifiable_rows > 0
    assert report.different_values == 0


def same_shopper(count: int, step_ms: int) -> list[Transaction]:
    """Payments of one card, a step apart and of different amounts."""
    first = make_stream(3, 1, step_ms, 0)[0]
    times = [first.event_time_ms + n * step_ms for n in range(count)]
    return [
        structs.replace(first, transaction_id=f"p{n}", event_time_ms=t, amount_minor=1_000 + n * n) for n, t in enumerate(times)
    ]


def test_a_payment_with_a_time_ahead_leaves_the_head_before_its_time(server: redis.Redis, tmp_path: Path) -> None:
    log = Log(Entities(server))
    stream = same_shopper(CARD_HEAD + 8, 8_000)
    # Observed first, and a time at which the card will have been observed 37 times more.
    stream[0] = structs.replace(stream[0], event_time_ms=stream[0].event_time_ms + 300_000)
    for t in stream:
        log.arrive(t)
        log.score(t)
    report = log.check(tmp_path)
    assert (report.stale_rows, report.unverifiable_rows, report.different_values) == (0, 0, 0)
    assert report.recounted > 0


def test_a_busy_card_in_order_needs_no_recount(server: redis.Redis, tmp_path: Path) -> None:
    log = Log(Entities(server))
    for t in same_shopper(CARD_HEAD + 14, 1_000):
        log.arrive(t)
        log.score(t)
    report = log.check(tmp_path)
    assert (report.stale_rows, report.different_values, report.recounted) == (0, 0, 0)


def observed_crosswise(server: redis.Redis, count: int, first: int, second: int) -> Log:
    """A card's payments p0, p1 ... of which two were decided without Redis and observed each in the other's place, by two workers.

    So close that only the head counts them; each is received 10 s after the one before.
    """
    log = Log(Entities(server))
    stream = same_shopper(count, 1_000)
    for n, t in enumerate(stream):
        log.arrive(t)
        log.score(stream[{first: second, second: first}.get(n, n)])
    for row in log.receipts:
        came = number_of(row)
        row["received_at_ms"] += 10_000 * came
        if came in (first, second):
            row["observed_seq"] = [-1] * len(ENTITIES)
    return log


def number_of(receipt: dict[str, Any]) -> int:
    return int(receipt["transaction_id"].removeprefix("p"))


def test_of_two_observed_afterwards_nobody_can_tell_which_one_the_head_still_counts(server: redis.Redis, tmp_path: Path) -> None:
    report = observed_crosswise(server, CARD_HEAD + 14, 10, 11).check(tmp_path)
    assert (report.missing_rows, report.different_values) == (2, 0)
    # The one whose head reaches back to the second of the two.
    assert report.unverifiable_rows == 1


def test_nor_when_others_were_observed_between_the_two(server: redis.Redis, tmp_path: Path) -> None:
    log = observed_crosswise(server, CARD_HEAD + 20, 10, 13)
    [second] = [row for row in log.receipts if number_of(row) == 13]
    received_ms = second["received_at_ms"]
    # Both were waiting when Redis answered again.
    for row in log.receipts:
        if number_of(row) in (11, 12, 13):
            row["received_at_ms"] = received_ms - 30_000
    report = log.check(tmp_path)
    assert (report.missing_rows, report.different_values) == (2, 0)
    # Two between them, and the three whose head reaches back to what lies behind the first and not behind the second.
    assert report.unverifiable_rows == 5
    # Received only after the first had been observed, the second can't have its place.
    second["received_at_ms"] = received_ms
    assert log.check(tmp_path).unverifiable_rows == 0


def test_history_that_nobody_observed_counts_from_tiles_alone(server: redis.Redis, tmp_path: Path) -> None:
    log = Log(Entities(server, hours_a_batch=0))
    stream = make_stream(12, 100, 600_000, 0)
    for t in stream[:60]:
        log.arrive(t, scored_by=SCORED_NEVER.decode())
    log.entities.tile(stream[:60], from_kafka=False)
    for t in stream[60:]:
        log.arrive(t, minutes=60)
        log.score(t, minutes=60)
    report = log.check(tmp_path)
    assert (report.rows, report.different_values) == (40, 0)


def test_a_sample_compares_so_many_and_a_period_only_its_own(server: redis.Redis, tmp_path: Path) -> None:
    log = make_log(server)
    assert log.check(tmp_path, sample=10).rows == 10
    times = sorted(row["event_time_ms"] for row in log.silver)
    half = log.check(tmp_path, from_ms=times[60])
    assert half.different_values == 0
    assert half.rows == sum(ms >= times[60] for ms in times)
    with pytest.raises(NoReceiptsError):
        log.check(tmp_path, from_ms=times[-1] + 1)


def metrics_of(settings: Settings) -> dict[str, float]:
    """The live check's metrics by name and labels; nothing while it doesn't answer."""
    try:
        with urllib.request.urlopen(f"http://{settings.host}:{settings.parity_port}/metrics", timeout=5) as reply:
            lines = reply.read().decode().splitlines()
    except OSError:
        return {}
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines if not line.startswith("#"))}


def test_the_live_check_counts_samples_as_metrics_and_leaves_on_sigterm(server: redis.Redis, tmp_path: Path) -> None:
    log = make_log(server)
    shifted(log.receipts[70])
    local = log.write(tmp_path)
    command = ("parity", "--live", "--every", "1", "--sample", "100000")
    with running_command(local, *command, log_path=tmp_path / "parity.log") as running:
        checked = "fraudgate_parity_compared_total"
        rows = len(log.receipts) * len(FEATURES)
        running.wait_until(lambda: metrics_of(local).get(checked, 0) >= 2 * rows, 60, "two samples were compared")
        found = metrics_of(local)
        samples = found[checked] / rows
        assert found['fraudgate_parity_different_total{feature="card_count_24h"}'] == samples
        assert found["fraudgate_parity_checked_timestamp_seconds"] > 0
        assert running.stop()


def test_the_command_says_what_differs_and_ends_with_status_1(server: redis.Redis, tmp_path: Path) -> None:
    log = make_log(server)
    whole = run_command(log.write(tmp_path / "whole"), "parity")
    assert whole.returncode == 0, whole.stderr
    assert "card_count_24h" in whole.stdout
    shifted(log.receipts[70])
    spoilt = run_command(log.write(tmp_path / "spoilt"), "parity", "--json")
    report = json.loads(spoilt.stdout)
    assert spoilt.returncode == 1
    assert (report["different"], report["missing"]) == (1, 0)
    assert report["compared"] == len(log.receipts) * len(FEATURES)
    nothing = run_command(local_settings(tmp_path / "nothing"), "parity")
    assert nothing.returncode == 1
    assert "there are no receipts" in nothing.stderr
