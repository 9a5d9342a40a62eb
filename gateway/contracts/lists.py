"""Who stands on which list: the changes of the topic `list_changes`, and the book that they add up to.

A list is declared in the policy (id, entity field, kind, outcome); its entries come at run time, one `ListChange` for each, all in one
partition and in one order for ever. The *version* of a book is the offset of the last change it took in, plus one: whoever has the changes
can make the book of any version again (`book_as_of`), and receipts carry the version.

A `ListBook` is never changed: `applied` returns another that shares what stayed the same. An entity field's entries lie in SHARDS
dictionaries by hash, of which a change copies one, and nobody who reads waits. A read is one look-up a value (`masks`). What either costs
at a million entries: tests/unit/gateway/policy/test_lists_file.py.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from enum import StrEnum
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from gateway.contracts.transaction import TEXT_FIELDS, TEXT_LENGTH_MAX, holds_card_number

# A book takes in no more lists and entries than these; a change that would make more is refused. Not settings: all processes, and whoever
# replays a decision, must refuse the same changes.
LISTS_MAX = 62
LIST_ENTRIES_MAX = 1_000_000
LIST_ID_CHARS_MAX = 64
REASON_CHARS_MAX = 500
WHO_CHARS_MAX = 200
# What a record of the topic may have, Avro or JSON, so that none takes long to look at.
CHANGE_BYTES_MAX = 8192
# Of an expiry: the year 9999.
EXPIRES_AT_MS_MAX = 253_402_300_799_999
SHARDS = 256
# The version where no lists are known.
NO_VERSION = -1
EMPTY_DIGEST = hashlib.sha256().hexdigest()

Int64s = npt.NDArray[np.int64]
# By bit: when the entry ends, None: never. Few entries stand on more than one list.
_Ends = tuple[tuple[int, int | None], ...]
# A value's lists: their bits while none of them ends, else each with its end.
_Entry = int | _Ends
_Shards = tuple[dict[str, _Entry], ...]
# Never written to: an editor copies a shard before it does.
_NO_ENTRIES: _Shards = tuple({} for _ in range(SHARDS))


class ListAction(StrEnum):
    ADD = "add"
    REMOVE = "remove"


class ListChangeError(ValueError):
    """A change that no book takes in. The message says why, and names no entity."""


class ListChange(msgspec.Struct, frozen=True, kw_only=True):
    """One record of the topic; `schemas/list_change.avsc` has the same fields in the same order.

    `entity_field` is the field of a transaction that `entity_value` is compared with, as the policy declares the list. An `add` of what
    stands on the list already replaces its expiry; a `remove` of what doesn't changes nothing. From `expires_at_ms` on (None: never) the
    entry no longer counts. `who` and `reason` are for people, `at_ms` is the wall clock of the change.
    """

    list_id: str
    entity_field: str
    action: ListAction
    entity_value: str
    expires_at_ms: int | None
    reason: str
    who: str
    at_ms: int


_change_decoder = msgspec.json.Decoder(ListChange)
_change_encoder = msgspec.json.Encoder()


def check_change(change: ListChange) -> ListChange:
    """The change itself when its fields are within their bounds. Raises `ListChangeError`."""
    for name, most, least in (
        ("list_id", LIST_ID_CHARS_MAX, 1),
        ("entity_value", TEXT_LENGTH_MAX, 1),
        ("reason", REASON_CHARS_MAX, 0),
        ("who", WHO_CHARS_MAX, 0),
    ):
        if not least <= len(getattr(change, name)) <= most:
            raise ListChangeError(f"{name} must have {least} to {most} characters")
    if change.entity_field not in TEXT_FIELDS:
        raise ListChangeError(f"entity_field must be one of {', '.join(sorted(TEXT_FIELDS))}")
    if holds_card_number(change.entity_value) or holds_card_number(change.reason):
        raise ListChangeError("a card number; entries are tokens")
    if change.expires_at_ms is not None and not 0 < change.expires_at_ms <= EXPIRES_AT_MS_MAX:
        raise ListChangeError(f"expires_at_ms must be in 1..{EXPIRES_AT_MS_MAX} or null")
    return change


def change_of_fields(fields: Mapping[str, Any]) -> ListChange:
    """A change from the fields of an Avro record. Raises `ListChangeError`."""
    try:
        return check_change(msgspec.convert(fields, ListChange))
    except msgspec.ValidationError as exc:
        raise ListChangeError(str(exc)) from exc


def change_of_json(text: bytes) -> ListChange:
    """A change from plain JSON, which the topic takes too. Raises `ListChangeError`."""
    try:
        return check_change(_change_decoder.decode(text))
    except msgspec.DecodeError as exc:
        raise ListChangeError(str(exc)) from exc


class _Place(msgspec.Struct, frozen=True):
    """A list that has entries: its bit, and how many entries."""

    bit: int
    entries: int


class ListBook:
    """The entries of all lists as of `version`. `ListBook()` is version 0, without any.

    `digest` names the changes that were taken in, and the order: each one's is the sha256 of the one before and the change. `refused` is
    how many changes of the last `applied` were not taken in, because there are LISTS_MAX lists or `entries_max` entries already.
    """

    __slots__ = ("_fields", "_places", "digest", "entries", "entries_max", "refused", "version")

    def __init__(
        self,
        *,
        version: int = 0,
        digest: str = EMPTY_DIGEST,
        fields: Mapping[str, _Shards] | None = None,
        places: Mapping[str, _Place] | None = None,
        entries_max: int = LIST_ENTRIES_MAX,
        refused: int = 0,
    ) -> None:
        self.version = version
        self.digest = digest
        self._fields = {} if fields is None else fields
        self._places = {} if places is None else places
        self.entries = sum(place.entries for place in self._places.values())
        self.entries_max = entries_max
        self.refused = refused

    @property
    def lists(self) -> dict[str, int]:
        """The ids of the lists that have entries, with how many, expired ones included."""
        return {list_id: place.entries for list_id, place in self._places.items()}

    def bit(self, list_id: str) -> int:
        """What stands for the list in this book's masks, a power of 2; 0 for a list without entries. Another book may have another."""
        place = self._places.get(list_id)
        return 0 if place is None else place.bit

    def holds(self, entity_field: str) -> bool:
        """Whether any list has an entry for that field: `masks` is all 0 where not, and needs no values."""
        return entity_field in self._fields

    def masks(self, entity_field: str, values: Sequence[str | None], at_ms: int | Int64s) -> Int64s:
        """For each of `values` (n,) the bits of the lists it stands on as of `at_ms` (one instant for all, or (n,)); None is on no list."""
        shards = self._fields.get(entity_field)
        out = np.zeros(len(values), np.int64)
        if shards is None:
            return out
        # None is in no shard either.
        entries = [shards[hash(value) % SHARDS].get(value) for value in values]  # type: ignore[arg-type]
        for i, entry in enumerate(entries):
            if entry is not None:
                out[i] = entry if isinstance(entry, int) else _bits_at(entry, at_ms if isinstance(at_ms, int) else int(at_ms[i]))
        return out

    def lists_of(self, entity_field: str, value: str, at_ms: int) -> list[str]:
        """The ids of the lists that one value stands on, sorted. For people; `masks` is for batches."""
        mask = int(self.masks(entity_field, [value], at_ms)[0])
        return sorted(list_id for list_id, place in self._places.items() if place.bit & mask)

    def applied(self, changes: Iterable[tuple[int, ListChange]], version: int | None = None) -> ListBook:
        """The book after `changes`, pairs of offset and change, which come in order and behind this book's version.

        `version` is that of the new book where records behind the last change held none that could be read; None: the last change's.
        """
        editor = _Editor(self._fields, self._places, self.entries_max)
        digest, at = self.digest, self.version
        for offset, change in changes:
            if offset < at:
                raise ValueError(f"a change at offset {offset} comes behind version {at}")
            at = offset + 1
            editor.apply(change)
            digest = hashlib.sha256(digest.encode() + b"%d" % offset + _change_encoder.encode(change)).hexdigest()
        if version is not None:
            if version < at:
                raise ValueError(f"version {version} is before the last change's, {at}")
            at = version
        return ListBook(
            version=at,
            digest=digest,
            fields=editor.fields(),
            places=editor.places,
            entries_max=self.entries_max,
            refused=editor.refused,
        )

    def blocks(self) -> Iterable[tuple[str, dict[str, _Entry]]]:
        """Everything that is in the book, in pieces: an entity field and some of its entries. For `book_of_blocks`."""
        for name, shards in self._fields.items():
            for shard in shards:
                if shard:
                    yield name, shard

    def places(self) -> dict[str, tuple[int, int]]:
        """By list its bit and how many entries it has. For `book_of_blocks`."""
        return {list_id: (place.bit, place.entries) for list_id, place in self._places.items()}


