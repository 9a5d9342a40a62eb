"""The public data sets as the pipeline would hold them: rows of silver and labels, for `fraudgate evaluate`.

By the same adapters that `fraudgate replay` sends them with, so that what is evaluated is what would have been scored. About 10 us a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from gateway.contracts.transaction import FIELDS
from loadtest.adapters import FRAUD_LABEL_DELAY_MS, Dataset
from loadtest.events import LoadError

BATCH_ROWS = 50_000
_TYPES = {"event_time_ms": pa.int64(), "amount_minor": pa.int64(), "latitude": pa.float64(), "longitude": pa.float64()}


@dataclass(frozen=True)
class PublicData:
    """`silver` has a transaction's fields, in order of (event_time_ms, transaction_id); `labels` one row a fraud; `is_fraud` (rows,)."""

    name: str
    silver: pa.Table
    labels: pa.Table
    is_fraud: npt.NDArray[np.bool_]


def read_public(paths: Sequence[Path]) -> PublicData:
    """The rows of one or more files of one data set. Raises `LoadError` for what can't be read or doesn't belong together."""
    batches: list[pa.RecordBatch] = []
    fraud: list[npt.NDArray[np.bool_]] = []
    names = set()
    schema = pa.schema([(name, _TYPES.get(name, pa.string())) for name in FIELDS])
    for path in paths:
        dataset = Dataset(path)
        names.add(dataset.adapter.name)
        events = dataset.events()
        while some := list(islice(events, BATCH_ROWS)):
            columns = [pa.array([getattr(e.transaction, name) for e in some], schema.field(name).type) for name in FIELDS]
            batches.append(pa.RecordBatch.from_arrays(columns, schema=schema))
            fraud.append(np.array([bool(e.is_fraud) for e in some]))
    if len(names) != 1:
        raise LoadError(f"the files are of several data sets: {', '.join(sorted(names))}")
    rows = pa.Table.from_batches(batches, schema).append_column("is_fraud", pa.array(np.concatenate(fraud)))
    if pc.count_distinct(rows["transaction_id"]).as_py() != rows.num_rows:
        raise LoadError("a transaction_id stands in the files twice")
    rows = rows.sort_by([("event_time_ms", "ascending"), ("transaction_id", "ascending")])
    frauds = rows.filter(rows["is_fraud"])
    labels = pa.table(
        {
            "transaction_id": frauds["transaction_id"],
            "is_fraud": frauds["is_fraud"],
            "reported_at_ms": pc.add(frauds["event_time_ms"], FRAUD_LABEL_DELAY_MS),
        }
    )
    return PublicData(names.pop(), rows.drop_columns("is_fraud"), labels, rows["is_fraud"].to_numpy())
