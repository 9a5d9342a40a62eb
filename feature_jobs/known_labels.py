"""Labels as columns, and which of them stands: contracts.label's order on tables of labels. Without Spark; about a microsecond a label."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from deltalake import DeltaTable
from deltalake.exceptions import TableNotFoundError

from feature_jobs.offline import LabelChanges
from gateway.contracts import tables
from gateway.contracts.label import NO_WORD, WORDS, precedence_order
from gateway.contracts.settings import Settings

Int64s = npt.NDArray[np.int64]

# What decides between labels. Tables of before effective_at_ms lack it.
COLUMNS = ("transaction_id", "is_fraud", "source", "state", "reported_at_ms", "effective_at_ms")
# What a table says that has no such column: a public data set knows of frauds, and nothing more of how it does.
DEFAULT_SOURCE, DEFAULT_STATE = "chargeback", "confirmed"


def read_labels(settings: Settings) -> pa.Table | None:
    """Those of COLUMNS that the table `labels` has, as it is now; None when there is no such table."""
    try:
        held = DeltaTable(tables.table_uri(settings.tables, tables.LABELS).replace("s3a://", "s3://", 1)).to_pyarrow_dataset()
    except TableNotFoundError:
        return None
    return held.to_table(columns=[name for name in COLUMNS if name in held.schema.names])


def weakest_first(labels: pa.Table) -> Int64s:
    """The rows of `labels` by precedence: of a transaction's labels the last one stands."""
    n = labels.num_rows
    fixed = {"source": DEFAULT_SOURCE, "state": DEFAULT_STATE}
    source, state = (labels[name] if name in labels.column_names else pa.array([fixed[name]] * n, pa.string()) for name in fixed)
    word = pc.index_in(pc.binary_join_element_wise(source, state, "/"), pa.array(WORDS))
    reported = labels["reported_at_ms"]
    holds = pc.coalesce(labels["effective_at_ms"], reported) if "effective_at_ms" in labels.column_names else reported
    return precedence_order(
        pc.fill_null(word, NO_WORD).to_numpy(zero_copy_only=False).astype(np.int64), _ints(holds), _ints(reported), _frauds(labels)
    )


def standing(labels: pa.Table, as_of_ms: int) -> dict[str, bool]:
    """Whether it was fraud, for each transaction that has a label by `as_of_ms`."""
    known = labels.filter(pc.less_equal(labels["reported_at_ms"], as_of_ms))
    known = known.take(pa.array(weakest_first(known)))
    return dict(zip(known["transaction_id"].to_pylist(), known["is_fraud"].to_pylist(), strict=True))


def label_changes(ids: pa.ChunkedArray, labels: pa.Table) -> LabelChanges:
    """What each label changed of what was known about its payment, whose row is its place in `ids`, from when it was reported.

    Those of unknown payments are left out.
    """
    place = np.empty(labels.num_rows, np.int64)
    order = weakest_first(labels)
    place[order] = np.arange(len(order))
    row = pc.fill_null(pc.index_in(labels["transaction_id"], ids.combine_chunks()), -1).to_numpy().astype(np.int64)
    reported_ms, fraud = _ints(labels["reported_at_ms"]), _frauds(labels)
    # Each payment's labels in the order in which they became known: what stands is the strongest so far.
    told = np.lexsort((place, reported_ms, row))
    told = told[row[told] >= 0]
    row, reported_ms = row[told], reported_ms[told]
    n = labels.num_rows
    strongest = np.maximum.accumulate(row * n + place[told]) - row * n if n else place
    is_fraud = fraud[order[strongest]].astype(np.int64)
    first = np.ones(len(row), bool)
    first[1:] = row[1:] != row[:-1]
    before = np.where(first, 0, np.roll(is_fraud, 1))
    changed = is_fraud != before
    return LabelChanges(row[changed], (is_fraud - before)[changed], reported_ms[changed])


def _ints(column: pa.ChunkedArray) -> Int64s:
    out: Int64s = column.to_numpy().astype(np.int64)
    return out


def _frauds(labels: pa.Table) -> npt.NDArray[np.bool_]:
    out: npt.NDArray[np.bool_] = labels["is_fraud"].to_numpy(zero_copy_only=False).astype(bool)
    return out
