"""Redis' replies (RESP 2) as they lie in memory: where they end, and where the values of one are. Called by gateway/redis.

A batch asks for some 500 values of a kilobyte: made into objects one by one they were copied twice and took 1.5 us of CPU a payment. Its
slow twin is hiredis (tests/agreement).
"""

from __future__ import annotations

import numpy as np

from gateway.kernels.compiled import compiled
from gateway.kernels.intake import Int64s
from gateway.kernels.raw import Bytes

_CR, _LF, _MINUS, _ZERO, _NINE = 13, 10, 45, 48, 57
_SIMPLE, _ERROR, _NUMBER, _BULK, _ARRAY = (ord(c) for c in "+-:$*")
# Redis' own bound of a value, and more than an error ever says.
_BULK_BYTES_MAX, _LINE_BYTES_MAX = 512 * 1024 * 1024, 65_536
NO_REPLY = -1


@compiled
def _line_end(buf: Bytes, at: int, end: int) -> int:
    """Where the line that `at` is in has its end, -1 when that has not come."""
    for i in range(at, end - 1):
        if buf[i] == _CR and buf[i + 1] == _LF:
            return i
    return -1


@compiled
def _length(buf: Bytes, at: int, line_end: int) -> int:
    """The number behind a `$` or `*`, -1 for nil, -2 for what is none."""
    if line_end - at == 2 and buf[at] == _MINUS and buf[at + 1] == _ZERO + 1:
        return -1
    if at == line_end or line_end - at > 9:
        return -2
    value = 0
    for i in range(at, line_end):
        if not _ZERO <= buf[i] <= _NINE:
            return -2
        value = value * 10 + np.int64(buf[i]) - _ZERO
    return value


@compiled
def replies_end(buf: Bytes, at: int, left: int) -> tuple[int, int]:
    """Goes on from `at`, where a reply begins or a part of one, while `left` of them are due. Returns where it stopped, and what is left.

    They are all there when none is left and the place isn't behind the end of `buf`; it may be, within a long value. What begins at the
    place is to be looked at again when more has come. NO_REPLY as the place: this is no RESP.
    """
    end = len(buf)
    while left > 0 and at < end:
        line_end = _line_end(buf, at, end)
        if line_end < 0:
            return (at if end - at <= _LINE_BYTES_MAX else NO_REPLY), left
        kind = buf[at]
        if kind == _BULK or kind == _ARRAY:
            length = _length(buf, at + 1, line_end)
            if length < -1 or length > _BULK_BYTES_MAX:
                return NO_REPLY, left
            if kind == _ARRAY:
                left += max(length, 0)
            elif length >= 0:
                line_end += length + 2
        elif kind != _SIMPLE and kind != _ERROR and kind != _NUMBER:
            return NO_REPLY, left
        left -= 1
        at = line_end + 2
    return at, left


@compiled
def bulks_in(buf: Bytes, at: int, starts: Int64s, sizes: Int64s) -> int:
    """An array of just as many values as `starts` and `sizes` (n,) have places, which are filled in: size -1 for nil.

    Returns where it ends, NO_REPLY when it is none. All of it is in `buf`.
    """
    end = len(buf)
    line_end = _line_end(buf, at, end)
    if line_end < 0 or buf[at] != _ARRAY or _length(buf, at + 1, line_end) != len(starts):
        return NO_REPLY
    at = line_end + 2
    for i in range(len(starts)):
        line_end = _line_end(buf, at, end)
        if line_end < 0 or buf[at] != _BULK:
            return NO_REPLY
        length = _length(buf, at + 1, line_end)
        if length < -1:
            return NO_REPLY
        at = line_end + 2
        starts[i] = at
        sizes[i] = length
        if length >= 0:
            at += length + 2
            if at > end:
                return NO_REPLY
    return at
