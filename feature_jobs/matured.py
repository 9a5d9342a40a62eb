"""How many labels have matured since a training set was made: whether another one would say anything new.

Reads ids and times of silver and labels with delta-rs, needs no Spark. Called by `fraudgate retrain`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from feature_jobs.training_set import DAY_MS, LABEL_DELAY_DAYS, NoHistoryError, read_table
from gateway.contracts import tables
from gateway.contracts.settings import Settings


@dataclass(frozen=True)
class Matured:
    """A training set made now would take payments before `until_ms` and labels reported by `as_of_ms`.

    `payments` is how many of its labelled payments the earlier one took without a label, with an older one, or not at all.
    """

    payments: int
    as_of_ms: int
    until_ms: int


def newly_matured(
    settings: Settings,
    *,
    label_delay_days: int = LABEL_DELAY_DAYS,
    since_as_of_ms: int | None = None,
    since_until_ms: int | None = None,
) -> Matured:
    """Counts against the training set that was made as of `since_as_of_ms` of payments before `since_until_ms`; None: there is none.

    Raises `NoHistoryError` when silver is empty.
    """
    silver = read_table(settings, tables.SILVER, ["transaction_id", "event_time_ms"])
    if silver is None or silver.num_rows == 0:
        raise NoHistoryError("silver holds no transactions: send some (fraudgate simulate --history) while fraudgate jobs runs")
    as_of_ms = int(pc.max(silver["event_time_ms"]).as_py())
    until_ms = as_of_ms - label_delay_days * DAY_MS
    labels = read_table(settings, tables.LABELS, ["transaction_id", "reported_at_ms"])
    if labels is None or labels.num_rows == 0:
        return Matured(0, as_of_ms, until_ms)
    labels = labels.filter(pc.less_equal(labels["reported_at_ms"], as_of_ms))
    row = pc.index_in(labels["transaction_id"], silver["transaction_id"].combine_chunks())
    # Labels of unknown payments are left out.
    labels, row = labels.filter(pc.is_valid(row)), row.drop_null()
    paid_ms = silver["event_time_ms"].take(row).to_numpy()
    reported_ms = labels["reported_at_ms"].to_numpy()
    new = paid_ms < until_ms
    if since_as_of_ms is not None and since_until_ms is not None:
        new &= (paid_ms >= since_until_ms) | (reported_ms > since_as_of_ms)
    return Matured(len(pc.unique(labels["transaction_id"].filter(pa.array(np.asarray(new))))), as_of_ms, until_ms)
