"""The Redis layout: keys, packed values and the scripts that change them. A reader refuses a version it doesn't know.

An entity has up to four values in one hash slot. Its head is a list of recent events, appended by the gateway in the same atomic
step that reads it. Its tiles are written by the Spark job alone, in one atomic step that also marks the events they now contain as
tiled in the head: so each event is counted from exactly one of the two, however far Spark has got.

    fg4:{card:abc}:h   HEAD_HEADER (24 bytes), 4 bytes more while there is an early list (how many hashes it has), then HEAD_EVENT
                       records (44 bytes each) in order of observation, at least one
    fg4:{card:abc}:t   TILES_HEADER (48 bytes), then FINE_TILE records (5 minutes, then hours), DAY_TILE records, and what the card
                       was seen with (4 bytes each)
    fg4:{card:abc}:e   hashes (8 bytes each) of transactions that the Spark job tiled before the gateway had observed them: early
    fg4:{merchant:m}:l LABELS_HEADER (24 bytes), then FRAUD_HOUR records (6 bytes each): frauds by hour of payment, where labels count
    fg4:i:{<transaction_id>}   idempotency record: fingerprint (16), position (16), answer (empty until decided)
    fg4:progress       how far the Spark job has got with tiles: PROGRESS, msgpack
    fg4:progress:{n}   on a cluster, copies of it in many slots, which tell the Spark job that no master has lost what it held
    fg4:labels         how far it has got with labels: LABELS_PROGRESS, msgpack

All numbers are little-endian. The order of observation is absolute: a head is born with a `base` in microseconds of wall-clock time,
rounded down to BASE_STEP, and each event gets the next number after it. So a head that was lost and born anew continues behind the old
one's numbers, and the first number of a life tells whether something came before it. An event is appended without its number, for
what stands before it isn't looked at then: it has the next one after the event before it. The first event of a head, and one behind
a gap that compaction left, tell theirs. The last event is never dropped.
"""

from __future__ import annotations

import hashlib
import struct
import zlib
from dataclasses import dataclass
from importlib.resources import files

import msgspec
import numpy as np
import numpy.typing as npt

LAYOUT_VERSION = 4
PREFIX = f"fg{LAYOUT_VERSION}"
PROGRESS_KEY = f"{PREFIX}:progress"
# So many that a master with a few hundred of the 16,384 slots or more has one of them.
PROGRESS_COPY_KEYS = tuple(f"{PREFIX}:progress:{{{n}}}" for n in range(512))
LABELS_PROGRESS_KEY = f"{PREFIX}:labels"

# version, entity, flags, check, base of the order of observation, -, events evicted before they were tiled
HEAD_HEADER = struct.Struct("<BBHIQII")
# version, entity, -, check, batch_id, epoch, early hashes, newest event's minute, settled minute, marked minute, wall-clock minute of
# the mark (contracts.windows.Horizon), then how many records: 5 minutes, hours, days, seen
TILES_HEADER = struct.Struct("<BBHIqIIIIIIHHHH")
# version, entity, -, check, batch_id, epoch, label changes applied so far
LABELS_HEADER = struct.Struct("<BBHIqII")
assert (HEAD_HEADER.size, TILES_HEADER.size, LABELS_HEADER.size) == (24, 48, 24)
TILES_HEADER_FIELDS = np.dtype(
    [
        ("version", "u1"),
        ("entity", "u1"),
        ("reserved", "<u2"),
        ("check", "<u4"),
        ("batch_id", "<i8"),
        ("epoch", "<u4"),
        ("early", "<u4"),
        ("newest_min", "<u4"),
        ("settled_min", "<u4"),
        ("marked_min", "<u4"),
        ("marked_at_min", "<u4"),
        ("fives", "<u2"),
        ("hours", "<u2"),
        ("days", "<u2"),
        ("seen", "<u2"),
    ]
)
assert TILES_HEADER_FIELDS.itemsize == TILES_HEADER.size
# Of HEAD_HEADER.flags: the entity has label counts.
FLAG_LABELLED = 1
# Behind the header of a head whose entity has an early list: how many hashes that has.
EARLY_MARK = struct.Struct("<I")
# An event's `seq` when it doesn't tell it.
SEQ_NEXT = 0xFFFFFFFF

