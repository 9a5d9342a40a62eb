"""Bronze records become typed transactions, receipts and labels, or refusals with a reason: as JVM expressions, no Python per row.

The verdicts and reasons for transactions are those of `gateway.contracts.transaction.decode_json` (JSON) and `from_fields` (Avro);
`tests/agreement/test_spark_refuses_as_the_gateway_does.py` holds the two together. Cost: docs/pipeline.md.

How JSON is read: Spark's VARIANT parser is strict (RFC 8259, duplicate keys refused at any depth) but stops after the first value,
so the text is wrapped in a list with a random second element, which must be found where it belongs. The variant's schema is then a
line of text that one regular expression compares with a transaction's shape.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterable
from functools import reduce
from typing import Any

from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F
from pyspark.sql.avro.functions import from_avro, to_avro

from feature_jobs.lake import AUDIT_DDL, LABEL_DDL, LIST_CHANGE_DDL, RECEIPT_DDL, RECEIPT_ENTITIES_DDL
from gateway.contracts import transaction as tx
from gateway.contracts.reasons import Refusal
from gateway.contracts.topics import AUDIT, DECISIONS, LABELS, LIST_CHANGES, SCORED_HEADER, TOPICS, TRANSACTIONS
from gateway.contracts.wire import HEADER

INTEGER_FIELDS = ("event_time_ms", "amount_minor")
COORDINATES = ("latitude", "longitude")
JSON_OPTIONS = {"allowSingleQuotes": "false", "allowNonNumericNumbers": "false", "mode": "PERMISSIVE"}
LABEL_FIELDS = tuple(part.split()[0] for part in LABEL_DDL.split(", "))
LABEL_OPTIONAL_FIELDS = frozenset({"amount_minor", "effective_at_ms"})
LIST_CHANGE_FIELDS = tuple(part.split()[0] for part in LIST_CHANGE_DDL.split(", "))
AUDIT_FIELDS = tuple(part.split()[0] for part in AUDIT_DDL.split(", "))
RECEIPT_FIELDS = tuple(part.split()[0] for part in RECEIPT_DDL.split(", "))
# Topics whose records are kept as they are: the columns of each, also of plain JSON.
KEPT_AS_THEY_ARE = {LABELS: LABEL_DDL, LIST_CHANGES: LIST_CHANGE_DDL, AUDIT: AUDIT_DDL}
RECEIPT_ENTITY_FIELDS = tuple(part.split()[0] for part in RECEIPT_ENTITIES_DDL.split(", "))


def _variant_types(field: str) -> str:
    """A regular expression for the variant types that `field` may have."""
    if field in INTEGER_FIELDS:
        return "BIGINT"
    kind = r"BIGINT|DOUBLE|DECIMAL\([0-9]+,[0-9]+\)" if field in COORDINATES else "STRING"
    return kind if field in tx.REQUIRED_FIELDS else f"{kind}|VOID"


def _shape_pattern() -> str:
    """What schema_of_variant() says of a well-formed transaction: it lists the fields in the order of their names."""
    names = sorted(tx.FIELDS)
    # The separators are simple because the first and the last name are required fields.
    assert names[0] in tx.REQUIRED_FIELDS
    assert names[-1] in tx.REQUIRED_FIELDS
    parts = [f"{names[0]}: (?:{_variant_types(names[0])})"]
    parts += [f"(?:, {n}: (?:{_variant_types(n)})){'' if n in tx.REQUIRED_FIELDS else '?'}" for n in names[1:]]
    return r"\AOBJECT<" + "".join(parts) + r">\z"


SHAPE_PATTERN = _shape_pattern()


def _whole(pattern: str) -> str:
    """A ^pattern$ of the contracts in Java's words: `$` would also match before a last line feed."""
    return rf"\A{pattern[1:-1]}\z"


def _choose(cases: Iterable[tuple[Column, Column]]) -> Column:
    """The value of the first case whose condition holds, else null. Later cases aren't evaluated."""
    chained = reduce(lambda so_far, case: so_far.when(*case), cases, F)
    assert isinstance(chained, Column)
    return chained


