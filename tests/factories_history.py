"""Delta tables as the feature jobs write them, small, without Spark: receipts with their payloads, hashes and chain, and audit entries."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
from deltalake import CommitProperties, DeltaTable, write_deltalake

from deploy.history.payloads import column_of
from feature_jobs.lake import DDL, PARTITIONED_BY, PROPERTIES, STATISTICS
from gateway.contracts import tables
from gateway.contracts.chain import GENESIS, chain_of, content_sha256
from gateway.contracts.decision import Door, Outcome, Receipt
from gateway.contracts.features import ENTITIES, FEATURE_NAMES, FINGERPRINT, LABELLED
from gateway.contracts.settings import Settings
from gateway.contracts.topics import DECISIONS, TOPICS
from gateway.contracts.transaction import Transaction
from gateway.kafka.avro import encode_receipt, receipt_fields
from tests.unit.gateway.factories import NOW_MS, make_transaction

SCHEMA_ID = 3
_TYPES = {
    "string": pa.string(),
    "int": pa.int32(),
    "bigint": pa.int64(),
    "double": pa.float64(),
    "boolean": pa.bool_(),
    "binary": pa.binary(),
    "timestamp": pa.timestamp("us", "UTC"),
    "array<string>": pa.list_(pa.string()),
    "array<float>": pa.list_(pa.float32()),
    "array<bigint>": pa.list_(pa.int64()),
    "array<struct<key: string, value: binary>>": pa.list_(pa.struct([("key", pa.string()), ("value", pa.binary())])),
}


def schema_of(name: str) -> pa.Schema:
    """The table's columns as feature_jobs.lake declares them."""
    parts = re.split(r", (?![^<]*>)", DDL[name])
    return pa.schema([(part.split(" ", 1)[0], _TYPES[part.split(" ", 1)[1]]) for part in parts])


def make_receipt(t: Transaction, **changes: Any) -> Receipt:
    values: dict[str, Any] = {
        "transaction_id": t.transaction_id,
        "transaction": t,
        "door": Door.HTTP,
        "source_partition": None,
        "source_offset": None,
        "received_at_ms": t.event_time_ms,
        "decided_at_ms": t.event_time_ms + 5,
        "decision": Outcome.APPROVE,
        "risk_score": 10,
        "probability": 0.01,
        "reasons": [],
        "rule_hits": [],
        "degraded": [],
        "model_name": "fraudgate",
        "model_version": "1",
        "model_digest": "d" * 64,
        "route": "champion",
        "feature_fingerprint": FINGERPRINT,
        "features": [float("nan"), *([0.5] * (len(FEATURE_NAMES) - 1))],
        "observed_seq": [0] * len(ENTITIES),
        "label_changes": [0] * len(LABELLED),
        "tiles_age_ms": 1200,
        "policy_digest": "p" * 64,
        "code_version": "c",
        "admit_us": 1,
        "features_us": 2,
        "model_us": 3,
        "policy_us": 4,
        "routed_by": "only",
        "policy_decision": "",
        "propensity": 1.0,
    }
    known = {name: value for name, value in (values | changes).items() if name in Receipt.__struct_fields__}
    return Receipt(**known)


def make_receipts(count: int, **changes: Any) -> list[Receipt]:
    """Of payments t0, t1 ... a second apart, of three customers by turns."""
    return [
        make_receipt(
            make_transaction(f"t{i}", customer_id=f"customer-{i % 3}", card_id=f"card-{i % 3}", event_time_ms=NOW_MS + i * 1000),
            **changes,
        )
        for i in range(count)
    ]


def keep_schema(settings: Settings) -> None:
    """The local copy of the registry's answers, so that no registry is asked."""
    settings.schemas_path.mkdir(parents=True, exist_ok=True)
    (settings.schemas_path / f"id-{SCHEMA_ID}.json").write_text(json.dumps({"schema": TOPICS[DECISIONS].schema_text}))


def decision_rows(receipts: Sequence[Receipt], partitions: int = 2, batch_rows: int = 5) -> list[dict[str, Any]]:
    """Rows of the table, dealt out over partitions, a batch of silver for every `batch_rows` of them."""
    heads = dict.fromkeys(range(partitions), GENESIS)
    rows = []
    for i, receipt in enumerate(receipts):
        partition, offset, batch_id = i % partitions, i // partitions, i // batch_rows
        at = datetime.fromtimestamp(receipt.decided_at_ms / 1000, UTC)
        payload = encode_receipt(receipt)
        content = content_sha256(SCHEMA_ID, partition, offset, round(at.timestamp() * 1_000_000), batch_id, payload)
        [heads[partition]] = chain_of(heads[partition], [content])
        row: dict[str, Any] = {
            "payload": payload,
            "schema_id": SCHEMA_ID,
            "content_sha256": content,
            "chain_sha256": heads[partition],
            "erased_at_ms": None,
            "partition": partition,
            "offset": offset,
            "kafka_timestamp": at,
            "batch_id": batch_id,
        }
        said = receipt_fields(payload)
        row |= {name: column_of(said, name) for name in schema_of(tables.DECISIONS).names if name not in row}
        rows.append(row)
    return rows