HEAD_EVENT = np.dtype(
    [
        ("transaction", "<u8"),  # txn_hash of the transaction_id
        ("event_time_ms", "<i8"),
        ("amount_minor", "<u4"),
        ("seq", "<u4"),  # place in the entity's order of observation, behind the head's base; SEQ_NEXT: one after the event before
        ("observed_s", "<u2"),  # wall clock at observation, seconds since the epoch modulo 65,536
        ("tiled", "u1"),
        ("counted", "u1"),  # what arrived later was in the tiles at observation
        ("latitude", "<f4"),
        ("longitude", "<f4"),
        ("dim_a", "<u2"),  # dim_hash of the entity's dimensions (contracts.features)
        ("dim_b", "<u2"),
        ("dim_c", "<u2"),
        ("reserved2", "<u2"),
    ]
)
# What the observe script is told of an entity: HEAD_HEADER for a head that is born now, then the event.
ENTITY_RECORD = np.dtype(
    [
        ("version", "u1"),
        ("entity", "u1"),
        ("flags", "<u2"),
        ("check", "<u4"),
        ("base_us", "<u8"),
        ("look", "<u4"),  # 1: look at the head before; it may hold the event, for which there is no claim any more, or be unsound
        ("reserved", "<u4"),
        *((name, HEAD_EVENT.fields[name][0]) for name in HEAD_EVENT.names or ()),  # type: ignore[index]
    ]
)
assert ENTITY_RECORD.itemsize == HEAD_HEADER.size + HEAD_EVENT.itemsize
HEAD_EVENT_PACK = struct.Struct("<QqIIHBBffHHHxx")
# A tile in memory, of any resolution.
TILE = np.dtype(
    [
        ("start_min", "<u4"),  # minutes since the epoch
        ("resolution_min", "<u2"),
        ("count", "<u4"),
        ("largest", "<u4"),  # minor units
        ("total", "<i8"),  # minor units
        ("squares", "<i8"),  # minor units squared, each amount capped at SQUARED_AMOUNT_MINOR_MAX
        ("distinct_a", "<u8"),  # bitmaps of 64 buckets
        ("distinct_b", "<u8"),
        ("distinct_c", "<u8"),
    ]
)
# As it lies in Redis: the resolution is told by the place, and a day has no bitmaps, which no window of days needs.
FINE_TILE = np.dtype([(name, TILE.fields[name][0]) for name in TILE.names if name != "resolution_min"])  # type: ignore[index,union-attr]
DAY_TILE = np.dtype([("day", "<u2"), ("count", "<u4"), ("largest", "<u4"), ("total", "<i8"), ("squares", "<i8")])
FRAUD_HOUR = np.dtype([("hour", "<u4"), ("frauds", "<u2")])  # hours since the epoch
HEAD_EVENT_BYTES, FINE_TILE_BYTES, DAY_TILE_BYTES, SEEN_BYTES = 44, 52, 26, 4
assert HEAD_EVENT.itemsize == HEAD_EVENT_PACK.size == HEAD_EVENT_BYTES
assert (FINE_TILE.itemsize, DAY_TILE.itemsize) == (FINE_TILE_BYTES, DAY_TILE_BYTES)
HOUR_MIN, DAY_MIN = 60, 1440
COUNT_MAX = 0xFFFF

HEAD_TTL_MS = 40 * 86_400_000
TILES_TTL_MS = 40 * 86_400_000
# Heads longer than this are compacted when the Spark job has tiled their events; the newest few always stay.
HEAD_COMPACT_ABOVE = 6
HEAD_KEPT_MIN = 4
# What was observed this much before the entity's newest event or less may be delivered again, for its receipt may not have been
# committed: no Kafka transaction lives longer than a minute.
HEAD_GUARD_S = 90

