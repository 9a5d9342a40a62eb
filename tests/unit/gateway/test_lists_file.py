"""What is kept of the lists on a disk: read again as it was written, or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from gateway.contracts.lists import LIST_ENTRIES_MAX, ListBook
from gateway.lists_file import Kept, KeptError, read_kept, write_kept
from tests.unit.contracts.test_lists import NOW_MS, make_change, numbered


def make_book(entries: int = 500) -> ListBook:
    changes = [make_change(f"card-{i}", f"list-{i % 3}", expires_at_ms=NOW_MS if i % 5 == 0 else None) for i in range(entries)]
    changes += [make_change("card-1", "list-0"), make_change("ip-1", "list-9", entity_field="ip")]
    return ListBook().applied(numbered(changes), len(changes) + 7)


def test_the_lists_are_read_as_they_were_written(tmp_path: Path) -> None:
    path, book = tmp_path / "lists" / "book", make_book()
    write_kept(path, Kept(book, "ab" * 32, 3))
    kept = read_kept(path, LIST_ENTRIES_MAX)
    assert (kept.last_sha256, kept.missing) == ("ab" * 32, 3)
    assert (kept.book.version, kept.book.digest, kept.book.lists) == (book.version, book.digest, book.lists)
    values = [f"card-{i}" for i in range(500)]
    for at_ms in (NOW_MS - 1, NOW_MS):
        assert (kept.book.masks("card_id", values, at_ms) == book.masks("card_id", values, at_ms)).all()
    assert kept.book.lists_of("ip", "ip-1", NOW_MS) == ["list-9"]
    # And it goes on as the first one would.
    more = [(book.version, make_change("card-2", "list-0"))]
    assert kept.book.applied(more).digest == book.applied(more).digest
    # Nothing else stays behind.
    assert [p.name for p in path.parent.iterdir()] == ["book"]


def test_writing_replaces_what_was_there_whole(tmp_path: Path) -> None:
    path = tmp_path / "book"
    write_kept(path, Kept(make_book(), "", 0))
    write_kept(path, Kept(ListBook(), "", 0))
    assert read_kept(path, LIST_ENTRIES_MAX).book.version == 0


def test_a_file_with_one_changed_byte_or_cut_short_is_not_used(tmp_path: Path) -> None:
    path = tmp_path / "book"
    write_kept(path, Kept(make_book(20), "", 0))
    whole = path.read_bytes()
    for i in range(0, len(whole), 17):
        path.write_bytes(whole[:i] + bytes([whole[i] ^ 1]) + whole[i + 1 :])
        with pytest.raises(KeptError):
            read_kept(path, LIST_ENTRIES_MAX)
        path.write_bytes(whole[:i])
        with pytest.raises(KeptError):
            read_kept(path, LIST_ENTRIES_MAX)
    with pytest.raises(FileNotFoundError):
        read_kept(tmp_path / "none", LIST_ENTRIES_MAX)
