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
    """Why a decision is not `approve`. At most `REASONS_MAX` of them stand in an answer.

    The policy's rules and lists name any of them. The model's are those of contracts/feature_reasons.py, which says what each follows from;
    MODEL_SCORE_HIGH stands in for them where the score wasn't explained.
    """

    MODEL_SCORE_HIGH = "MODEL_SCORE_HIGH"
    CARD_VELOCITY = "CARD_VELOCITY"
    DEVICE_MANY_CARDS = "DEVICE_MANY_CARDS"
    IP_MANY_CARDS = "IP_MANY_CARDS"
    MERCHANT_CARD_TESTING = "MERCHANT_CARD_TESTING"
    AMOUNT_UNUSUAL = "AMOUNT_UNUSUAL"
    IMPOSSIBLE_TRAVEL = "IMPOSSIBLE_TRAVEL"
    AMOUNT_LIMIT = "AMOUNT_LIMIT"
    NO_MODEL = "NO_MODEL"
    ON_BLOCK_LIST = "ON_BLOCK_LIST"
    ON_WATCH_LIST = "ON_WATCH_LIST"
    AMOUNT_HIGH = "AMOUNT_HIGH"
    AMOUNT_SMALL = "AMOUNT_SMALL"
    AMOUNT_AS_USUAL = "AMOUNT_AS_USUAL"
    UNUSUAL_HOUR = "UNUSUAL_HOUR"
    PAYMENT_CHANNEL = "PAYMENT_CHANNEL"
    CROSS_BORDER = "CROSS_BORDER"
    PAYMENT_COUNTRY = "PAYMENT_COUNTRY"
    CARD_MUCH_USED = "CARD_MUCH_USED"
    CARD_LITTLE_USED = "CARD_LITTLE_USED"
    CARD_USED_JUST_BEFORE = "CARD_USED_JUST_BEFORE"
    CARD_LONG_UNUSED = "CARD_LONG_UNUSED"
    CARD_MANY_MERCHANTS = "CARD_MANY_MERCHANTS"
    CARD_MANY_COUNTRIES = "CARD_MANY_COUNTRIES"
    CARD_COUNTRY_CHANGED = "CARD_COUNTRY_CHANGED"
    CARD_MANY_DEVICES = "CARD_MANY_DEVICES"
    CARD_DEVICES = "CARD_DEVICES"
    CARD_TRAVEL = "CARD_TRAVEL"
    SPENDING_HIGH = "SPENDING_HIGH"
    SPENDING_LOW = "SPENDING_LOW"
    NEW_MERCHANT = "NEW_MERCHANT"
    NEW_DEVICE = "NEW_DEVICE"
    CUSTOMER_VELOCITY = "CUSTOMER_VELOCITY"
    CUSTOMER_LITTLE_HISTORY = "CUSTOMER_LITTLE_HISTORY"
    CUSTOMER_MANY_CARDS = "CUSTOMER_MANY_CARDS"
    CUSTOMER_FRAUD_HISTORY = "CUSTOMER_FRAUD_HISTORY"
    CUSTOMER_PROFILE = "CUSTOMER_PROFILE"
    MERCHANT_CATEGORY = "MERCHANT_CATEGORY"
    MERCHANT_BUSY = "MERCHANT_BUSY"
    MERCHANT_LITTLE_KNOWN = "MERCHANT_LITTLE_KNOWN"
    MERCHANT_AMOUNT_UNUSUAL = "MERCHANT_AMOUNT_UNUSUAL"
    MERCHANT_MANY_CARDS = "MERCHANT_MANY_CARDS"
    MERCHANT_FRAUD_HISTORY = "MERCHANT_FRAUD_HISTORY"
    MERCHANT_PROFILE = "MERCHANT_PROFILE"
    DEVICE_BUSY = "DEVICE_BUSY"
    DEVICE_MANY_ADDRESSES = "DEVICE_MANY_ADDRESSES"
    DEVICE_LITTLE_KNOWN = "DEVICE_LITTLE_KNOWN"
    DEVICE_UNKNOWN = "DEVICE_UNKNOWN"
    IP_BUSY = "IP_BUSY"
    IP_LITTLE_KNOWN = "IP_LITTLE_KNOWN"
    IP_UNKNOWN = "IP_UNKNOWN"


REASONS_MAX = 4

