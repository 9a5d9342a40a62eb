"""Reason codes: why a transaction was refused, quarantined, degraded or decided as it was.

Codes are stable, since receipts, dashboards and runbooks name them. Texts may be reworded.
"""

from __future__ import annotations

from enum import StrEnum


class Refusal(StrEnum):
    """Why an input is no transaction. The value is the problem `reason` over HTTP and the quarantine reason on Kafka."""

    TOO_LARGE = "too_large"
    NOT_UTF8 = "not_utf8"
    MALFORMED_JSON = "malformed_json"
    DUPLICATE_KEY = "duplicate_key"
    UNKNOWN_SCHEMA_ID = "unknown_schema_id"
    MALFORMED_AVRO = "malformed_avro"
    UNKNOWN_FIELD = "unknown_field"
    MISSING_FIELD = "missing_field"
    WRONG_TYPE = "wrong_type"
    CARD_NUMBER = "card_number"
    BAD_FORMAT = "bad_format"
    AMOUNT_OUT_OF_RANGE = "amount_out_of_range"
    UNKNOWN_CURRENCY = "unknown_currency"
    COORDINATE_OUT_OF_RANGE = "coordinate_out_of_range"
    EVENT_TIME_IN_FUTURE = "event_time_in_future"
    EVENT_TIME_TOO_OLD = "event_time_too_old"
    IDEMPOTENCY_CONFLICT = "idempotency_conflict"


REFUSAL_TEXT: dict[Refusal, str] = {
    Refusal.TOO_LARGE: "the message is larger than the documented limit",
    Refusal.NOT_UTF8: "the text is not valid UTF-8",
    Refusal.MALFORMED_JSON: "the body is not a JSON object, or is nested deeper than the documented limit",
    Refusal.DUPLICATE_KEY: "a field is given twice",
    Refusal.UNKNOWN_SCHEMA_ID: "the schema registry has no schema of this id for transactions",
    Refusal.MALFORMED_AVRO: "the bytes are not a record of the schema they name",
    Refusal.UNKNOWN_FIELD: "a field is not part of the transaction schema",
    Refusal.MISSING_FIELD: "a required field is missing",
    Refusal.WRONG_TYPE: "a field has the wrong type",
    Refusal.CARD_NUMBER: "a text field holds a raw card number; send a token instead",
    Refusal.BAD_FORMAT: "a text field doesn't match its documented pattern",
    Refusal.AMOUNT_OUT_OF_RANGE: "amount_minor must lie in 0..1000000000",
    Refusal.UNKNOWN_CURRENCY: "currency is not an active ISO 4217 code",
    Refusal.COORDINATE_OUT_OF_RANGE: "latitude must lie in -90..90 and longitude in -180..180, both or neither given",
    Refusal.EVENT_TIME_IN_FUTURE: "event_time_ms lies too far in the future",
    Refusal.EVENT_TIME_TOO_OLD: "event_time_ms lies too far in the past",
    Refusal.IDEMPOTENCY_CONFLICT: "the transaction_id was seen with another body inside the idempotency window",
}
assert set(REFUSAL_TEXT) == set(Refusal)


class Degraded(StrEnum):
    """What an answer had to do without, in the order of the degradation ladder."""

    STALE_FEATURES = "stale_features"
    REQUEST_ONLY = "request_only"
    RULES_ONLY = "rules_only"
    STATIC_POLICY = "static_policy"


class Reason(StrEnum):
    """Why a decision is not `approve`. At most `REASONS_MAX` of them stand in an answer."""

    MODEL_SCORE_HIGH = "MODEL_SCORE_HIGH"
    CARD_VELOCITY = "CARD_VELOCITY"
    DEVICE_MANY_CARDS = "DEVICE_MANY_CARDS"
    IP_MANY_CARDS = "IP_MANY_CARDS"
    MERCHANT_CARD_TESTING = "MERCHANT_CARD_TESTING"
    AMOUNT_UNUSUAL = "AMOUNT_UNUSUAL"
    IMPOSSIBLE_TRAVEL = "IMPOSSIBLE_TRAVEL"
    AMOUNT_LIMIT = "AMOUNT_LIMIT"
    NO_MODEL = "NO_MODEL"


REASONS_MAX = 4

REASON_TEXT: dict[Reason, str] = {
    Reason.MODEL_SCORE_HIGH: "the model rates this payment as risky",
    Reason.CARD_VELOCITY: "the card was used unusually often in a short time",
    Reason.DEVICE_MANY_CARDS: "the device was used with many different cards",
    Reason.IP_MANY_CARDS: "the network address was used with many different cards",
    Reason.MERCHANT_CARD_TESTING: "many different cards were tried at this merchant in a short time",
    Reason.AMOUNT_UNUSUAL: "the amount is far from what this card usually pays",
    Reason.IMPOSSIBLE_TRAVEL: "the card was used in places too far apart in too short a time",
    Reason.AMOUNT_LIMIT: "the amount is above the limit for this kind of payment",
    Reason.NO_MODEL: "no model could rate this payment in time",
}
assert set(REASON_TEXT) == set(Reason)