BASE_STEP = 65_536
# Two places further apart than this belong to two lives of a head: none is born within a tenth of a second of the last one's end, and
# fewer events than this were observed but never published one after the other.
LIFE_GAP = 100_000

# How long a gateway may be down and still find what the Spark job tiled meanwhile.
EARLY_TTL_MS = 86_400_000
EARLY_MAX = 4096

FINGERPRINT_BYTES = 16
# "k", partition, 0, offset; or "h", 0, a number for the process that claimed, and when, in ms.
POSITION = struct.Struct("<cxHIq")
assert POSITION.size == 16
CLAIM_BYTES = FINGERPRINT_BYTES + POSITION.size
# Who claimed over HTTP is alone with the transaction for so long. After CLAIM_FREE_MS another may decide it as well, and then the answer
# that Redis has first stands for both. What lies between is for a SET on its way and for clocks that differ.
CLAIM_ALONE_MS = 30
CLAIM_FREE_MS = 45
# Whoever has the time waits so much longer: most such processes are slow, and few are dead. After CLAIM_DEAD_MS nobody does.
CLAIM_PATIENCE_MS = 15
CLAIM_DEAD_MS = 250


def _script(*names: str) -> str:
    return "\n".join(files("gateway.contracts").joinpath(f"lua/{name}.lua").read_text() for name in names)


# A batch at once, for one Redis; and one entity, for a cluster, where a script may touch one hash slot.
OBSERVE_LUA = _script("entity", "observe")
OBSERVE_ENTITY_LUA = _script("entity", "observe_entity")
SETTLE_LUA = _script("settle")
MERGE_LUA = _script("merge")
LABELS_LUA = _script("labels")
RESTORE_LUA = _script("restore")


class UnknownLayoutError(RuntimeError):
    """A packed value has a version, entity or key check that this reader doesn't know: it must not be used."""


class Progress(msgspec.Struct, array_like=True, frozen=True):
    """How far the Spark job has got, written after each batch of tiles.

    `lost_at_ms` is not 0 from the moment Redis was found to have lost data until its heads are whole again: features are stale.
    Meanwhile `rebuilt_batch_id` is the last batch of the rebuild: receipts of later batches are not in the heads yet.
    """

    epoch: int
    batch_id: int
    written_at_ms: int  # wall clock
    arrived_through_ms: int  # the newest Kafka timestamp whose transaction is in the tiles
    lost_at_ms: int = 0
    rebuilt_batch_id: int = -1


class LabelsProgress(msgspec.Struct, array_like=True, frozen=True):
    """The newest batch of label changes that Redis holds all of, written after it."""

    epoch: int
    batch_id: int


def entity_tag(entity: str, entity_id: str) -> str:
    """The hash tag that all values of an entity share."""
    return f"{{{entity}:{entity_id}}}"


def head_key(entity: str, entity_id: str) -> str:
    return f"{PREFIX}:{{{entity}:{entity_id}}}:h"


def tiles_key(entity: str, entity_id: str) -> str:
    return f"{PREFIX}:{{{entity}:{entity_id}}}:t"


def early_key(entity: str, entity_id: str) -> str:
    return f"{PREFIX}:{{{entity}:{entity_id}}}:e"


def labels_key(entity: str, entity_id: str) -> str:
    return f"{PREFIX}:{{{entity}:{entity_id}}}:l"


def idempotency_key(transaction_id: str) -> str:
    return f"{PREFIX}:i:{{{transaction_id}}}"


def txn_hash(transaction_id: str) -> int:
    """The first 8 bytes of MD5, little-endian: Spark computes the same with its own md5()."""
    return int.from_bytes(hashlib.md5(transaction_id.encode(), usedforsecurity=False).digest()[:8], "little")


def dim_hash(value: str | None) -> int:
    """The lower half of CRC-32 of the UTF-8 text, as of Spark's crc32(). A missing value counts as one value, the empty text."""
    return zlib.crc32((value or "").encode()) & 0xFFFF


