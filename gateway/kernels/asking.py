"""What Redis is asked for a batch: a record for each entity of each transaction, and script call and MGET as bytes on the wire.

Called by gateway/redis/store.py. Half a microsecond a transaction.
"""

from __future__ import annotations

import zlib

import numpy as np
import numpy.typing as npt

from gateway.contracts.features import ENTITIES
from gateway.contracts.layout import CLAIM_BYTES, ENTITY_RECORD, FLAG_LABELLED, LAYOUT_VERSION, PREFIX, SEQ_NEXT
from gateway.kernels.compiled import compiled
from gateway.kernels.intake import TEXT_INDEX, TRANSACTION_ID, Floats, Int64s
from gateway.kernels.raw import Bytes, crc32, put_bytes, put_decimal

ENTITY_COUNT = len(ENTITIES)
ENTITY_TEXT = np.array([TEXT_INDEX[e.field] for e in ENTITIES])
_DIM_TEXT = np.array([[TEXT_INDEX[name] for name in e.dims] for e in ENTITIES])
_FLAGS = np.array([FLAG_LABELLED if e.labelled else 0 for e in ENTITIES], np.uint16)
# crc32 of "card:" and so on, which key checks go on from.
_CHECK_START = np.array([zlib.crc32(f"{e.name}:".encode()) for e in ENTITIES], np.int64)
TEXT_COUNT = len(TEXT_INDEX)


def _padded(texts: list[bytes]) -> tuple[Bytes, Int64s]:
    lengths = np.array([len(t) for t in texts], np.int64)
    out = np.zeros((len(texts), int(lengths.max())), np.uint8)
    for i, text in enumerate(texts):
        out[i, : len(text)] = np.frombuffer(text, np.uint8)
    return out, lengths


# A value's key is the text before the entity's id, the id, and `}:h` for a head, `}:t` for tiles, `}:l` for labels.
_KEY_START, _KEY_START_LENGTHS = _padded([f"{PREFIX}:{{{e.name}:".encode() for e in ENTITIES])
_END = np.frombuffer(b"}:htl", np.uint8)
_HEAD, _TILES, _LABELS = 2, 3, 4
_IS_LABELLED = np.array([e.labelled for e in ENTITIES])
_CLAIM_START = np.frombuffer(f"{PREFIX}:i:{{".encode(), np.uint8)
_CLAIM_END = np.frombuffer(b"}", np.uint8)
# "$" and the length, the line's end, the text, the line's end.
_BULK_BYTES_MAX = 16
KEY_BYTES_MAX = int(_KEY_START_LENGTHS.max()) + len(_CLAIM_START) + 64 + _BULK_BYTES_MAX
RECORD_BYTES = ENTITY_RECORD.itemsize
ROW_BYTES_MAX = (4 * ENTITY_COUNT + 1) * KEY_BYTES_MAX + 2 * _BULK_BYTES_MAX + CLAIM_BYTES + ENTITY_COUNT * RECORD_BYTES
assert CLAIM_BYTES < 100


_COUNTRY = TEXT_INDEX["country"]


@compiled
def entity_records(
    buf: Bytes,
    starts: Int64s,
    lengths: Int64s,
    numbers: Int64s,
    places: Floats,
    hashes: npt.NDArray[np.uint64],
    counted: npt.NDArray[np.uint8],
    look: npt.NDArray[np.uint8],
    base_us: int,
    observed_s: int,
    records: npt.NDArray[np.void],
    dims: npt.NDArray[np.uint16],
    country: Int64s,
    hashed: npt.NDArray[np.uint16],
) -> None:
    """Fills in `records` (rows * ENTITY_COUNT, ENTITY_RECORD): a new head's header, and the event.

    `dims` (rows * ENTITY_COUNT, 3) gets the events' dimensions, `country` (rows,) the dim_hash of each payment's. What stands in the
    records of entities that a payment doesn't name isn't meant to be used. `hashed` (TEXT_COUNT,) is working space.
    """
    for row in range(len(hashes)):
        for text in range(TEXT_COUNT):
            hashed[text] = 0
            if lengths[row, text] > 0:
                hashed[text] = crc32(buf, starts[row, text], lengths[row, text], 0) & 0xFFFF
        country[row] = hashed[_COUNTRY]
        for e in range(ENTITY_COUNT):
            owner = row * ENTITY_COUNT + e
            text = ENTITY_TEXT[e]
            for d in range(3):
                dims[owner, d] = hashed[_DIM_TEXT[e, d]]
            if lengths[row, text] < 0:
                continue
            record = records[owner]
            record.version = LAYOUT_VERSION
            record.entity = e
            record.flags = _FLAGS[e]
            record.check = crc32(buf, starts[row, text], lengths[row, text], _CHECK_START[e])
            record.base_us = base_us
            record.look = look[row]
            record.seq = SEQ_NEXT
            record.transaction = hashes[row]
            record.event_time_ms = numbers[row, 0]
            record.amount_minor = numbers[row, 1]
            record.observed_s = observed_s
            record.counted = counted[row]
            record.latitude = places[row, 0]
            record.longitude = places[row, 1]
            record.dim_a = dims[owner, 0]
            record.dim_b = dims[owner, 1]
            record.dim_c = dims[owner, 2]


