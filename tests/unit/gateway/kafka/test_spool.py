"""The local log: what is appended comes back in order, once delivered it is gone, and a process that dies anywhere loses nothing of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from gateway.kafka.spool import HEADER, SLOT_BYTES, SLOT_HEADER, Spool, open_orphan, open_own

MANY = 1 << 30


def make_spool(folder: Path, bytes_max: int = MANY, segment_bytes: int = 200) -> Spool:
    return Spool(folder, bytes_max, segment_bytes)


def payloads(spool: Spool, bytes_max: int = MANY) -> list[bytes]:
    return [payload for _, payload in spool.read(bytes_max)]


def deliver(spool: Spool, bytes_max: int = MANY) -> None:
    spool.delivered([entry for entry, _ in spool.read(bytes_max)])


def test_entries_come_back_in_order_over_segments_and_restarts(tmp_path: Path) -> None:
    spool = make_spool(tmp_path)
    wanted = [b"%d" % i * 30 for i in range(40)]
    for payload in wanted[:25]:
        assert spool.append(payload, 2)
    spool.close()
    spool = make_spool(tmp_path)
    for payload in wanted[25:]:
        assert spool.append(payload, 2)
    assert payloads(spool) == wanted
    assert spool.records == 80
    assert len(list(tmp_path.glob("*.log"))) > 5
    spool.close()


def test_one_byte_more_than_the_bound_is_refused_and_room_comes_back(tmp_path: Path) -> None:
    spool = make_spool(tmp_path, bytes_max=2 * (HEADER.size + 10))
    assert spool.append(b"a" * 10, 1)
    assert not spool.append(b"b" * 11, 1)
    assert spool.append(b"c" * 10, 1)
    assert not spool.append(b"", 1)
    deliver(spool, 10)
    assert spool.append(b"d" * 10, 1)
    assert payloads(spool) == [b"c" * 10, b"d" * 10]
    spool.close()


def test_what_is_delivered_does_not_come_again_after_a_restart(tmp_path: Path) -> None:
    spool = make_spool(tmp_path)
    for i in range(20):
        spool.append(b"%02d" % i * 20, 1)
    deliver(spool, 40 * 7)
    spool.close()
    spool = make_spool(tmp_path)
    assert [p[:2] for p in payloads(spool)] == [b"%02d" % i for i in range(7, 20)]
    assert spool.records == 13
    deliver(spool)
    assert (spool.records, spool.bytes, spool.oldest_ms) == (0, 0, None)
    assert len(list(tmp_path.glob("*.log"))) == 1
    spool.close()
    assert list(tmp_path.glob("*.log")) == []
    spool = make_spool(tmp_path)
    assert payloads(spool) == []
    spool.append(b"new", 1)
    assert payloads(spool) == [b"new"]
    spool.close()


def test_a_delivery_under_way_is_remembered_with_its_note(tmp_path: Path) -> None:
    spool = make_spool(tmp_path)
    for i in range(9):
        spool.append(b"%d" % i * 50, 1)
    entries = [entry for entry, _ in spool.read(4 * 50)]
    spool.begin(entries[-1].end, b"who")
    spool.append(b"later", 1)
    spool.close()
    spool = make_spool(tmp_path)
    assert spool.pending == (entries[-1].end, b"who")
    assert [entry for entry, _ in spool.read(1, until=entries[-1].end)] == entries
    spool.delivered(entries)
    assert payloads(spool)[0] == b"4" * 50
    spool.close()
    spool = make_spool(tmp_path)
    assert spool.pending is None
    spool.close()


@pytest.mark.parametrize("left", range(1, HEADER.size + 6))
def test_an_entry_that_was_cut_short_is_left_out(tmp_path: Path, left: int) -> None:
    spool = make_spool(tmp_path, segment_bytes=10_000)
    spool.append(b"first", 1)
    whole = (tmp_path / "0000000001.log").stat().st_size
    spool.append(b"second", 1)
    spool.close()
    file = tmp_path / "0000000001.log"
    file.write_bytes(file.read_bytes()[: whole + left])
    spool = make_spool(tmp_path)
    assert payloads(spool) == [b"first"]
    spool.append(b"third", 1)
    assert payloads(spool) == [b"first", b"third"]
    spool.close()


def test_a_damaged_entry_ends_its_segment(tmp_path: Path) -> None:
    spool = make_spool(tmp_path, segment_bytes=10_000)
    for payload in (b"first", b"second", b"third"):
        spool.append(payload, 1)
    spool.close()
    file = tmp_path / "0000000001.log"
    file.write_bytes(file.read_bytes().replace(b"second", b"sEcond"))
    spool = make_spool(tmp_path)
    assert payloads(spool) == [b"first"]
    spool.close()


def test_a_process_that_died_while_segments_were_removed_delivers_nothing_again(tmp_path: Path) -> None:
    spool = make_spool(tmp_path)
    for i in range(9):
        spool.append(b"%d" % i * 50, 1)
    entries = [entry for entry, _ in spool.read(MANY)]
    spool.begin(entries[-1].end, b"who")
    kept = {p: p.read_bytes() for p in tmp_path.glob("*.log")}
    spool.delivered(entries)
    spool.close()
    for path in sorted(kept)[2:]:
        path.write_bytes(kept[path])
    spool = make_spool(tmp_path)
    assert payloads(spool) == []
    spool.close()


def test_two_processes_do_not_share_it(tmp_path: Path) -> None:
    spool = make_spool(tmp_path)
    with pytest.raises(BlockingIOError):
        make_spool(tmp_path)
    spool.close()
    make_spool(tmp_path).close()


def test_while_one_process_drains_the_next_of_its_name_has_a_log_of_its_own(tmp_path: Path) -> None:
    old = open_own(tmp_path, "7", MANY)
    old.append(b"old", 1)
    new = open_own(tmp_path, "7", MANY)
    assert new.directory != old.directory
    assert payloads(new) == []
    old.close()
    # Whose process is gone is found by anybody, once.
    found = open_orphan(tmp_path, MANY)
    assert found is not None
    assert payloads(found) == [b"old"]
    assert open_orphan(tmp_path, MANY) is None
    deliver(found)
    found.close()
    assert open_orphan(tmp_path, MANY) is None
    new.close()


def test_the_age_is_of_the_oldest_that_is_not_delivered(tmp_path: Path) -> None:
    now_ms = iter(range(1000, 2000, 100))
    spool = Spool(tmp_path, MANY, 100, lambda: next(now_ms))
    for i in range(5):
        spool.append(b"%d" % i * 60, 1)
    assert spool.oldest_ms == 1000
    # 60 bytes a payload, and two to a segment: what is left begins in another segment.
    deliver(spool, 120)
    assert spool.oldest_ms == 1200
    deliver(spool, 60)
    assert spool.oldest_ms == 1300
    spool.close()


def test_entries_are_synchronised_while_segments_come_and_go(tmp_path: Path) -> None:
    spool = make_spool(tmp_path, segment_bytes=100)
    for i in range(20):
        spool.append(b"%02d" % i * 30, 1)
        if i % 3 == 0:
            spool.sync()
        if i % 4 == 0:
            deliver(spool, 60)
    spool.sync()
    assert [p[:2] for p in payloads(spool)] == [b"%02d" % i for i in range(5, 20)]
    spool.close()


@pytest.mark.parametrize("begun", [1, 2, 3])
def test_a_cursor_that_was_being_written_leaves_the_one_before(tmp_path: Path, begun: int) -> None:
    spool = make_spool(tmp_path)
    for i in range(6):
        spool.append(b"%d" % i * 50, 1)
    for _ in range(begun):
        deliver(spool, 50)
    spool.close()
    file = tmp_path / "cursor"
    slots = bytearray(file.read_bytes())
    # The last one written, cut short in its middle.
    at = begun % 2 * SLOT_BYTES + SLOT_HEADER.size + 2
    slots[at] ^= 0xFF
    file.write_bytes(slots)
    spool = make_spool(tmp_path)
    left = [p[:1] for p in payloads(spool)]
    assert left == [b"%d" % i for i in range(begun - 1 if begun > 1 else 0, 6)]
    spool.close()


def test_a_note_that_is_too_long_is_refused_and_nothing_is_lost(tmp_path: Path) -> None:
    spool = make_spool(tmp_path)
    spool.append(b"a", 1)
    with pytest.raises(OSError, match="too long"):
        spool.begin(spool.tail, b"x" * SLOT_BYTES)
    spool.close()
    spool = make_spool(tmp_path)
    assert payloads(spool) == [b"a"]
    assert spool.pending is None
    spool.close()
