"""What a backtest decides again: receipts of the past with their payments and what is known of them, from Delta without Spark.

Called by deploy/history/backtest_command.py. A part is at most about PART_ROWS receipts, so that memory doesn't grow with history.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import IntEnum

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from deltalake import DeltaTable
from deltalake.exceptions import DeltaError, TableNotFoundError
from pyarrow.dataset import Dataset

from feature_jobs.known_labels import read_labels, weakest_first
from feature_jobs.training_set import local
from gateway.contracts import tables
from gateway.contracts.decision import SEVERITY, Outcome
from gateway.contracts.features import FEATURE_NAMES, FINGERPRINT
from gateway.contracts.reasons import Degraded
from gateway.contracts.settings import Settings
from gateway.contracts.transaction import CHANNELS, FIELDS
from gateway.kernels.intake import CLEAN, TEXTS
from gateway.scoring.requests import Requests

Int64s = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]

DAY_MS = 86_400_000
# Receipts of one part: about 100 MB with everything that is made of them.
PART_ROWS = 100_000
RECEIPT_COLUMNS = (
    *("transaction_id", "event_time_ms", "received_at_ms", "features", "feature_fingerprint", "risk_score", "probability"),
    *("decision", "policy_decision", "degraded", "lists_version"),
)
# Receipts of an earlier version know of no lists.
NO_LISTS_VERSION = -1
WITHOUT_FEATURES = pa.array([Degraded.REQUEST_ONLY.value, Degraded.STATIC_POLICY.value])
DECLINE = SEVERITY[Outcome.DECLINE]


class NoHistoryError(RuntimeError):
    """There is nothing to replay. The message says what is missing."""


class Known(IntEnum):
    """What is known of a payment. YOUNG: its label may be still to come. UNSEEN: it was declined, so no chargeback could come."""

    FRAUD = 0
    GENUINE = 1
    YOUNG = 2
    UNSEEN = 3


@dataclass(frozen=True)
class Part:
    """Some receipts, (rows,) each; `matrix` (rows, features). `score` is NaN where no model scored. `logged` is the place in SEVERITY of
    what the policy of then came to, -1 where it isn't known."""

    transaction_id: pa.Array
    customer_id: pa.Array
    requests: Requests
    matrix: npt.NDArray[np.float32]
    score: Floats
    received_at_ms: Int64s
    has_features: Bools
    lists_version: Int64s
    known: npt.NDArray[np.int8]
    logged: Int64s

    def __len__(self) -> int:
        return len(self.score)


@dataclass(frozen=True)
class Standing:
    """The label that stands of each payment that has one."""

    ids: pa.Array
    is_fraud: Bools

    def of(self, transaction_id: pa.Array) -> tuple[Bools, Bools]:
        """(labelled, fraud), (rows,) each."""
        place = pc.fill_null(pc.index_in(transaction_id, self.ids), -1).to_numpy(zero_copy_only=False).astype(np.int64)
        return place >= 0, np.append(self.is_fraud, False)[place]


def standing_labels(labels: pa.Table | None, as_of_ms: int) -> Standing:
    """Of the labels that had been reported by `as_of_ms`."""
    if labels is None:
        return Standing(pa.array([], pa.string()), np.zeros(0, bool))
    labels = labels.filter(pc.less_equal(labels["reported_at_ms"], as_of_ms)).select(
        [name for name in labels.column_names if name != "card_id"]
    )
    labels = labels.take(pa.array(weakest_first(labels)[::-1]))
    ids = labels["transaction_id"].combine_chunks()
    # The strongest comes first, and the first place of each id is what counts.
    first = np.unique(ids.dictionary_encode().indices.to_numpy(zero_copy_only=False), return_index=True)[1]
    chosen = pa.array(first)
    return Standing(ids.take(chosen), labels["is_fraud"].to_numpy(zero_copy_only=False).astype(bool)[first])


