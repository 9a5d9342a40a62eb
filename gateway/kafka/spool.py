"""A bounded local log of what is on its way to Kafka: entries are appended, read in order, and forgotten once delivered.

A directory of segments, each a sequence of entries: a header (length, CRC-32, number of records, time) and a payload that this file
doesn't look into. Beside them the file `cursor` says how far delivery has got and what it is at: everything before `start` is delivered,
what lies between `start` and `end` may be, and `note` is what its sender needs to find out. It is written in place, into two slots in
turn, so that one of them is always whole: a rename would cost a file system's transaction for each delivery.

An append is one write to the page cache: it survives the end of the process in any form at once, and that of the machine from the next
`sync` on. A write that was cut short is cut off when the log is opened. One process at a time has it.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import struct
import time
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec

log = logging.getLogger(__name__)

SEGMENT_BYTES = 8 * 1024 * 1024
# length of the payload, CRC-32 of the rest of the header and the payload, records in it, written at (ms)
HEADER = struct.Struct("<IIIq")
CHECKED_FROM = 8
# Nothing longer is ever written; a longer length is damage.
PAYLOAD_BYTES_MAX = 64 * 1024 * 1024
SUFFIX = ".log"
# Of the cursor's file: generation, length and CRC-32 of what a slot holds, and how large a slot is.
SLOT_HEADER = struct.Struct("<QII")
SLOT_BYTES = 128 * 1024
LOCK = "lock"
# Directories for one name: more processes of it than this never live at a time.
PLACES_MAX = 64


class Position(NamedTuple):
    segment: int
    offset: int


class Entry(NamedTuple):
    """One entry, from `start` to before `end`."""

    start: Position
    end: Position
    records: int
    written_ms: int

    @property
    def bytes(self) -> int:
        return self.end.offset - self.start.offset


class Cursor(msgspec.Struct, array_like=True):
    start: Position
    end: Position
    note: bytes


class Spool:
    """Raises BlockingIOError when another process has the directory, other OSErrors for what the disk does."""

    def __init__(
        self,
        directory: Path,
        bytes_max: int,
        segment_bytes: int = SEGMENT_BYTES,
        now_ms: Callable[[], int] = lambda: time.time_ns() // 1_000_000,
    ) -> None:
        self.directory = directory
        self._bytes_max = bytes_max
        self._segment_bytes = segment_bytes
        self._now_ms = now_ms
        directory.mkdir(parents=True, exist_ok=True)
        self._lock = os.open(directory / LOCK, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._lock)
            raise
        self._file: int | None = None
        # Files by segment that are full and not yet known to be on the disk.
        self._full: dict[int, int] = {}
        self._dirty = False
        # Of what isn't delivered.
        self.bytes = self.records = 0
        self.oldest_ms: int | None = None
        self._tail = Position(0, 0)
        self._cursor_file = os.open(directory / "cursor", os.O_RDWR | os.O_CREAT, 0o600)
        self._generation = 0
        self._cursor = self._read_cursor()
        self._segments = sorted(int(p.stem) for p in directory.glob(f"*{SUFFIX}"))
        if self._cursor is not None and self._cursor.start.segment not in self._segments:
            # A segment goes when all of it is delivered, hence all that was under way.
            self._cursor = Cursor(self._cursor.end, self._cursor.end, b"")
        self._head = self._recover()

    @property
    def pending(self) -> tuple[Position, bytes] | None:
        """Where a delivery that may have happened ends, and its note."""
        if self._cursor is None or self._cursor.start == self._cursor.end:
            return None
        return self._cursor.end, self._cursor.note

    @property
    def tail(self) -> Position:
        """Where the next entry begins, or the end of the last segment."""
        return self._tail

    def append(self, payload: bytes, records: int) -> Entry | None:
        """None, and nothing is written, when it would be more than the bound."""
        size = HEADER.size + len(payload)
        if self.bytes + size > self._bytes_max:
            return None
        assert len(payload) <= PAYLOAD_BYTES_MAX
        if self._file is None or self._tail.offset >= self._segment_bytes:
            self._next_segment()
        assert self._file is not None
        now_ms = self._now_ms()
        header = HEADER.pack(len(payload), 0, records, now_ms)
        crc = zlib.crc32(payload, zlib.crc32(header[CHECKED_FROM:]))
        written = os.writev(self._file, (HEADER.pack(len(payload), crc, records, now_ms), payload))
        if written < size:
            os.ftruncate(self._file, self._tail.offset)
            raise OSError("the disk took only part of an entry")
        start, self._tail = self._tail, Position(self._tail.segment, self._tail.offset + size)
        self._dirty = True
        self.bytes += size
        self.records += records
        if self.oldest_ms is None:
            self.oldest_ms = now_ms
        return Entry(start, self._tail, records, now_ms)

    def read(self, bytes_max: int, until: Position | None = None) -> list[tuple[Entry, bytes]]:
        """The oldest entries that aren't delivered with their payloads, up to `bytes_max` or one, and none from `until` on."""
        found: list[tuple[Entry, bytes]] = []
        at, size = self._head, 0
        while until is None or at < until:
            entry = self._entry_at(at)
            if entry is None:
                following = [s for s in self._segments if s > at.segment]
                if not following:
                    break
                at = Position(following[0], 0)
                continue
            size += len(entry[1])
            if found and size > bytes_max and until is None:
                break
            found.append(entry)
            at = entry[0].end
        return found

    def begin(self, end: Position, note: bytes) -> None:
        """What lies before `end` is about to be sent."""
        self._write_cursor(Cursor(self._head, end, note))

    def delivered(self, entries: Sequence[Entry]) -> None:
        """`entries`, the oldest ones, are delivered."""
        end = self._head = entries[-1].end
        self.records -= sum(e.records for e in entries)
        self.bytes -= sum(e.bytes for e in entries)
        self.oldest_ms = self._written_at(end) if self.records else None
        self._write_cursor(Cursor(end, end, b""))
        self._remove([s for s in self._segments if s < end.segment])

    def sync(self) -> None:
        """What was appended survives the end of the machine too. May be called from another thread."""
        for segment in list(self._full):
            file = self._full.pop(segment, None)
            if file is not None:
                os.fsync(file)
                os.close(file)
        if self._dirty and self._file is not None:
            self._dirty = False
            # It may be closed meanwhile.
            with contextlib.suppress(OSError):
                os.fsync(self._file)

    def close(self) -> None:
        if self._file is not None:
            self._full[self._tail.segment] = self._file
            self._file = None
        if not self.records:
            self._remove(list(self._segments))
        for file in (*self._full.values(), self._cursor_file, self._lock):
            os.close(file)

    def _remove(self, segments: list[int]) -> None:
        """`segments`, the oldest first, of which all is delivered. The cursor says so already."""
        for segment in segments:
            self._path(segment).unlink()
            self._segments.remove(segment)
            file = self._full.pop(segment, None)
            if file is not None:
                os.close(file)

    def _next_segment(self) -> None:
        if self._file is not None:
            self._full[self._tail.segment] = self._file
        number = self._tail.segment + 1
        self._file = os.open(self._path(number), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        self._segments.append(number)
        self._tail = Position(number, 0)
        if not self.records:
            self._head = self._tail

    def _recover(self) -> Position:
        """Count what is there, cut off what is damaged, and find where to go on."""
        head = self._cursor.start if self._cursor is not None else Position(self._segments[0] if self._segments else 0, 0)
        self._remove([s for s in self._segments if s < head.segment])
        self._tail = Position(max([head.segment, *self._segments]), 0)
        for segment in self._segments:
            at = head if segment == head.segment else Position(segment, 0)
            while (found := self._entry_at(at)) is not None:
                entry = found[0]
                self.records += entry.records
                self.bytes += entry.bytes
                if self.oldest_ms is None:
                    self.oldest_ms = entry.written_ms
                at = entry.end
            left = self._path(segment).stat().st_size - at.offset
            if left > 0:
                log.warning("spool: %d bytes at the end of %s were cut short and are left out", left, self._path(segment).name)
                os.truncate(self._path(segment), at.offset)
            self._tail = at
        return head

    def _entry_at(self, at: Position) -> tuple[Entry, bytes] | None:
        if at.segment not in self._segments:
            return None
        with self._path(at.segment).open("rb") as file:
            file.seek(at.offset)
            header = file.read(HEADER.size)
            if len(header) < HEADER.size:
                return None
            length, crc, records, written_ms = HEADER.unpack(header)
            payload = file.read(length) if length <= PAYLOAD_BYTES_MAX else b""
        if len(payload) != length or zlib.crc32(payload, zlib.crc32(header[CHECKED_FROM:])) != crc:
            return None
        return Entry(at, Position(at.segment, at.offset + HEADER.size + length), records, written_ms), payload

    def _written_at(self, at: Position) -> int | None:
        """When the first entry from `at` on was written."""
        for segment in [s for s in self._segments if s >= at.segment]:
            with self._path(segment).open("rb") as file:
                file.seek(at.offset if segment == at.segment else 0)
                header = file.read(HEADER.size)
            if len(header) == HEADER.size:
                written_ms: int = HEADER.unpack(header)[3]
                return written_ms
        return None

    def _read_cursor(self) -> Cursor | None:
        found: list[tuple[int, bytes]] = []
        whole = os.pread(self._cursor_file, 2 * SLOT_BYTES, 0)
        for slot in (whole[:SLOT_BYTES], whole[SLOT_BYTES:]):
            if len(slot) < SLOT_HEADER.size:
                continue
            generation, length, crc = SLOT_HEADER.unpack(slot[: SLOT_HEADER.size])
            held = slot[SLOT_HEADER.size : SLOT_HEADER.size + length]
            if generation and len(held) == length and zlib.crc32(held) == crc:
                found.append((generation, held))
        if not found:
            if whole:
                log.warning("spool: the cursor in %s is damaged: what was delivered may be delivered again", self.directory)
            return None
        self._generation, held = max(found)
        return msgspec.msgpack.decode(held, type=Cursor)

    def _write_cursor(self, cursor: Cursor) -> None:
        held = msgspec.msgpack.encode(cursor)
        if SLOT_HEADER.size + len(held) > SLOT_BYTES:
            raise OSError("the note of a delivery is too long")
        self._generation += 1
        slot = SLOT_HEADER.pack(self._generation, len(held), zlib.crc32(held)) + held
        if os.pwrite(self._cursor_file, slot, self._generation % 2 * SLOT_BYTES) < len(slot):
            raise OSError("the disk took only part of the cursor")
        self._cursor = cursor

    def _path(self, segment: int) -> Path:
        return self.directory / f"{segment:010}{SUFFIX}"


def open_own(root: Path, name: str, bytes_max: int) -> Spool:
    """A log that no other process has: `root`/`name`, or while another process of that name still has it, `root`/`name`.2 and so on.

    Raises OSError.
    """
    for number in range(1, PLACES_MAX + 1):
        try:
            return Spool(root / (name if number == 1 else f"{name}.{number}"), bytes_max)
        except BlockingIOError:
            continue
    raise OSError(f"{PLACES_MAX} processes have the local log of {name}")


def open_orphan(root: Path, bytes_max: int) -> Spool | None:
    """A log under `root` that a process left something in and nobody has, None when there is none. Raises OSError."""
    for lock in sorted(root.glob(f"*/{LOCK}")):
        try:
            spool = Spool(lock.parent, bytes_max)
        except BlockingIOError:
            continue
        if spool.records:
            return spool
        spool.close()
    return None
