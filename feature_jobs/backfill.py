"""The backfill: features of every transaction of a past period, from silver, into the Delta table `features`.

As the gateway would have seen them, had each transaction been observed when it happened; labels count from when they were reported.
Called by `fraudgate backfill`. 100,000 rows take about a second.
"""

from __future__ import annotations

from dataclasses import dataclass

from deltalake import DeltaTable, write_deltalake
from deltalake.exceptions import TableNotFoundError

from feature_jobs.known_labels import read_labels
from feature_jobs.training_set import FINGERPRINT_KEY, NoHistoryError, commit_note, features_between, local, read_table
from gateway.contracts import tables
from gateway.contracts.features import FINGERPRINT
from gateway.contracts.settings import Settings
from gateway.contracts.transaction import FIELDS


class OtherFeaturesError(RuntimeError):
    """The table holds features of another definition. The message says what to do."""


@dataclass(frozen=True)
class Backfill:
    """What was written. `version` is the Delta version of the table at `uri`."""

    uri: str
    version: int
    rows: int
    from_ms: int
    to_ms: int


def backfill(settings: Settings, *, from_ms: int | None = None, to_ms: int | None = None) -> Backfill:
    """Replace the features of the transactions with event times in [from_ms, to_ms), by default of all, in one commit.

    Windows look back upon all of silver, however old. Done again, it gives the same rows. Raises `NoHistoryError`, `OtherFeaturesError`.
    """
    uri = tables.table_uri(settings.tables, tables.FEATURES)
    _same_definition(uri)
    silver = read_table(settings, tables.SILVER, list(FIELDS))
    if silver is None or silver.num_rows == 0:
        raise NoHistoryError("silver holds no transactions: send some while fraudgate jobs runs")
    silver = silver.sort_by([("event_time_ms", "ascending"), ("transaction_id", "ascending")])
    labels = read_labels(settings)
    first_ms = int(silver["event_time_ms"][0].as_py()) if from_ms is None else from_ms
    end_ms = int(silver["event_time_ms"][-1].as_py()) + 1 if to_ms is None else to_ms
    rows = features_between(silver, labels, first_ms, end_ms)
    if rows.num_rows == 0:
        raise NoHistoryError("silver holds no transaction of this period")
    # A period is replaced as a whole; the first commit makes the table.
    period = f"event_time_ms >= {first_ms} and event_time_ms < {end_ms}" if DeltaTable.is_deltatable(local(uri)) else None
    write_deltalake(local(uri), rows, mode="overwrite", predicate=period, commit_properties=commit_note(settings))
    return Backfill(uri, DeltaTable(local(uri)).version(), rows.num_rows, first_ms, end_ms)


def _same_definition(uri: str) -> None:
    try:
        notes = [str(commit.get("userMetadata", "")) for commit in DeltaTable(local(uri)).history()]
    except TableNotFoundError:
        return
    # Commits that change no row (compaction) say nothing.
    written_for = next((n.removeprefix(f"{FINGERPRINT_KEY}=") for n in notes if n.startswith(FINGERPRINT_KEY)), "")
    if written_for != FINGERPRINT:
        raise OtherFeaturesError(
            f"{uri} holds features {written_for or 'of unknown origin'}, this code computes {FINGERPRINT}: move the table away"
        )
