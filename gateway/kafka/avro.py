"""Avro in and out: the records of our topics as bytes, and transactions from bytes of any known schema version.

The transaction and receipt writers are spelled out by hand after their schemas, since they run for each decision: a receipt costs
about 10 us here and 22 us with fastavro (tests/unit/gateway/kafka/test_avro.py holds the two together).
"""

from __future__ import annotations

import asyncio
import io
import json
import logging
import struct
import time
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

import fastavro
import msgspec

from gateway.contracts.decision import ModelRef, Receipt
from gateway.contracts.reasons import Refusal
from gateway.contracts.registry import RegistryUnavailableError, SchemaRegistry, UnknownSchemaError
from gateway.contracts.topics import ALERTS, QUARANTINE, TOPICS, TRANSACTIONS
from gateway.contracts.transaction import MESSAGE_BYTES_MAX, RefusedError, Transaction, decode_json, from_fields
from gateway.contracts.wire import HEADER, is_framed, unframe

log = logging.getLogger(__name__)

# How long an answer "no such schema" is believed, and how many such ids are remembered.
UNKNOWN_ID_TTL_S = 30.0
UNKNOWN_IDS_MAX = 4096

_double = struct.Struct("<d").pack


def encode_long(n: int) -> bytes:
    """Avro's int and long: zigzag, then 7 bits a byte, the lowest first."""
    n = (n << 1) ^ (n >> 63)
    if _TIME_LEAST <= n < _TIME_MOST:
        # Times since the epoch in milliseconds, from 1970-07 to 2039: the commonest of the long ones.
        return bytes(
            (n & 0x7F | 0x80, n >> 7 & 0x7F | 0x80, n >> 14 & 0x7F | 0x80, n >> 21 & 0x7F | 0x80, n >> 28 & 0x7F | 0x80, n >> 35)
        )
    out = bytearray()
    while n > 0x7F:
        out.append(n & 0x7F | 0x80)
        n >>= 7
    out.append(n)
    return bytes(out)


_TIME_LEAST, _TIME_MOST = 1 << 35, 1 << 42
_SMALL = [encode_long(n) for n in range(4096)]
_NULL, _SECOND, _END = b"\0", b"\2", b"\0"


def encode_text(value: str) -> bytes:
    raw = value.encode()
    size = len(raw)
    return (_SMALL[size] if size < len(_SMALL) else encode_long(size)) + raw


def encode_text_or_null(value: str | None) -> bytes:
    return _NULL if value is None else _SECOND + encode_text(value)


def _long_or_null(value: int | None) -> bytes:
    return _NULL if value is None else _SECOND + encode_long(value)


def _double_or_null(value: float | None) -> bytes:
    return _NULL if value is None else _SECOND + _double(value)


def encode_texts(values: Sequence[str]) -> bytes:
    return _END if not values else _SMALL[len(values)] + b"".join([encode_text(v) for v in values]) + _END


@lru_cache(maxsize=64)
def _known(value: str) -> bytes:
    """For texts that repeat in every receipt."""
    return encode_text(value)


@lru_cache(maxsize=8)
def _floats(n: int) -> struct.Struct:
    return struct.Struct(f"<{n}f")


def encode_transaction(t: Transaction) -> bytes:
    """The record of schemas/transaction.avsc, which is also the `transaction` of a receipt."""
    return b"".join(
        (
            encode_text(t.transaction_id),
            encode_long(t.event_time_ms),
            encode_text(t.card_id),
            encode_text(t.customer_id),
            encode_text(t.merchant_id),
            encode_long(t.amount_minor),
            encode_text(t.currency),
            encode_text(t.channel),
            encode_text(t.mcc),
            encode_text(t.country),
            encode_text_or_null(t.device_id),
            encode_text_or_null(t.ip),
            encode_text_or_null(t.card_bin),
            encode_text_or_null(t.card_country),
            _double_or_null(t.latitude),
            _double_or_null(t.longitude),
        )
    )


def encode_receipt(r: Receipt) -> bytes:
    """The record of schemas/decision.avsc."""
    return b"".join(
        (
            encode_text(r.transaction_id),
            encode_transaction(r.transaction),
            _known(r.door),
            _long_or_null(r.source_partition),
            _long_or_null(r.source_offset),
            encode_long(r.received_at_ms),
            encode_long(r.decided_at_ms),
            _known(r.decision),
            encode_long(r.risk_score),
            _double_or_null(r.probability),
            encode_texts(r.reasons),
            encode_texts(r.rule_hits),
            encode_texts(r.degraded),
            encode_text_or_null(r.model_name),
            encode_text_or_null(r.model_version),
            encode_text_or_null(r.model_digest),
            encode_text_or_null(r.route),
            _known(r.feature_fingerprint),
            _SMALL[len(r.features)],
            _floats(len(r.features)).pack(*r.features),
            _END if r.features else b"",
            _SMALL[len(r.observed_seq)],
            *[encode_long(s) for s in r.observed_seq],
            _END if r.observed_seq else b"",
            _SMALL[len(r.label_changes)],
            *[encode_long(n) for n in r.label_changes],
            _END if r.label_changes else b"",
            _long_or_null(r.tiles_age_ms),
            _known(r.policy_digest),
            _known(r.code_version),
            encode_long(r.admit_us),
            encode_long(r.features_us),
            encode_long(r.model_us),
            encode_long(r.policy_us),
            _known(r.routed_by),
            _known(r.policy_decision),
            _double(r.propensity),
            encode_texts(r.list_hits),
            encode_texts(r.shadow_hits),
            encode_texts(r.rule_errors),
            encode_long(r.lists_version),
        )
    )