def parse(bronze: DataFrame, schemas: dict[str, dict[int, str]]) -> DataFrame:
    """One row a record of bronze: where it came from, then

    `reason` and `field` (null: valid), `t` / `d` / `l` / `c` / `a` (the struct of a transaction, receipt, label, list change or audit
    record; null for the other topics and for refusals), `scored_by`, `dedup_key`, `value` (the original bytes, null unless refused), and
    of receipts `payload` (the Avro record's bytes) and `schema_id`.
    """
    framed = _decoded(_framed(bronze), schemas)
    typed = _typed(framed)
    refused = F.col("reason").isNotNull()
    kept = typed.withColumn("reason", _reason()).withColumn("field", F.when(refused, _field()))
    own_id = F.coalesce(F.col("t.transaction_id"), F.col("d.transaction_id"))
    position = F.concat_ws(":", "topic", "partition", "offset")
    is_receipt = ~refused & (F.col("topic") == DECISIONS)
    return kept.select(
        "topic",
        "partition",
        "offset",
        "kafka_timestamp",
        "ingested_at",
        "reason",
        "field",
        F.when(~refused, F.col("t")).alias("t"),
        F.when(~refused, F.col("d")).alias("d"),
        *(F.when(~refused, F.col(name)).alias(name) for name in ("l", "c", "a")),
        F.when(
            F.col("topic") == TRANSACTIONS,
            _scored_by(),
        ).alias("scored_by"),
        # What has no transaction_id, and each label, is nobody's duplicate.
        F.when(~refused & own_id.isNotNull(), F.concat_ws("/", "topic", own_id)).otherwise(position).alias("dedup_key"),
        F.when(refused, F.col("value")).alias("value"),
        F.when(is_receipt, _payload()).alias("payload"),
        F.when(is_receipt, F.col("schema_id").cast("int")).alias("schema_id"),
    )


def receipt_columns() -> list[Column]:
    """The columns of the table `decisions` that a receipt fills, from `d` of rows that were parsed before (and kept).

    A receipt of before exploration says "" of what its policy came to: that is what was decided.
    """
    named = {name: F.col(f"d.{name}") for name in RECEIPT_FIELDS + RECEIPT_ENTITY_FIELDS}
    said = named["policy_decision"]
    named["policy_decision"] = F.when(said == "", named["decision"]).otherwise(said)
    return [column.alias(name) for name, column in named.items()]


def _scored_by() -> Column:
    """The value of the first header of that name. Nearly always it is the only header, and looking there first spares a search."""
    first = F.get("headers", F.lit(0))
    search = F.get(F.expr(f"filter(headers, h -> h.key = '{SCORED_HEADER}')"), F.lit(0))
    return F.when(first["key"] == SCORED_HEADER, first["value"]).when(F.size("headers") > 1, search["value"]).cast("string")


def _framed(bronze: DataFrame) -> DataFrame:
    """Adds `framed`, `schema_id` (null: plain JSON, or too short a frame), `text` (null: not JSON or not UTF-8) and their verdicts."""
    value = F.coalesce("value", F.lit(b""))
    framed = F.substring("value", 1, 1) == F.lit(b"\0")
    too_large = F.length("value") > tx.MESSAGE_BYTES_MAX
    text = F.col("value").cast("string")
    utf8 = F.is_valid_utf8(text)
    return (
        bronze.withColumn("value", value)
        .withColumn("too_large", (F.col("topic") == TRANSACTIONS) & too_large)
        .withColumn("framed", framed)
        .withColumn("not_utf8", ~framed & ~utf8)
        .withColumn("text", F.when(~F.col("framed") & ~F.col("too_large") & ~F.col("not_utf8"), text))
        .withColumn(
            "schema_id",
            F.when(
                F.col("framed") & (F.length("value") >= HEADER.size),
                F.conv(F.hex(F.substring("value", 2, 4)), 16, 10).cast("bigint"),
            ),
        )
    )


