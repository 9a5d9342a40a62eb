"""The packed frauds of an entity: which days stay, and that they follow from the sums alone."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from feature_jobs.label_values import Days, read_days, values_of
from gateway.contracts import layout
from gateway.contracts.features import ENTITY_INDEX
from gateway.contracts.windows import DAY_MS, LABELLED_RETENTION_MS

TODAY = 20_000
KEPT_DAYS = LABELLED_RETENTION_MS // DAY_MS


def batch(*rows: tuple[str, int, int, int]) -> pa.RecordBatch:
    """(tag, day, frauds, changes) each."""
    tag, day, frauds, changes = zip(*rows, strict=True)
    return pa.RecordBatch.from_pydict({"tag": tag, "day": day, "frauds": frauds, "changes": changes})


def unpacked(value: bytes, tag: str) -> tuple[list[tuple[int, int]], int]:
    entity, entity_id = tag.split(":", 1)
    days = layout.fraud_days(value, ENTITY_INDEX[entity], layout.key_check(entity, entity_id))
    return [(int(r["day"]), int(r["frauds"])) for r in days], layout.LABELS_HEADER.unpack_from(value)[6]


def test_days_of_an_entity_are_in_order_and_its_changes_are_added_up() -> None:
    days = read_days([batch(("merchant:b", TODAY, 1, 1), ("merchant:a", TODAY, 2, 4)), batch(("merchant:b", TODAY - 3, 5, 7))])
    values = dict(zip(days.tags, values_of(days, epoch=3, batch_id=9), strict=True))
    assert unpacked(values["merchant:a"], "merchant:a") == ([(TODAY, 2)], 4)
    assert unpacked(values["merchant:b"], "merchant:b") == ([(TODAY - 3, 5), (TODAY, 1)], 8)
    assert layout.LABELS_HEADER.unpack_from(values["merchant:a"])[4:6] == (9, 3)


def test_days_without_frauds_and_days_past_the_retention_are_left_out_and_still_counted_as_changes() -> None:
    tag = "customer:u:1"
    rows = ((tag, TODAY - KEPT_DAYS - 1, 4, 4), (tag, TODAY - KEPT_DAYS, 1, 3), (tag, TODAY - 1, 0, 2), (tag, TODAY, 3, 3))
    (value,) = values_of(read_days([batch(*rows)]), 1, 1)
    assert unpacked(value, tag) == ([(TODAY - KEPT_DAYS, 1), (TODAY, 3)], 12)


def test_the_newest_day_stays_without_frauds_so_that_older_days_do_not_come_back() -> None:
    tag = "merchant:m"
    (value,) = values_of(read_days([batch((tag, TODAY - KEPT_DAYS - 1, 4, 4), (tag, TODAY, 0, 2))]), 1, 1)
    assert unpacked(value, tag) == ([(TODAY, 0)], 6)


def test_more_frauds_than_a_record_holds_read_as_the_most_it_holds() -> None:
    (value,) = values_of(read_days([batch(("merchant:m", TODAY, layout.COUNT_MAX + 1, 70_000))]), 1, 1)
    assert unpacked(value, "merchant:m") == ([(TODAY, layout.COUNT_MAX)], 70_000)


def test_no_rows_are_no_entities() -> None:
    none = np.zeros(0, np.int64)
    assert read_days([]).tags == []
    assert values_of(Days([], none, none, none, none), 1, 1) == []