@compiled
def put_bulk(out: Bytes, at: int, length: int) -> int:
    """The line before a bulk string of RESP."""
    out[at] = 36
    at = put_decimal(out, at + 1, length)
    out[at] = 13
    out[at + 1] = 10
    return at + 2


@compiled
def put_end(out: Bytes, at: int) -> int:
    out[at] = 13
    out[at + 1] = 10
    return at + 2


@compiled
def _put_key(out: Bytes, at: int, buf: Bytes, entity: int, start: int, length: int, kind: int) -> int:
    at = put_bulk(out, at, _KEY_START_LENGTHS[entity] + length + 3)
    at = put_bytes(out, at, _KEY_START[entity], 0, _KEY_START_LENGTHS[entity])
    at = put_bytes(out, at, buf, start, length)
    out[at] = _END[0]
    out[at + 1] = _END[1]
    out[at + 2] = _END[kind]
    return put_end(out, at + 3)


@compiled
def script_call(
    buf: Bytes, starts: Int64s, lengths: Int64s, claims: Bytes, records: Bytes, before: Bytes, between: Bytes, out: Bytes
) -> int:
    """The call of lua/observe.lua as RESP, in `out`; its length is returned.

    `before` is all up to the batch's keys, `between` the script's arguments that come first. `claims` is (rows * CLAIM_BYTES,),
    `records` the bytes of ENTITY_RECORD (rows * ENTITY_COUNT). `out` must hold them, and ROW_BYTES_MAX a row.
    """
    rows = len(starts)
    at = put_bytes(out, 0, before, 0, len(before))
    for row in range(rows):
        own = lengths[row, TRANSACTION_ID]
        at = put_bulk(out, at, len(_CLAIM_START) + own + len(_CLAIM_END))
        at = put_bytes(out, at, _CLAIM_START, 0, len(_CLAIM_START))
        at = put_bytes(out, at, buf, starts[row, TRANSACTION_ID], own)
        at = put_bytes(out, at, _CLAIM_END, 0, len(_CLAIM_END))
        at = put_end(out, at)
        for e in range(ENTITY_COUNT):
            text = ENTITY_TEXT[e]
            if lengths[row, text] >= 0:
                at = _put_key(out, at, buf, e, starts[row, text], lengths[row, text], _HEAD)
    at = put_bytes(out, at, between, 0, len(between))
    for row in range(rows):
        at = put_bulk(out, at, CLAIM_BYTES)
        at = put_bytes(out, at, claims, row * CLAIM_BYTES, CLAIM_BYTES)
        at = put_end(out, at)
        named = 0
        for e in range(ENTITY_COUNT):
            named += lengths[row, ENTITY_TEXT[e]] >= 0
        at = put_bulk(out, at, named * RECORD_BYTES)
        for e in range(ENTITY_COUNT):
            if lengths[row, ENTITY_TEXT[e]] >= 0:
                at = put_bytes(out, at, records, (row * ENTITY_COUNT + e) * RECORD_BYTES, RECORD_BYTES)
        at = put_end(out, at)
    return at


@compiled
def values_call(buf: Bytes, starts: Int64s, lengths: Int64s, before: Bytes, out: Bytes) -> int:
    """The MGET of the batch's values as RESP, in `out`, as for `script_call`; `before` is its start.

    Asks for the tiles of each transaction's entities, then for the frauds of those that count labels, then for the heads.
    """
    at = put_bytes(out, 0, before, 0, len(before))
    for kind in (_TILES, _LABELS, _HEAD):
        for row in range(len(starts)):
            for e in range(ENTITY_COUNT):
                text = ENTITY_TEXT[e]
                if lengths[row, text] >= 0 and (kind != _LABELS or _IS_LABELLED[e]):
                    at = _put_key(out, at, buf, e, starts[row, text], lengths[row, text], kind)
    return at
