"""A card transaction: its fields, their bounds, and the checks that both doors and the Spark job apply alike.

`parse_json` is the JSON door's decoder: typed, strict, about three microseconds. The Spark job repeats the same checks as
JVM expressions; `tests/agreement` holds the two together.
"""

from __future__ import annotations

import json
import re
from typing import Any, Literal

import msgspec

from gateway.contracts.reasons import Refusal

MESSAGE_BYTES_MAX = 16_384
# The deepest nesting that is parsed at all. A transaction is flat (depth 1).
JSON_DEPTH_MAX = 64
TEXT_LENGTH_MAX = 64
# Zero is a card verification: an authorisation of no amount.
AMOUNT_MINOR_MIN = 0
AMOUNT_MINOR_MAX = 1_000_000_000
EVENT_TIME_FUTURE_MS_MAX = 24 * 3_600_000
EVENT_TIME_PAST_MS_MAX = 20 * 365 * 24 * 3_600_000

ID_PATTERN = r"^[A-Za-z0-9._:\-]{1,64}$"
MCC_PATTERN = r"^[0-9]{4}$"
COUNTRY_PATTERN = r"^[A-Z]{2}$"
BIN_PATTERN = r"^[0-9]{6,8}$"
# A whole run of 13 to 19 digits, single spaces or hyphens between them allowed. Valid in Python and in Java.
CARD_NUMBER_PATTERN = r"(?<![0-9])[0-9](?:[ \-]?[0-9]){12,18}(?![0-9])"

# ISO 4217, active codes of circulating currencies.
CURRENCIES = frozenset(
    "AED AFN ALL AMD AOA ARS AUD AWG AZN BAM BBD BDT BGN BHD BIF BMD BND BOB BRL BSD BTN BWP BYN BZD CAD CDF CHF CLP CNY COP"
    " CRC CUP CVE CZK DJF DKK DOP DZD EGP ERN ETB EUR FJD FKP GBP GEL GHS GIP GMD GNF GTQ GYD HKD HNL HTG HUF IDR ILS INR IQD"
    " IRR ISK JMD JOD JPY KES KGS KHR KMF KPW KRW KWD KYD KZT LAK LBP LKR LRD LSL LYD MAD MDL MGA MKD MMK MNT MOP MRU MUR MVR"
    " MWK MXN MYR MZN NAD NGN NIO NOK NPR NZD OMR PAB PEN PGK PHP PKR PLN PYG QAR RON RSD RUB RWF SAR SBD SCR SDG SEK SGD SHP"
    " SLE SOS SRD SSP STN SVC SYP SZL THB TJS TMT TND TOP TRY TTD TWD TZS UAH UGX USD UYU UZS VED VES VND VUV WST XAF XCD XOF"
    " XPF YER ZAR ZMW ZWG".split()
)

Channel = Literal["pos", "ecom", "atm", "moto"]
CHANNELS: tuple[Channel, ...] = ("pos", "ecom", "atm", "moto")