# What an analyst reads. Each is true of every payment that has the code.
REASON_TEXT: dict[Reason, str] = {
    Reason.MODEL_SCORE_HIGH: "the model rates this payment as risky",
    Reason.CARD_VELOCITY: "the card was used unusually often in a short time",
    Reason.DEVICE_MANY_CARDS: "the device was used with several different cards",
    Reason.IP_MANY_CARDS: "the network address was used with several different cards",
    Reason.MERCHANT_CARD_TESTING: "many different cards were tried at this merchant in a short time",
    Reason.AMOUNT_UNUSUAL: "the amount is far from what this card usually pays",
    Reason.IMPOSSIBLE_TRAVEL: "the card was used in places too far apart in too short a time",
    Reason.AMOUNT_LIMIT: "the amount is above the limit for this kind of payment",
    Reason.NO_MODEL: "no model could rate this payment in time",
    Reason.ON_BLOCK_LIST: "something about the payment stands on a block list",
    Reason.ON_WATCH_LIST: "something about the payment stands on a list of what is looked at",
    Reason.AMOUNT_HIGH: "the amount is higher than that of most payments",
    Reason.AMOUNT_SMALL: "the amount is no higher than that of most payments",
    Reason.AMOUNT_AS_USUAL: "the amount is of the size that this card or its holder usually pays, or smaller",
    Reason.UNUSUAL_HOUR: "frauds are more frequent at this time of the day or week",
    Reason.PAYMENT_CHANNEL: "frauds are more frequent through this channel",
    Reason.CROSS_BORDER: "the card was issued in another country than the merchant's",
    Reason.PAYMENT_COUNTRY: "what is known of the card's country and last place raises the risk",
    Reason.CARD_MUCH_USED: "the card was used more often lately than most",
    Reason.CARD_LITTLE_USED: "the card was used no more lately than most, or not at all",
    Reason.CARD_USED_JUST_BEFORE: "the card or its holder had paid shortly before, as soon as most or sooner",
    Reason.CARD_LONG_UNUSED: "neither the card nor its holder had paid for longer than most",
    Reason.CARD_MANY_MERCHANTS: "the card was used at more merchants within a day than most",
    Reason.CARD_MANY_COUNTRIES: "the card was used in several countries within a day",
    Reason.CARD_COUNTRY_CHANGED: "the card's payment before was in another country",
    Reason.CARD_MANY_DEVICES: "the card or its holder used several devices within a day",
    Reason.CARD_DEVICES: "what is known of the card's devices raises the risk",
    Reason.CARD_TRAVEL: "the card came from its last place faster than by road",
    Reason.SPENDING_HIGH: "more was spent with the card, or by its holder, than with most before this payment",
    Reason.SPENDING_LOW: "no more was spent with the card, or by its holder, than with most before this payment",
    Reason.NEW_MERCHANT: "the card wasn't used at this merchant before",
    Reason.NEW_DEVICE: "the card wasn't used with this device before",
    Reason.CUSTOMER_VELOCITY: "the customer paid more often lately than most",
    Reason.CUSTOMER_LITTLE_HISTORY: "the customer paid no more often lately than most, or not at all",
    Reason.CUSTOMER_MANY_CARDS: "the customer used several cards within a day",
    Reason.CUSTOMER_FRAUD_HISTORY: "earlier payments of this customer were reported as fraud",
    Reason.CUSTOMER_PROFILE: "the customer's history is like that of customers with more frauds",
    Reason.MERCHANT_CATEGORY: "frauds are more frequent at this kind of merchant",
    Reason.MERCHANT_BUSY: "the merchant takes more payments lately than most",
    Reason.MERCHANT_LITTLE_KNOWN: "the merchant was paid no more lately than most, or not at all",
    Reason.MERCHANT_AMOUNT_UNUSUAL: "the amount is above what is usually paid at this merchant",
    Reason.MERCHANT_MANY_CARDS: "more different cards paid at this merchant lately than at most",
    Reason.MERCHANT_FRAUD_HISTORY: "earlier payments at this merchant were reported as fraud",
    Reason.MERCHANT_PROFILE: "what is known of this merchant raises the risk",
    Reason.DEVICE_BUSY: "the device paid more often lately than most",
    Reason.DEVICE_MANY_ADDRESSES: "the device paid from several network addresses within a day",
    Reason.DEVICE_LITTLE_KNOWN: "the device paid no more lately than most",
    Reason.DEVICE_UNKNOWN: "no device, or one without history, came with this payment",
    Reason.IP_BUSY: "more was paid from the network address lately than from most",
    Reason.IP_LITTLE_KNOWN: "no more was paid from the network address lately than from most",
    Reason.IP_UNKNOWN: "no network address, or one without history, came with this payment",
}
assert set(REASON_TEXT) == set(Reason)

