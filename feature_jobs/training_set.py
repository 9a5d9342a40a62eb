"""The training set: features as of each transaction, labels as known at a given time, as one version of a Delta table.

Reads silver and labels with delta-rs, computes with the offline engine, needs no Spark. Called by `fraudgate training-set` and
`fraudgate train`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from deltalake import CommitProperties, DeltaTable, write_deltalake
from deltalake.exceptions import TableNotFoundError

from feature_jobs.known_labels import label_changes, read_labels, standing
from feature_jobs.offline import EntityColumns, History, offline_features
from gateway.contracts import tables
from gateway.contracts.features import ENTITIES, FEATURE_NAMES, FINGERPRINT, RequestColumns
from gateway.contracts.layout import dim_hash
from gateway.contracts.settings import Settings
from gateway.contracts.transaction import CHANNELS, FIELDS

DAY_MS = 86_400_000
LABEL_DELAY_DAYS = 7
FINGERPRINT_KEY = "fraudgate.feature_fingerprint"


class NoHistoryError(RuntimeError):
    """There is nothing to make a training set of. The message says what is missing."""


@dataclass(frozen=True)
class TrainingSet:
    """What was written. `version` is the Delta version of the table at `uri`."""

    uri: str
    version: int
    rows: int
    frauds: int
    from_ms: int
    to_ms: int
    as_of_ms: int


def write_training_set(
    settings: Settings,
    *,
    from_ms: int | None = None,
    to_ms: int | None = None,
    as_of_ms: int | None = None,
    label_delay_days: int = LABEL_DELAY_DAYS,
) -> TrainingSet:
    """Write transactions with event times in [from_ms, to_ms) whose labels had `label_delay_days` to arrive by `as_of_ms`.

    Features see all of silver before each transaction, however old. Of a transaction's labels known at `as_of_ms` the one that stands
    (contracts.label) counts; without one it is genuine. `as_of_ms` is by default the newest event time in silver. Raises `NoHistoryError`.
    """
    silver = read_table(settings, tables.SILVER, list(FIELDS))
    if silver is None or silver.num_rows == 0:
        raise NoHistoryError("silver holds no transactions: send some (fraudgate simulate --history) while fraudgate jobs runs")
    silver = silver.sort_by([("event_time_ms", "ascending"), ("transaction_id", "ascending")])
    t_ms = _ints(silver["event_time_ms"])
    as_of_ms = int(t_ms[-1]) if as_of_ms is None else as_of_ms
    matured_ms = as_of_ms - label_delay_days * DAY_MS
    first_ms = int(t_ms[0]) if from_ms is None else from_ms
    end_ms = matured_ms if to_ms is None else min(to_ms, matured_ms)
    chosen = (t_ms >= first_ms) & (t_ms < end_ms)
    if not chosen.any():
        raise NoHistoryError(f"no transaction in silver is at least {label_delay_days} days older than the labels' as-of time")
    labels = read_labels(settings)
    rows = features_between(silver, labels, first_ms, end_ms)
    is_fraud = _labels(labels, rows["transaction_id"], as_of_ms)
    rows = rows.append_column("is_fraud", pa.array(is_fraud))
    # No feature: models are judged by country as well.
    rows = rows.append_column("country", silver.filter(pa.array(chosen))["country"])
    uri = tables.table_uri(settings.tables, tables.TRAINING_SET)
    write_deltalake(
        local(uri),
        rows,
        mode="overwrite",
        schema_mode="overwrite",
        commit_properties=commit_note(settings, as_of_ms=as_of_ms, end_ms=end_ms),
    )
    version = DeltaTable(local(uri)).version()
    return TrainingSet(uri, version, rows.num_rows, int(is_fraud.sum()), first_ms, end_ms, as_of_ms)


def features_between(silver: pa.Table, labels: pa.Table | None, first_ms: int, end_ms: int) -> pa.Table:
    """transaction_id, event_time_ms and a column for each feature of the transactions with event times in [first_ms, end_ms).

    `silver` is sorted by (event_time_ms, transaction_id) and holds all that the windows look back upon.
    """
    t_ms = _ints(silver["event_time_ms"])
    known = silver.filter(pa.array(t_ms < end_ms))
    chosen = t_ms[: known.num_rows] >= first_ms
    features = offline_features(history_of(known, labels))[chosen]
    rows = known.filter(pa.array(chosen))
    columns: dict[str, pa.Array | pa.ChunkedArray] = {name: rows[name] for name in ("transaction_id", "event_time_ms")}
    columns |= {name: pa.array(features[:, i], pa.float32()) for i, name in enumerate(FEATURE_NAMES)}
    return pa.table(columns)


def commit_note(settings: Settings, **values: int) -> CommitProperties:
    """What a commit says of the features it holds: their fingerprint, and what they were made from.

    model_export reads the fingerprint alone; it is the whole of userMetadata.
    """
    made_from = {
        f"fraudgate.{name}_version": str(version)
        for name in (tables.SILVER, tables.LABELS)
        if (version := table_version(settings, name)) is not None
    }
    made_from |= {f"fraudgate.{name}": str(value) for name, value in values.items()}
    return CommitProperties(custom_metadata={"userMetadata": f"{FINGERPRINT_KEY}={FINGERPRINT}", **made_from})


def table_version(settings: Settings, name: str) -> int | None:
    """The newest version of a table, None when it doesn't exist."""
    try:
        return int(DeltaTable(local(tables.table_uri(settings.tables, name))).version())
    except TableNotFoundError:
        return None


