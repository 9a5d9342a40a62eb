"""Receipts out of the table `decisions`: one by its transaction, or many, with their payload decoded. Called by why and replay-decision.

A look-up reads the ids first, of files and row groups whose statistics allow the id, and then of the row's file what is needed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
from deltalake import DeltaTable

from deploy.history.lake import BATCH_ROWS, NoTableError, instant_of, open_table, rows_of, schema_of
from deploy.history.payloads import Payloads
from gateway.contracts import tables
from gateway.contracts.settings import Settings
from gateway.contracts.transaction import FIELDS, Transaction


class NoReceiptError(RuntimeError):
    """There is no such receipt. The message says where it was looked for."""


@dataclass(frozen=True)
class Found:
    """One row of the table. `receipt` are the fields of schemas/decision.avsc, None where the customer's data were erased.

    `whole` is False for a row of before there were payloads: its transaction comes from silver, and may be None.
    """

    transaction_id: str
    row: dict[str, Any]
    receipt: dict[str, Any] | None
    whole: bool

    @property
    def erased_at_ms(self) -> int | None:
        at_ms: int | None = self.row["erased_at_ms"]
        return at_ms


def find_receipt(settings: Settings, transaction_id: str, as_of: str | None = None) -> Found:
    """The newest receipt of a transaction; as of a version of the table, or as it was known at a time (ISO 8601).

    Raises `NoReceiptError`, `NoTableError`, `deploy.history.payloads.NoSchemaError`, `deploy.history.payloads.UnreadableError`.
    """
    by_version = as_of is not None and as_of.isdigit()
    table = open_table(settings, tables.DECISIONS, as_of if by_version else None)
    chosen = ds.field("transaction_id") == transaction_id
    if as_of is not None and not by_version:
        chosen &= ds.field("kafka_timestamp") <= pa.scalar(instant_of(as_of), pa.timestamp("us", "UTC"))
    places = rows_of(table, ["batch_id", "partition", "offset"], chosen)
    if not places:
        raise NoReceiptError(
            f"there is no receipt of {transaction_id} in the table {tables.DECISIONS}{f' as of {as_of}' if as_of else ''}; one arrives "
            "there some seconds after its decision, while fraudgate jobs runs"
        )
    newest = max(places, key=lambda place: (place["batch_id"], place["offset"]))
    for name, value in newest.items():
        chosen &= ds.field(name) == value
    [row] = rows_of(table, _row_columns(table), chosen)
    return _found(settings, Payloads(settings), row)


def chosen_ids(settings: Settings, last: int | None = None, sample: int | None = None, seed: int = 0) -> list[str] | None:
    """Transactions of the `last` receipts by time of decision, or of a random `sample`; None: of all. Raises `NoTableError`."""
    if last is None and sample is None:
        return None
    rows = open_table(settings, tables.DECISIONS).to_pyarrow_dataset().to_table(columns=["transaction_id", "decided_at_ms"])
    if last is not None:
        rows = rows.take(pc.sort_indices(rows, [("decided_at_ms", "descending")]).slice(0, last))
    elif sample is not None and sample < rows.num_rows:
        rows = rows.take(pa.array(np.sort(np.random.default_rng(seed).choice(rows.num_rows, sample, replace=False))))
    ids: list[str] = rows["transaction_id"].to_pylist()
    return ids


def read_receipts(settings: Settings, ids: Sequence[str] | None = None) -> Iterator[list[Found]]:
    """Every receipt of `ids`, None: of all, in one pass over the table, some thousand at a time.

    Raises `NoReceiptError`, `NoTableError`, `deploy.history.payloads.NoSchemaError`, `deploy.history.payloads.UnreadableError`.
    """
    table, payloads = open_table(settings, tables.DECISIONS), Payloads(settings)
    columns = [*_row_columns(table)]
    rows = table.to_pyarrow_dataset()
    scanner = rows.scanner(
        columns=[name for name in columns if name in rows.schema.names],
        filter=None if ids is None else ds.field("transaction_id").isin(list(ids)),
        batch_size=BATCH_ROWS,
        batch_readahead=1,
        fragment_readahead=1,
    )
    missing = set(ids or ())
    for batch in scanner.to_batches():
        found = [_found(settings, payloads, dict.fromkeys(columns) | row) for row in batch.to_pylist()]
        missing -= {one.transaction_id for one in found}
        if found:
            yield found
    if missing:
        raise NoReceiptError(f"there is no receipt of {', '.join(sorted(missing)[:5])} in the table {tables.DECISIONS}")


def _row_columns(table: DeltaTable) -> list[str]:
    return sorted({*schema_of(table).names, "payload", "schema_id", "erased_at_ms"})


def _found(settings: Settings, payloads: Payloads, row: dict[str, Any]) -> Found:
    transaction_id = row["transaction_id"]
    if row["payload"] is not None:
        return Found(transaction_id, row, payloads.receipt(row["schema_id"], row["payload"]), whole=True)
    if row["erased_at_ms"] is not None:
        return Found(transaction_id, row, None, whole=False)
    receipt = row | {"transaction": _payment(settings, transaction_id, row["event_time_ms"])}
    return Found(transaction_id, row, receipt, whole=False)


def _payment(settings: Settings, transaction_id: str, event_time_ms: int | None) -> dict[str, Any] | None:
    """The transaction out of silver, for receipts of before there were payloads."""
    try:
        silver = open_table(settings, tables.SILVER)
    except NoTableError:
        return None
    chosen = ds.field("transaction_id") == transaction_id
    if event_time_ms is not None:
        chosen &= ds.field("event_time_ms") == event_time_ms
    rows = rows_of(silver, list(FIELDS), chosen)
    return msgspec.to_builtins(msgspec.convert(rows[0], Transaction)) if rows else None