def write_rows(settings: Settings, name: str, rows: Sequence[dict[str, Any]], note: str | None = None) -> None:
    """Append, with the properties that the feature jobs give the table."""
    schema = schema_of(name)
    write_deltalake(
        tables.table_uri(settings.tables, name),
        pa.Table.from_pylist(list(rows), schema),
        mode="append",
        partition_by=list(PARTITIONED_BY.get(name, ())) or None,
        configuration=dict(PROPERTIES) | {"delta.dataSkippingStatsColumns": STATISTICS[name]},
        commit_properties=None if note is None else CommitProperties(custom_metadata={"userMetadata": note}),
    )


def write_decisions(settings: Settings, receipts: Sequence[Receipt], partitions: int = 2) -> list[dict[str, Any]]:
    """The table as silver leaves it: the rows in the order of offsets, and the newest of each partition noted in the log."""
    keep_schema(settings)
    rows = decision_rows(receipts, partitions)
    heads = {str(row["partition"]): (row["offset"], row["chain_sha256"].hex()) for row in rows}
    write_rows(settings, tables.DECISIONS, rows, json.dumps({"query": "silver", "batch_id": 0, "heads": heads}))
    return rows


def write_many_decisions(settings: Settings, count: int, chunk: int = 50_000, seed: int = 1) -> None:
    """A table of `count` receipts in chunks, of as many random payments, one after the other: ids "m0000000", "m0000001" ...

    Features are drawn from a thousand rows, so that it is made in seconds; the chain is whole.
    """
    keep_schema(settings)
    rnd = np.random.default_rng(seed)
    pool = [
        make_receipt(
            make_transaction(
                "m0000000", card_id=f"card-{i}", customer_id=f"customer-{i}", amount_minor=int(rnd.integers(1, 1_000_000))
            ),
            features=rnd.normal(size=len(FEATURE_NAMES)).astype(np.float32).tolist(),
        )
        for i in range(1_000)
    ]
    templates = [encode_receipt(receipt) for receipt in pool]
    schema = schema_of(tables.DECISIONS)
    columns = pa.Table.from_pylist([dict.fromkeys(schema.names) | {"transaction_id": "", **_columns(t)} for t in templates], schema)
    chain = GENESIS
    for first in range(0, count, chunk):
        ids = [f"m{i:07d}" for i in range(first, min(first + chunk, count))]
        chosen = rnd.integers(0, len(pool), len(ids))
        at_us = [(NOW_MS + i) * 1000 for i in range(first, first + len(ids))]
        payloads = [templates[c].replace(b"m0000000", one.encode()) for c, one in zip(chosen.tolist(), ids, strict=True)]
        places = zip(range(first, first + len(ids)), at_us, payloads, strict=True)
        contents = [content_sha256(SCHEMA_ID, 0, offset, us, first // chunk, payload) for offset, us, payload in places]
        links = chain_of(chain, contents)
        chain = links[-1]
        values = {
            "transaction_id": pa.array(ids),
            "payload": pa.array(payloads, pa.binary()),
            "schema_id": pa.array([SCHEMA_ID] * len(ids), pa.int32()),
            "content_sha256": pa.array(contents, pa.binary()),
            "chain_sha256": pa.array(links, pa.binary()),
            "partition": pa.array([0] * len(ids), pa.int32()),
            "offset": pa.array(range(first, first + len(ids)), pa.int64()),
            "kafka_timestamp": pa.array(at_us, pa.timestamp("us", "UTC")),
            "batch_id": pa.array([first // chunk] * len(ids), pa.int64()),
        }
        rows = columns.take(pa.array(chosen))
        for name, column in values.items():
            rows = rows.set_column(schema.get_field_index(name), schema.field(name), column)
        write_deltalake(
            tables.table_uri(settings.tables, tables.DECISIONS),
            rows,
            mode="append",
            configuration=dict(PROPERTIES) | {"delta.dataSkippingStatsColumns": STATISTICS[tables.DECISIONS]},
        )


def _columns(payload: bytes) -> dict[str, Any]:
    said = receipt_fields(payload)
    kept = {
        "payload",
        "schema_id",
        "content_sha256",
        "chain_sha256",
        "erased_at_ms",
        "partition",
        "offset",
        "kafka_timestamp",
        "batch_id",
    }
    return {name: column_of(said, name) for name in schema_of(tables.DECISIONS).names if name not in kept}


def rewrite_decisions(settings: Settings, rows: Sequence[dict[str, Any]]) -> None:
    """Put other rows in the table's place: what somebody does who tampers with its files."""
    write_deltalake(
        tables.table_uri(settings.tables, tables.DECISIONS),
        pa.Table.from_pylist(list(rows), schema_of(tables.DECISIONS)),
        mode="overwrite",
    )


def read_rows(settings: Settings, name: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = DeltaTable(tables.table_uri(settings.tables, name)).to_pyarrow_table().to_pylist()
    return rows


def amended(receipt: Receipt, **changes: Any) -> Receipt:
    return msgspec.structs.replace(receipt, **changes)
