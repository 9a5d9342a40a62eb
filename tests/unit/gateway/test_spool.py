"""The local log: what is appended comes back in order, once delivered it is gone, and a process that dies anywhere loses nothing of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from gateway.spool import HEADER, Spool

MANY = 1 << 30


def make_spool(folder: Path, bytes_max: int = MANY, segment_bytes: int = 200) -> Spool:
    return Spool(folder, bytes_max, segment_bytes)


def payloads(spool: Spool, bytes_max: int = MANY) -> list[bytes]:
    return [e.payload for e in spool.read(bytes_max)]


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
    spool.delivered(spool.read(10))
    assert spool.append(b"d" * 10, 1)
    assert payloads(spool) == [b"c" * 10, b"d" * 10]
    spool.close()


def test_what_is_delivered_does_not_come_again_after_a_restart(tmp_path: Path) -> None:
    spool = make_spool(tmp_path)
    for i in range(20):
        spool.append(b"%02d" % i * 20, 1)
    spool.delivered(spool.read(40 * 7))
    spool.close()
    spool = make_spool(tmp_path)
    assert [p[:2] for p in payloads(spool)] == [b"%02d" % i for i in range(7, 20)]
    assert spool.records == 13
    spool.delivered(spool.read(MANY))
    assert (spool.records, spool.bytes, spool.oldest_ms) == (0, 0, None)
    assert list(tmp_path.glob("*.log")) == []
    spool.close()
    spool = make_spool(tmp_path)
    assert payloads(spool) == []
    spool.append(b"new", 1)
    assert payloads(spool) == [b"new"]
    spool.close()


def test_a_delivery_under_way_is_remembered_with_its_note(tmp_path: Path) -> None:
    spool = make_spool(tmp_path)
    for i in range(9):
        spool.append(b"%d" % i * 50, 1)
    entries = spool.read(4 * 50)
    spool.begin(entries[-1].end, b"who")
    spool.append(b"later", 1)
    spool.close()
    spool = make_spool(tmp_path)
    assert spool.pending == (entries[-1].end, b"who")
    assert [e.payload for e in spool.read(1, until=entries[-1].end)] == [e.payload for e in entries]
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
    entries = spool.read(MANY)
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