class Transaction(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One card transaction as callers send it. Money in minor units, time in milliseconds since the epoch, UTC.

    `card_id` and the other ids are tokens: a raw card number in any field is refused.
    """

    transaction_id: str
    event_time_ms: int
    card_id: str
    customer_id: str
    merchant_id: str
    amount_minor: int
    currency: str
    channel: Channel
    mcc: str
    country: str
    device_id: str | None = None
    ip: str | None = None
    card_bin: str | None = None
    card_country: str | None = None
    latitude: float | None = None
    longitude: float | None = None


FIELDS: tuple[str, ...] = Transaction.__struct_fields__
REQUIRED_FIELDS: tuple[str, ...] = FIELDS[:10]
TEXT_FIELDS: tuple[str, ...] = tuple(f for f in FIELDS if f not in {"event_time_ms", "amount_minor", "latitude", "longitude"})
ID_FIELDS: tuple[str, ...] = ("transaction_id", "card_id", "customer_id", "merchant_id", "device_id", "ip")
assert set(ID_FIELDS) < set(TEXT_FIELDS)


class RefusedError(ValueError):
    """The input is no transaction. `reason` is the stable code, `field` names the offender; the value is never shown."""

    def __init__(self, reason: Refusal, field: str | None = None) -> None:
        super().__init__(reason.value if field is None else f"{reason.value}: {field}")
        self.reason = reason
        self.field = field


_decoder = msgspec.json.Decoder(Transaction)
_encoder = msgspec.json.Encoder()
_id_match = re.compile(ID_PATTERN[1:-1]).fullmatch
_mcc_match = re.compile(MCC_PATTERN[1:-1]).fullmatch
_country_match = re.compile(COUNTRY_PATTERN[1:-1]).fullmatch
_bin_match = re.compile(BIN_PATTERN[1:-1]).fullmatch
_card_numbers = re.compile(CARD_NUMBER_PATTERN).findall
_digit_run = re.compile(r"[0-9](?:[ \-]?[0-9]){12}").search


def luhn_valid(digits: str) -> bool:
    """Luhn's check (ISO/IEC 7812-1, annex B) over a string of decimal digits."""
    total = 0
    for i, c in enumerate(reversed(digits)):
        d = ord(c) - 48
        if i % 2:
            d = d * 2 - 9 if d > 4 else d * 2
        total += d
    return total % 10 == 0


def holds_card_number(text: str) -> bool:
    """True when `text` holds a whole run of 13 to 19 digits that passes Luhn's check."""
    if _digit_run(text) is None:
        return False
    return any(luhn_valid(run.replace(" ", "").replace("-", "")) for run in _card_numbers(text))


INT64_MAX = 2**63 - 1
# Every text field in one line each, so that one search looks at all of them.
_texts_match = re.compile(
    "{id}\n{id}\n{id}\n{id}\n{oid}\n{oid}\n{mcc}\n{country}\n(?:{bin})?\n(?:{country})?\n".format(
        id=ID_PATTERN[1:-1],
        oid=ID_PATTERN[1:-1].replace("{1,64}", "{0,64}"),
        mcc=MCC_PATTERN[1:-1],
        country=COUNTRY_PATTERN[1:-1],
        bin=BIN_PATTERN[1:-1],
    )
).fullmatch


def _texts(t: Transaction) -> str:
    return (
        f"{t.transaction_id}\n{t.card_id}\n{t.customer_id}\n{t.merchant_id}\n{t.device_id or ''}\n{t.ip or ''}\n"
        f"{t.mcc}\n{t.country}\n{t.card_bin or ''}\n{t.card_country or ''}\n"
    )


def check(t: Transaction, now_ms: int) -> None:
    """Raise `RefusedError` unless each value of `t` lies in its documented bounds. `now_ms` is the time of arrival.

    The order of the checks is the precedence of the reasons when several apply.
    """
    texts = _texts(t)
    # `texts` leaves out channel, which is one of four words, and currency, which is looked at here when it can't be a code.
    if _digit_run(texts) is not None or (len(t.currency) != 3 and _digit_run(t.currency) is not None):
        for field in TEXT_FIELDS:
            value = getattr(t, field)
            if value is not None and holds_card_number(value):
                raise RefusedError(Refusal.CARD_NUMBER, field)
    if _texts_match(texts) is None or "" in (t.device_id, t.ip, t.card_bin, t.card_country):
        raise RefusedError(Refusal.BAD_FORMAT, _first_bad_format(t))
    if not AMOUNT_MINOR_MIN <= t.amount_minor <= AMOUNT_MINOR_MAX:
        raise RefusedError(Refusal.AMOUNT_OUT_OF_RANGE, "amount_minor")
    if t.currency not in CURRENCIES:
        raise RefusedError(Refusal.UNKNOWN_CURRENCY, "currency")
    if (t.latitude is None) != (t.longitude is None):
        raise RefusedError(Refusal.COORDINATE_OUT_OF_RANGE, "latitude")
    if t.latitude is not None and t.longitude is not None:
        # Written so that NaN, which Avro can carry, fails too.
        if not -90.0 <= t.latitude <= 90.0:
            raise RefusedError(Refusal.COORDINATE_OUT_OF_RANGE, "latitude")
        if not -180.0 <= t.longitude <= 180.0:
            raise RefusedError(Refusal.COORDINATE_OUT_OF_RANGE, "longitude")
    if t.event_time_ms > now_ms + EVENT_TIME_FUTURE_MS_MAX:
        raise RefusedError(Refusal.EVENT_TIME_IN_FUTURE, "event_time_ms")
    if t.event_time_ms < now_ms - EVENT_TIME_PAST_MS_MAX:
        raise RefusedError(Refusal.EVENT_TIME_TOO_OLD, "event_time_ms")


def _first_bad_format(t: Transaction) -> str:
    checks = [(f, _id_match) for f in ID_FIELDS]
    checks += [
        ("mcc", _mcc_match),
        ("country", _country_match),
        ("card_bin", _bin_match),
        ("card_country", _country_match),
    ]
    for field, match in checks:
        value = getattr(t, field)
        if value is not None and match(value) is None:
            return field
    return "text"


_NULLS = [(name, f'"{name}":null'.encode()) for name in FIELDS if name not in REQUIRED_FIELDS]


def decode_json(body: bytes, now_ms: int) -> Transaction:
    """The transaction that `body` holds, checked. Raises `RefusedError`."""
    t = parse_json(body)
    check(t, now_ms)
    return t


def parse_json(body: bytes) -> Transaction:
    """The transaction that `body` holds, of the right shape; its values are still to be checked. Raises `RefusedError`.

    The fast path decodes and counts quotation marks: a flat object whose marks are just those of its fields repeats no key.
    Everything else goes through `classify_json`, which takes its time and names the exact reason.
    """
    if len(body) > MESSAGE_BYTES_MAX:
        raise RefusedError(Refusal.TOO_LARGE)
    try:
        t = _decoder.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError) as exc:
        raise (classify_json(body) or RefusedError(Refusal.MALFORMED_JSON)) from exc
    # 8 required fields of text with 4 marks each and 2 numbers with 2; optional texts add 4, coordinates 2.
    marks = 36 + 4 * ((t.device_id is not None) + (t.ip is not None) + (t.card_bin is not None) + (t.card_country is not None))
    marks += 2 * ((t.latitude is not None) + (t.longitude is not None))
    more = body.count(b'"') - marks
    if more:
        # Optional fields may be there and null: each of them once.
        for name, null in _NULLS:
            if getattr(t, name) is None and body.count(null) == 1:
                more -= 2
    if more or not -INT64_MAX <= t.amount_minor <= INT64_MAX or not -INT64_MAX <= t.event_time_ms <= INT64_MAX:
        refusal = classify_json(body)
        if refusal is not None:
            raise refusal
    return t


