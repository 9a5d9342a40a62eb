"""What labels change of what is known about their payments, without Spark."""

from __future__ import annotations

import datetime as dt
from typing import Any

import pyarrow as pa

from feature_jobs.label_changes import KNOWN_COLUMNS, LABEL_SCHEMA, PAYMENT_COLUMNS, changes_of, places, tags_of

KAFKA_TIME = dt.datetime(2026, 1, 1, tzinfo=dt.UTC)


SAID = {"source": "analyst", "state": "confirmed", "effective_at_ms": None}


def labels(*rows: tuple[str, bool, int, int]) -> pa.Table:
    """(transaction_id, is_fraud, reported_at_ms, offset) each."""
    fixed = SAID | {"partition": 0, "kafka_timestamp": KAFKA_TIME}
    names = ("transaction_id", "is_fraud", "reported_at_ms", "offset")
    return pa.Table.from_pylist([dict(zip(names, row, strict=True)) | fixed for row in rows], LABEL_SCHEMA)


def payments(*ids: str, **changes: Any) -> pa.Table:
    own = {"event_time_ms": 5, "customer_id": "u", "merchant_id": "m", "batch_id": 1, "partition": 0, "offset": 0} | changes
    assert own.keys() | {"transaction_id"} == set(PAYMENT_COLUMNS)
    schema = pa.schema(
        [(name, pa.string() if name.endswith("_id") and name != "batch_id" else pa.int64()) for name in PAYMENT_COLUMNS]
    )
    return pa.Table.from_pylist([{"transaction_id": i} | own for i in ids], schema)


def known(*rows: tuple[str, bool, int, int, int]) -> pa.Table:
    """(transaction_id, is_fraud, reported_at_ms, change, offset) each."""
    names = ("transaction_id", "is_fraud", "reported_at_ms", "change", "offset")
    if not rows:
        return pa.table({name: pa.array([], pa.null()) for name in KNOWN_COLUMNS})
    return pa.Table.from_pylist([dict(zip(names, row, strict=True)) | SAID | {"partition": 0} for row in rows])


def found(rows: pa.Table) -> list[tuple[str, int]]:
    return list(zip(rows["transaction_id"].to_pylist(), rows["change"].to_pylist(), strict=True))


def test_labels_apply_in_the_order_of_their_reports_and_count_what_they_change() -> None:
    asked = labels(("a", False, 30, 0), ("a", True, 10, 1), ("b", True, 20, 2), ("a", True, 20, 3), ("c", False, 5, 4))
    rows, unmatched = changes_of(asked, payments("a", "b", "c"), known())
    assert found(rows) == [("c", 0), ("a", 1), ("b", 1), ("a", 0), ("a", -1)]
    assert rows["place"].to_pylist() == [0, 1, 2, 3, 4]
    assert rows["merchant_id"].to_pylist() == ["m"] * 5
    assert unmatched.num_rows == 0


def test_of_two_that_contradict_each_other_in_nothing_but_the_verdict_fraud_stands_whichever_came_first() -> None:
    rows, _ = changes_of(labels(("a", False, 10, 1), ("a", True, 10, 0)), payments("a"), known())
    assert found(rows) == [("a", 1), ("a", 0)]
    rows, _ = changes_of(labels(("a", False, 10, 0), ("a", True, 10, 1)), payments("a"), known())
    assert found(rows) == [("a", 0), ("a", 1)]


def test_what_was_reported_before_the_newest_known_changes_nothing_and_hides_nothing() -> None:
    asked = labels(("a", True, 10, 5), ("a", True, 20, 6), ("a", True, 25, 7))
    rows, _ = changes_of(asked, payments("a"), known(("a", True, 5, 1, 1), ("a", False, 21, -1, 2)))
    assert found(rows) == [("a", 0), ("a", 0), ("a", 1)]


def test_changes_that_an_older_order_made_are_mended_by_the_next_label() -> None:
    # Counted as genuine, though the confirmed fraud is the newest that is known.
    before = known(("a", False, 20, 0, 3), ("a", True, 30, 0, 4))
    rows, _ = changes_of(labels(("a", False, 10, 7)), payments("a"), before)
    assert found(rows) == [("a", 1)]


def test_a_label_that_was_applied_or_stands_there_twice_counts_once() -> None:
    rows, unmatched = changes_of(
        labels(("a", True, 10, 1), ("b", True, 10, 2), ("b", True, 10, 2)), payments("a", "b"), known(("a", True, 10, 1, 1))
    )
    assert found(rows) == [("b", 1)]
    assert unmatched.num_rows == 0


def test_labels_without_a_payment_are_handed_back() -> None:
    rows, unmatched = changes_of(labels(("a", True, 10, 1), ("b", True, 10, 2)), payments("b"), known())
    assert found(rows) == [("b", 1)]
    assert places(unmatched) == {(0, 1)}
    assert unmatched.schema == LABEL_SCHEMA


def test_no_label_changes_nothing() -> None:
    nothing = pa.table({name: pa.array([], pa.null()) for name in PAYMENT_COLUMNS})
    rows, unmatched = changes_of(labels(), nothing, known())
    assert rows.num_rows == unmatched.num_rows == 0
    assert tags_of(rows) == []


def test_of_a_repeated_payment_the_first_counts() -> None:
    twice = pa.concat_tables([payments("a", batch_id=9, merchant_id="late"), payments("a", batch_id=2, merchant_id="first")])
    rows, _ = changes_of(labels(("a", True, 10, 1)), twice, known())
    assert rows["merchant_id"].to_pylist() == ["first"]


def test_entities_of_changes_are_named_once_each() -> None:
    rows, _ = changes_of(labels(("a", True, 10, 1), ("b", True, 10, 2), ("c", False, 10, 3)), payments("a", "b"), known())
    assert tags_of(rows) == ["customer:u", "merchant:m"]
    unchanged, _ = changes_of(labels(("a", False, 10, 1)), payments("a"), known())
    assert tags_of(unchanged) == []
