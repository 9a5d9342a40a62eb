"""The audit file: every entry stands on a line of its own, whatever happened to the one before."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from gateway.contracts.audit import AUDIT_FILE, ENTRY_BYTES_MAX, append_audit, read_audit


def test_entries_come_back_in_the_order_they_were_written(tmp_path: Path) -> None:
    first = append_audit(tmp_path, action="promote", subject="champion", before=None, after="1")
    second = append_audit(
        tmp_path, action="rollback", subject="champion", before="1", after="2", reason="alerts", by="ann", at_ms=5
    )
    assert read_audit(tmp_path) == ([first, second], 0)
    assert "@" in first.who
    assert (second.who, second.at_ms) == ("ann", 5)


def test_a_directory_without_an_audit_file_has_no_entries(tmp_path: Path) -> None:
    assert read_audit(tmp_path / "nowhere") == ([], 0)


def test_half_a_line_costs_itself_and_not_the_next_entry(tmp_path: Path) -> None:
    append_audit(tmp_path, action="promote", subject="champion", before=None, after="1")
    path = tmp_path / AUDIT_FILE
    path.write_bytes(path.read_bytes() + b'{"at_ms": 17, "wh')
    entry = append_audit(tmp_path, action="promote", subject="champion", before="1", after="2")
    entries, unreadable = read_audit(tmp_path)
    assert (entries[-1], len(entries), unreadable) == (entry, 2, 1)


def test_a_reason_with_line_breaks_stays_on_one_line(tmp_path: Path) -> None:
    append_audit(tmp_path, action="route", subject="challenger_share", before="0.1", after="0", reason="a\nb\n")
    entries, unreadable = read_audit(tmp_path)
    assert ([e.reason for e in entries], unreadable) == (["a\nb\n"], 0)


def test_many_writers_at_once_lose_no_entry(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: append_audit(tmp_path, action="route", subject=str(i), before=None, after="x" * 4000), range(100)))
    entries, unreadable = read_audit(tmp_path)
    assert ({int(e.subject) for e in entries}, unreadable) == (set(range(100)), 0)


def test_an_entry_one_byte_too_long_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    def write(reason: str) -> None:
        append_audit(tmp_path, action="a", subject="s", before=None, after=None, reason=reason, by="me", at_ms=1)

    write("")
    room = ENTRY_BYTES_MAX - (tmp_path / AUDIT_FILE).stat().st_size
    write("x" * room)
    with pytest.raises(ValueError, match="at most"):
        write("x" * (room + 1))
    assert len(read_audit(tmp_path)[0]) == 2