def book_of_blocks(
    version: int,
    digest: str,
    places: Mapping[str, tuple[int, int]],
    blocks: Iterable[tuple[str, Mapping[str, _Entry]]],
    entries_max: int = LIST_ENTRIES_MAX,
) -> ListBook:
    """The book that a process wrote down as `places` and `blocks`. Its shards differ: texts hash differently in each process."""
    fields: dict[str, _Shards] = {}
    for name, block in blocks:
        shards = fields.setdefault(name, tuple({} for _ in range(SHARDS)))
        for value, entry in block.items():
            shards[hash(value) % SHARDS][value] = entry
    return ListBook(
        version=version,
        digest=digest,
        fields=fields,
        places={list_id: _Place(bit, entries) for list_id, (bit, entries) in places.items()},
        entries_max=entries_max,
    )


def book_as_of(changes: Iterable[tuple[int, ListChange]], version: int) -> ListBook:
    """The book of `version`, from (offset, change) of all changes, in order. ValueError for a version below 0: no lists were known."""
    if version < 0:
        raise ValueError(f"there is no book of version {version}")
    return ListBook().applied(((offset, change) for offset, change in changes if offset < version), version)


def _bits_at(entry: _Ends, at_ms: int) -> int:
    return sum(bit for bit, ends_ms in entry if ends_ms is None or at_ms < ends_ms)