def key_check(entity: str, entity_id: str) -> int:
    """Stands in each packed value, so that a reply that reached the wrong caller is noticed."""
    return zlib.crc32(f"{entity}:{entity_id}".encode())


def head_events(value: bytes, entity_index: int, check: int) -> npt.NDArray[np.void]:
    """The events of a head, each with its place. Raises `UnknownLayoutError`."""
    _check(value, HEAD_HEADER, entity_index, check)
    count, rest = divmod(len(value) - HEAD_HEADER.size, HEAD_EVENT_BYTES)
    if count < 1 or rest not in (0, EARLY_MARK.size):
        raise UnknownLayoutError("packed value of a wrong length")
    events = np.frombuffer(value, HEAD_EVENT, offset=HEAD_HEADER.size + rest).copy()
    index = np.arange(count)
    told = np.where(events["seq"] != SEQ_NEXT, index, -1)
    if told[0] < 0:
        raise UnknownLayoutError("a head that doesn't tell the place of its first event")
    last_told = np.maximum.accumulate(told)
    events["seq"] = events["seq"][last_told] + (index - last_told)
    return events


def fraud_hours(value: bytes, entity_index: int, check: int) -> npt.NDArray[np.void]:
    """The frauds of an entity by hour of payment. Raises `UnknownLayoutError`."""
    _check(value, LABELS_HEADER, entity_index, check)
    if (len(value) - LABELS_HEADER.size) % FRAUD_HOUR.itemsize:
        raise UnknownLayoutError("packed value of a wrong length")
    return np.frombuffer(value, FRAUD_HOUR, offset=LABELS_HEADER.size)


def pack_frauds(entity_index: int, check: int, batch_id: int, epoch: int, changes: int, hours: npt.NDArray[np.void]) -> bytes:
    """`hours` is FRAUD_HOUR (n,), ascending; `changes` counts all label changes of the entity so far."""
    return LABELS_HEADER.pack(LAYOUT_VERSION, entity_index, 0, check, batch_id, epoch, changes) + hours.tobytes()


def tiles_bytes(fives: int, hours: int, days: int, seen: int) -> int:
    """The length of a value with so many records."""
    return TILES_HEADER.size + FINE_TILE_BYTES * (fives + hours) + DAY_TILE_BYTES * days + SEEN_BYTES * seen


def _check(value: bytes, header: struct.Struct, entity_index: int, check: int) -> None:
    if len(value) < header.size:
        raise UnknownLayoutError("packed value of a wrong length")
    version, entity, _, found = struct.unpack_from("<BBHI", value)
    if version != LAYOUT_VERSION:
        raise UnknownLayoutError(f"packed value of layout version {version}, this reader knows {LAYOUT_VERSION}")
    if entity != entity_index or found != check:
        raise UnknownLayoutError("packed value of another key")


@dataclass
class TileValues:
    """The tiles values of some owners. `headers` is TILES_HEADER_FIELDS (owners,), zeros where nothing is held.

    `tiles` (TILE) and `seen` (uint32, minutes / 5 modulo 65,536 in the upper half) are sorted by owner.
    """

    headers: npt.NDArray[np.void]
    tiles: npt.NDArray[np.void]
    owner: npt.NDArray[np.int64]
    seen: npt.NDArray[np.uint32]
    seen_owner: npt.NDArray[np.int64]


