"""What an erasure leaves of a receipt, and how the audit knows it from a receipt that somebody tampered with.

An entry of the table `audit` names each erased row by its place, with a digest of what was left of it. Written by `fraudgate erase`, read
by `fraudgate audit`. The entry doesn't name the customer.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.dataset as ds

from deploy.history.lake import NoTableError, open_table, rows_of
from gateway.contracts import tables
from gateway.contracts.settings import Settings

ERASED = "customer_erased"
# Of `decisions`: what is emptied. The rest says what was decided, by what, and when.
ERASED_COLUMNS = (
    *("event_time_ms", "card_id", "customer_id", "merchant_id", "device_id", "ip", "card_bin"),
    *("features", "observed_seq", "label_changes", "payload"),
)
_KEPT_DIGEST_BYTES = 16


@dataclass(frozen=True)
class Erasures:
    """By (partition, offset) of each erased row: when it was erased, and the digest of what was left."""

    rows: dict[tuple[int, int], tuple[int, str]] = field(default_factory=dict)


def erasures_of(settings: Settings) -> Erasures:
    """All that the table `audit` knows of."""
    try:
        table = open_table(settings, tables.AUDIT)
    except NoTableError:
        return Erasures()
    found: dict[tuple[int, int], tuple[int, str]] = {}
    for entry in rows_of(table, ["at_ms", "detail"], ds.field("action") == ERASED):
        for partition, offset, digest in json.loads(entry["detail"])["rows"]:
            found[partition, offset] = (entry["at_ms"], digest)
    return Erasures(found)


def kept_digest(rows: pa.RecordBatch | pa.Table) -> list[str]:
    """A digest of everything that an erasure leaves of each row, as hexadecimal. Columns of a later version don't count while null."""
    names = sorted(name for name in rows.schema.names if name not in ERASED_COLUMNS and name != "erased_at_ms")
    found = []
    for row in rows.select(names).to_pylist():
        kept: dict[str, Any] = {name: _plain(value) for name, value in row.items() if value is not None}
        digest = hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()
        found.append(digest[: 2 * _KEPT_DIGEST_BYTES])
    return found


def _plain(value: Any) -> Any:
    return value if isinstance(value, str | int | float | bool | list) else value.hex() if isinstance(value, bytes) else str(value)