def _decoded(framed: DataFrame, schemas: dict[str, dict[int, str]]) -> DataFrame:
    """Adds `v` (the JSON of a transaction as a variant), `twice` (a key is repeated), `json_<topic>` and `avro_<topic>`."""
    nonce = secrets.token_hex(16)
    wrapped = F.concat(F.lit("["), F.col("text"), F.lit(f',"{nonce}"]'))
    is_transaction = F.col("topic") == TRANSACTIONS
    rows = framed.withColumn("pair", F.when(is_transaction, F.try_parse_json(wrapped)))
    first = F.try_variant_get("pair", "$[0]", "variant")
    rows = rows.withColumn("v", F.when(F.try_variant_get("pair", "$[1]", "string") == nonce, first))
    # Reads what the strict parser refused once more, this time with repeated keys allowed: is that all that is wrong?
    lenient = F.from_json(wrapped, "array<string>", JSON_OPTIONS)
    twice = F.col("v").isNull() & is_transaction & (F.size(lenient) == 2) & (F.element_at(lenient, 2) == nonce)
    rows = rows.withColumn("twice", F.coalesce(F.when(F.col("v").isNull() & F.col("text").isNotNull(), twice), F.lit(False)))
    for topic, ddl in KEPT_AS_THEY_ARE.items():
        rows = rows.withColumn(f"json_{topic}", F.when(F.col("topic") == topic, F.from_json("text", ddl, JSON_OPTIONS)))
    for topic, by_id in schemas.items():
        # A projection of their own: each later mention of a record would decode it again.
        for schema_id, writer in sorted(by_id.items()):
            right = (F.col("topic") == topic) & (F.col("schema_id") == schema_id)
            rows = rows.withColumn(_raw(topic, schema_id), F.when(right, from_avro(_payload(), writer, {"mode": "PERMISSIVE"})))
    for topic, by_id in schemas.items():
        branches = [
            ((F.col("topic") == topic) & (F.col("schema_id") == schema_id), _whole_record(topic, schema_id, writer))
            for schema_id, writer in sorted(by_id.items())
        ]
        known = F.col("schema_id").isin(sorted(by_id)) if by_id else F.lit(False)
        rows = rows.withColumn(f"avro_{topic}", _choose(branches)).withColumn(
            f"known_{topic}", (F.col("topic") == topic) & F.coalesce(known, F.lit(False))
        )
    # A topic of which nobody has registered a schema has plain JSON only.
    for topic in KEPT_AS_THEY_ARE.keys() - schemas.keys():
        record = F.lit(None).cast(f"struct<{KEPT_AS_THEY_ARE[topic].replace(' ', ': ').replace(',: ', ', ')}>")
        rows = rows.withColumn(f"avro_{topic}", record).withColumn(f"known_{topic}", F.lit(False))
    return rows


def _payload() -> Column:
    return F.substring("value", HEADER.size + 1, tx.MESSAGE_BYTES_MAX * 64)


def _raw(topic: str, schema_id: int) -> str:
    """The column with records of that schema as they were written."""
    return f"raw_{topic}_{schema_id}"


def _whole_record(topic: str, schema_id: int, writer: str) -> Column:
    """The record that is all of the payload, in this code's schema, else null.

    Spark's reader doesn't mind bytes behind a record, so it is written again to compare. A writer's schema with other than plain
    fields, which Spark might not write the way it was, is spared that check.
    """
    as_read = F.col(_raw(topic, schema_id))
    schema, reader = json.loads(writer), TOPICS[topic].schema_text
    # Decoding by the writer's schema into itself is what was done already.
    own = schema == json.loads(reader)
    record = as_read if own else from_avro(_payload(), writer, {"mode": "PERMISSIVE", "avroSchema": reader})
    required = [f["name"] for f in schema["fields"] if isinstance(f["type"], str)]
    if not required or not _plain(schema):
        return record
    # What can't be read is a record of nulls, which can't be written: that would fail the batch, not the row.
    sound = reduce(lambda so_far, name: so_far & as_read[name].isNotNull(), required, F.lit(True))
    return F.when(sound & (F.length(F.when(sound, to_avro(as_read, writer))) == F.length(_payload())), record)


def _plain(schema: dict[str, Any]) -> bool:
    """Every field is a primitive, or null or a primitive."""
    kinds = (kind for f in schema["fields"] for kind in (f["type"] if isinstance(f["type"], list) else [f["type"]]))
    return all(isinstance(kind, str) for kind in kinds) and all(
        not isinstance(f["type"], list) or (len(f["type"]) == 2 and "null" in f["type"]) for f in schema["fields"]
    )


