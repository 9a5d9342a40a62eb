"""Where the kernels find Redis' replies and the values in them, against hiredis, in whatever pieces they come."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.kernels.resp import NO_REPLY, bulks_in, replies_end
from gateway.redis.link import parsed
from tests.resp import Status, encoded

VALUES = st.none() | st.binary(max_size=40) | st.sampled_from([b"\r\n", b"$1\r\nx\r\n", b"*2\r\n", b"-1"])
REPLIES = st.recursive(
    VALUES | st.integers(-9, 9) | st.text("abc ", max_size=9).map(Status), lambda inner: st.lists(inner, max_size=4), max_leaves=12
)


def buffer(data: bytes) -> Any:
    return np.frombuffer(data, np.uint8)


@given(replies=st.lists(REPLIES, min_size=1, max_size=4), data=st.data())
def test_replies_end_where_hiredis_has_read_them(replies: list[Any], data: st.DataObject) -> None:
    whole = b"".join(map(encoded, replies))
    assert len(parsed(whole)) == len(replies)
    at, left, came = 0, len(replies), 0
    while came < len(whole):
        assert left > 0 or at > came, "they are not all there yet"
        came = data.draw(st.integers(came + 1, len(whole)))
        at, left = replies_end(buffer(whole[:came]), at, left)
    assert (at, left) == (len(whole), 0)
    # What comes after them is not looked at.
    assert replies_end(buffer(whole + b"?"), 0, len(replies)) == (len(whole), 0)


@given(values=st.lists(VALUES, max_size=8), before=st.binary(max_size=5))
def test_values_lie_where_they_are_said_to(values: list[bytes | None], before: bytes) -> None:
    raw = before + encoded(values)
    starts, sizes = np.full(len(values), -9), np.full(len(values), -9)
    assert bulks_in(buffer(raw), len(before), starts, sizes) == len(raw)
    found = [None if n < 0 else raw[a : a + n] for a, n in zip(starts.tolist(), sizes.tolist(), strict=True)]
    assert found == values == parsed(raw[len(before) :])[0]


@pytest.mark.parametrize(
    "raw", [b"?\r\n", b"HTTP/1.1\r\n", b"$x\r\n", b"$-2\r\n", b"$\r\n", b"*1x\r\n", b"$9999999999\r\n", b"+" + b"x" * 70_000]
)
def test_what_is_no_reply_is_found_out(raw: bytes) -> None:
    assert replies_end(buffer(raw), 0, 1)[0] == NO_REPLY


@pytest.mark.parametrize(
    "raw",
    [b"", b"*2\r\n", b"*1\r\n$1\r\nx\r\n", b"*2\r\n$1\r\nx\r\n:1\r\n", b"*2\r\n$1\r\nx\r\n$5\r\nx\r\n", b"-OOM\r\n", b"$-1\r\n"],
)
def test_what_is_no_array_of_two_values_is_none(raw: bytes) -> None:
    assert bulks_in(buffer(raw), 0, np.zeros(2, np.int64), np.zeros(2, np.int64)) == NO_REPLY
