"""Training sets and backfills know at each moment what was known then, and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from deltalake import DeltaTable, write_deltalake
from msgspec import structs

from feature_jobs.backfill import OtherFeaturesError, backfill
from feature_jobs.matured import newly_matured
from feature_jobs.training_set import NoHistoryError, write_training_set
from gateway.contracts import tables
from gateway.contracts.features import FEATURE_NAMES, FINGERPRINT
from gateway.contracts.settings import Settings
from gateway.contracts.transaction import Transaction
from gateway.contracts.windows import DAY_MS
from tests.agreement.test_offline_engine_equals_a_recount import in_order, silver_of
from tests.entities import make_stream
from tests.oracle import Oracle, differences

LABELS = pa.schema([("transaction_id", pa.string()), ("is_fraud", pa.bool_()), ("reported_at_ms", pa.int64())])


@pytest.fixture
def local(tmp_path: Path) -> Settings:
    return Settings(home=str(tmp_path))


def uri(settings: Settings, name: str) -> str:
    return tables.table_uri(settings.tables, name)


def write(settings: Settings, stream: list[Transaction], labels: list[tuple[str, bool, int]] = []) -> None:  # noqa: B006
    write_deltalake(uri(settings, tables.SILVER), silver_of(stream), mode="overwrite")
    rows = [dict(zip(LABELS.names, label, strict=True)) for label in labels]
    write_deltalake(uri(settings, tables.LABELS), pa.Table.from_pylist(rows, LABELS), mode="overwrite")


def read(settings: Settings, name: str, version: int | None = None) -> dict[str, dict[str, Any]]:
    rows = DeltaTable(uri(settings, name), version=version).to_pyarrow_table().to_pylist()
    return {row["transaction_id"]: row for row in rows}


def stream_of(days: int) -> list[Transaction]:
    """Two payments a day of one card at one merchant."""
    [first] = make_stream(1, 1, 1, 0)
    return [
        structs.replace(first, transaction_id=f"t{i:03}", event_time_ms=first.event_time_ms + i * DAY_MS // 2)
        for i in range(2 * days)
    ]


def test_labels_are_those_known_at_the_given_date_with_their_corrections(local: Settings) -> None:
    stream = stream_of(30)
    t0 = stream[0].event_time_ms
    write(local, stream, [("t000", True, t0 + 5 * DAY_MS), ("t000", False, t0 + 12 * DAY_MS), ("t004", True, t0 + 11 * DAY_MS)])
    early = write_training_set(local, as_of_ms=t0 + 10 * DAY_MS)
    late = write_training_set(local, as_of_ms=t0 + 20 * DAY_MS)
    assert (early.frauds, late.frauds) == (1, 1)
    assert [i for i, row in read(local, tables.TRAINING_SET, early.version).items() if row["is_fraud"]] == ["t000"]
    assert [i for i, row in read(local, tables.TRAINING_SET, late.version).items() if row["is_fraud"]] == ["t004"]
    # Younger than the label delay at the as-of time: not in it.
    assert max(read(local, tables.TRAINING_SET, early.version)) == "t005"


def test_features_know_labels_only_from_the_time_they_were_reported(local: Settings) -> None:
    stream = stream_of(30)
    t0 = stream[0].event_time_ms
    write(local, stream, [("t000", True, t0 + 10 * DAY_MS)])
    write_training_set(local, as_of_ms=t0 + 40 * DAY_MS)
    rows = read(local, tables.TRAINING_SET)
    frauds = {i: row["merchant_frauds_30d"] for i, row in rows.items()}
    assert [frauds[f"t{i:03}"] for i in (16, 19, 20, 21)] == [0, 0, 1, 1]


def test_a_version_says_what_it_was_made_from_and_stays_as_it_was(local: Settings) -> None:
    write(local, stream_of(30))
    first = write_training_set(local)
    before = read(local, tables.TRAINING_SET, first.version)
    write(local, stream_of(40))
    second = write_training_set(local)
    assert second.rows > first.rows
    # As text, for unknown values are no number and equal nothing.
    assert str(read(local, tables.TRAINING_SET, first.version)) == str(before)
    note = DeltaTable(uri(local, tables.TRAINING_SET)).history(1)[0]
    assert note["userMetadata"] == f"fraudgate.feature_fingerprint={FINGERPRINT}"
    assert note[f"fraudgate.{tables.SILVER}_version"] == "1"
    assert (note["fraudgate.as_of_ms"], note["fraudgate.end_ms"]) == (str(second.as_of_ms), str(second.to_ms))


def test_each_row_has_the_country_of_its_payment_beside_the_features(local: Settings) -> None:
    stream = in_order(make_stream(7, 200, 1_800_000, 0))
    write(local, stream)
    write_training_set(local, label_delay_days=0)
    rows = read(local, tables.TRAINING_SET)
    assert {i: row["country"] for i, row in rows.items()} == {
        t.transaction_id: t.country for t in stream if t.transaction_id in rows
    }
    assert len({row["country"] for row in rows.values()}) == 3


def test_labels_have_newly_matured_that_the_last_training_set_did_not_know(local: Settings) -> None:
    stream = stream_of(30)
    t0 = stream[0].event_time_ms
    labels = [
        ("t000", True, t0 + 5 * DAY_MS),
        ("t004", True, t0 + 11 * DAY_MS),
        ("t020", False, t0 + 12 * DAY_MS),
        ("t020", True, t0 + 13 * DAY_MS),
        ("t050", True, t0 + 26 * DAY_MS),
        ("nobody", True, t0 + 6 * DAY_MS),
    ]
    write(local, stream, labels)
    now = newly_matured(local)
    newest = stream[-1].event_time_ms
    # t050 is too young; the payment of "nobody" is unknown; a corrected label counts once.
    assert (now.payments, now.as_of_ms, now.until_ms) == (3, newest, newest - 7 * DAY_MS)
    # A training set of payments before day 3 as of day 10 knew t000; t004's label came later, t020 is a later payment.
    assert newly_matured(local, since_as_of_ms=t0 + 10 * DAY_MS, since_until_ms=t0 + 3 * DAY_MS).payments == 2
    assert newly_matured(local, since_as_of_ms=now.as_of_ms, since_until_ms=now.until_ms).payments == 0


def test_nothing_matures_without_labels_and_without_payments_it_is_said(local: Settings) -> None:
    with pytest.raises(NoHistoryError, match="silver holds no transactions"):
        newly_matured(local)
    write_deltalake(uri(local, tables.SILVER), silver_of(stream_of(30)))
    assert newly_matured(local).payments == 0


def test_a_backfill_equals_what_the_gateway_would_have_seen(local: Settings) -> None:
    stream = in_order(make_stream(7, 200, 1_800_000, 0))
    write(local, stream)
    backfill(local)
    rows, oracle = read(local, tables.FEATURES), Oracle()
    for t in stream:
        found = [float(np.float32(rows[t.transaction_id][name])) for name in FEATURE_NAMES]
        assert differences(oracle.observe(t), found) == [], t.transaction_id


def test_a_backfill_of_a_period_replaces_that_period_alone(local: Settings) -> None:
    stream = in_order(make_stream(7, 120, 1_800_000, 0))
    write(local, stream)
    backfill(local)
    whole = read(local, tables.FEATURES)
    middle, end = stream[40].event_time_ms, stream[80].event_time_ms
    DeltaTable(uri(local, tables.FEATURES)).delete(f"event_time_ms >= {middle} and event_time_ms < {end}")
    assert len(read(local, tables.FEATURES)) < len(whole)
    part = backfill(local, from_ms=middle, to_ms=end)
    assert part.rows == sum(middle <= t.event_time_ms < end for t in stream)
    again = read(local, tables.FEATURES)
    assert again.keys() == whole.keys()
    for i, row in whole.items():
        np.testing.assert_array_equal([again[i][name] for name in FEATURE_NAMES], [row[name] for name in FEATURE_NAMES])


def test_a_backfill_with_nothing_to_compute_says_so(local: Settings) -> None:
    with pytest.raises(NoHistoryError, match="silver holds no transactions"):
        backfill(local)
    write(local, stream_of(2))
    with pytest.raises(NoHistoryError, match="of this period"):
        backfill(local, from_ms=0, to_ms=1)


def test_features_of_another_definition_are_not_mixed_in(local: Settings) -> None:
    write(local, stream_of(2))
    write_deltalake(uri(local, tables.FEATURES), silver_of(stream_of(1)))
    with pytest.raises(OtherFeaturesError, match="move the table away"):
        backfill(local)