_BEHAVIOUR = "This payment differs from how the card is usually used."
_CHECKED = "We need to be sure that it is you who pays."
_AMOUNT = "The amount of this payment needs a closer look."
_FREQUENCY = "The card was used in a way that we check for your safety."
_MERCHANT = "Payments of this kind, or at this merchant, are checked more closely."
_WAY = "The way in which this payment was made needs a closer look."
_WHERE = "The place of this payment needs a closer look."

# What a cardholder may be told: plain, without blame, and of no help to somebody who tries out what gets through. Several codes share
# a text, so that it doesn't tell what was looked at.
CARDHOLDER_TEXT: dict[Reason, str] = {
    Reason.MODEL_SCORE_HIGH: _CHECKED,
    Reason.CARD_VELOCITY: _FREQUENCY,
    Reason.DEVICE_MANY_CARDS: _WAY,
    Reason.IP_MANY_CARDS: _WAY,
    Reason.MERCHANT_CARD_TESTING: _MERCHANT,
    Reason.AMOUNT_UNUSUAL: _AMOUNT,
    Reason.IMPOSSIBLE_TRAVEL: _WHERE,
    Reason.AMOUNT_LIMIT: _AMOUNT,
    Reason.NO_MODEL: "We could not check this payment in time.",
    Reason.ON_BLOCK_LIST: _CHECKED,
    Reason.ON_WATCH_LIST: _CHECKED,
    Reason.AMOUNT_HIGH: _AMOUNT,
    Reason.AMOUNT_SMALL: _AMOUNT,
    Reason.AMOUNT_AS_USUAL: _AMOUNT,
    Reason.UNUSUAL_HOUR: "The time of this payment needs a closer look.",
    Reason.PAYMENT_CHANNEL: _WAY,
    Reason.CROSS_BORDER: _WHERE,
    Reason.PAYMENT_COUNTRY: _WHERE,
    Reason.CARD_MUCH_USED: _FREQUENCY,
    Reason.CARD_LITTLE_USED: _BEHAVIOUR,
    Reason.CARD_USED_JUST_BEFORE: _FREQUENCY,
    Reason.CARD_LONG_UNUSED: _FREQUENCY,
    Reason.CARD_MANY_MERCHANTS: _FREQUENCY,
    Reason.CARD_MANY_COUNTRIES: _WHERE,
    Reason.CARD_COUNTRY_CHANGED: _WHERE,
    Reason.CARD_MANY_DEVICES: _WAY,
    Reason.CARD_DEVICES: _WAY,
    Reason.CARD_TRAVEL: _WHERE,
    Reason.SPENDING_HIGH: _BEHAVIOUR,
    Reason.SPENDING_LOW: _BEHAVIOUR,
    Reason.NEW_MERCHANT: _BEHAVIOUR,
    Reason.NEW_DEVICE: _WAY,
    Reason.CUSTOMER_VELOCITY: _FREQUENCY,
    Reason.CUSTOMER_LITTLE_HISTORY: _CHECKED,
    Reason.CUSTOMER_MANY_CARDS: _CHECKED,
    Reason.CUSTOMER_FRAUD_HISTORY: _CHECKED,
    Reason.CUSTOMER_PROFILE: _CHECKED,
    Reason.MERCHANT_CATEGORY: _MERCHANT,
    Reason.MERCHANT_BUSY: _MERCHANT,
    Reason.MERCHANT_LITTLE_KNOWN: _MERCHANT,
    Reason.MERCHANT_AMOUNT_UNUSUAL: _AMOUNT,
    Reason.MERCHANT_MANY_CARDS: _MERCHANT,
    Reason.MERCHANT_FRAUD_HISTORY: _MERCHANT,
    Reason.MERCHANT_PROFILE: _MERCHANT,
    Reason.DEVICE_BUSY: _WAY,
    Reason.DEVICE_MANY_ADDRESSES: _WAY,
    Reason.DEVICE_LITTLE_KNOWN: _WAY,
    Reason.DEVICE_UNKNOWN: _WAY,
    Reason.IP_BUSY: _WAY,
    Reason.IP_LITTLE_KNOWN: _WAY,
    Reason.IP_UNKNOWN: _WAY,
}
assert set(CARDHOLDER_TEXT) == set(Reason)
