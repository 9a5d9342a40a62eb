"""The feature list: its names, its fingerprint, and what is unknown."""

from __future__ import annotations

import numpy as np
import pytest

from gateway.contracts import features
from gateway.contracts.feature_matrix import feature_matrix
from gateway.contracts.features import ENTITIES, FEATURE_INDEX, FEATURES, request_columns
from gateway.contracts.transaction import Transaction
from gateway.contracts.windows import Asked, aggregate, nothing_held

T = Transaction(
    transaction_id="t",
    event_time_ms=1_700_000_000_000,  # a Tuesday, 22:13 UTC
    card_id="c",
    customer_id="u",
    merchant_id="m",
    amount_minor=1234,
    currency="EUR",
    channel="ecom",
    mcc="5411",
    country="DE",
    card_country="FR",
)


def matrix_without_history(known: bool) -> list[float]:
    none, no_dim = np.zeros(len(ENTITIES), np.int64), np.zeros(len(ENTITIES), np.uint16)
    empty = aggregate(Asked(none + T.event_time_ms, none, none + 64, no_dim, no_dim), nothing_held(len(ENTITIES)))
    row = feature_matrix(request_columns([T]), empty, np.full((1, len(ENTITIES)), known))[0]
    return [float(x) for x in row]


def test_a_first_transaction_has_counts_of_zero_and_no_means() -> None:
    row = matrix_without_history(known=True)
    assert row[FEATURE_INDEX["card_count_24h"]] == 0
    assert np.isnan(row[FEATURE_INDEX["card_amount_mean_30d"]])
    assert np.isnan(row[FEATURE_INDEX["card_since_last"]])
    assert np.isnan(row[FEATURE_INDEX["merchant_fraud_rate_7d"]])
    assert row[FEATURE_INDEX["card_new_merchant"]] == 1


def test_an_unknown_entity_has_no_values_at_all() -> None:
    row = matrix_without_history(known=False)
    for f in FEATURES:
        assert np.isnan(row[FEATURE_INDEX[f.name]]) == (f.entity is not None), f.name


def test_request_features_come_from_the_request() -> None:
    row = matrix_without_history(known=False)
    found = {
        name: row[FEATURE_INDEX[name]] for name in ("hour", "weekday", "is_night", "is_weekend", "mcc", "cross_border", "channel")
    }
    assert found == {"hour": 22, "weekday": 1, "is_night": 0, "is_weekend": 0, "mcc": 5411, "cross_border": 1, "channel": 1}


def test_the_fingerprint_follows_every_part_of_the_definition(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = {features.FINGERPRINT}
    for name, value in (
        ("FEATURES", FEATURES[:-1]),
        ("ENTITIES", ENTITIES[:-1]),
        ("SETTLE_MS", 1),
        ("WINDOWS", ()),
        ("LABEL_WINDOWS", ()),
        ("SKETCH_ESTIMATE", []),
    ):
        with monkeypatch.context() as m:
            m.setattr(features, name, value)
            seen.add(features._fingerprint())
    assert len(seen) == 7
