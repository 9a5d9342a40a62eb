"""Inputs that mean harm or a mistake, and valid ones that look like it, each with the refusal it must get.

One corpus for POST /score, the transactions topic and the Spark job: see `hostile_cases`.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import fastavro

from gateway.contracts.reasons import Refusal
from gateway.contracts.topics import TOPICS, TRANSACTIONS
from gateway.contracts.transaction import (
    AMOUNT_MINOR_MAX,
    EVENT_TIME_FUTURE_MS_MAX,
    EVENT_TIME_PAST_MS_MAX,
    FIELDS,
    ID_FIELDS,
    JSON_DEPTH_MAX,
    MESSAGE_BYTES_MAX,
    REQUIRED_FIELDS,
    TEXT_FIELDS,
    TEXT_LENGTH_MAX,
    luhn_valid,
)
from gateway.contracts.wire import frame

Kind = Literal["json", "avro", "raw"]

# A well-known test number of a card network, and 13 digits that are none.
CARD_NUMBER = "4111111111111111"
NO_CARD_NUMBER = "1234567890123"
assert luhn_valid(CARD_NUMBER) and not luhn_valid(NO_CARD_NUMBER)
UNKNOWN_SCHEMA_ID = 1_999_999_999
MEGABYTE = 1_000_000
HOUR_MS = 3_600_000
INT64_MAX = 2**63 - 1


@dataclass(frozen=True)
class HostileCase:
    """`value` is a body or a message. `refusal` and `field` are what it must be refused with; None: it is valid.

    `kind` says how a reader takes it: "json" is text that at least begins like a body, "raw" bytes that don't, "avro" is in wire
    format (starts with a zero byte), which only the Kafka door takes. `transaction_id` is None where the value holds none.
    """

    name: str
    value: bytes
    kind: Kind
    refusal: Refusal | None
    field: str | None = None
    transaction_id: str | None = None


class _Builder:
    """Gives each case a valid transaction of its own to spoil."""

    def __init__(self, now_ms: int, prefix: str) -> None:
        self.now_ms = now_ms
        self._prefix = prefix
        self._made = 0

    def fields(self, **changed: Any) -> dict[str, Any]:
        self._made += 1
        t: dict[str, Any] = {
            "transaction_id": f"{self._prefix}-n{self._made:05d}",
            "event_time_ms": self.now_ms - 60_000,
            "card_id": f"tok-{self._prefix}",
            "customer_id": f"cus-{self._prefix}",
            "merchant_id": "mer-hostile",
            "amount_minor": 1_999,
            "currency": "EUR",
            "channel": "ecom",
            "mcc": "5411",
            "country": "DE",
            "device_id": "dev-hostile",
            "ip": "192.0.2.7",
            "card_bin": "908210",
            "card_country": "DE",
            "latitude": 52.52,
            "longitude": 13.4,
        }
        return t | changed

    def json(self, name: str, refusal: Refusal | None, field: str | None = None, **changed: Any) -> HostileCase:
        """A valid transaction with some fields changed."""
        t = self.fields(**changed)
        return self.text(name, json.dumps(t), refusal, field, t["transaction_id"])

    def spliced(self, name: str, field: str, text: str, refusal: Refusal | None, named: str | None = None) -> HostileCase:
        """A valid transaction with one field's value given as literal JSON."""
        t = self.fields()
        del t[field]
        return self.text(name, json.dumps(t)[:-1] + f', "{field}": {text}}}', refusal, named, t["transaction_id"])

    def text(
        self, name: str, text: str, refusal: Refusal | None, field: str | None = None, transaction_id: Any = None
    ) -> HostileCase:
        known = transaction_id if isinstance(transaction_id, str) else None
        return HostileCase(name, text.encode(), "json", refusal, field, known)


