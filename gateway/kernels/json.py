"""A batch of transactions from JSON to Avro, body by body. Called by gateway/scoring/requests.py. About a microsecond each.

Reads what callers usually send: one flat object of our fields, each once, texts without escapes in ASCII, integers and decimal numbers
without exponent. Whatever else comes is left to contracts.transaction.parse_json, which names what is wrong with it or finds it good.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from gateway.contracts.transaction import FIELDS, REQUIRED_FIELDS
from gateway.kernels.compiled import allocating, compiled
from gateway.kernels.intake import TEXTS, Floats, Int64s
from gateway.kernels.raw import Bytes, put_bytes, put_f64, put_long

# Where a field's value goes: a text's place in the record, behind them event_time_ms, amount_minor, latitude, longitude.
_TEXT_COUNT = len(TEXTS)
_EVENT_TIME, _AMOUNT, _LATITUDE, _LONGITUDE = range(_TEXT_COUNT, _TEXT_COUNT + 4)
_PLACES = (*TEXTS, "event_time_ms", "amount_minor", "latitude", "longitude")
assert set(_PLACES) == set(FIELDS)
_COUNT = len(_PLACES)
_NAME_MAX = max(map(len, _PLACES))
_NAMES = np.zeros((_COUNT, _NAME_MAX), np.uint8)
for _i, _name in enumerate(_PLACES):
    _NAMES[_i, : len(_name)] = np.frombuffer(_name.encode(), np.uint8)
_NAME_LENGTHS = np.array([len(name) for name in _PLACES], np.int64)
_REQUIRED = sum(1 << _PLACES.index(name) for name in REQUIRED_FIELDS)
_REQUIRED_TEXTS = sum(name in REQUIRED_FIELDS for name in TEXTS)
assert all(name in REQUIRED_FIELDS for name in TEXTS[:_REQUIRED_TEXTS])
# More may not fit. Powers of ten are exact in a double up to the 22nd.
_DIGITS_MAX = 18
_QUOTE, _COLON, _COMMA, _OPEN, _CLOSE, _MINUS, _DOT, _ZERO, _NINE, _BACKSLASH = b'":,{}-.09\\'
_POWERS = 10.0 ** np.arange(_DIGITS_MAX + 1)
# Dekker's constant: splits a double into two of half its digits.
_SPLIT = 134217729.0
_UNSURE = 2.0**-90


@compiled
def _past_space(buf: Bytes, at: int, end: int) -> int:
    while at < end and (buf[at] == 32 or 9 <= buf[at] <= 10 or buf[at] == 13):
        at += 1
    return at


@compiled
def _text_end(buf: Bytes, at: int, end: int) -> int:
    """Where the closing mark of a text that begins at `at` is, -1 when it isn't plain."""
    while at < end:
        c = buf[at]
        if c == _QUOTE:
            return at
        if c < 32 or c >= 127 or c == _BACKSLASH:
            return -1
        at += 1
    return -1


@compiled
def _place_of(buf: Bytes, at: int, length: int) -> int:
    """Of the field with this name, -1 when there is none."""
    for place in range(_COUNT):
        if _NAME_LENGTHS[place] == length:
            same = True
            for i in range(length):
                if buf[at + i] != _NAMES[place, i]:
                    same = False
                    break
            if same:
                return place
    return -1


@compiled
def _is_null(buf: Bytes, at: int, end: int) -> bool:
    return end - at >= 4 and buf[at] == 110 and buf[at + 1] == 117 and buf[at + 2] == 108 and buf[at + 3] == 108


@compiled
def _digits(buf: Bytes, at: int, end: int) -> tuple[int, int]:
    """A whole number without needless zeros, and where it ends: -1 when it is none or longer than that."""
    begin = at
    value = 0
    while at < end and _ZERO <= buf[at] <= _NINE:
        if at - begin == _DIGITS_MAX:
            return 0, -1
        value = value * 10 + np.int64(buf[at]) - _ZERO
        at += 1
    if at == begin or (buf[begin] == _ZERO and at - begin > 1):
        return 0, -1
    return value, at


@compiled
def _integer(buf: Bytes, at: int, end: int) -> tuple[int, int]:
    negative = at < end and buf[at] == _MINUS
    value, at = _digits(buf, at + negative, end)
    return -value if negative else value, at


@compiled
def _quotient(value: int, power: float) -> float:
    """The double nearest to value / power, NaN when that isn't certain. Both are positive and `power` is exact."""
    high = np.float64(value)
    low = np.float64(value - np.int64(high))
    first = high / power
    # What is left of `high`, exactly (T. J. Dekker, A floating-point technique for extending the available precision, 1971).
    a = first * _SPLIT
    a_high = a - (a - first)
    a_low = first - a_high
    b = power * _SPLIT
    b_high = b - (b - power)
    b_low = power - b_high
    product = first * power
    rest = a_low * b_low - (((product - a_high * b_high) - a_low * b_high) - a_high * b_low)
    second = ((high - product) - rest + low) / power
    # The sum of the two is right to more than a hundred bits: to which double it rounds is certain unless it lies just between two.
    unsure = first * _UNSURE
    return first + second if first + (second - unsure) == first + (second + unsure) else np.nan


