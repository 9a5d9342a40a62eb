"""Records of the topics as bytes: Avro in Confluent's wire format, or JSON; and back, for the topics that accounting reads."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from typing import Any

import fastavro
import msgspec

from gateway.contracts.registry import RegistryUnavailableError, SchemaRegistry, UnknownSchemaError
from gateway.contracts.topics import TOPICS
from gateway.contracts.wire import frame, is_framed, unframe
from loadtest.events import LoadError

Encode = Callable[[msgspec.Struct], bytes]

_json = msgspec.json.Encoder()


def json_encoder() -> Encode:
    """JSON with the fields in declared order."""
    return _json.encode


def avro_encoder(topic: str, registry: SchemaRegistry) -> Encode:
    """Avro by the topic's schema as this code has it, under the id that the registry gives. Raises `LoadError` without one."""
    try:
        schema_id = registry.id_of(topic)
    except RegistryUnavailableError as exc:
        raise LoadError(
            f"the schema registry doesn't answer ({exc}): start it with fraudgate up, or set FRAUDGATE_REGISTRY_URL or"
            " FRAUDGATE_REGISTRY_PORT, or send --format json"
        ) from exc
    schema = fastavro.parse_schema(json.loads(TOPICS[topic].schema_text))

    def encode(record: msgspec.Struct) -> bytes:
        out = io.BytesIO()
        fastavro.schemaless_writer(out, schema, msgspec.structs.asdict(record))
        return frame(schema_id, out.getvalue())

    return encode


class UnreadableError(ValueError):
    """The bytes are neither Avro of a schema the registry knows nor a JSON object."""


class Reader:
    """Decodes values of a topic to `fields` of them. Schemas are asked for once and kept."""

    def __init__(self, topic: str, registry: SchemaRegistry, fields: tuple[str, ...]) -> None:
        wanted = json.loads(TOPICS[topic].schema_text)
        wanted["fields"] = [f for f in wanted["fields"] if f["name"] in fields]
        # A reader's schema of these fields alone: fastavro skips the others instead of building them.
        self._wanted = fastavro.parse_schema(wanted)
        self._registry = registry
        self._writers: dict[int, Any] = {}

    def read(self, value: bytes) -> dict[str, Any]:
        """Raises `UnreadableError`, or `RegistryUnavailableError` for a schema that can't be asked for."""
        try:
            if is_framed(value):
                schema_id, payload = unframe(value)
                record = fastavro.schemaless_reader(io.BytesIO(payload), self._writer(schema_id), self._wanted)
            else:
                record = msgspec.json.decode(value)
        # fastavro raises whatever the broken bytes lead it to (EOFError, IndexError, struct.error, UnicodeDecodeError ...).
        except (RegistryUnavailableError, UnreadableError):
            raise
        except Exception as exc:  # noqa: BLE001
            raise UnreadableError(type(exc).__name__) from exc
        if not isinstance(record, dict):
            raise UnreadableError("no record")
        return record

    def _writer(self, schema_id: int) -> Any:
        if schema_id not in self._writers:
            try:
                self._writers[schema_id] = fastavro.parse_schema(json.loads(self._registry.schema(schema_id)))
            except UnknownSchemaError as exc:
                raise UnreadableError(f"schema {schema_id}") from exc
        return self._writers[schema_id]