def _typed(rows: DataFrame) -> DataFrame:
    """Adds the structs `t`, `d`, `l`, `c`, `a`; `shape` (schema text of the variant), `shaped` (a transaction's), `texts` (of `t`)."""
    rows = rows.withColumn("shape", F.schema_of_variant("v")).withColumn("shaped", F.col("shape").rlike(SHAPE_PATTERN))
    from_variant = F.struct(*(F.try_variant_get("v", f"$.{name}", _sql_type(name)).alias(name) for name in tx.FIELDS))
    avro = F.col(f"avro_{TRANSACTIONS}")
    from_record = F.struct(*(avro[name].cast(_sql_type(name)).alias(name) for name in tx.FIELDS))
    decision = F.col(f"avro_{DECISIONS}")
    receipt = F.struct(
        *(decision[name].alias(name) for name in RECEIPT_FIELDS),
        *(decision["transaction"][name].alias(name) for name in RECEIPT_ENTITY_FIELDS),
    )
    label, change, audit = (F.coalesce(F.col(f"avro_{topic}"), F.col(f"json_{topic}")) for topic in KEPT_AS_THEY_ARE)
    rows = (
        rows.withColumn("t", F.when(F.col("shaped"), from_variant).when(avro["transaction_id"].isNotNull(), from_record))
        .withColumn("d", F.when(decision["transaction_id"].isNotNull(), receipt))
        .withColumn("l", F.when(_label_is_right(label), F.struct(*(label[name].alias(name) for name in LABEL_FIELDS))))
        .withColumn("c", F.when(_change_is_right(change), F.struct(*(change[name].alias(name) for name in LIST_CHANGE_FIELDS))))
        .withColumn("a", F.when(audit["action"].isNotNull(), F.struct(*(audit[name].alias(name) for name in AUDIT_FIELDS))))
    )
    return rows.withColumn("texts", F.concat_ws("\n", *(F.col("t")[name] for name in tx.TEXT_FIELDS)))


def _sql_type(field: str) -> str:
    return "bigint" if field in INTEGER_FIELDS else "double" if field in COORDINATES else "string"


def _label_is_right(label: Column) -> Column:
    required = (name for name in LABEL_FIELDS if name not in LABEL_OPTIONAL_FIELDS)
    complete = reduce(lambda so_far, name: so_far & label[name].isNotNull(), required, F.lit(True))
    return (
        complete
        & label["source"].isin("chargeback", "refund", "analyst")
        & label["state"].isin("reported", "confirmed", "false_positive", "reversed")
    )


def _change_is_right(change: Column) -> Column:
    """As far as Spark looks; who makes lists of the changes looks again (contracts.lists.check_change)."""
    required = (change[name].isNotNull() for name in LIST_CHANGE_FIELDS if name != "expires_at_ms")
    return reduce(lambda so_far, is_there: so_far & is_there, required, change["action"].isin("add", "remove"))


def _reason() -> Column:
    """The reason code by the documented precedence, null when the record is valid."""
    return F.when(
        F.col("topic") == TRANSACTIONS,
        _choose(
            [
                (F.col("too_large"), F.lit(Refusal.TOO_LARGE.value)),
                (F.col("framed"), _avro_reason()),
                (F.lit(True), _json_reason()),
            ]
        ),
    ).otherwise(
        _choose(
            [
                (_any(F.col(name).isNotNull() for name in ("d", "l", "c", "a")), F.lit(None).cast("string")),
                (
                    F.col("framed") & F.col("schema_id").isNotNull() & ~_known_id(),
                    F.lit(Refusal.UNKNOWN_SCHEMA_ID.value),
                ),
                (F.col("framed"), F.lit(Refusal.MALFORMED_AVRO.value)),
                (F.col("not_utf8"), F.lit(Refusal.NOT_UTF8.value)),
                (F.lit(True), F.lit(Refusal.MALFORMED_JSON.value)),
            ]
        )
    )


def _known_id() -> Column:
    return _any(F.col(f"known_{topic}") for topic in (TRANSACTIONS, DECISIONS, *KEPT_AS_THEY_ARE))


def _avro_reason() -> Column:
    return _choose(
        [
            (F.col("schema_id").isNull(), F.lit(Refusal.MALFORMED_AVRO.value)),
            (~F.col(f"known_{TRANSACTIONS}"), F.lit(Refusal.UNKNOWN_SCHEMA_ID.value)),
            (F.col("t").isNull(), F.lit(Refusal.MALFORMED_AVRO.value)),
            (~F.is_valid_utf8("texts"), F.lit(Refusal.NOT_UTF8.value)),
            (_any(_wrong_value(name) for name in tx.FIELDS), F.lit(Refusal.WRONG_TYPE.value)),
            (F.lit(True), _value_reason()),
        ]
    )