@compiled
def _decimal(buf: Bytes, at: int, end: int) -> tuple[float, int]:
    """A number with a fraction, correctly rounded. -1 for all others, and where the rounding isn't certain."""
    negative = at < end and buf[at] == _MINUS
    begin = at + negative
    value, at = _digits(buf, begin, end)
    if at < 0 or at >= end or buf[at] != _DOT:
        return 0.0, -1
    at += 1
    whole, fraction = at - 1 - begin, 0
    while at < end and _ZERO <= buf[at] <= _NINE:
        fraction += 1
        if whole + fraction > _DIGITS_MAX:
            return 0.0, -1
        value = value * 10 + np.int64(buf[at]) - _ZERO
        at += 1
    if fraction == 0:
        return 0.0, -1
    found = _quotient(value, _POWERS[fraction]) if value > 0 else 0.0
    if np.isnan(found):
        return 0.0, -1
    return -found if negative else found, at


@compiled
def _parse(buf: Bytes, at: int, end: int, starts: Int64s, lengths: Int64s, numbers: Int64s, places: Floats) -> bool:
    """One body. False when it is none of ours, or perhaps."""
    lengths[:] = -1
    places[:] = np.nan
    seen = 0
    at = _past_space(buf, at, end)
    if at >= end or buf[at] != _OPEN:
        return False
    at = _past_space(buf, at + 1, end)
    while True:
        if at >= end or buf[at] != _QUOTE:
            return False
        begin = at + 1
        at = _text_end(buf, begin, end)
        if at < 0:
            return False
        place = _place_of(buf, begin, at - begin)
        if place < 0 or seen >> place & 1:
            return False
        seen |= 1 << place
        at = _past_space(buf, at + 1, end)
        if at >= end or buf[at] != _COLON:
            return False
        at = _past_space(buf, at + 1, end)
        if at >= end:
            return False
        if _is_null(buf, at, end):
            if _REQUIRED >> place & 1:
                return False
            at += 4
        elif place < _TEXT_COUNT:
            if buf[at] != _QUOTE:
                return False
            starts[place] = at + 1
            at = _text_end(buf, at + 1, end)
            if at < 0:
                return False
            lengths[place] = at - starts[place]
            at += 1
        elif place < _LATITUDE:
            numbers[place - _EVENT_TIME], at = _integer(buf, at, end)
            if at < 0:
                return False
        else:
            places[place - _LATITUDE], at = _decimal(buf, at, end)
            if at < 0:
                return False
        at = _past_space(buf, at, end)
        if at >= end:
            return False
        if buf[at] == _CLOSE:
            break
        if buf[at] != _COMMA:
            return False
        at = _past_space(buf, at + 1, end)
    return _past_space(buf, at + 1, end) == end and seen & _REQUIRED == _REQUIRED


@compiled
def _write(
    buf: Bytes,
    edges: Int64s,
    out: Bytes,
    out_edges: Int64s,
    read: npt.NDArray[np.bool_],
    starts: Int64s,
    lengths: Int64s,
    numbers: Int64s,
    places: Floats,
) -> None:
    at = 0
    out_edges[0] = 0
    for row in range(len(edges) - 1):
        read[row] = _parse(buf, edges[row], edges[row + 1], starts, lengths, numbers, places)
        if read[row]:
            for text in range(_TEXT_COUNT):
                if text >= _REQUIRED_TEXTS:
                    out[at] = 0 if lengths[text] < 0 else 2
                    at += 1
                    if lengths[text] < 0:
                        continue
                at = put_long(out, at, lengths[text])
                at = put_bytes(out, at, buf, starts[text], lengths[text])
                if text == 0:
                    at = put_long(out, at, numbers[0])
                elif text == 3:
                    at = put_long(out, at, numbers[1])
            for place in range(2):
                out[at] = 0 if np.isnan(places[place]) else 2
                at += 1
                if out[at - 1] == 2:
                    at = put_f64(out, at, places[place])
        out_edges[row + 1] = at


@allocating
def write_transactions(buf: Bytes, edges: Int64s, out: Bytes, out_edges: Int64s, read: npt.NDArray[np.bool_]) -> None:
    """The records of schemas/transaction.avsc of the bodies that lie in `buf` from edges[i] to edges[i + 1] - 1.

    Row i of `out` goes from out_edges[i] to out_edges[i + 1] - 1, and is empty where `read` (rows,) is False. A record is shorter than its
    body, so `out` is as long as `buf`.
    """
    starts, lengths = np.empty(_TEXT_COUNT, np.int64), np.empty(_TEXT_COUNT, np.int64)
    numbers, places = np.empty(2, np.int64), np.empty(2, np.float64)
    _write(buf, edges, out, out_edges, read, starts, lengths, numbers, places)
