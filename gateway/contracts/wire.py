"""Confluent's wire format: a zero byte, the schema id (4 bytes, big-endian), then the Avro record. Plain JSON starts otherwise."""

from __future__ import annotations

import struct

MAGIC = 0
HEADER = struct.Struct(">BI")


def is_framed(value: bytes) -> bool:
    """True for Avro in wire format. JSON text never starts with a zero byte."""
    return value[:1] == b"\0"


def frame(schema_id: int, payload: bytes) -> bytes:
    return HEADER.pack(MAGIC, schema_id) + payload


def unframe(value: bytes) -> tuple[int, bytes]:
    """(schema id, Avro payload). Raises ValueError when `value` is shorter than the header or not framed."""
    if len(value) < HEADER.size or value[0] != MAGIC:
        raise ValueError("not in wire format")
    return HEADER.unpack_from(value)[1], value[HEADER.size :]
