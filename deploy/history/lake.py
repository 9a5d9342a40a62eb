"""The Delta tables as the commands about the past read them: with delta-rs, without Spark, of each file only the columns asked for."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pyarrow as pa
import pyarrow.dataset as ds
from deltalake import DeltaTable
from deltalake.exceptions import DeltaError, TableNotFoundError

from gateway.contracts import tables
from gateway.contracts.settings import Settings

# What a scan holds at a time: the rows of a receipt's table are a kilobyte each.
BATCH_ROWS = 8_192


class NoTableError(RuntimeError):
    """The table, or the version asked for, isn't there."""


def uri_of(settings: Settings, name: str) -> str:
    """A table's address as delta-rs spells it: Spark says s3a, delta-rs s3."""
    return tables.table_uri(settings.tables, name).replace("s3a://", "s3://", 1)


def open_table(settings: Settings, name: str, as_of: str | None = None) -> DeltaTable:
    """The table now, or as of a version (a small number) or a time (ISO 8601). Raises `NoTableError`."""
    uri = uri_of(settings, name)
    try:
        table = DeltaTable(uri)
        if as_of is not None:
            table.load_as_version(int(as_of) if as_of.isdigit() else instant_of(as_of))
    except TableNotFoundError as exc:
        raise NoTableError(f"there is no table {name} in {settings.tables}") from exc
    except (DeltaError, ValueError) as exc:
        raise NoTableError(f"the table {name} can't be read as of {as_of}: {exc}") from exc
    return table


def instant_of(text: str) -> datetime:
    """A time as people write it, UTC unless it names another zone. Raises `NoTableError`, which says how to write one."""
    try:
        at = datetime.fromisoformat(text)
    except ValueError as exc:
        raise NoTableError(f"--as-of takes a version or a time like 2026-08-08T12:00:00, not {text!r}") from exc
    return at if at.tzinfo else at.replace(tzinfo=UTC)


def rows_of(table: DeltaTable, columns: list[str], chosen: ds.Expression | None = None) -> list[dict[str, Any]]:
    """Few rows, as dictionaries. A column that the table of an earlier version lacks is None."""
    rows = table.to_pyarrow_dataset()
    held = [column for column in columns if column in rows.schema.names]
    found: list[dict[str, Any]] = rows.to_table(columns=held, filter=chosen).to_pylist()
    return [dict.fromkeys(columns) | row for row in found]


def schema_of(table: DeltaTable) -> pa.Schema:
    found: pa.Schema = table.to_pyarrow_dataset().schema
    return found
