"""The JSON kernel against msgspec and the checks: what it reads is what they read, and what it leaves is read by them."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.contracts.transaction import FIELDS, RefusedError, check, encode_json, parse_json
from gateway.http.bodies import read_bodies
from gateway.kafka.avro import encode_transaction
from gateway.kernels.json import write_transactions
from gateway.scoring.requests import edges_of
from tests.entities import make_stream
from tests.unit.gateway.factories import NOW_MS, make_transaction

FULL = make_transaction(
    device_id="d-1", ip="10.0.0.1", card_bin="411111", card_country="AT", latitude=48.2082, longitude=-16.3738, channel="ecom"
)
BODY = encode_json(FULL)


def by_kernel(bodies: list[bytes]) -> list[bytes | None]:
    """The record of each body, None where the kernel leaves it to others."""
    data = b"".join(bodies)
    out, edges, read = np.empty(len(data), np.uint8), np.empty(len(bodies) + 1, np.int64), np.empty(len(bodies), np.bool_)
    write_transactions(np.frombuffer(data, np.uint8), edges_of(bodies), out, edges, read)
    return [out[a:b].tobytes() if is_read else None for a, b, is_read in zip(edges, edges[1:], read, strict=False)]


def by_msgspec(body: bytes) -> bytes | str:
    """The record of a good transaction, or why it is refused."""
    try:
        t = parse_json(body)
        check(t, NOW_MS)
    except RefusedError as exc:
        return str(exc)
    return encode_transaction(t)


def found(bodies: list[bytes]) -> list[bytes | str]:
    return [str(r) if isinstance(r, RefusedError) else r for r in read_bodies(bodies, NOW_MS)[0]]


def test_what_callers_send_is_read_by_the_kernel() -> None:
    stream = make_stream(5, 300, 60_000, 1000)
    wanted: list[bytes | None] = [encode_transaction(t) for t in stream]
    assert by_kernel([encode_json(t) for t in stream]) == wanted
    # As json.dumps writes it, and as people do.
    fields = [json.loads(encode_json(t)) for t in stream]
    assert by_kernel([json.dumps(f).encode() for f in fields]) == wanted
    assert by_kernel([json.dumps(f, indent=2).encode() + b"\r\n" for f in fields]) == wanted
    without_nulls = [{k: v for k, v in reversed(f.items()) if v is not None} for f in fields]
    assert by_kernel([json.dumps(f).encode() for f in without_nulls]) == wanted
    records, requests = read_bodies([encode_json(t) for t in stream], max(t.event_time_ms for t in stream))
    assert records == wanted
    assert requests is not None
    assert requests.ids() == [t.transaction_id for t in stream]
    assert requests.cards() == [t.card_id.encode() for t in stream]


LEFT_TO_OTHERS = {
    "an escape": BODY.replace(b'"t1"', b'"t\\u0031"'),
    "a letter beyond ASCII": BODY.replace(b'"t1"', '"tä"'.encode()),
    "a field twice": BODY[:-1] + b',"mcc":"5411"}',
    "a null twice": BODY.replace(b'"device_id":"d-1"', b'"device_id":null,"device_id":null'),
    "an unknown field": BODY[:-1] + b',"x":1}',
    "a field too few": BODY.replace(b'"mcc":"5411",', b""),
    "a required null": BODY.replace(b'"mcc":"5411"', b'"mcc":null'),
    "a text for a number": BODY.replace(b"1234", b'"1234"'),
    "a number for a text": BODY.replace(b'"t1"', b"1"),
    "a leading zero": BODY.replace(b"1234", b"01234"),
    "a fraction of a cent": BODY.replace(b"1234", b"1234.0"),
    "an exponent": BODY.replace(b"48.2082", b"4.82082e1"),
    "a coordinate without fraction": BODY.replace(b"48.2082", b"48"),
    "more digits than a double has": BODY.replace(b"48.2082", b"48.208200000000000001"),
    "an amount of 19 digits": BODY.replace(b"1234", b"1234567890123456789"),
    "a comma too many": BODY[:-1] + b",}",
    "two objects": BODY + BODY,
    "nothing": b"",
    "a list": b"[" + BODY + b"]",
    "a control character": BODY.replace(b'"t1"', b'"t\n1"'),
    "cut short": BODY[:-1],
    "a sign alone": BODY.replace(b"1234", b"-"),
    "a point without digits": BODY.replace(b"48.2082", b"48."),
}


@pytest.mark.parametrize("case", LEFT_TO_OTHERS)
def test_what_is_not_plain_is_left_to_the_slow_path_and_costs_its_neighbours_nothing(case: str) -> None:
    body = LEFT_TO_OTHERS[case]
    assert by_kernel([BODY, body, BODY]) == [encode_transaction(FULL), None, encode_transaction(FULL)]
    assert found([BODY, body, BODY]) == [encode_transaction(FULL), by_msgspec(body), encode_transaction(FULL)]


def coordinates() -> Iterator[str]:
    """Doubles as they are written, what lies exactly between two of them or a hair beside, and any other digits."""
    rng = random.Random(3)
    for _ in range(20_000):
        value = rng.uniform(-90, 90) * 10.0 ** -rng.randrange(6)
        yield f"{value:.17f}"[: 19 + (value < 0)] if rng.random() < 0.3 else repr(value)
        yield f"{value:.{rng.randrange(1, 16)}f}"
    for _ in range(20_000):
        # From 16 on, 45 and fewer bits behind the point; with one more it is a midpoint, of at most 18 digits when few are set.
        whole, bits = rng.randrange(16, 90), rng.randrange(1, 14)
        odd = rng.randrange(1, 2**bits, 2)
        yield f"{whole}.{odd * 5**bits:0{bits}d}"
        middle = (2**52 + rng.randrange(2**52)) * 2 + 1
        yield f"0.{middle * 10**17 // 2**54:017d}"


def test_a_coordinate_is_the_double_nearest_to_its_digits() -> None:
    texts = list(coordinates())
    bodies = [BODY.replace(b"48.2082", text.encode()) for text in texts]
    left = 0
    for text, record in zip(texts, by_kernel(bodies), strict=True):
        if record is None:
            left += 1
            assert "e" in text or sum(c.isdigit() for c in text) > 18 or abs(float(text)) < 1e-3, text
        else:
            assert struct.unpack("<d", record[-17:-9])[0] == float(text), text
    assert left < len(texts) / 10


def test_what_rounds_either_way_is_left_to_others() -> None:
    # 2**53 + 1 lies exactly between two doubles.
    middle = str((2**53 + 1) * 10)
    texts = [middle[:2] + "." + middle[2:], "9007199254740993.0", "9007199254740992.9", "9007199254740993.1"]
    found_ = by_kernel([BODY.replace(b"48.2082", text.encode()) for text in texts])
    assert [record is None for record in found_] == [False, True, False, False]


@given(st.integers(-(10**20), 10**20), st.integers(-(10**20), 10**20))
def test_whole_numbers_are_read_as_they_stand(amount: int, time_ms: int) -> None:
    body = BODY.replace(b"1234", str(amount).encode()).replace(str(NOW_MS).encode(), str(time_ms).encode())
    [record] = by_kernel([body])
    if record is not None:
        assert record == encode_transaction(parse_json(body))
    else:
        assert max(abs(amount), abs(time_ms)) >= 10**18
    assert found([body]) == [by_msgspec(body)]


def damaged(count: int) -> Iterator[bytes]:
    """Bodies with bytes changed, dropped, doubled and swapped."""
    rng = random.Random(11)
    interesting = b'":,{}[]\\ \n0123456789-.eEnul\x00\x7f\x80'
    names = [f.encode() for f in FIELDS]
    for _ in range(count):
        body = bytearray(BODY)
        for _ in range(rng.randrange(1, 4)):
            at = rng.randrange(len(body))
            kind = rng.randrange(5)
            if kind == 0:
                body[at] = rng.choice(interesting)
            elif kind == 1:
                del body[at]
            elif kind == 2:
                body.insert(at, rng.choice(interesting))
            elif kind == 3:
                a, b = rng.sample(names, 2)
                body = bytearray(bytes(body).replace(a, b, 1))
            else:
                body[at] = rng.randrange(256)
        yield bytes(body)


def test_what_the_kernel_reads_of_damaged_bodies_is_what_msgspec_reads() -> None:
    bodies = list(damaged(20_000))
    read = 0
    for body, record in zip(bodies, by_kernel(bodies), strict=True):
        if record is not None:
            read += 1
            # A channel is a text like others here; the columns' kernel doesn't know any but the four.
            assert found([body]) == [by_msgspec(body)], body
            if not isinstance(found([body])[0], str):
                assert record == found([body])[0]
    # Most of what is read still is good: changed letters in texts.
    assert 1000 < read < 15_000
    assert found(bodies) == [by_msgspec(body) for body in bodies]


@given(st.lists(st.binary(max_size=60), max_size=5))
def test_no_bytes_are_read_beyond_the_end_of_a_body(noise: list[bytes]) -> None:
    got = by_kernel([*noise, BODY, *[part[:-1] for part in noise]])
    assert got[len(noise)] == encode_transaction(FULL)
    assert found(noise) == [by_msgspec(part) for part in noise]