class _Editor:
    """What `ListBook.applied` makes the next book with. Copies a shard when it first writes to it, and nothing else."""

    def __init__(self, fields: Mapping[str, _Shards], places: Mapping[str, _Place], entries_max: int) -> None:
        self.places = dict(places)
        self.refused = 0
        self._before = fields
        self._entries_max = entries_max
        self._entries = sum(place.entries for place in places.values())
        # Of each field that was written to: its shards, and which of them are ours to write to.
        self._written: dict[str, tuple[list[dict[str, _Entry]], set[int]]] = {}

    def fields(self) -> dict[str, _Shards]:
        """Of each field that has entries."""
        found = dict(self._before)
        for name, (shards, _) in self._written.items():
            if any(shards):
                found[name] = tuple(shards)
            else:
                found.pop(name, None)
        return found

    def apply(self, change: ListChange) -> None:
        name, value = change.entity_field, change.entity_value
        place = self.places.get(change.list_id)
        ends = _ends_of(self._shards(name)[hash(value) % SHARDS].get(value))
        bit = 0 if place is None else place.bit
        stands = any(of == bit for of, _ in ends)
        rest = tuple(pair for pair in ends if pair[0] != bit)
        if change.action is ListAction.REMOVE:
            if stands:
                self._put(name, value, rest)
                self._count(change.list_id, -1)
            return
        if not stands:
            if self._entries >= self._entries_max or (place is None and len(self.places) >= LISTS_MAX):
                self.refused += 1
                return
            bit = self._count(change.list_id, 1)
        self._put(name, value, (*rest, (bit, change.expires_at_ms)))

    def _shards(self, name: str) -> Sequence[dict[str, _Entry]]:
        written = self._written.get(name)
        return self._before.get(name, _NO_ENTRIES) if written is None else written[0]

    def _count(self, list_id: str, by: int) -> int:
        """One entry of the list more or less; its bit, which is the lowest free one for a list that had none."""
        self._entries += by
        place = self.places.get(list_id)
        if place is None:
            taken = {p.bit for p in self.places.values()}
            place = _Place(next(1 << i for i in range(LISTS_MAX) if 1 << i not in taken), 0)
        if place.entries + by == 0:
            del self.places[list_id]
        else:
            self.places[list_id] = _Place(place.bit, place.entries + by)
        return place.bit

    def _put(self, name: str, value: str, ends: _Ends) -> None:
        if name not in self._written:
            self._written[name] = list(self._shards(name)), set()
        shards, ours = self._written[name]
        k = hash(value) % SHARDS
        if k not in ours:
            shards[k] = dict(shards[k])
            ours.add(k)
        if ends:
            shards[k][value] = sum(bit for bit, _ in ends) if all(end is None for _, end in ends) else ends
        else:
            del shards[k][value]


def _ends_of(entry: _Entry | None) -> _Ends:
    if entry is None:
        return ()
    if not isinstance(entry, int):
        return entry
    return tuple((1 << i, None) for i in range(entry.bit_length()) if entry >> i & 1)
