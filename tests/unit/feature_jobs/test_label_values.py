"""The packed frauds of an entity: which hours stay, and that they follow from the sums alone."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from feature_jobs.label_values import Hours, read_hours, values_of
from gateway.contracts import layout
from gateway.contracts.features import ENTITY_INDEX
from gateway.contracts.windows import HOUR_MS, LABELLED_RETENTION_MS

NOW = 480_000
KEPT_HOURS = LABELLED_RETENTION_MS // HOUR_MS


def batch(*rows: tuple[str, int, int, int]) -> pa.RecordBatch:
    """(tag, hour, frauds, changes) each."""
    tag, hour, frauds, changes = zip(*rows, strict=True)
    return pa.RecordBatch.from_pydict({"tag": tag, "hour": hour, "frauds": frauds, "changes": changes})


def unpacked(value: bytes, tag: str) -> tuple[list[tuple[int, int]], int]:
    entity, entity_id = tag.split(":", 1)
    hours = layout.fraud_hours(value, ENTITY_INDEX[entity], layout.key_check(entity, entity_id))
    return [(int(r["hour"]), int(r["frauds"])) for r in hours], layout.LABELS_HEADER.unpack_from(value)[6]


def test_hours_of_an_entity_are_in_order_and_its_changes_are_added_up() -> None:
    hours = read_hours([batch(("merchant:b", NOW, 1, 1), ("merchant:a", NOW, 2, 4)), batch(("merchant:b", NOW - 3, 5, 7))])
    values = dict(zip(hours.tags, values_of(hours, epoch=3, batch_id=9), strict=True))
    assert unpacked(values["merchant:a"], "merchant:a") == ([(NOW, 2)], 4)
    assert unpacked(values["merchant:b"], "merchant:b") == ([(NOW - 3, 5), (NOW, 1)], 8)
    assert layout.LABELS_HEADER.unpack_from(values["merchant:a"])[4:6] == (9, 3)


def test_hours_without_frauds_and_hours_past_the_retention_are_left_out_and_still_counted_as_changes() -> None:
    tag = "customer:u:1"
    rows = ((tag, NOW - KEPT_HOURS - 1, 4, 4), (tag, NOW - KEPT_HOURS, 1, 3), (tag, NOW - 1, 0, 2), (tag, NOW, 3, 3))
    (value,) = values_of(read_hours([batch(*rows)]), 1, 1)
    assert unpacked(value, tag) == ([(NOW - KEPT_HOURS, 1), (NOW, 3)], 12)


def test_the_newest_hour_stays_without_frauds_so_that_older_hours_do_not_come_back() -> None:
    tag = "merchant:m"
    (value,) = values_of(read_hours([batch((tag, NOW - KEPT_HOURS - 1, 4, 4), (tag, NOW, 0, 2))]), 1, 1)
    assert unpacked(value, tag) == ([(NOW, 0)], 6)


def test_more_frauds_than_a_record_holds_read_as_the_most_it_holds() -> None:
    (value,) = values_of(read_hours([batch(("merchant:m", NOW, layout.COUNT_MAX + 1, 70_000))]), 1, 1)
    assert unpacked(value, "merchant:m") == ([(NOW, layout.COUNT_MAX)], 70_000)


def test_no_rows_are_no_entities() -> None:
    none = np.zeros(0, np.int64)
    assert read_hours([]).tags == []
    assert values_of(Hours([], none, none, none, none), 1, 1) == []
