"""The training set: read from its Delta table at one version, checked against the feature contract, ordered by time.

Called by `fraudgate train`; reading 100,000 rows takes well under a second.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from deltalake import DeltaTable
from deltalake.exceptions import DeltaError, TableNotFoundError

from gateway.contracts.features import FEATURE_NAMES, FINGERPRINT
from gateway.contracts.tables import TRAINING_SET, table_uri
from model_export.errors import TrainingSetError

Floats = npt.NDArray[np.float32]
Bools = npt.NDArray[np.bool_]

ID_COLUMN = "transaction_id"
TIME_COLUMN = "event_time_ms"
LABEL_COLUMN = "is_fraud"
# The writer of the table may say in the commit's userMetadata (Spark's option of that name) which features it computed, as this
# prefix and the fingerprint; compared when it does.
FINGERPRINT_PREFIX = "fraudgate.feature_fingerprint="
# Keys of the same commit that say what the table was made from.
MADE_FROM_PREFIX = "fraudgate."
COUNTRY_COLUMN = "country"

ROWS_MIN = 500
FRAUDS_MIN = 40
GENUINE_MIN = 20


@dataclass(frozen=True, kw_only=True)
class TrainingSet:
    """Rows in the order of (event_time_ms, transaction_id). NaN is unknown; no value is infinite.

    `features` is (rows, len(FEATURE_NAMES)), `is_fraud` and `event_time_ms` are (rows,). `table` and `version` name the Delta
    table and the version it was read at, `made_from` what its commit says it was made from (fraudgate.as_of_ms,
    fraudgate.silver_version ...). `country` is (rows,) text, empty where unknown; None in tables that were written without it.
    """

    features: Floats
    is_fraud: Bools
    event_time_ms: npt.NDArray[np.int64]
    table: str
    version: int
    country: npt.NDArray[np.object_] | None = None
    made_from: dict[str, str] = field(default_factory=dict)

    @property
    def rows(self) -> int:
        return len(self.is_fraud)

    @property
    def frauds(self) -> int:
        return int(self.is_fraud.sum())


def read_training_set(tables: str, version: int | None = None) -> TrainingSet:
    """The table `training_set` under the setting `tables_uri`, at `version` or at its newest. Raises `TrainingSetError`."""
    uri = table_uri(tables, TRAINING_SET).replace("s3a://", "s3://", 1)
    try:
        table = DeltaTable(uri, version=version)
        found = table.version()
        # delta-rs numbers the history rightly only of a table that is opened at its newest version. Of a commit long gone nothing is said.
        history = DeltaTable(uri).history()
        commit: dict[str, Any] = next((c for c in history if c.get("version") == found), {})
        written_for = str(commit.get("userMetadata", ""))
        rows = table.to_pyarrow_table()
    except TableNotFoundError as exc:
        raise TrainingSetError(f"there is no training set at {uri}; write one with: fraudgate training-set") from exc
    except (DeltaError, OSError) as exc:
        at = "its newest version" if version is None else f"version {version}"
        raise TrainingSetError(f"the training set at {uri} can't be read at {at}: {exc}") from exc
    if written_for.startswith(FINGERPRINT_PREFIX) and written_for != FINGERPRINT_PREFIX + FINGERPRINT:
        raise TrainingSetError(
            f"version {found} of {uri} was written for features {written_for.removeprefix(FINGERPRINT_PREFIX)}, "
            f"this code computes {FINGERPRINT}; write it anew with: fraudgate training-set"
        )
    made_from = {key: str(value) for key, value in commit.items() if key.startswith(MADE_FROM_PREFIX)}
    return replace(training_set_of(rows, uri, found), made_from=made_from)


def training_set_of(rows: pa.Table, table: str, version: int) -> TrainingSet:
    """A training set from rows as the table holds them. Raises `TrainingSetError`."""
    _check_columns(rows.schema, table, version)
    where = f"version {version} of {table}"
    if rows.num_rows == 0:
        raise TrainingSetError(f"{where} has no rows: are there labelled transactions older than the label delay?")
    if rows.num_rows < ROWS_MIN:
        raise TrainingSetError(f"{where} has {rows.num_rows} rows; training needs {ROWS_MIN}")
    for name in (ID_COLUMN, TIME_COLUMN, LABEL_COLUMN):
        if rows[name].null_count:
            raise TrainingSetError(f"{where} has {rows[name].null_count} rows whose {name} is null")
    rows = rows.sort_by([(TIME_COLUMN, "ascending"), (ID_COLUMN, "ascending")])
    is_fraud = rows[LABEL_COLUMN].cast(pa.int8()).to_numpy().astype(bool)
    frauds = int(is_fraud.sum())
    if frauds < FRAUDS_MIN:
        raise TrainingSetError(f"{where} has {frauds} frauds among {len(is_fraud)} rows; training needs {FRAUDS_MIN}")
    if len(is_fraud) - frauds < GENUINE_MIN:
        raise TrainingSetError(f"{where} has {len(is_fraud) - frauds} genuine rows; training needs {GENUINE_MIN}")
    features = np.empty((rows.num_rows, len(FEATURE_NAMES)), np.float32)
    for i, name in enumerate(FEATURE_NAMES):
        features[:, i] = rows[name].cast(pa.float32()).to_numpy()
    infinite = np.isinf(features).any(axis=0)
    if infinite.any():
        names = ", ".join(np.array(FEATURE_NAMES)[infinite])
        raise TrainingSetError(f"{where} holds infinite values in {names}; unknown is NaN")
    return TrainingSet(
        features=features,
        is_fraud=is_fraud,
        event_time_ms=rows[TIME_COLUMN].cast(pa.int64()).to_numpy(),
        table=table,
        version=version,
        country=rows[COUNTRY_COLUMN].fill_null("").to_numpy() if COUNTRY_COLUMN in rows.schema.names else None,
    )


def _check_columns(schema: pa.Schema, table: str, version: int) -> None:
    """Raises `TrainingSetError` unless the floating-point columns are the contract's features, whatever their order."""
    missing = [name for name in (ID_COLUMN, TIME_COLUMN, LABEL_COLUMN, *FEATURE_NAMES) if name not in schema.names]
    unknown = [f.name for f in schema if pa.types.is_floating(f.type) and f.name not in FEATURE_NAMES]
    if missing or unknown:
        raise TrainingSetError(
            f"the columns of version {version} of {table} differ from the feature contract (fingerprint {FINGERPRINT}): "
            f"missing {_some(missing)}; unknown {_some(unknown)}; write it anew with: fraudgate training-set"
        )


def _some(names: list[str]) -> str:
    """At most five of `names`, for a message."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "") if names else "none"