_parsed: dict[str, Any] = {name: fastavro.parse_schema(json.loads(TOPICS[name].schema_text)) for name in TOPICS}
TRANSACTION_NAME = _parsed[TRANSACTIONS]["name"]


def encode(topic: str, record: dict[str, Any]) -> bytes:
    """Any record of a topic, by its schema. For what is rare."""
    out = io.BytesIO()
    fastavro.schemaless_writer(out, _parsed[topic], record)
    return out.getvalue()


def encode_shadow_scores(
    model: ModelRef, digest: str, ids: Sequence[str], times_ms: Sequence[int], probability: Sequence[float], now_ms: int
) -> Iterator[bytes]:
    """Records of schemas/shadow_score.avsc, one for each transaction. 2 us each."""
    of_model = encode_text(model.name) + encode_text(model.version) + encode_text(digest)
    now = encode_long(now_ms)
    for transaction_id, t_ms, p in zip(ids, times_ms, probability, strict=True):
        yield encode_text(transaction_id) + encode_long(t_ms) + of_model + _double(p) + now


def encode_quarantined(record: dict[str, Any]) -> bytes:
    return encode(QUARANTINE, record)


def encode_alert(record: dict[str, Any]) -> bytes:
    return encode(ALERTS, record)


class SchemaBook:
    """Schema ids: ours by topic, for writing, and those of others by id, for reading. Asks the registry off the event loop."""

    def __init__(self, registry: SchemaRegistry) -> None:
        self._registry = registry
        self._ids: dict[str, int] = {}
        self._writers: dict[int, Any] = {}
        self._unknown: dict[int, float] = {}

    @property
    def complete(self) -> bool:
        return len(self._ids) == len(TOPICS)

    def id_of(self, topic: str) -> int:
        """The id that records of `topic` are written with. Only once `complete`."""
        return self._ids[topic]

    async def resolve(self) -> None:
        """Learn the ids of our topics. Raises `RegistryUnavailableError` when neither registry nor local copy knows them."""
        for topic in TOPICS:
            if topic not in self._ids:
                self._ids[topic] = await asyncio.to_thread(self._registry.id_of, topic)

    async def learn(self, values: list[bytes]) -> None:
        """Look up the schema ids that `values` name and nobody has asked for lately."""
        for schema_id in {unframe(v)[0] for v in values if is_framed(v) and len(v) > 4}:
            if schema_id in self._writers or time.monotonic() < self._unknown.get(schema_id, 0.0):
                continue
            await self._look_up(schema_id)

    async def _look_up(self, schema_id: int) -> None:
        try:
            text = await asyncio.to_thread(self._registry.schema, schema_id)
            parsed = fastavro.parse_schema(json.loads(text))
        except UnknownSchemaError:
            self._reject(schema_id)
            return
        except (RegistryUnavailableError, fastavro.schema.SchemaParseException, fastavro.schema.UnknownType, ValueError) as exc:
            log.warning("registry: schema %d can't be had: %s", schema_id, exc)
            self._reject(schema_id)
            return
        if not isinstance(parsed, dict) or parsed.get("name") != TRANSACTION_NAME:
            self._reject(schema_id)
            return
        self._writers[schema_id] = parsed

    def _reject(self, schema_id: int) -> None:
        if len(self._unknown) >= UNKNOWN_IDS_MAX:
            self._unknown.clear()
        self._unknown[schema_id] = time.monotonic() + UNKNOWN_ID_TTL_S

    def payload_of(self, value: bytes | None) -> bytes:
        """The record of a Kafka value that was written with our own schema, empty for any other."""
        if value is None or not is_framed(value) or len(value) > MESSAGE_BYTES_MAX or len(value) < HEADER.size:
            return b""
        schema_id, payload = unframe(value)
        return payload if schema_id == self._ids.get(TRANSACTIONS) else b""

    def decode_transaction(self, value: bytes | None, now_ms: int) -> Transaction:
        """The transaction of a Kafka record, Avro or JSON by its first byte. Raises `RefusedError`.

        An Avro record is read with the schema it names and projected on ours, so that a newer schema's extra fields are left out.
        """
        if value is None:
            raise RefusedError(Refusal.MALFORMED_JSON)
        if not is_framed(value):
            return decode_json(value, now_ms)
        if len(value) > MESSAGE_BYTES_MAX:
            raise RefusedError(Refusal.TOO_LARGE)
        try:
            schema_id, payload = unframe(value)
        except ValueError as exc:
            raise RefusedError(Refusal.MALFORMED_AVRO) from exc
        writer = self._writers.get(schema_id)
        if writer is None:
            raise RefusedError(Refusal.UNKNOWN_SCHEMA_ID)
        stream = io.BytesIO(payload)
        try:
            fields: Any = fastavro.schemaless_reader(stream, writer, _parsed[TRANSACTIONS])
        except Exception as exc:  # noqa: BLE001
            # On hostile bytes fastavro raises whatever its decoder runs into.
            raise RefusedError(_avro_refusal(exc)) from exc
        if stream.tell() != len(payload) or not isinstance(fields, dict):
            raise RefusedError(Refusal.MALFORMED_AVRO)
        return from_fields(fields, now_ms)


def _avro_refusal(exc: Exception) -> Refusal:
    return Refusal.NOT_UTF8 if isinstance(exc, UnicodeDecodeError) else Refusal.MALFORMED_AVRO


def receipt_fields(payload: bytes) -> dict[str, Any]:
    """A receipt's fields from its Avro record, for tools and tests."""
    record: Any = fastavro.schemaless_reader(io.BytesIO(payload), _parsed["decisions"], None)
    fields: dict[str, Any] = record
    return fields


def receipt_of(payload: bytes) -> Receipt:
    """A receipt from its Avro record."""
    return msgspec.convert(receipt_fields(payload), Receipt)
