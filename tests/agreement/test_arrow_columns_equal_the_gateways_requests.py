"""A backtest hands Arrow's columns to the policy where the gateway decodes Avro: both see the same batch."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import structs

from deploy.history.backtest_rows import requests_of
from gateway.kafka.avro import encode_transaction
from gateway.kernels.intake import CLEAN, TEXTS
from gateway.scoring.requests import read_requests, transactions_of
from tests.agreement.test_offline_engine_equals_a_recount import silver_of
from tests.entities import make_stream

OPTIONAL = ("device_id", "ip", "card_bin", "card_country")


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32), rows=st.integers(0, 60), first=st.integers(0, 5), data=st.data())
def test_requests_from_arrow_equal_those_from_avro(seed: int, rows: int, first: int, data: st.DataObject) -> None:
    stream = make_stream(seed, rows, 60_000, 0) if rows else []
    hidden = data.draw(st.lists(st.sampled_from(OPTIONAL), max_size=4, unique=True))
    stream = [structs.replace(t, **dict.fromkeys(hidden)) if i % 3 else t for i, t in enumerate(stream)]
    # A slice, as a filter leaves it: offsets don't begin at 0.
    found = requests_of(silver_of(stream).slice(first))
    stream = stream[first:]
    expected = read_requests([encode_transaction(t) for t in stream], np.full(len(stream), -1))
    assert (expected.state == CLEAN).all()
    every = np.arange(len(stream))
    for name in TEXTS:
        assert found.texts(name, every) == expected.texts(name, every)
    np.testing.assert_array_equal(found.numbers, expected.numbers)
    np.testing.assert_array_equal(found.places, expected.places)
    np.testing.assert_array_equal(found.lengths, expected.lengths)
    assert transactions_of(found) == stream