def hostile_cases(
    now_ms: int, schema_id: int, *, prefix: str = "hostile", unknown_schema_id: int = UNKNOWN_SCHEMA_ID
) -> list[HostileCase]:
    """The corpus. `schema_id` is that of schemas/transaction.avsc in the registry; transaction ids start with `prefix`.

    `now_ms` is the time of arrival; cases near a limit of time keep an hour from it.
    """
    b = _Builder(now_ms, prefix)
    groups = (_syntax, _encoding, _nesting, _duplicates, _shape, _numbers, _times, _texts, _card_numbers, _places, _sizes, _valid)
    cases = [case for group in groups for case in group(b)]
    cases += _avro(b, schema_id, unknown_schema_id)
    assert len({c.name for c in cases}) == len(cases), "names are unique"
    return cases


def _syntax(b: _Builder) -> Iterator[HostileCase]:
    bad = Refusal.MALFORMED_JSON
    whole = json.dumps(b.fields())
    yield HostileCase("empty", b"", "raw", bad)
    yield HostileCase("only white space", b" \r\n\t ", "raw", bad)
    yield HostileCase("no JSON at all", b"hello", "raw", bad)
    yield HostileCase("XML", b"<transaction/>", "raw", bad)
    for name, text in (
        ("open brace", "{"),
        ("wrong bracket", "{]"),
        ("truncated in the middle", whole[: len(whole) // 2]),
        ("truncated by one", whole[:-1]),
        ("trailing comma", whole[:-1] + ",}"),
        ("trailing garbage", whole + "x"),
        ("two objects", whole + whole),
        ("two objects on two lines", whole + "\n" + whole),
        ("single quotes", whole.replace('"', "'")),
        ("a comment", "/* */" + whole),
        ("keys without quotes", "{transaction_id: 1}"),
        ("an empty list", "[]"),
        ("a list of a transaction", f"[{whole}]"),
        ("a text", '"transaction"'),
        ("a transaction inside a text", json.dumps(whole)),
        ("a number", "42"),
        ("null", "null"),
        ("true", "true"),
    ):
        yield b.text(name, text, bad)


def _encoding(b: _Builder) -> Iterator[HostileCase]:
    whole = json.dumps(b.fields()).encode()
    yield HostileCase("a byte of no character", whole.replace(b"mer-hostile", b"mer-\xff"), "json", Refusal.NOT_UTF8)
    yield HostileCase("Latin-1", whole.replace(b"mer-hostile", b"caf\xe9"), "json", Refusal.NOT_UTF8)
    yield HostileCase("an overlong sequence", whole.replace(b"mer-hostile", b"mer\xc0\xaf"), "json", Refusal.NOT_UTF8)
    yield HostileCase("a surrogate's bytes", whole.replace(b"mer-hostile", b"\xed\xa0\x80"), "json", Refusal.NOT_UTF8)
    yield HostileCase("UTF-16", whole.decode().encode("utf-16"), "raw", Refusal.NOT_UTF8)
    yield HostileCase("a byte of no character in broken JSON", b'{"a": \xff', "json", Refusal.NOT_UTF8)
    yield HostileCase("a byte order mark", b"\xef\xbb\xbf" + whole, "raw", Refusal.MALFORMED_JSON)
    yield HostileCase("a zero byte behind", whole + b"\0", "json", Refusal.MALFORMED_JSON)
    yield HostileCase("a raw line feed in a text", whole.replace(b"mer-hostile", b"mer\nx"), "json", Refusal.MALFORMED_JSON)
    yield HostileCase("a raw zero byte in a text", whole.replace(b"mer-hostile", b"mer\0x"), "json", Refusal.MALFORMED_JSON)
    yield b.spliced("a lone surrogate", "merchant_id", r'"\ud83d"', Refusal.MALFORMED_JSON)
    yield b.spliced("surrogates in wrong order", "merchant_id", r'"\ude00\ud83d"', Refusal.MALFORMED_JSON)
    yield b.spliced("an unknown escape", "merchant_id", r'"\x41"', Refusal.MALFORMED_JSON)


def _nesting(b: _Builder) -> Iterator[HostileCase]:
    deep = JSON_DEPTH_MAX
    yield b.text("thousands of lists", "[" * 8_000 + "]" * 8_000, Refusal.MALFORMED_JSON)
    yield b.text("thousands of open lists", "[" * 16_000, Refusal.MALFORMED_JSON)
    yield b.text("thousands of objects", '{"a":' * 2_500 + "1" + "}" * 2_500, Refusal.MALFORMED_JSON)
    yield b.spliced("a list in a field", "mcc", '["5411"]', Refusal.WRONG_TYPE, "mcc")
    yield b.spliced("nested in a field, at the limit", "mcc", "[" * (deep - 1) + "]" * (deep - 1), Refusal.WRONG_TYPE, "mcc")
    yield b.spliced("nested in a field, beyond the limit", "mcc", "[" * deep + "]" * deep, Refusal.MALFORMED_JSON)
    unknown = json.dumps(b.fields())[:-1] + ', "x": ' + "[" * 30 + "]" * 30 + "}"
    yield b.text("nested in an unknown field", unknown, Refusal.UNKNOWN_FIELD)
    yield b.json("brackets inside a text", Refusal.BAD_FORMAT, "merchant_id", merchant_id="[" * 64)


def _duplicates(b: _Builder) -> Iterator[HostileCase]:
    twice = Refusal.DUPLICATE_KEY
    for name, tail in (
        ("a key twice, the same value", ',"amount_minor":1999}'),
        ("a key twice, another value", ',"amount_minor":1}'),
        ("a key twice, with spaces", ' , "amount_minor" : 1 }'),
        ("a key twice, once escaped", ',"\\u0061mount_minor":1}'),
        ("an optional key twice, once null", ',"device_id":null}'),
        ("a key twice, of another type", ',"amount_minor":"1"}'),
        ("an id twice", ',"transaction_id":"other"}'),
    ):
        yield b.text(name, json.dumps(b.fields())[:-1] + tail, twice)


def _shape(b: _Builder) -> Iterator[HostileCase]:
    for field in FIELDS:
        wrong = (12345, True, ["x"], {"x": "y"}) if field in TEXT_FIELDS else ("1", True, [1], {"x": 1})
        for value in wrong:
            name = f"{field} is a {type(value).__name__}"
            yield b.json(name, Refusal.WRONG_TYPE, field, **{field: value})
    for field in REQUIRED_FIELDS:
        t = b.fields()
        del t[field]
        yield b.text(f"{field} is missing", json.dumps(t), Refusal.MISSING_FIELD, field, t.get("transaction_id"))
        yield b.json(f"{field} is null", Refusal.WRONG_TYPE, field, **{field: None})
    yield b.text("an empty object", "{}", Refusal.MISSING_FIELD, REQUIRED_FIELDS[0])
    unknown: tuple[tuple[str, dict[str, Any]], ...] = (
        ("an unknown field", {"is_fraud": True}),
        ("an unknown field of null", {"note": None}),
        ("a field with an empty name", {"": 1}),
        ("a field in other letters", {"Amount_Minor": 1}),
    )
    for name, extra in unknown:
        yield b.json(name, Refusal.UNKNOWN_FIELD, **extra)
    yield b.json("a channel of no kind", Refusal.WRONG_TYPE, "channel", channel="web")
    yield b.json("an empty channel", Refusal.WRONG_TYPE, "channel", channel="")


def _numbers(b: _Builder) -> Iterator[HostileCase]:
    for field in ("amount_minor", "event_time_ms"):
        for text in ("12.5", "100.0", "1e3"):
            yield b.spliced(f"{field} is {text}", field, text, Refusal.WRONG_TYPE, field)
        for text in (str(2**63), str(-(2**63) - 1), "1" + "0" * 30):
            yield b.spliced(f"{field} is {text[:24]}", field, text, Refusal.WRONG_TYPE, field)
    for field in ("amount_minor", "latitude"):
        for text in ("NaN", "Infinity", "-Infinity", "0100", "+5", "0x10", ".5", "5."):
            yield b.spliced(f"{field} is {text}", field, text, Refusal.MALFORMED_JSON)
    yield b.spliced("latitude is 1e999", "latitude", "1e999", Refusal.WRONG_TYPE, "latitude")
    for amount in (-1, -1_999, AMOUNT_MINOR_MAX + 1, INT64_MAX):
        yield b.json(f"an amount of {amount}", Refusal.AMOUNT_OUT_OF_RANGE, "amount_minor", amount_minor=amount)


def _times(b: _Builder) -> Iterator[HostileCase]:
    for name, at_ms in (
        ("25 hours ahead", b.now_ms + EVENT_TIME_FUTURE_MS_MAX + HOUR_MS),
        ("in microseconds", b.now_ms * 1_000),
        ("at the end of time", INT64_MAX),
    ):
        yield b.json(f"a time {name}", Refusal.EVENT_TIME_IN_FUTURE, "event_time_ms", event_time_ms=at_ms)
    for name, at_ms in (
        ("over 20 years ago", b.now_ms - EVENT_TIME_PAST_MS_MAX - HOUR_MS),
        ("in seconds", b.now_ms // 1_000),
        ("of zero", 0),
        ("before 1970", -1),
        ("at the beginning of time", -INT64_MAX),
    ):
        yield b.json(f"a time {name}", Refusal.EVENT_TIME_TOO_OLD, "event_time_ms", event_time_ms=at_ms)


def _texts(b: _Builder) -> Iterator[HostileCase]:
    bad = Refusal.BAD_FORMAT
    for field in ID_FIELDS:
        for name, value in (
            ("empty", ""),
            ("too long", "x" * (TEXT_LENGTH_MAX + 1)),
            ("with braces", "{card}"),
            ("with a space", "a b"),
            ("with a space behind", "ab "),
            ("with a line feed", "a\nb"),
            ("with a line feed behind", "ab\n"),
        ):
            yield b.json(f"{field} {name}", bad, field, **{field: value})
    for name, value in (
        ("with a zero character", "a\0b"),
        ("with a delete character", "a\x7fb"),
        ("with an umlaut", "kärt"),
        ("with other digits", "١٢٣"),
        ("with an emoji", "😀"),
        ("with a slash", "a/b"),
        ("with a quotation mark", 'a"b'),
        ("with a backslash", "a\\b"),
        ("with markup", "<script>"),
        ("with an expression", "${jndi:x}"),
    ):
        yield b.json(f"merchant_id {name}", bad, "merchant_id", merchant_id=value)
    for field, values in (
        ("mcc", ("", "541", "54111", "54a1", "٥٤١١", "5411\n")),
        ("country", ("", "de", "D", "DEU", "D1")),
        ("card_bin", ("", "90821", "908210123", "90821x")),
        ("card_country", ("", "de", "DEU")),
    ):
        for value in values:
            yield b.json(f"{field} is {value!r}", bad, field, **{field: value})
    for value in ("", "XXX", "eur", "EURO", "€", "EU"):
        yield b.json(f"currency is {value!r}", Refusal.UNKNOWN_CURRENCY, "currency", currency=value)


def _card_numbers(b: _Builder) -> Iterator[HostileCase]:
    spaced = " ".join(CARD_NUMBER[i : i + 4] for i in range(0, 16, 4))
    for field in TEXT_FIELDS:
        # A channel is one of four words; anything else has the wrong type before it is looked at.
        refusal = Refusal.WRONG_TYPE if field == "channel" else Refusal.CARD_NUMBER
        yield b.json(f"a card number in {field}", refusal, field, **{field: CARD_NUMBER})
        yield b.json(f"a card number with spaces in {field}", refusal, field, **{field: spaced})
        yield b.json(f"a card number with hyphens in {field}", refusal, field, **{field: spaced.replace(" ", "-")})
    yield b.json("a card number inside a token", Refusal.CARD_NUMBER, "card_id", card_id=f"tok-{CARD_NUMBER}x")
    yield b.spliced(
        "a card number in escapes",
        "card_id",
        '"' + "".join(f"\\u003{d}" for d in CARD_NUMBER) + '"',
        Refusal.CARD_NUMBER,
        "card_id",
    )


def _places(b: _Builder) -> Iterator[HostileCase]:
    bad = Refusal.COORDINATE_OUT_OF_RANGE
    yield b.json("a latitude alone", bad, "latitude", longitude=None)
    yield b.json("a longitude alone", bad, "latitude", latitude=None)
    for latitude in (90.0001, -90.0001, 1e300):
        yield b.json(f"a latitude of {latitude}", bad, "latitude", latitude=latitude)
    for longitude in (180.0001, -180.0001, 360):
        yield b.json(f"a longitude of {longitude}", bad, "longitude", longitude=longitude)


def _sizes(b: _Builder) -> Iterator[HostileCase]:
    whole = json.dumps(b.fields())
    yield b.text("a megabyte of white space", whole + " " * MEGABYTE, Refusal.TOO_LARGE)
    yield b.json("a megabyte in a field", Refusal.TOO_LARGE, merchant_id="x" * MEGABYTE)
    yield b.text("one byte too large", whole + " " * (MESSAGE_BYTES_MAX + 1 - len(whole)), Refusal.TOO_LARGE)
    t = b.fields()
    whole = json.dumps(t)
    yield b.text("as large as allowed", whole + " " * (MESSAGE_BYTES_MAX - len(whole)), None, None, t["transaction_id"])


def _valid(b: _Builder) -> Iterator[HostileCase]:
    for field in FIELDS:
        if field not in REQUIRED_FIELDS and field not in ("latitude", "longitude"):
            yield b.json(f"{field} null, which is allowed", None, **{field: None})
    yield b.json("coordinates null, which is allowed", None, latitude=None, longitude=None)
    t = {f: v for f, v in b.fields().items() if f in REQUIRED_FIELDS}
    yield b.text("required fields only", json.dumps(t), None, None, t["transaction_id"])
    t = b.fields()
    yield b.text("white space everywhere", json.dumps(t, indent=8, separators=(" ,", " :\t")), None, None, t["transaction_id"])
    t = b.fields()
    yield b.text("fields in another order", json.dumps(dict(reversed(t.items()))), None, None, t["transaction_id"])
    yield b.spliced("an escaped letter", "merchant_id", r'"mer-\u0041"', None)
    t = b.fields()
    escaped = json.dumps(t).replace('"mcc"', r'"\u006dcc"')
    yield b.text("an escaped key", escaped, None, None, t["transaction_id"])
    yield b.json("an amount of zero, a card verification", None, amount_minor=0)
    yield b.json("the largest amount", None, amount_minor=AMOUNT_MINOR_MAX)
    yield b.json("whole numbers as coordinates", None, latitude=52, longitude=13)
    yield b.json("the north pole", None, latitude=90, longitude=180.0)
    yield b.json("the south pole", None, latitude=-90.0, longitude=-180)
    yield b.json("23 hours ahead", None, event_time_ms=b.now_ms + EVENT_TIME_FUTURE_MS_MAX - HOUR_MS)
    yield b.json("almost 20 years ago", None, event_time_ms=b.now_ms - EVENT_TIME_PAST_MS_MAX + HOUR_MS)
    yield b.json("the longest token", None, card_id="x" * TEXT_LENGTH_MAX)
    yield b.json("every allowed character", None, merchant_id="aZ09._:-")
    yield b.json("thirteen digits that are no card number", None, card_id=NO_CARD_NUMBER)
    yield b.json("twelve digits", None, card_id=CARD_NUMBER[:12])
    yield b.json("twenty digits", None, card_id=CARD_NUMBER + "0000")
    yield b.json("an address of IP version 6", None, ip="2001:db8::7")


_schema = fastavro.parse_schema(json.loads(TOPICS[TRANSACTIONS].schema_text))


def _record(fields: dict[str, Any]) -> bytes:
    out = io.BytesIO()
    fastavro.schemaless_writer(out, _schema, fields)
    return out.getvalue()


def _avro(b: _Builder, schema_id: int, unknown_schema_id: int) -> Iterator[HostileCase]:
    """Messages in wire format."""

    def spoilt(name: str, refusal: Refusal | None, field: str | None = None, **changed: Any) -> HostileCase:
        t = b.fields(**changed)
        known = t["transaction_id"]
        return HostileCase(f"Avro: {name}", frame(schema_id, _record(t)), "avro", refusal, field, known)

    record = _record(b.fields())
    broken = Refusal.MALFORMED_AVRO
    yield HostileCase("Avro: an unknown schema id", frame(unknown_schema_id, record), "avro", Refusal.UNKNOWN_SCHEMA_ID)
    yield HostileCase("Avro: the first byte alone", b"\0", "avro", broken)
    yield HostileCase("Avro: a short header", b"\0\0\0", "avro", broken)
    yield HostileCase("Avro: a header alone", frame(schema_id, b""), "avro", broken)
    yield HostileCase("Avro: truncated in the middle", frame(schema_id, record[: len(record) // 2]), "avro", broken)
    yield HostileCase("Avro: truncated by one", frame(schema_id, record[:-1]), "avro", broken)
    yield HostileCase("Avro: a text of negative length", frame(schema_id, b"\x01" + record[1:]), "avro", broken)
    yield HostileCase("Avro: a text of a petabyte", frame(schema_id, b"\xfe\xff\xff\xff\xff\xff\x7f" + record[1:]), "avro", broken)
    yield HostileCase("Avro: a number that never ends", frame(schema_id, b"\xff" * 64), "avro", broken)
    yield HostileCase("Avro: JSON behind the header", frame(schema_id, json.dumps(b.fields()).encode()), "avro", broken)
    too_large = _record(b.fields(merchant_id="x" * MESSAGE_BYTES_MAX))
    yield HostileCase("Avro: too large", frame(schema_id, too_large), "avro", Refusal.TOO_LARGE)
    yield spoilt("a latitude of NaN", Refusal.WRONG_TYPE, "latitude", latitude=float("nan"))
    yield spoilt("coordinates of NaN", Refusal.WRONG_TYPE, "latitude", latitude=float("nan"), longitude=float("nan"))
    yield spoilt("an infinite longitude", Refusal.WRONG_TYPE, "longitude", longitude=float("inf"))
    yield spoilt("a latitude alone", Refusal.COORDINATE_OUT_OF_RANGE, "latitude", longitude=None)
    yield spoilt("a negative amount", Refusal.AMOUNT_OUT_OF_RANGE, "amount_minor", amount_minor=-5)
    yield spoilt("the largest amount of all", Refusal.AMOUNT_OUT_OF_RANGE, "amount_minor", amount_minor=INT64_MAX)
    yield spoilt("a currency of no country", Refusal.UNKNOWN_CURRENCY, "currency", currency="XXX")
    yield spoilt("a channel of no kind", Refusal.WRONG_TYPE, "channel", channel="web")
    yield spoilt("a card number", Refusal.CARD_NUMBER, "card_id", card_id=CARD_NUMBER)
    yield spoilt("an empty id", Refusal.BAD_FORMAT, "card_id", card_id="")
    yield spoilt("a line feed in an id", Refusal.BAD_FORMAT, "merchant_id", merchant_id="a\nb")
    yield spoilt(
        "a time ahead", Refusal.EVENT_TIME_IN_FUTURE, "event_time_ms", event_time_ms=b.now_ms + 2 * EVENT_TIME_FUTURE_MS_MAX
    )
    yield spoilt("a time before 1970", Refusal.EVENT_TIME_TOO_OLD, "event_time_ms", event_time_ms=-1)
    yield spoilt("valid", None)
    yield spoilt("valid, optional fields null", None, device_id=None, ip=None, card_bin=None, card_country=None)
