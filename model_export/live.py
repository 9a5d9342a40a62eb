"""Receipts and labels of live payments, read from Delta without Spark, as columns. Used by `fraudgate compare` and `fraudgate drift`.

100,000 receipts take about a second and 60 MB.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from deltalake import DeltaTable
from deltalake.exceptions import DeltaError, TableNotFoundError
from pyarrow.dataset import Dataset

from gateway.contracts import tables
from gateway.contracts.features import FEATURE_INDEX, FEATURE_NAMES, FINGERPRINT
from gateway.contracts.label import NO_WORD, WORDS, precedence_order
from gateway.contracts.reasons import Degraded
from gateway.contracts.reference import OUTCOME_CODE
from gateway.contracts.settings import Settings
from model_export.errors import ModelExportError

DAY_MS = 86_400_000
# Receipts that one command holds in memory: of more, the newest.
RECEIPTS_MAX = 500_000
REQUIRED = (
    *("transaction_id", "event_time_ms", "card_id", "features", "feature_fingerprint", "risk_score", "probability", "decision"),
    *("degraded", "rule_hits", "model_version", "model_digest", "route"),
)
# Tables written before exploration, and before lists, don't have these.
OPTIONAL = ("routed_by", "policy_decision", "propensity", "list_hits")
# What decides between labels; older tables have less.
LABEL_COLUMNS = ("transaction_id", "is_fraud", "source", "state", "reported_at_ms", "effective_at_ms")
# Answers that are flagged only with these were made from all that the model asks for.
WHOLE = {Degraded.STALE_FEATURES.value}

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]
Ints = npt.NDArray[np.int64]


class NoReceiptsError(ModelExportError):
    """There is nothing to report on. The message says what is missing."""


@dataclass(frozen=True)
class Receipts:
    """(rows,) each, in order of event time; `features` (rows, features) float32.

    `decision` and `policy_decision` are OUTCOME_CODE; `propensity` the chance of the decision given; `score` the risk score; `card` numbers
    the cards. `full`: it had all features; `whole`: and a model scored it. `left_out` counts receipts of other features or beyond
    RECEIPTS_MAX.
    """

    transaction_id: pa.ChunkedArray
    event_time_ms: Ints
    card: Ints
    features: npt.NDArray[np.float32]
    score: Floats
    probability: Floats
    decision: Ints
    policy_decision: Ints
    propensity: Floats
    full: Bools
    whole: Bools
    rule_hits: list[list[str]]
    list_hits: list[list[str]]
    model_version: npt.NDArray[np.object_]
    model_digest: npt.NDArray[np.object_]
    route: npt.NDArray[np.object_]
    routed_by: npt.NDArray[np.object_]
    left_out: int

    def __len__(self) -> int:
        return len(self.event_time_ms)

    @property
    def amount_minor(self) -> Floats:
        return self.features[:, FEATURE_INDEX["amount_minor"]].astype(np.float64)


def read_receipts(settings: Settings, from_ms: int | None = None, to_ms: int | None = None) -> Receipts:
    """Receipts with event times in [from_ms, to_ms). Raises `NoReceiptsError`."""
    uri = _uri(settings, tables.DECISIONS)
    try:
        held = DeltaTable(uri).to_pyarrow_dataset()
        columns = [*REQUIRED, *(name for name in OPTIONAL if name in held.schema.names)]
        from_ms, found = _newest(held, from_ms, to_ms)
        rows = held.to_table(columns=columns, filter=_between(from_ms, to_ms))
    except TableNotFoundError as exc:
        raise NoReceiptsError(f"there are no receipts at {uri}: fraudgate jobs writes them while payments are decided") from exc
    except (DeltaError, OSError, pa.ArrowException) as exc:
        raise NoReceiptsError(f"the receipts at {uri} can't be read: {exc}") from exc
    width = pc.list_value_length(rows["features"])
    rows = rows.filter(pc.and_(pc.equal(rows["feature_fingerprint"], FINGERPRINT), pc.equal(width, len(FEATURE_NAMES))))
    rows = rows.sort_by([("event_time_ms", "ascending"), ("transaction_id", "ascending")])
    rows = rows.slice(max(0, rows.num_rows - RECEIPTS_MAX))
    if not rows.num_rows:
        raise NoReceiptsError(
            f"none of {found} receipts of that time at {uri} is of the features that this code computes ({FINGERPRINT})"
        )
    return _columns(rows, found - rows.num_rows)


def _between(from_ms: int | None, to_ms: int | None) -> pc.Expression:
    """Event times in [from_ms, to_ms)."""
    wanted = pc.field("event_time_ms").is_valid()
    if from_ms is not None:
        wanted &= pc.field("event_time_ms") >= from_ms
    if to_ms is not None:
        wanted &= pc.field("event_time_ms") < to_ms
    return wanted


def _newest(held: Dataset, from_ms: int | None, to_ms: int | None) -> tuple[int | None, int]:
    """(from when on, of how many) so that not much more than RECEIPTS_MAX are read: times first, which are small."""
    t_ms = held.to_table(columns=["event_time_ms"], filter=_between(from_ms, to_ms))["event_time_ms"].to_numpy()
    if len(t_ms) > RECEIPTS_MAX:
        from_ms = int(np.partition(t_ms, len(t_ms) - RECEIPTS_MAX)[len(t_ms) - RECEIPTS_MAX])
    return from_ms, len(t_ms)


def read_payments(settings: Settings, from_ms: int, to_ms: int) -> tuple[pa.ChunkedArray, Ints, Ints]:
    """(transaction_id, event_time_ms, card) of receipts with event times in [from_ms, to_ms), without all else."""
    try:
        rows = DeltaTable(_uri(settings, tables.DECISIONS)).to_pyarrow_dataset()
        held = rows.to_table(columns=["transaction_id", "event_time_ms", "card_id"], filter=_between(from_ms, to_ms))
    except (DeltaError, OSError, pa.ArrowException) as exc:
        raise NoReceiptsError(f"the receipts at {_uri(settings, tables.DECISIONS)} can't be read: {exc}") from exc
    return held["transaction_id"], held["event_time_ms"].to_numpy().astype(np.int64), codes(held["card_id"])


def newest_receipt_ms(settings: Settings) -> int:
    """The newest event time. Raises `NoReceiptsError`."""
    uri = _uri(settings, tables.DECISIONS)
    try:
        held = DeltaTable(uri).to_pyarrow_dataset().to_table(columns=["event_time_ms"])
    except TableNotFoundError as exc:
        raise NoReceiptsError(f"there are no receipts at {uri}: fraudgate jobs writes them while payments are decided") from exc
    if not held.num_rows:
        raise NoReceiptsError(f"there are no receipts at {uri} yet")
    return int(pc.max(held["event_time_ms"]).as_py())


def _columns(rows: pa.Table, left_out: int) -> Receipts:
    flat = rows["features"].combine_chunks().flatten()
    degraded = rows["degraded"].to_pylist()
    probability = rows["probability"].to_numpy(zero_copy_only=False).astype(np.float64)
    full = np.fromiter((not d or WHOLE.issuperset(d) for d in degraded), bool, rows.num_rows)
    decision = _outcomes(rows["decision"], np.zeros(rows.num_rows, np.int64))

    def optional(name: str, default: object) -> pa.ChunkedArray:
        return rows[name] if name in rows.column_names else pa.chunked_array([pa.array([default] * rows.num_rows)])

    propensity = pc.fill_null(optional("propensity", 1.0), 1.0).to_numpy(zero_copy_only=False).astype(np.float64)
    return Receipts(
        transaction_id=rows["transaction_id"],
        event_time_ms=rows["event_time_ms"].to_numpy().astype(np.int64),
        card=codes(rows["card_id"]),
        features=flat.to_numpy(zero_copy_only=False).astype(np.float32).reshape(rows.num_rows, len(FEATURE_NAMES)),
        score=rows["risk_score"].to_numpy(zero_copy_only=False).astype(np.float64),
        probability=probability,
        decision=decision,
        policy_decision=_outcomes(optional("policy_decision", ""), decision),
        propensity=propensity,
        full=full,
        whole=full & np.isfinite(probability),
        rule_hits=rows["rule_hits"].to_pylist(),
        list_hits=[hits or [] for hits in optional("list_hits", None).to_pylist()],
        model_version=_texts(rows["model_version"]),
        model_digest=_texts(rows["model_digest"]),
        route=_texts(rows["route"]),
        routed_by=_texts(optional("routed_by", "")),
        left_out=left_out,
    )


@dataclass(frozen=True)
class Labels:
    """Of given payments, (rows,): whether a label says anything, whether the one that stands says fraud, when it was reported (0: never).

    `newest_ms` is the newest label of all payments, 0 without any.
    """

    known: Bools
    is_fraud: Bools
    reported_ms: Ints
    newest_ms: int


def read_labels(settings: Settings, transaction_id: pa.ChunkedArray, as_of_ms: int | None = None) -> Labels:
    """What was known by `as_of_ms` (default: all) of the payments with these ids."""
    n = len(transaction_id)
    known, is_fraud, reported_ms = np.zeros(n, bool), np.zeros(n, bool), np.zeros(n, np.int64)
    uri = _uri(settings, tables.LABELS)
    try:
        held = DeltaTable(uri).to_pyarrow_dataset()
        rows = held.to_table(columns=[name for name in LABEL_COLUMNS if name in held.schema.names])
    except TableNotFoundError:
        return Labels(known, is_fraud, reported_ms, 0)
    except (DeltaError, OSError, pa.ArrowException) as exc:
        raise NoReceiptsError(f"the labels at {uri} can't be read: {exc}") from exc
    if as_of_ms is not None:
        rows = rows.filter(pc.less_equal(rows["reported_at_ms"], as_of_ms))
    if not rows.num_rows:
        return Labels(known, is_fraud, reported_ms, 0)
    newest_ms = int(pc.max(rows["reported_at_ms"]).as_py())
    rows = rows.take(pa.array(_weakest_first(rows)))
    place = pc.fill_null(pc.index_in(rows["transaction_id"], transaction_id.combine_chunks()), -1).to_numpy().astype(np.int64)
    fraud = rows["is_fraud"].to_numpy(zero_copy_only=False).astype(bool)
    # In order of precedence, so that the label that stands is what stays.
    known[place[place >= 0]] = True
    is_fraud[place[place >= 0]] = fraud[place >= 0]
    reported_ms[place[place >= 0]] = rows["reported_at_ms"].to_numpy()[place >= 0]
    return Labels(known, is_fraud, reported_ms, newest_ms)


def _weakest_first(labels: pa.Table) -> Ints:
    """The rows by contracts.label's precedence. What a table doesn't say is a confirmed chargeback's."""
    n = labels.num_rows
    source = labels["source"] if "source" in labels.column_names else pa.array(["chargeback"] * n, pa.string())
    state = labels["state"] if "state" in labels.column_names else pa.array(["confirmed"] * n, pa.string())
    word = pc.fill_null(pc.index_in(pc.binary_join_element_wise(source, state, "/"), pa.array(WORDS)), NO_WORD)
    reported = labels["reported_at_ms"]
    holds = pc.coalesce(labels["effective_at_ms"], reported) if "effective_at_ms" in labels.column_names else reported
    fraud = labels["is_fraud"].to_numpy(zero_copy_only=False).astype(bool)
    return precedence_order(word.to_numpy(zero_copy_only=False).astype(np.int64), holds.to_numpy(), reported.to_numpy(), fraud)


def codes(column: pa.ChunkedArray) -> Ints:
    """A number for each distinct text, from 0; -1 for null."""
    encoded = column.combine_chunks().dictionary_encode()
    if isinstance(encoded, pa.ChunkedArray):
        encoded = encoded.combine_chunks()
    out: Ints = pc.fill_null(encoded.indices, -1).to_numpy(zero_copy_only=False).astype(np.int64)
    return out


def _outcomes(column: pa.ChunkedArray, default: Ints) -> Ints:
    found = pc.fill_null(pc.index_in(column, pa.array(list(OUTCOME_CODE))), -1).to_numpy(zero_copy_only=False).astype(np.int64)
    out: Ints = np.where(found >= 0, found, default)
    return out


def _texts(column: pa.ChunkedArray) -> npt.NDArray[np.object_]:
    """Empty text for null."""
    return np.array([v or "" for v in column.to_pylist()], object)


def _uri(settings: Settings, name: str) -> str:
    return tables.table_uri(settings.tables, name).replace("s3a://", "s3://", 1)