def known_of(standing: Standing, ids: pa.Array, event_time_ms: Int64s, declined: Bools, mature_ms: int) -> npt.NDArray[np.int8]:
    """What is known of each payment; those from `mature_ms` on are young."""
    labelled, fraud = standing.of(ids)
    silent = np.where(event_time_ms >= mature_ms, Known.YOUNG, np.where(declined, Known.UNSEEN, Known.GENUINE))
    found = np.where(fraud, Known.FRAUD, np.where(labelled & ~fraud & (event_time_ms < mature_ms), Known.GENUINE, silent))
    return found.astype(np.int8)


def requests_of(payments: pa.Table) -> Requests:
    """A transaction's fields as the policy sees a batch of them. Texts stay where Arrow has them, one column behind the other."""
    rows = payments.num_rows
    pieces: list[bytes] = []
    starts = np.zeros((rows, len(TEXTS)), np.int64)
    lengths = np.empty((rows, len(TEXTS)), np.int64)
    at = 0
    for i, name in enumerate(TEXTS):
        column = pc.cast(payments[name], pa.large_string()).combine_chunks()
        column = column if isinstance(column, pa.Array) else pa.concat_arrays(column.chunks)
        _, edges_buffer, data = column.buffers()
        edges = np.frombuffer(edges_buffer, np.int64, rows + 1, column.offset * 8) if rows else np.zeros(1, np.int64)
        text = b"" if data is None else data.slice(int(edges[0]), int(edges[-1] - edges[0])).to_pybytes()
        starts[:, i] = at + edges[:-1] - edges[0]
        lengths[:, i] = np.where(column.is_valid().to_numpy(zero_copy_only=False), np.diff(edges), -1)
        pieces.append(text)
        at += len(text)
    data = b"".join(pieces)
    mcc = pc.fill_null(pc.cast(payments["mcc"], pa.int64()), 0)
    channel = pc.fill_null(pc.index_in(payments["channel"], pa.array(CHANNELS)), -1)
    border = pc.cast(pc.not_equal(payments["card_country"], payments["country"]), pa.float64())
    return Requests(
        data=data,
        buf=np.frombuffer(data, np.uint8),
        edges=np.zeros(rows + 1, np.int64),
        starts=starts,
        lengths=lengths,
        numbers=np.stack([_ints(c) for c in (payments["event_time_ms"], payments["amount_minor"], channel, mcc)], axis=1),
        places=np.stack([_floats(c) for c in (payments["latitude"], payments["longitude"], border)], axis=1),
        state=np.full(rows, CLEAN, np.uint8),
    )