def _json_reason() -> Column:
    keys = F.json_object_keys("text")
    missing = F.size(F.array_except(F.lit(list(tx.REQUIRED_FIELDS)), keys)) > 0
    return _choose(
        [
            (F.col("not_utf8"), F.lit(Refusal.NOT_UTF8.value)),
            (_too_deep(), F.lit(Refusal.MALFORMED_JSON.value)),
            (F.col("twice"), F.lit(Refusal.DUPLICATE_KEY.value)),
            (F.col("v").isNull() | ~F.col("shape").startswith("OBJECT<"), F.lit(Refusal.MALFORMED_JSON.value)),
            (~F.col("shaped") & (F.size(F.array_except(keys, F.lit(list(tx.FIELDS)))) > 0), F.lit(Refusal.UNKNOWN_FIELD.value)),
            (~F.col("shaped") & missing, F.lit(Refusal.MISSING_FIELD.value)),
            (~F.col("shaped"), F.lit(Refusal.WRONG_TYPE.value)),
            (_any(_wrong_value(name) for name in tx.FIELDS), F.lit(Refusal.WRONG_TYPE.value)),
            (_lone_surrogate(), F.lit(Refusal.MALFORMED_JSON.value)),
            (F.lit(True), _value_reason()),
        ]
    )


def _any(conditions: Iterable[Column]) -> Column:
    return reduce(lambda a, b: a | b, conditions)


def _wrong_value(field: str) -> Column:
    """Of the right type on the wire and still not of the contract's type."""
    value = F.col("t")[field]
    if field == "channel":
        return F.coalesce(~value.isin(list(tx.CHANNELS)), F.lit(False))
    if field in INTEGER_FIELDS:
        return F.coalesce(value < -tx.INT64_MAX, F.lit(False))
    if field in COORDINATES:
        return F.coalesce(F.isnan(value) | (F.abs(value) == float("inf")), F.lit(False))
    return F.lit(False)


def _value_reason() -> Column:
    """What `contracts.transaction.check` would say of `t`."""
    t = F.col("t")
    now_ms = F.unix_millis("kafka_timestamp")
    both = t["latitude"].isNotNull() & t["longitude"].isNotNull()
    off_the_globe = both & ~(t["latitude"].between(-90.0, 90.0) & t["longitude"].between(-180.0, 180.0))
    return _choose(
        [
            (_digits_in_texts() & _any(_holds_card_number(name) for name in tx.TEXT_FIELDS), F.lit(Refusal.CARD_NUMBER.value)),
            (_any(_bad_format(name, pattern) for name, pattern in PATTERNS.items()), F.lit(Refusal.BAD_FORMAT.value)),
            (~t["amount_minor"].between(tx.AMOUNT_MINOR_MIN, tx.AMOUNT_MINOR_MAX), F.lit(Refusal.AMOUNT_OUT_OF_RANGE.value)),
            (~t["currency"].isin(sorted(tx.CURRENCIES)), F.lit(Refusal.UNKNOWN_CURRENCY.value)),
            (
                (t["latitude"].isNull() != t["longitude"].isNull()) | off_the_globe,
                F.lit(Refusal.COORDINATE_OUT_OF_RANGE.value),
            ),
            (t["event_time_ms"] > now_ms + tx.EVENT_TIME_FUTURE_MS_MAX, F.lit(Refusal.EVENT_TIME_IN_FUTURE.value)),
            (t["event_time_ms"] < now_ms - tx.EVENT_TIME_PAST_MS_MAX, F.lit(Refusal.EVENT_TIME_TOO_OLD.value)),
        ]
    )


PATTERNS: dict[str, str] = dict.fromkeys(tx.ID_FIELDS, _whole(tx.ID_PATTERN)) | {
    "mcc": _whole(tx.MCC_PATTERN),
    "country": _whole(tx.COUNTRY_PATTERN),
    "card_bin": _whole(tx.BIN_PATTERN),
    "card_country": _whole(tx.COUNTRY_PATTERN),
}


def _bad_format(field: str, pattern: str) -> Column:
    return F.coalesce(~F.col("t")[field].rlike(pattern), F.lit(False))


def _digits_in_texts() -> Column:
    """A cheap first look: can there be a card number at all? No run of digits crosses a line feed."""
    return F.col("texts").rlike(r"[0-9](?:[ \-]?[0-9]){12}")


