"""What is kept of the lists on a disk: read again as it was written, or not at all."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest

from gateway.contracts.lists import LIST_ENTRIES_MAX, ListBook
from gateway.policy.lists_file import Kept, KeptError, read_kept, write_kept
from tests.unit.contracts.test_lists import NOW_MS, make_change, numbered

pytestmark = pytest.mark.anyio


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


@pytest.mark.slow
@pytest.mark.timeout(400)
async def test_a_million_entries_change_and_are_kept_without_anybody_waiting(tmp_path: Path) -> None:
    book = ListBook()
    for first in range(0, LIST_ENTRIES_MAX, 20_000):
        book = book.applied([(i, make_change(f"token-{i:07d}", f"list-{i % 5}")) for i in range(first, first + 20_000)])
    one_more = book.applied([(book.version, make_change("one-more", "list-0"))])
    assert (book.entries, one_more.entries, one_more.refused) == (LIST_ENTRIES_MAX, LIST_ENTRIES_MAX, 1)
    lags_s: list[float] = []

    async def look() -> None:
        while True:
            began_s = time.perf_counter()
            await asyncio.sleep(0.001)  # sleeps: what is measured is how late it ends
            lags_s.append(time.perf_counter() - began_s)

    def change() -> float:
        began_s, changed = time.perf_counter(), book
        for i in range(1000):
            changed = changed.applied([(changed.version, make_change(f"token-{i:07d}", f"list-{i % 5}", expires_at_ms=NOW_MS))])
        return time.perf_counter() - began_s

    looking = asyncio.create_task(look())
    change_s = await asyncio.to_thread(change)
    began_s = time.perf_counter()
    path = tmp_path / "book"
    await asyncio.to_thread(write_kept, path, Kept(book, "", 0))
    write_s = time.perf_counter() - began_s
    looking.cancel()
    values = [f"other-{i}" for i in range(64)]
    began_s = time.perf_counter()
    for _ in range(1000):
        book.masks("card_id", values, NOW_MS)
    read_us = (time.perf_counter() - began_s) / 64_000 * 1e6
    kept = read_kept(path, LIST_ENTRIES_MAX).book
    assert (kept.entries, kept.digest) == (book.entries, book.digest)
    size_mb = path.stat().st_size / 1e6
    print(
        f"\na million entries: {change_s * 1000:.0f} us a change, {write_s:.1f} s and {size_mb:.0f} MB to keep, {read_us:.2f} us a value to"
        f" look up; the event loop waited {max(lags_s) * 1000:.0f} ms at most",
        flush=True,
    )
    # A copy of all entries would take as long for each change.
    assert change_s / 1000 < 0.005
    assert max(lags_s) < 0.5
