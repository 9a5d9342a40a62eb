"""Avro of any registered schema as dictionaries, and the ids that our own records are written with. For the case service's threads."""

from __future__ import annotations

import io
import json
from typing import Any

import fastavro

from gateway.contracts.registry import RegistryUnavailableError, SchemaRegistry
from gateway.contracts.topics import TOPICS
from gateway.contracts.wire import is_framed, unframe

SCHEMAS_MAX = 1000


class UnreadableError(ValueError):
    """The bytes are no record of the topic. The message names what kind of wrong it is, nothing of the bytes."""


class Schemas:
    """Asks the registry once for each id; its local copy stands in when the registry is down."""

    def __init__(self, registry: SchemaRegistry) -> None:
        self._registry = registry
        self._ids: dict[str, int] = {}
        self._writers: dict[int, Any] = {}
        self._readers = {name: fastavro.parse_schema(json.loads(topic.schema_text)) for name, topic in TOPICS.items()}

    def id_of(self, topic: str) -> int:
        """Raises `RegistryUnavailableError`."""
        if topic not in self._ids:
            self._ids[topic] = self._registry.id_of(topic)
        return self._ids[topic]

    def read(self, topic: str, value: bytes | None, *, plain: bool = False) -> dict[str, Any]:
        """A record's fields, in this code's schema; with `plain` also of JSON, whose values may then be anything.

        Raises `UnreadableError`, or `RegistryUnavailableError`: to be tried again.
        """
        if value is None:
            raise UnreadableError("no value")
        try:
            record: Any
            if is_framed(value):
                schema_id, payload = unframe(value)
                record = fastavro.schemaless_reader(io.BytesIO(payload), self._writer(schema_id), self._readers[topic])
            elif plain:
                record = json.loads(value)
            else:
                raise UnreadableError("not in wire format")  # noqa: TRY301
        except (RegistryUnavailableError, UnreadableError):
            raise
        except Exception as exc:  # noqa: BLE001
            # On broken bytes fastavro raises whatever its decoder runs into.
            raise UnreadableError(type(exc).__name__) from exc
        if not isinstance(record, dict):
            raise UnreadableError("no record")
        return record

    def _writer(self, schema_id: int) -> Any:
        if schema_id not in self._writers:
            parsed = fastavro.parse_schema(json.loads(self._registry.schema(schema_id)))
            if len(self._writers) >= SCHEMAS_MAX:
                self._writers.clear()
            self._writers[schema_id] = parsed
        return self._writers[schema_id]