def _holds_card_number(field: str) -> Column:
    runs = F.regexp_extract_all(F.col("t")[field], F.lit(tx.CARD_NUMBER_PATTERN), F.lit(0))
    return F.coalesce(F.exists(runs, lambda run: F.call_function("luhn_check", F.regexp_replace(run, r"[ \-]", ""))), F.lit(False))


def _too_deep() -> Column:
    """Nested deeper than the contract parses. Counted only where there are brackets enough."""
    opening = F.length("text") - F.length(F.translate("text", "[{", ""))
    bare = F.regexp_replace(F.regexp_replace("text", r"(?s)\\.", ""), r'"[^"]*+"', "")
    brackets = F.regexp_replace(bare, r"[^\[\]{}]", "")
    # The deepest of the running sums of +1 and -1, folded without materialising them.
    zero = F.struct(F.lit(0).alias("now"), F.lit(0).alias("deepest"))
    deepest = F.aggregate(
        F.split(brackets, ""),
        zero,
        lambda so_far, c: _step(so_far, F.when(c.isin("[", "{"), 1).when(c.isin("]", "}"), -1).otherwise(0)),
        lambda so_far: so_far["deepest"],
    )
    return F.when(opening > tx.JSON_DEPTH_MAX, deepest > tx.JSON_DEPTH_MAX).otherwise(False)


def _step(so_far: Column, change: Column) -> Column:
    now = so_far["now"] + change
    return F.struct(now.alias("now"), F.greatest(so_far["deepest"], now).alias("deepest"))


def _lone_surrogate() -> Column:
    """An escaped half of a surrogate pair without its other half: no Unicode text, though the VARIANT parser lets it pass."""
    escapes = F.regexp_replace("text", r"\\\\", "")
    whole = F.regexp_replace(escapes, r"\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}", "")
    return F.col("text").rlike(r"\\u[dD][89a-fA-F]") & whole.rlike(r"\\u[dD][89a-fA-F][0-9a-fA-F]{2}")


def _field() -> Column:
    """The offending field, where the contract names one."""
    keys = F.json_object_keys("text")
    by_reason: dict[Refusal, list[tuple[Column, str]]] = {
        Refusal.MISSING_FIELD: [(~F.array_contains(keys, name), name) for name in tx.REQUIRED_FIELDS],
        Refusal.WRONG_TYPE: [
            (F.coalesce(~F.col("shaped"), F.lit(False)) & _wrong_type(name) | _wrong_value(name), name) for name in tx.FIELDS
        ],
        Refusal.CARD_NUMBER: [(_holds_card_number(name), name) for name in tx.TEXT_FIELDS],
        Refusal.BAD_FORMAT: [(_bad_format(name, pattern), name) for name, pattern in PATTERNS.items()],
        Refusal.AMOUNT_OUT_OF_RANGE: [(F.lit(True), "amount_minor")],
        Refusal.UNKNOWN_CURRENCY: [(F.lit(True), "currency")],
        Refusal.COORDINATE_OUT_OF_RANGE: [
            (F.col("t.longitude").isNull() | F.col("t.latitude").isNull() | ~F.col("t.latitude").between(-90.0, 90.0), "latitude"),
            (F.lit(True), "longitude"),
        ],
        Refusal.EVENT_TIME_IN_FUTURE: [(F.lit(True), "event_time_ms")],
        Refusal.EVENT_TIME_TOO_OLD: [(F.lit(True), "event_time_ms")],
    }
    return _choose(
        (F.col("reason") == reason.value, _choose((condition, F.lit(name)) for condition, name in cases))
        for reason, cases in by_reason.items()
    )


def _wrong_type(field: str) -> Column:
    """The type of one field of the variant isn't a transaction's. A missing field has none; only an optional one may be missing."""
    kind = F.schema_of_variant(F.try_variant_get("v", f"$.{field}", "variant"))
    right = kind.rlike(rf"\A(?:{_variant_types(field)})\z")
    if field == "channel":
        right &= F.try_variant_get("v", "$.channel", "string").isin(list(tx.CHANNELS))
    if field in INTEGER_FIELDS:
        right &= F.try_variant_get("v", f"$.{field}", "bigint") >= -tx.INT64_MAX
    if field in COORDINATES:
        value = F.try_variant_get("v", f"$.{field}", "double")
        right &= F.coalesce(F.abs(value) < float("inf"), F.lit(True))
    return F.coalesce(~right, F.lit(False))
