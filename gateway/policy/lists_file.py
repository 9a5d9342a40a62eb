"""The lists of a process on its disk: one file, written whole beside the old one and renamed. Called by gateway/policy/lists.py.

Written in pieces of some thousand entries: a process that decides meanwhile waits for one of them at most (what a million entries take:
tests/unit/gateway/policy/test_lists_file.py).
"""

from __future__ import annotations

import hashlib
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec

from gateway.contracts.lists import ListBook, book_of_blocks

MAGIC = b"fraudgate lists 1\n"
FILE_BYTES_MAX = 1 << 30
_LENGTH = struct.Struct("<I")
_SHA_BYTES = hashlib.sha256().digest_size


class KeptError(ValueError):
    """The file is not what a gateway wrote. The message says what is wrong with it."""


class _Head(msgspec.Struct):
    version: int
    digest: str
    places: dict[str, tuple[int, int]]
    last_sha256: str
    missing: int


class _Block(msgspec.Struct, array_like=True):
    field: str
    entries: dict[str, int | tuple[tuple[int, int | None], ...]]


@dataclass(frozen=True)
class Kept:
    """`last_sha256` is of the topic's record at the book's version - 1 (empty: none), `missing` how many changes the topic lacked."""

    book: ListBook
    last_sha256: str
    missing: int


def write_kept(path: Path, kept: Kept) -> None:
    """It is on the disk when this returns. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    book, seen = kept.book, hashlib.sha256()
    try:
        with part.open("wb") as file:
            file.write(MAGIC)
            head = _Head(book.version, book.digest, book.places(), kept.last_sha256, kept.missing)
            for piece in _pieces(head, book):
                data = _LENGTH.pack(len(piece)) + piece
                seen.update(data)
                file.write(data)
            file.write(_LENGTH.pack(0) + seen.digest())
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _pieces(head: _Head, book: ListBook) -> Iterator[bytes]:
    encode = msgspec.msgpack.encode
    yield encode(head)
    for field, entries in book.blocks():
        yield encode(_Block(field, entries))


def read_kept(path: Path, entries_max: int) -> Kept:
    """What was written last. Raises `KeptError`, FileNotFoundError, OSError."""
    if path.stat().st_size > FILE_BYTES_MAX:
        raise KeptError(f"{path} has more than {FILE_BYTES_MAX} bytes")
    data = path.read_bytes()
    if not data.startswith(MAGIC):
        raise KeptError(f"{path} is not a file of lists, or of another version")
    at, pieces = len(MAGIC), []
    while True:
        if at + _LENGTH.size > len(data):
            raise KeptError(f"{path} is cut short")
        (size,) = _LENGTH.unpack_from(data, at)
        if size == 0:
            break
        pieces.append(data[at + _LENGTH.size : at + _LENGTH.size + size])
        at += _LENGTH.size + size
    if data[at + _LENGTH.size :] != hashlib.sha256(data[len(MAGIC) : at]).digest():
        raise KeptError(f"{path} is damaged: its checksum is another")
    try:
        head = msgspec.msgpack.decode(pieces[0], type=_Head)
        decoder = msgspec.msgpack.Decoder(_Block)
        blocks = ((block.field, block.entries) for block in map(decoder.decode, pieces[1:]))
        book = book_of_blocks(head.version, head.digest, head.places, blocks, entries_max)
    except (msgspec.DecodeError, IndexError) as exc:
        raise KeptError(f"{path} can't be read: {exc}") from exc
    return Kept(book, head.last_sha256, head.missing)
