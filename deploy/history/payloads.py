"""Receipts out of their Avro records as the table `decisions` keeps them, whatever version of the schema wrote them."""

from __future__ import annotations

import io
import json
from functools import lru_cache
from typing import Any

import fastavro

from gateway.contracts.registry import RegistryUnavailableError, SchemaRegistry, UnknownSchemaError
from gateway.contracts.settings import Settings
from gateway.contracts.topics import DECISIONS, TOPICS
from gateway.contracts.transaction import FIELDS

_READER: Any = fastavro.parse_schema(json.loads(TOPICS[DECISIONS].schema_text))


class UnreadableError(ValueError):
    """The bytes are no receipt of their schema."""


class NoSchemaError(RuntimeError):
    """Neither the local copy nor the registry knows the schema that a receipt was written with."""


class Payloads:
    """Writers' schemas by their ids: from the local copy of the registry's answers, or else from the registry."""

    def __init__(self, settings: Settings) -> None:
        self._registry = SchemaRegistry(settings.registry, settings.schemas_path)
        self._writer = lru_cache(maxsize=256)(self._find)

    def _find(self, schema_id: int) -> Any:
        try:
            return fastavro.parse_schema(json.loads(self._registry.schema(schema_id)))
        except (RegistryUnavailableError, UnknownSchemaError, ValueError, fastavro.schema.SchemaParseException) as exc:
            raise NoSchemaError(f"the schema {schema_id} of receipts can't be had: {exc}") from exc

    def receipt(self, schema_id: int, payload: bytes) -> dict[str, Any]:
        """The fields of a receipt, those that its writer didn't know by their defaults. Raises `UnreadableError`, `NoSchemaError`."""
        writer = self._writer(schema_id)
        stream = io.BytesIO(payload)
        try:
            found: Any = fastavro.schemaless_reader(stream, writer, None if writer == _READER else _READER)
        except Exception as exc:  # noqa: BLE001
            # On bytes that were tampered with fastavro raises whatever its decoder runs into.
            raise UnreadableError(f"{type(exc).__name__}") from exc
        if stream.tell() != len(payload) or not isinstance(found, dict):
            raise UnreadableError("bytes are left over")
        return found


def column_of(receipt: dict[str, Any], name: str) -> Any:
    """What the feature jobs write into the column `name` of a receipt's row (feature_jobs.parse.receipt_columns)."""
    if name == "policy_decision":
        return receipt[name] or receipt["decision"]
    return receipt[name] if name in receipt else receipt["transaction"][name]


RECEIPT_COLUMNS: frozenset[str] = frozenset(field["name"] for field in _READER["fields"]) - {"transaction"} | frozenset(FIELDS)
