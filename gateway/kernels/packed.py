"""Whether a packed value is the one that was asked for, and where an event stands in a head. Called by gateway/kernels/features.py.

The slow twin of both is contracts.layout.head_events (tests/agreement).
"""

from __future__ import annotations

import numpy as np

from gateway.contracts.features import ENTITIES
from gateway.contracts.layout import (
    DAY_TILE_BYTES,
    EARLY_MARK,
    FINE_TILE_BYTES,
    FLAG_LABELLED,
    FRAUD_HOUR,
    HEAD_EVENT,
    HEAD_EVENT_BYTES,
    HEAD_HEADER,
    LABELS_HEADER,
    LAYOUT_VERSION,
    SEEN_BYTES,
    SEQ_NEXT,
    TILES_HEADER,
)
from gateway.kernels.compiled import compiled
from gateway.kernels.raw import Bytes, u16, u32, u64

_HEAD, _EARLY_MARK, _EVENT = HEAD_HEADER.size, EARLY_MARK.size, HEAD_EVENT_BYTES
_SEQ = HEAD_EVENT.fields["seq"][1]  # type: ignore[index]
_TILES, _COUNTS, _LABELS = TILES_HEADER.size, TILES_HEADER.size - 8, LABELS_HEADER.size
_FINE, _DAY, _SEEN, _FRAUDS = FINE_TILE_BYTES, DAY_TILE_BYTES, SEEN_BYTES, FRAUD_HOUR.itemsize
_IS_LABELLED = np.array([e.labelled for e in ENTITIES])


@compiled
def events_from(heads: int) -> int:
    """Where the events begin in a head of so many bytes; -1: they aren't whole."""
    rest = (heads - _HEAD) % _EVENT
    return _HEAD + rest if rest == 0 or rest == _EARLY_MARK else -1


@compiled
def place_in(buf: Bytes, events: int, end: int, transaction: np.uint64) -> int:
    """The place of a transaction among the events of a head, or the next one when it isn't there."""
    place = -1
    for at in range(events, end, _EVENT):
        told = u32(buf, at + _SEQ)
        place = place + 1 if told == SEQ_NEXT else told
        if u64(buf, at) == transaction:
            return place
    return place + 1


@compiled
def sound_head(buf: Bytes, entity: int, check: int, head: int, heads: int) -> bool:
    """True when a head is empty, or one of this layout, entity and key with whole events, the first of which tells its place."""
    return heads == 0 or (
        heads >= _HEAD + _EVENT
        and events_from(heads) >= 0
        and u32(buf, head + events_from(heads) + _SEQ) != SEQ_NEXT
        and buf[head] == LAYOUT_VERSION
        and buf[head + 1] == entity
        and u16(buf, head + 2) == (FLAG_LABELLED if _IS_LABELLED[entity] else 0)
        and u32(buf, head + 4) == check
    )


@compiled
def sound(buf: Bytes, entity: int, check: int, tiles: int, tiled: int, frauds: int, frauded: int) -> bool:
    """The same of tiles and frauds. Places and lengths in bytes."""
    if tiled > 0:
        if tiled < _TILES or buf[tiles] != LAYOUT_VERSION or buf[tiles + 1] != entity or u32(buf, tiles + 4) != check:
            return False
        fine = u16(buf, tiles + _COUNTS) + u16(buf, tiles + _COUNTS + 2)
        days, seen = u16(buf, tiles + _COUNTS + 4), u16(buf, tiles + _COUNTS + 6)
        if tiled != _TILES + _FINE * fine + _DAY * days + _SEEN * seen:
            return False
    if frauded > 0:
        if frauded < _LABELS or (frauded - _LABELS) % _FRAUDS != 0:
            return False
        return buf[frauds] == LAYOUT_VERSION and buf[frauds + 1] == entity and u32(buf, frauds + 4) == check
    return True
