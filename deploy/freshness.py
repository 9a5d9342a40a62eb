"""How fresh the tables are: for each row, when its commit appeared in the table's log minus when Kafka took the record.

Reads the Delta log and the data files of a table on a directory; asks neither Spark nor its metrics. The time of a commit is the
modification time of its log file: before that no reader sees the row.
"""

from __future__ import annotations

import json
import urllib.parse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq


@dataclass(frozen=True)
class Freshness:
    """Seconds, over `rows` rows."""

    rows: int
    p50_s: float
    max_s: float


def freshness_of(waits_s: npt.NDArray[np.float64]) -> Freshness:
    """Raises ValueError when there is no row: no figure is better than a wrong one."""
    if len(waits_s) == 0:
        raise ValueError("no row to measure freshness of")
    return Freshness(len(waits_s), float(np.median(waits_s)), float(waits_s.max()))


def table_freshness(table: Path, since_ms: int, *, key: str | None = None) -> Freshness:
    """Freshness of the rows that Kafka took at `since_ms` or later (column kafka_timestamp).

    `key` names the column that identifies a row in a table whose commits rewrite rows: its first appearance counts.
    """
    first: dict[object, float] = {}
    waits: list[npt.NDArray[np.float64]] = []
    for committed_ms, file in added_files(table):
        columns = pq.ParquetFile(file).read(["kafka_timestamp", *([key] if key else [])])
        arrived_ms = columns["kafka_timestamp"].cast("timestamp[ms]").cast("int64").to_numpy()
        recent = arrived_ms >= since_ms
        wait_s = (committed_ms - arrived_ms) / 1000.0
        if key is None:
            waits.append(wait_s[recent])
        else:
            for name, wait in zip(columns[key].filter(recent).to_pylist(), wait_s[recent], strict=True):
                first.setdefault(name, float(wait))
    return freshness_of(np.array(list(first.values())) if key else np.concatenate([*waits, np.zeros(0)]))


def added_files(table: Path) -> Iterator[tuple[float, Path]]:
    """(commit time in milliseconds since the epoch, data file) of each file that a commit added and that is still there."""
    for log in sorted((table / "_delta_log").glob("*.json")):
        committed_ms = log.stat().st_mtime * 1000.0
        for line in log.read_text().splitlines():
            add = json.loads(line).get("add")
            # Compaction moves rows without changing data.
            if add is None or not add["dataChange"]:
                continue
            file = table / urllib.parse.unquote(add["path"])
            if file.exists():
                yield committed_ms, file
