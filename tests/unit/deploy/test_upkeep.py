"""Maintenance on small Delta tables: what it may delete, what must stay readable, and that the audit still verifies."""

from __future__ import annotations

import os
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
from deltalake import DeltaTable, WriterProperties
from deltalake.exceptions import CommitFailedError

from deploy.history import upkeep
from deploy.history.alone import UpkeepRunningError, alone
from deploy.history.audit import audit
from deploy.history.maintain import NICENESS, maintain
from deploy.history.verify import verify
from gateway.contracts import tables
from gateway.contracts.settings import Settings, load_settings
from tests.factories_history import decision_rows, keep_schema, make_receipts, read_rows, write_decisions, write_rows
from tests.unit.gateway.factories import NOW_MS

ROWS = 20
NOW = datetime.fromtimestamp(NOW_MS / 1000, UTC)


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    monkeypatch.setenv("FRAUDGATE_HOME", str(tmp_path))
    monkeypatch.setenv("FRAUDGATE_REGISTRY_URL", "http://127.0.0.1:9")
    return load_settings()


@pytest.fixture
def niceness(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """What the command asked for. It can't be taken back without privileges: here it would stay with all tests that follow."""
    asked: list[int] = []
    monkeypatch.setattr(os, "nice", asked.append)
    return asked


def days_behind(settings: Settings, seconds: float) -> datetime:
    """The time at which the row of that second has just had its time."""
    return NOW + timedelta(days=settings.decisions_keep_days, seconds=seconds)


def test_receipts_past_their_time_go_and_the_rest_verifies_from_its_anchor(
    settings: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    write_decisions(settings, make_receipts(ROWS))
    assert upkeep.forget_receipts(settings, days_behind(settings, 0)) is None
    done = upkeep.forget_receipts(settings, days_behind(settings, 6.5))
    assert done is not None
    assert done.what.startswith("7 receipts")
    assert sorted(row["transaction_id"] for row in read_rows(settings, tables.DECISIONS)) == sorted(f"t{i}" for i in range(7, ROWS))
    verdict = verify(settings)
    assert (verdict.broken, verdict.chained, verdict.anchored) == (0, ROWS - 7, 7)
    # Once more, and the anchors go on.
    upkeep.forget_receipts(settings, days_behind(settings, 9.5))
    assert (verify(settings).broken, verify(settings).anchored) == (0, 10)
    assert audit([]) == 0
    assert "10 deleted when their time was over" in capsys.readouterr().out


def test_the_newest_receipt_of_each_partition_stays_however_old(settings: Settings) -> None:
    write_decisions(settings, make_receipts(ROWS))
    upkeep.forget_receipts(settings, days_behind(settings, 10_000))
    assert sorted(row["transaction_id"] for row in read_rows(settings, tables.DECISIONS)) == ["t18", "t19"]
    assert (verify(settings).broken, verify(settings).unbounded) == (0, [])


def test_a_deletion_that_was_interrupted_behind_its_anchor_is_no_break(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    write_decisions(settings, make_receipts(ROWS))

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(upkeep, "delete", killed)
        with pytest.raises(KeyboardInterrupt):
            upkeep.forget_receipts(settings, days_behind(settings, 6.5))
    assert (verify(settings).broken, verify(settings).chained) == (0, ROWS)
    upkeep.forget_receipts(settings, days_behind(settings, 6.5))
    assert (verify(settings).broken, verify(settings).chained) == (0, ROWS - 7)


def test_rows_deleted_without_an_anchor_are_a_break(settings: Settings) -> None:
    write_decisions(settings, make_receipts(ROWS))
    upkeep.delete(settings, tables.DECISIONS, '"offset" < 2', ds.field("offset") < 2)
    assert [(b.partition, b.offset) for b in verify(settings).breaks] == [(0, 2), (1, 2)]


def test_small_files_become_one_sorted_by_transaction_and_a_look_up_reads_one_group(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upkeep, "WRITER", WriterProperties(max_row_group_size=25, compression="ZSTD"))
    keep_schema(settings)
    rows = decision_rows(make_receipts(100))
    for first in range(0, 100, 5):
        write_rows(settings, tables.DECISIONS, rows[first : first + 5])
    done = upkeep.order_receipts(settings)
    assert done is not None
    assert done.what == "sorted by transaction_id: 20 files became 1"
    [uri] = DeltaTable(tables.table_uri(settings.tables, tables.DECISIONS)).file_uris()
    file = pq.ParquetFile(uri)
    place = file.schema_arrow.names.index("transaction_id")
    bounds = [file.metadata.row_group(i).column(0).statistics for i in range(file.metadata.num_row_groups)]
    assert file.metadata.row_group(0).column(place).path_in_schema == "transaction_id"
    assert len(bounds) == 4
    assert all(a.max < b.min for a, b in zip(bounds, bounds[1:], strict=False))
    assert verify(settings).broken == 0
    # Nothing new, nothing to do.
    assert upkeep.order_receipts(settings) is None


def test_every_version_of_the_promised_time_stays_readable(settings: Settings) -> None:
    write_decisions(settings, make_receipts(ROWS))
    upkeep.delete(settings, tables.DECISIONS, "transaction_id = 't3'", ds.field("transaction_id") == "t3")
    upkeep.vacuum(settings, tables.DECISIONS)
    table = DeltaTable(tables.table_uri(settings.tables, tables.DECISIONS))
    table.load_as_version(0)
    assert table.to_pyarrow_table().num_rows == ROWS
    # When its time is over it isn't.
    done = upkeep.vacuum(settings, tables.DECISIONS, hours=0)
    assert done is not None
    with pytest.raises(OSError, match="No such file"):
        table.to_pyarrow_table()


def test_a_change_that_others_replaced_is_made_again_and_given_up_after_some_tries(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upkeep, "RETRY_S", 0)
    write_decisions(settings, make_receipts(2))
    tries = []

    def change(_: DeltaTable) -> int:
        tries.append(1)
        if len(tries) == 1:
            raise CommitFailedError("a concurrent transaction")
        return len(tries)

    # The second commit was overwritten, the third stands.
    assert upkeep.committed(settings, tables.DECISIONS, change, lambda _: len(tries) == 3) == 3
    with pytest.raises(upkeep.UpkeepError, match="decisions: "):
        upkeep.committed(settings, tables.DECISIONS, change, lambda _: False)
    assert len(tries) == 3 + upkeep.ATTEMPTS_MAX


def test_raw_records_past_their_time_go(settings: Settings) -> None:
    record = {"topic": "labels", "partition": 0, "value": b"x", "batch_id": 0}
    rows = [record | {"offset": i, "kafka_timestamp": NOW - timedelta(days=i)} for i in range(4)]
    write_rows(settings, tables.BRONZE, rows)
    done = upkeep.forget_raw(settings, tables.BRONZE, NOW + timedelta(days=settings.bronze_keep_days - 1, seconds=-1))
    assert done is not None
    assert sorted(row["offset"] for row in read_rows(settings, tables.BRONZE)) == [0, 1]


def test_sums_of_an_hour_that_is_over_become_one_row_an_entity(settings: Settings) -> None:
    over, going_on = NOW.replace(minute=0, second=0, microsecond=0) - timedelta(hours=3), NOW - timedelta(minutes=30)

    def part(hour: datetime, card: str, amount: int, largest: int | None, declined: int = 0) -> dict[str, object]:
        return {
            "entity": "card",
            "entity_id": card,
            "hour": hour,
            "transactions": int(largest is not None),
            "amount_minor": amount,
            "declined": declined,
            "largest_minor": largest,
            "updated_at": hour + timedelta(minutes=amount),
        }

    # A decision without its transaction, which came with the batch before, has no amount.
    for rows in (
        [part(over, "a", 7, 7), part(over, "b", 1, 1), part(going_on, "a", 2, 2)],
        [part(over, "a", 5, 5), part(going_on, "a", 3, 3)],
        [part(over, "a", 0, None, declined=1)],
    ):
        write_rows(settings, tables.GOLD_ENTITY_HOUR, rows)
    assert upkeep.hours_in_parts(settings, NOW) == [over]
    done = upkeep.put_together(settings, over)
    assert done.what.startswith("4 rows of ") and done.what.endswith("became 2")
    rows = read_rows(settings, tables.GOLD_ENTITY_HOUR)
    assert len(rows) == 4
    [card] = [row for row in rows if row["hour"] == over and row["entity_id"] == "a"]
    expected = {"transactions": 2, "amount_minor": 12, "declined": 1, "largest_minor": 7, "updated_at": over + timedelta(minutes=7)}
    assert {name: card[name] for name in expected} == expected
    assert upkeep.hours_in_parts(settings, NOW) == []


def test_a_round_of_all_tables_says_what_it_did(
    settings: Settings, niceness: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    for i in range(upkeep.SMALL_FILES_MIN):
        write_rows(settings, tables.LABELS, [{"transaction_id": f"t{i}", "batch_id": i}])
    assert maintain(["--once"]) == 0
    assert f"{tables.LABELS}             {upkeep.SMALL_FILES_MIN} files became 1" in capsys.readouterr().out
    assert maintain(["--once"]) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert niceness == [NICENESS, NICENESS]


@pytest.mark.usefixtures("niceness")
def test_two_rounds_at_a_time_are_refused(settings: Settings, capsys: pytest.CaptureFixture[str]) -> None:
    with alone(settings.home_path):
        with pytest.raises(UpkeepRunningError), alone(settings.home_path):
            pass
        assert maintain(["--once"]) == 1
    assert "another fraudgate maintain or erase" in capsys.readouterr().err
