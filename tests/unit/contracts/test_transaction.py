"""Checks, decoding and refusals of transactions."""

from __future__ import annotations

import json
import random
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.contracts.reasons import Refusal
from gateway.contracts.transaction import (
    AMOUNT_MINOR_MAX,
    AMOUNT_MINOR_MIN,
    EVENT_TIME_FUTURE_MS_MAX,
    EVENT_TIME_PAST_MS_MAX,
    FIELDS,
    MESSAGE_BYTES_MAX,
    REQUIRED_FIELDS,
    RefusedError,
    Transaction,
    check,
    classify_json,
    decode_json,
    encode_json,
    from_fields,
    holds_card_number,
    luhn_valid,
)

NOW_MS = 1_780_000_000_000


def make_fields(**changed: Any) -> dict[str, Any]:
    return {
        "transaction_id": "t1",
        "event_time_ms": NOW_MS,
        "card_id": "c1",
        "customer_id": "u1",
        "merchant_id": "m1",
        "amount_minor": 1_250,
        "currency": "EUR",
        "channel": "pos",
        "mcc": "5411",
        "country": "DE",
    } | changed


def refusal_of(body: bytes, now_ms: int = NOW_MS) -> tuple[Refusal, str | None] | None:
    try:
        decode_json(body, now_ms)
    except RefusedError as refused:
        return refused.reason, refused.field
    return None


@pytest.mark.parametrize(
    ("changed", "refusal"),
    [
        ({"amount_minor": AMOUNT_MINOR_MIN}, None),
        ({"amount_minor": AMOUNT_MINOR_MIN - 1}, (Refusal.AMOUNT_OUT_OF_RANGE, "amount_minor")),
        ({"amount_minor": AMOUNT_MINOR_MAX}, None),
        ({"amount_minor": AMOUNT_MINOR_MAX + 1}, (Refusal.AMOUNT_OUT_OF_RANGE, "amount_minor")),
        ({"event_time_ms": NOW_MS + EVENT_TIME_FUTURE_MS_MAX}, None),
        ({"event_time_ms": NOW_MS + EVENT_TIME_FUTURE_MS_MAX + 1}, (Refusal.EVENT_TIME_IN_FUTURE, "event_time_ms")),
        ({"event_time_ms": NOW_MS - EVENT_TIME_PAST_MS_MAX}, None),
        ({"event_time_ms": NOW_MS - EVENT_TIME_PAST_MS_MAX - 1}, (Refusal.EVENT_TIME_TOO_OLD, "event_time_ms")),
        ({"card_id": "x" * 64}, None),
        ({"card_id": "x" * 65}, (Refusal.BAD_FORMAT, "card_id")),
        ({"latitude": 90.0, "longitude": -180.0}, None),
        ({"latitude": 90.1, "longitude": 0.0}, (Refusal.COORDINATE_OUT_OF_RANGE, "latitude")),
    ],
)
def test_each_limit_holds_exactly(changed: dict[str, Any], refusal: tuple[Refusal, str] | None) -> None:
    assert refusal_of(json.dumps(make_fields(**changed)).encode()) == refusal


def test_a_body_is_read_up_to_its_limit_and_refused_one_byte_beyond() -> None:
    body = json.dumps(make_fields()).encode()
    assert refusal_of(body.ljust(MESSAGE_BYTES_MAX)) is None
    assert refusal_of(body.ljust(MESSAGE_BYTES_MAX + 1)) == (Refusal.TOO_LARGE, None)


def test_a_card_number_takes_precedence_over_every_other_fault_of_a_value() -> None:
    fields = make_fields(currency="4111 1111 1111 1111", amount_minor=-1, mcc="x")
    assert refusal_of(json.dumps(fields).encode()) == (Refusal.CARD_NUMBER, "currency")


def test_the_refusal_never_repeats_a_value() -> None:
    for name in ("4111111111111111", "secret"):
        with pytest.raises(RefusedError) as refused:
            decode_json(json.dumps(make_fields(**{name: 1, "card_id": name})).encode(), NOW_MS)
        assert name not in str(refused.value)


@given(st.text(alphabet="0123456789", min_size=1, max_size=30))
def test_luhn_finds_every_single_wrong_digit(digits: str) -> None:
    check_digit = next(d for d in "0123456789" if luhn_valid(digits + d))
    for wrong in "0123456789":
        assert luhn_valid(digits + wrong) == (wrong == check_digit)


@given(st.integers(12, 18), st.sampled_from(["", " ", "-"]), st.randoms(use_true_random=False))
def test_a_card_number_is_found_in_any_grouping_and_company(length: int, separator: str, rng: random.Random) -> None:
    digits = "".join(rng.choice("0123456789") for _ in range(length))
    number = next(digits + d for d in "0123456789" if luhn_valid(digits + d))
    grouped = separator.join(number[i : i + 4] for i in range(0, len(number), 4))
    assert holds_card_number(f"tok:{grouped}x")


@pytest.mark.parametrize("text", ["411111111111", "41111111111111110000", "4111111111111112", "4111.1111.1111.1111", "abc", ""])
def test_digits_that_are_no_card_number_pass(text: str) -> None:
    assert not holds_card_number(text)


def test_canonical_json_reads_back_to_the_same_transaction() -> None:
    t = Transaction(**make_fields(latitude=1.5, longitude=-2.25, ip="192.0.2.1"))
    assert decode_json(encode_json(t), NOW_MS) == t
    assert from_fields(msgspec.structs.asdict(t), NOW_MS) == t


values = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(["EUR", "pos", "5411", "DE", "t1", "908210", "4111111111111111"]),
    st.lists(st.integers(), max_size=2),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)


@st.composite
def spoilt_fields(draw: st.DrawFn) -> dict[str, Any]:
    """A valid transaction with some fields replaced, removed or added."""
    fields = make_fields()
    for name in draw(st.lists(st.sampled_from([*FIELDS, "extra"]), max_size=4)):
        if draw(st.booleans()):
            fields[name] = draw(values)
        else:
            fields.pop(name, None)
    return fields


def expected(body: bytes) -> tuple[Refusal, str | None] | None:
    """The slow way: the reason by shape, then the checks of values on what json.loads read."""
    refusal = classify_json(body)
    if refusal is not None:
        return refusal.reason, refusal.field
    try:
        check(Transaction(**json.loads(body)), NOW_MS)
    except RefusedError as refused:
        return refused.reason, refused.field
    return None


@settings(max_examples=400, deadline=None)
@given(spoilt_fields(), st.booleans())
def test_the_fast_decoder_refuses_just_what_the_slow_classifier_refuses(fields: dict[str, Any], spaced: bool) -> None:
    body = json.dumps(fields, indent=1 if spaced else None).encode()
    assert refusal_of(body) == expected(body)


@settings(max_examples=300, deadline=None)
@given(spoilt_fields(), st.data())
def test_a_repeated_key_is_always_found(fields: dict[str, Any], data: st.DataObject) -> None:
    known = [f for f in fields if f in REQUIRED_FIELDS]
    name = data.draw(st.sampled_from(known or ["mcc"]))
    again = json.dumps({name: data.draw(st.one_of(st.none(), st.integers(0, 9), st.just("pos")))})[1:]
    body = (json.dumps(fields | {name: "x"})[:-1] + "," + again).encode()
    refusal = refusal_of(body)
    assert refusal is not None
    assert refusal[0] in (Refusal.DUPLICATE_KEY, Refusal.MALFORMED_JSON)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200))
def test_arbitrary_bytes_are_refused_and_nothing_else_happens(body: bytes) -> None:
    assert refusal_of(body) is not None
