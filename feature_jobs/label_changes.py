"""What each label changes of what was known about its payment: the rows of the table `label_changes`. Pure, in the driver.

A stream of labels is about a hundredth of the payments, so a batch is a few hundred rows; about 5 microseconds a label.
"""

from __future__ import annotations

import pyarrow as pa

from gateway.contracts.features import ENTITIES, LABELLED
from gateway.contracts.label import Precedence, precedence

# The entities whose frauds are counted, and the columns that name them.
LABELLED_ENTITIES = tuple(ENTITIES[i] for i in LABELLED)
ENTITY_COLUMNS = tuple(e.field for e in LABELLED_ENTITIES)

# Of a label, as it stands in the table `labels`.
LABEL_SCHEMA = pa.schema(
    [
        ("transaction_id", pa.string()),
        ("is_fraud", pa.bool_()),
        ("source", pa.string()),
        ("state", pa.string()),
        ("reported_at_ms", pa.int64()),
        ("effective_at_ms", pa.int64()),
        ("partition", pa.int32()),
        ("offset", pa.int64()),
        ("kafka_timestamp", pa.timestamp("us", tz="UTC")),
    ]
)
PAYMENT_COLUMNS = ("transaction_id", "event_time_ms", *ENTITY_COLUMNS, "batch_id", "partition", "offset")
_SAID = ("source", "state", "effective_at_ms", "reported_at_ms", "is_fraud")
KNOWN_COLUMNS = ("transaction_id", *_SAID, "change", "partition", "offset")

Place = tuple[int, int]


def changes_of(labels: pa.Table, payments: pa.Table, known: pa.Table) -> tuple[pa.Table, pa.Table]:
    """(label changes in the order in which they apply, labels whose payment isn't there).

    `labels` is LABEL_SCHEMA, `payments` PAYMENT_COLUMNS of silver, `known` KNOWN_COLUMNS of label_changes: of the labels' transactions.
    Labels that stand in `known`, or twice in `labels`, by their place in Kafka, are left out. What a transaction's labels come to is what
    contracts.label says of all of them, so whichever comes last, the sum of its changes is the same.
    """
    payment = _first_rows(payments)
    applied = places(known)
    standing, counted = _known(known)
    ids, reported = labels["transaction_id"].to_pylist(), labels["reported_at_ms"].to_pylist()
    said = _precedences(labels)
    at = list(zip(labels["partition"].to_pylist(), labels["offset"].to_pylist(), strict=True))
    chosen: list[int] = []
    change: list[int] = []
    unmatched: list[int] = []
    for i in sorted(range(len(ids)), key=lambda i: (reported[i], at[i])):
        if at[i] in applied:
            continue
        applied.add(at[i])
        if ids[i] not in payment:
            unmatched.append(i)
            continue
        stands = standing[ids[i]] = max(said[i], standing.get(ids[i], said[i]))
        is_fraud = int(stands[-1])
        chosen.append(i)
        change.append(is_fraud - counted.get(ids[i], 0))
        counted[ids[i]] = is_fraud
    rows = _take(labels, chosen)
    of_payment = _take(payments, [payment[ids[i]] for i in chosen])
    for name in ("event_time_ms", *ENTITY_COLUMNS):
        rows = rows.append_column(name, of_payment[name])
    rows = rows.append_column("change", pa.array(change, pa.int32())).append_column(
        "place", pa.array(range(len(chosen)), pa.int64())
    )
    return rows, _take(labels, unmatched)


def tags_of(rows: pa.Table) -> list[str]:
    """The entities ("merchant:x") that rows of label_changes change something of, sorted."""
    changed = [c != 0 for c in rows["change"].to_pylist()]
    return sorted(
        {
            f"{entity.name}:{entity_id}"
            for entity in LABELLED_ENTITIES
            for entity_id, changes in zip(rows[entity.field].to_pylist(), changed, strict=True)
            if changes and entity_id is not None
        }
    )


def places(rows: pa.Table) -> set[Place]:
    """(partition, offset) of each label."""
    return set(zip(rows["partition"].to_pylist(), rows["offset"].to_pylist(), strict=True))


def _take(table: pa.Table, rows: list[int]) -> pa.Table:
    return table.take(pa.array(rows, pa.int64()))


def _first_rows(payments: pa.Table) -> dict[str, int]:
    """The row of each transaction. Of a repetition that came after the deduplication window, the first one counts."""
    ids = payments["transaction_id"].to_pylist()
    order = list(zip(*(payments[name].to_pylist() for name in ("batch_id", "partition", "offset")), strict=True))
    first: dict[str, int] = {}
    for i in sorted(range(len(ids)), key=lambda i: order[i]):
        first.setdefault(ids[i], i)
    return first


def _precedences(labels: pa.Table) -> list[Precedence]:
    return [precedence(*row) for row in zip(*(labels[name].to_pylist() for name in _SAID), strict=True)]


def _known(known: pa.Table) -> tuple[dict[str, Precedence], dict[str, int]]:
    """(the label that stands, 1 where its changes so far add up to a fraud) by transaction."""
    standing: dict[str, Precedence] = {}
    counted: dict[str, int] = {}
    for i, said, change in zip(known["transaction_id"].to_pylist(), _precedences(known), known["change"].to_pylist(), strict=True):
        standing[i] = max(said, standing.get(i, said))
        counted[i] = counted.get(i, 0) + change
    return standing, counted