@dataclass
class DeltaHistory:
    """The receipts of `settings`' tables with event times in [from_ms, to_ms); a label counts that was reported by `labels_as_of_ms`.

    Payments less than `mature_days` old at that time are young. After `parts` has ended, `left_out` says how many receipts had to be
    left out, and why.
    """

    settings: Settings
    from_ms: int | None
    to_ms: int | None
    labels_as_of_ms: int
    mature_days: int
    part_rows: int = PART_ROWS
    left_out: Counter[str] = field(default_factory=Counter)

    def parts(self) -> Iterator[Part]:
        """Raises `NoHistoryError`."""
        receipts, silver = self._open(tables.DECISIONS), self._open(tables.SILVER)
        standing = standing_labels(read_labels(self.settings), self.labels_as_of_ms)
        edges = self._edges(receipts)
        for first_ms, end_ms in zip(edges[:-1], edges[1:], strict=True):
            columns = [name for name in RECEIPT_COLUMNS if name in receipts.schema.names]
            rows = receipts.to_table(columns=columns, filter=_between(first_ms, end_ms))
            payments = silver.to_table(columns=list(FIELDS), filter=_between(first_ms, end_ms))
            if (part := self._part(rows, payments, standing)) is not None:
                yield part

    def _open(self, name: str) -> Dataset:
        uri = local(tables.table_uri(self.settings.tables, name))
        try:
            return DeltaTable(uri).to_pyarrow_dataset()
        except TableNotFoundError as exc:
            raise NoHistoryError(f"there is no table {uri}: fraudgate jobs writes it while payments are decided") from exc
        except (DeltaError, OSError) as exc:
            raise NoHistoryError(f"{uri} can't be read: {exc}") from exc

    def _edges(self, receipts: Dataset) -> list[int]:
        """Times between which about `part_rows` receipts lie each."""
        wanted = pc.field("event_time_ms").is_valid()
        if self.from_ms is not None:
            wanted &= pc.field("event_time_ms") >= self.from_ms
        if self.to_ms is not None:
            wanted &= pc.field("event_time_ms") < self.to_ms
        t_ms = np.sort(receipts.to_table(columns=["event_time_ms"], filter=wanted)["event_time_ms"].to_numpy())
        if not len(t_ms):
            raise NoHistoryError("there are no receipts of that time")
        return [*np.unique(t_ms[:: self.part_rows]).tolist(), int(t_ms[-1]) + 1]

    def _part(self, rows: pa.Table, payments: pa.Table, standing: Standing) -> Part | None:
        width = pc.fill_null(pc.list_value_length(rows["features"]), -1)
        ours = pc.and_(pc.equal(rows["feature_fingerprint"], FINGERPRINT), pc.equal(width, len(FEATURE_NAMES)))
        self.left_out["other features than this code computes"] += rows.num_rows - (pc.sum(ours).as_py() or 0)
        rows = rows.filter(ours)
        place = pc.index_in(rows["transaction_id"], payments["transaction_id"].combine_chunks())
        self.left_out["no payment in silver"] += place.null_count
        rows, place = rows.filter(pc.is_valid(place)), place.drop_null()
        if not rows.num_rows:
            return None
        payments = payments.take(place)
        n = rows.num_rows
        flat = rows["features"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
        decided = _severity(rows["decision"])
        logged = _severity(rows["policy_decision"]) if "policy_decision" in rows.column_names else decided
        version = rows["lists_version"] if "lists_version" in rows.column_names else pa.chunked_array([[NO_LISTS_VERSION] * n])
        ids = rows["transaction_id"].combine_chunks()
        t_ms = _ints(rows["event_time_ms"])
        mature_ms = self.labels_as_of_ms - self.mature_days * DAY_MS
        scored = rows["probability"].is_valid().to_numpy()
        return Part(
            transaction_id=ids,
            customer_id=payments["customer_id"].combine_chunks(),
            requests=requests_of(payments),
            matrix=np.ascontiguousarray(flat.astype(np.float32).reshape(n, len(FEATURE_NAMES))),
            score=np.where(scored, _floats(rows["risk_score"]), np.nan),
            received_at_ms=_ints(rows["received_at_ms"]),
            has_features=_has_features(rows["degraded"]),
            lists_version=_ints(pc.fill_null(version, NO_LISTS_VERSION)),
            known=known_of(standing, ids, t_ms, decided == DECLINE, mature_ms),
            logged=logged,
        )


def _between(first_ms: int, end_ms: int) -> pc.Expression:
    return (pc.field("event_time_ms") >= first_ms) & (pc.field("event_time_ms") < end_ms)


def _has_features(degraded: pa.ChunkedArray) -> Bools:
    """Whether the receipt's features came from Redis."""
    lists = degraded.combine_chunks()
    without = pc.is_in(lists.flatten(), WITHOUT_FEATURES).to_numpy(zero_copy_only=False)
    owner = pc.list_parent_indices(lists).to_numpy()
    found = np.ones(len(lists), bool)
    found[owner[without]] = False
    return found


def _severity(column: pa.ChunkedArray) -> Int64s:
    """Places in SEVERITY, -1 for what is no outcome."""
    order = sorted(Outcome, key=lambda outcome: SEVERITY[outcome])
    return _ints(pc.fill_null(pc.index_in(column, pa.array([o.value for o in order])), -1))


def _ints(column: pa.ChunkedArray | pa.Array) -> Int64s:
    out: Int64s = column.to_numpy(zero_copy_only=False).astype(np.int64) if isinstance(column, pa.Array) else _ints(_one(column))
    return out


def _floats(column: pa.ChunkedArray | pa.Array) -> Floats:
    """NaN for null."""
    array = column if isinstance(column, pa.Array) else _one(column)
    out: Floats = pc.cast(array, pa.float64()).to_numpy(zero_copy_only=False)
    return out


def _one(column: pa.ChunkedArray) -> pa.Array:
    held = column.combine_chunks()
    return held if isinstance(held, pa.Array) else pa.concat_arrays(held.chunks)