def unpack_tiles(values: list[bytes | None], entity_index: list[int], check: list[int]) -> TileValues:
    """What `values` hold, one owner each. Raises `UnknownLayoutError`."""
    headers = np.zeros(len(values), TILES_HEADER_FIELDS)
    fine, days, seen = [], [], []
    for i, value in enumerate(values):
        if value is None:
            continue
        _check(value, TILES_HEADER, entity_index[i], check[i])
        headers[i] = np.frombuffer(value, TILES_HEADER_FIELDS, 1)[0]
        *_, n_five, n_hour, n_day, n_seen = TILES_HEADER.unpack_from(value)
        if len(value) != tiles_bytes(n_five, n_hour, n_day, n_seen):
            raise UnknownLayoutError("packed value of a wrong length")
        at = TILES_HEADER.size + FINE_TILE_BYTES * (n_five + n_hour)
        fine.append(value[TILES_HEADER.size : at])
        days.append(value[at : at + DAY_TILE_BYTES * n_day])
        seen.append(value[at + DAY_TILE_BYTES * n_day :])
    return _assemble(headers, b"".join(fine), b"".join(days), b"".join(seen))


def _assemble(headers: npt.NDArray[np.void], fine_bytes: bytes, day_bytes: bytes, seen_bytes: bytes) -> TileValues:
    fine, day = np.frombuffer(fine_bytes, FINE_TILE), np.frombuffer(day_bytes, DAY_TILE)
    owners = np.arange(len(headers))
    fives, hours, days = (headers[name].astype(np.int64) for name in ("fives", "hours", "days"))
    tiles = np.zeros(len(fine) + len(day), TILE)
    first, second = tiles[: len(fine)], tiles[len(fine) :]
    for name in FINE_TILE.names or ():
        first[name] = fine[name]
    first["resolution_min"] = np.repeat(
        np.tile(np.array([5, HOUR_MIN], np.uint16), len(headers)), np.stack([fives, hours], axis=1).reshape(-1)
    )
    for name in ("count", "largest", "total", "squares"):
        second[name] = day[name]
    second["start_min"] = day["day"].astype(np.uint32) * DAY_MIN
    second["resolution_min"] = DAY_MIN
    owner = np.concatenate([np.repeat(owners, fives + hours), np.repeat(owners, days)])
    order = np.argsort(owner, kind="stable")
    return TileValues(
        headers=headers,
        tiles=tiles[order],
        owner=owner[order],
        seen=np.frombuffer(seen_bytes, "<u4"),
        seen_owner=np.repeat(owners, headers["seen"].astype(np.int64)),
    )


def pack_tiles(values: TileValues) -> list[bytes]:
    """The packed value of each owner. `tiles` must be sorted by owner, resolution and start; the counts in `headers` are filled in."""
    headers, tiles, owners = values.headers, values.tiles, len(values.headers)
    of_day = tiles["resolution_min"] == DAY_MIN
    fine, day = np.empty(int((~of_day).sum()), FINE_TILE), np.empty(int(of_day.sum()), DAY_TILE)
    for name in FINE_TILE.names or ():
        fine[name] = tiles[name][~of_day]
    for name in ("count", "largest", "total", "squares"):
        day[name] = tiles[name][of_day]
    day["day"] = tiles["start_min"][of_day] // DAY_MIN

    def edges(owner: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        out: npt.NDArray[np.int64] = np.searchsorted(owner, np.arange(owners + 1))
        return out

    fine_edges, day_edges, seen_edges = edges(values.owner[~of_day]), edges(values.owner[of_day]), edges(values.seen_owner)
    hours = np.bincount(values.owner[tiles["resolution_min"] == HOUR_MIN], minlength=owners)
    headers["version"] = LAYOUT_VERSION
    headers["hours"] = hours
    headers["fives"] = np.diff(fine_edges) - hours
    headers["days"] = np.diff(day_edges)
    headers["seen"] = np.diff(seen_edges)
    parts = (
        (headers.tobytes(), (np.arange(owners + 1) * TILES_HEADER.size).tolist()),
        (fine.tobytes(), (fine_edges * FINE_TILE_BYTES).tolist()),
        (day.tobytes(), (day_edges * DAY_TILE_BYTES).tolist()),
        (values.seen.astype("<u4").tobytes(), (seen_edges * SEEN_BYTES).tolist()),
    )
    return [b"".join([data[at[i] : at[i + 1]] for data, at in parts]) for i in range(owners)]
