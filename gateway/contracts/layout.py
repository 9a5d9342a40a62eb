"""The Redis layout: keys, packed values and the two scripts that change them. A reader refuses a version it doesn't know.

An entity has two values in one hash slot. Its head is a list of recent events, appended by the gateway in the same atomic step
that reads it. Its tiles are written by the Spark job alone, in one atomic step that also marks the events they now contain as
tiled in the head: so each event is counted from exactly one of the two, however far Spark has got.

    fg1:{card:abc}:h   header (16 bytes), then HEAD_EVENT records (48 bytes each) in order of observation
    fg1:{card:abc}:t   header (24 bytes), then TILE records (48 bytes each)
    fg1:{card:abc}:e   hashes (8 bytes each) of transactions that the Spark job tiled before the gateway had observed them: early
    fg1:i:{<transaction_id>}   idempotency record: fingerprint (16), position (16), answer (empty until decided)
    fg1:progress       how far the Spark job has got: PROGRESS, msgpack

All numbers are little-endian. Both scripts touch keys of one entity at a time, so a Redis Cluster by one call an entity works.
"""

from __future__ import annotations

import hashlib
import struct
import zlib
from importlib.resources import files

import msgspec
import numpy as np
import numpy.typing as npt

LAYOUT_VERSION = 1
PREFIX = f"fg{LAYOUT_VERSION}"
PROGRESS_KEY = f"{PREFIX}:progress"

HEAD_HEADER = struct.Struct("<BBHIII")  # version, entity, -, check, next seq, events evicted before they were tiled
TILES_HEADER = struct.Struct("<BBHIqII")  # version, entity, -, check, batch_id, epoch, early hashes
assert HEAD_HEADER.size == 16
assert TILES_HEADER.size == 24

HEAD_EVENT = np.dtype(
    [
        ("transaction", "<u8"),  # txn_hash of the transaction_id
        ("event_time_ms", "<i8"),
        ("amount_minor", "<u4"),
        ("seq", "<u4"),  # the entity's order of observation, from 0; filled in by the script
        ("observed_s", "<u4"),  # wall clock at observation, seconds since the epoch
        ("dim_a", "<u4"),  # dim_hash of the entity's two dimensions (contracts.features)
        ("dim_b", "<u4"),
        ("latitude", "<f4"),
        ("longitude", "<f4"),
        ("tiled", "u1"),
        ("reserved", "V3"),
    ]
)
HEAD_EVENT_PACK = struct.Struct("<QqIIIIIffB3x")
TILE = np.dtype(
    [
        ("start_min", "<u4"),  # minutes since the epoch
        ("resolution_min", "<u2"),
        ("updated_min", "<u2"),  # wall clock of the last change, minutes since the epoch modulo 65,536
        ("count", "<u4"),
        ("largest", "<u4"),  # minor units
        ("total", "<i8"),  # minor units
        ("squares", "<i8"),  # minor units squared, each amount capped at SQUARED_AMOUNT_MINOR_MAX
        ("distinct_a", "<u8"),  # bitmap of 64 buckets
        ("distinct_b", "<u8"),
    ]
)
RECORD_BYTES = 48
assert HEAD_EVENT.itemsize == HEAD_EVENT_PACK.size == TILE.itemsize == RECORD_BYTES

HEAD_TTL_MS = 32 * 86_400_000
TILES_TTL_MS = 32 * 86_400_000
# Heads longer than this are compacted when the Spark job has tiled their events; the newest few always stay.
HEAD_COMPACT_ABOVE = 16
HEAD_KEPT_MIN = 4

# How long a gateway may be down and still find what the Spark job tiled meanwhile.
EARLY_TTL_MS = 86_400_000

FINGERPRINT_BYTES = 16
POSITION = struct.Struct("<cxHIq")  # door ("k" or "h"), partition, -, offset
assert POSITION.size == 16

OBSERVE_LUA = files("gateway.contracts").joinpath("lua/observe.lua").read_text()
MERGE_LUA = files("gateway.contracts").joinpath("lua/merge.lua").read_text()


class UnknownLayoutError(RuntimeError):
    """A packed value has a version, entity or key check that this reader doesn't know: it must not be used."""


class Progress(msgspec.Struct, array_like=True, frozen=True):
    """How far the Spark job has got, written after each batch of tiles."""

    epoch: int
    batch_id: int
    written_at_ms: int  # wall clock
    arrived_through_ms: int  # the newest Kafka timestamp whose transaction is in the tiles


def entity_tag(entity: str, entity_id: str) -> str:
    """The hash tag that both values of an entity share."""
    return f"{{{entity}:{entity_id}}}"


def head_key(entity: str, entity_id: str) -> str:
    return f"{PREFIX}:{{{entity}:{entity_id}}}:h"


def tiles_key(entity: str, entity_id: str) -> str:
    return f"{PREFIX}:{{{entity}:{entity_id}}}:t"


def early_key(entity: str, entity_id: str) -> str:
    return f"{PREFIX}:{{{entity}:{entity_id}}}:e"


def idempotency_key(transaction_id: str) -> str:
    return f"{PREFIX}:i:{{{transaction_id}}}"


def txn_hash(transaction_id: str) -> int:
    """The first 8 bytes of MD5, little-endian: Spark computes the same with its own md5()."""
    return int.from_bytes(hashlib.md5(transaction_id.encode(), usedforsecurity=False).digest()[:8], "little")


def dim_hash(value: str | None) -> int:
    """CRC-32 of the UTF-8 text, as Spark's crc32() computes it. A missing value counts as one value, the empty text."""
    return zlib.crc32((value or "").encode())


def key_check(entity: str, entity_id: str) -> int:
    """Stands in each packed value, so that a reply that reached the wrong caller is noticed."""
    return zlib.crc32(f"{entity}:{entity_id}".encode())


def head_events(value: bytes, entity_index: int, check: int) -> npt.NDArray[np.void]:
    """The events of a head. Raises `UnknownLayoutError`."""
    _check(value, HEAD_HEADER, entity_index, check)
    return np.frombuffer(value, HEAD_EVENT, offset=HEAD_HEADER.size)


def tile_records(value: bytes, entity_index: int, check: int) -> npt.NDArray[np.void]:
    """The tiles of an entity. Raises `UnknownLayoutError`."""
    _check(value, TILES_HEADER, entity_index, check)
    return np.frombuffer(value, TILE, offset=TILES_HEADER.size)


def _check(value: bytes, header: struct.Struct, entity_index: int, check: int) -> None:
    if len(value) < header.size or (len(value) - header.size) % RECORD_BYTES:
        raise UnknownLayoutError("packed value of a wrong length")
    version, entity, _, found = struct.unpack_from("<BBHI", value)
    if version != LAYOUT_VERSION:
        raise UnknownLayoutError(f"packed value of layout version {version}, this reader knows {LAYOUT_VERSION}")
    if entity != entity_index or found != check:
        raise UnknownLayoutError("packed value of another key")


def pack_tiles(entity_index: int, check: int, batch_id: int, epoch: int, tiles: npt.NDArray[np.void]) -> bytes:
    return TILES_HEADER.pack(LAYOUT_VERSION, entity_index, 0, check, batch_id, epoch, 0) + tiles.tobytes()