def history_of(silver: pa.Table, labels: pa.Table | None = None) -> History:
    """Columns for the offline engine from rows of silver sorted by (event_time_ms, transaction_id).

    `labels` has known_labels.COLUMNS: each counts for features from the time it was reported.
    """
    country, card_country = silver["country"], silver["card_country"]
    request = RequestColumns(
        t_ms=_ints(silver["event_time_ms"]),
        amount_minor=_ints(silver["amount_minor"]),
        channel=_floats(pc.index_in(silver["channel"], pa.array(CHANNELS))),
        mcc=_floats(pc.cast(silver["mcc"], pa.int64())),
        cross_border=_floats(pc.not_equal(card_country, country)),
        latitude=_floats(silver["latitude"]),
        longitude=_floats(silver["longitude"]),
        country=_dim_hashes(country).astype(np.float64),
    )
    hashes = {name: _dim_hashes(silver[name]) for name in {dim for e in ENTITIES for dim in e.dims}}
    entities = tuple(
        EntityColumns(codes_of(silver[e.field])[0], hashes[e.dim_a], hashes[e.dim_b], hashes[e.dim_c]) for e in ENTITIES
    )
    changes = None if labels is None else label_changes(silver["transaction_id"], labels)
    return History(request, entities, tuple(changes if e.labelled else None for e in ENTITIES))


def read_table(settings: Settings, name: str, columns: list[str], where: pc.Expression | None = None) -> pa.Table | None:
    """Columns of a table as it is now, None when it doesn't exist; of the rows for which `where` holds."""
    try:
        return DeltaTable(local(tables.table_uri(settings.tables, name))).to_pyarrow_table(columns=columns, filters=where)
    except TableNotFoundError:
        return None


def _labels(labels: pa.Table | None, ids: pa.ChunkedArray, as_of_ms: int) -> npt.NDArray[np.bool_]:
    """For each transaction, whether what stands of its labels at `as_of_ms` says fraud."""
    known = {} if labels is None else standing(labels, as_of_ms)
    return np.array([known.get(i, False) for i in ids.to_pylist()], bool)


def local(uri: str) -> str:
    """A table's address as delta-rs spells it: Spark says s3a, delta-rs s3."""
    return uri.replace("s3a://", "s3://", 1)


def _ints(column: pa.ChunkedArray) -> npt.NDArray[np.int64]:
    out: npt.NDArray[np.int64] = column.to_numpy().astype(np.int64)
    return out


def _floats(column: pa.ChunkedArray) -> npt.NDArray[np.float64]:
    """NaN for null; booleans as 0 and 1."""
    out: npt.NDArray[np.float64] = pc.cast(column, pa.float64()).to_numpy(zero_copy_only=False).astype(np.float64)
    return out


def codes_of(column: pa.ChunkedArray) -> tuple[npt.NDArray[np.int64], list[str]]:
    """A number for each value, -1 for null, and the values by number."""
    encoded = column.combine_chunks().dictionary_encode()
    if isinstance(encoded, pa.ChunkedArray):
        encoded = encoded.combine_chunks()
    codes = pc.fill_null(encoded.indices, -1).to_numpy(zero_copy_only=False).astype(np.int64)
    return codes, encoded.dictionary.to_pylist()


def _dim_hashes(column: pa.ChunkedArray) -> npt.NDArray[np.uint16]:
    """`layout.dim_hash` of each value; each distinct value is hashed once."""
    codes, values = codes_of(column)
    hashes = np.array([dim_hash(v) for v in values] + [dim_hash(None)], np.uint16)
    return hashes[codes]
