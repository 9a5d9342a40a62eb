"""What the expressions of a policy may name: fields of the transaction, features, the score, values derived from them.

A field comes before a feature of the same name: `mcc` and `channel` are the field's text, `amount_minor` its exact number.
"""

from __future__ import annotations

import re

from gateway.contracts.features import FEATURE_NAMES
from gateway.contracts.transaction import (
    BIN_PATTERN,
    CHANNELS,
    COUNTRY_PATTERN,
    CURRENCIES,
    FIELDS,
    ID_PATTERN,
    MCC_PATTERN,
    TEXT_FIELDS,
)

NUMBER_FIELDS: tuple[str, ...] = tuple(f for f in FIELDS if f not in TEXT_FIELDS)
SCORE = "score"
# In the language itself. The card's last place is its speed times the time since, of which at least a second counts.
DERIVED: dict[str, str] = {"card_distance_km": "card_speed * (max(card_since_last, 1) / 3600)"}
FUNCTIONS = ("known", "list", "abs", "min", "max")
NAMES: tuple[str, ...] = (*FIELDS, *FEATURE_NAMES, SCORE, *DERIVED)
assert not {*DERIVED, SCORE, *FUNCTIONS} & {*FIELDS, *FEATURE_NAMES}

_WORDS: dict[str, frozenset[str]] = {"channel": frozenset(CHANNELS), "currency": CURRENCIES}
_PATTERNS: dict[str, str] = {
    "mcc": MCC_PATTERN,
    "country": COUNTRY_PATTERN,
    "card_country": COUNTRY_PATTERN,
    "card_bin": BIN_PATTERN,
}


def words_of(field: str) -> frozenset[str]:
    """What a text field may be where it is one of some words, else nothing."""
    return _WORDS.get(field, frozenset())


def may_be(field: str, value: str) -> bool:
    """Whether any transaction has this text in this field."""
    words = _WORDS.get(field)
    if words is not None:
        return value in words
    return re.fullmatch(_PATTERNS.get(field, ID_PATTERN), value) is not None
