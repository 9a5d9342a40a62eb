"""Follows a Delta table commit by commit, without Spark: the rows that each version added, in order.

Reads the table's log one file at a time, so that a look costs a millisecond however many files the table has. Only for tables that are
appended to: commits that change rows are passed over.
"""

from __future__ import annotations

import json
from typing import Any
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.parquet as pq
from deltalake import DeltaTable
from deltalake.exceptions import DeltaError, TableNotFoundError
from deltalake.fs import DeltaStorageHandler
from pyarrow.fs import PyFileSystem


class Tail:
    """The table at `uri` (as delta-rs spells it). Its methods raise OSError, DeltaError or pyarrow.ArrowException when it can't be read."""

    def __init__(self, uri: str) -> None:
        self._uri = uri
        self._files: PyFileSystem | None = None

    def newest(self) -> int | None:
        """The newest version, None where there is no table. Reads the whole log: for the start only."""
        try:
            return int(DeltaTable(self._uri).version())
        except TableNotFoundError:
            return None

    def added(self, version: int, columns: list[str]) -> pa.Table | None:
        """Rows that `version` added, of those of `columns` that it has. None when there is no such commit: it is still to come, or its
        log was cleaned up."""
        if self._files is None:
            self._files = PyFileSystem(DeltaStorageHandler(self._uri))
        try:
            with self._files.open_input_stream(f"_delta_log/{version:020d}.json") as stream:
                actions: list[dict[str, Any]] = [json.loads(line) for line in stream.read().splitlines() if line]
        except FileNotFoundError:
            return None
        parts: list[pa.Table] = []
        # A commit that changes rows brings none: an erasure, or what its retention is over for.
        if any(a["remove"]["dataChange"] for a in actions if "remove" in a):
            return pa.table({})
        for action in actions:
            if (add := action.get("add")) is not None and add["dataChange"]:
                with self._files.open_input_file(unquote(add["path"])) as file:
                    held = pq.ParquetFile(file)
                    parts.append(held.read([c for c in columns if c in held.schema_arrow.names]))
        return pa.concat_tables(parts, promote_options="default") if parts else pa.table({})


READ_ERRORS = (OSError, DeltaError, pa.ArrowException)