def _refuse_constant(name: str) -> float:
    raise ValueError(name)


def _depth(body: str) -> int:
    """The deepest nesting of brackets outside of strings."""
    depth = deepest = 0
    in_string = escaped = False
    for c in body:
        if in_string:
            if escaped:
                escaped = False
            elif c == "\\":
                escaped = True
            elif c == '"':
                in_string = False
        elif c == '"':
            in_string = True
        elif c in "[{":
            depth += 1
            deepest = max(deepest, depth)
        elif c in "]}":
            depth -= 1
    return deepest


def classify_json(body: bytes) -> RefusedError | None:
    """Why `body` is no transaction, by the documented precedence. Slow (tens of microseconds): for refusals only.

    None when the shape is right after all: an explicit null, an escaped character, or a lone surrogate that json.loads lets pass.
    """
    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError:
        return RefusedError(Refusal.NOT_UTF8)
    if _depth(text) > JSON_DEPTH_MAX:
        return RefusedError(Refusal.MALFORMED_JSON)
    twice = False

    def pairs_to_dict(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        nonlocal twice
        d = dict(pairs)
        twice |= len(d) != len(pairs)
        return d

    try:
        value = json.loads(text, object_pairs_hook=pairs_to_dict, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        return RefusedError(Refusal.MALFORMED_JSON)
    # Only of a text that is JSON to its end: what is malformed stays malformed, wherever a key was repeated before.
    if twice:
        return RefusedError(Refusal.DUPLICATE_KEY)
    if not isinstance(value, dict):
        return RefusedError(Refusal.MALFORMED_JSON)
    return classify_fields(value)


def classify_fields(value: dict[str, Any]) -> RefusedError | None:
    """The first of unknown field, missing field and wrong type that applies to a decoded object; None when its shape is right."""
    for name in value:
        if name not in FIELDS:
            # The name came from outside and may hold anything: it is not repeated.
            return RefusedError(Refusal.UNKNOWN_FIELD)
    for name in REQUIRED_FIELDS:
        if name not in value:
            return RefusedError(Refusal.MISSING_FIELD, name)
    for name in FIELDS:
        v = value.get(name)
        if v is None and name not in REQUIRED_FIELDS:
            continue
        if name in TEXT_FIELDS:
            right = isinstance(v, str) if name != "channel" else v in CHANNELS and isinstance(v, str)
        elif name in {"latitude", "longitude"}:
            right = isinstance(v, int | float) and not isinstance(v, bool) and abs(v) < float("inf")
        else:
            right = isinstance(v, int) and not isinstance(v, bool) and -INT64_MAX <= v <= INT64_MAX
        if not right:
            return RefusedError(Refusal.WRONG_TYPE, name)
    return None


def encode_json(t: Transaction) -> bytes:
    """Canonical JSON of `t`: fields in declared order, no white space. Equal transactions give equal bytes."""
    return _encoder.encode(t)


def from_fields(fields: dict[str, Any], now_ms: int) -> Transaction:
    """A checked transaction from decoded Avro or any other mapping. Raises `RefusedError`."""
    refusal = classify_fields(fields)
    if refusal is not None:
        raise refusal
    t = Transaction(**fields)
    check(t, now_ms)
    return t
