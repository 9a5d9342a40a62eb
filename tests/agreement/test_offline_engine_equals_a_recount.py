"""The offline engine against the slow oracle: same bits for every feature of every row."""

from __future__ import annotations

import random

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import structs

from feature_jobs import offline
from feature_jobs.training_set import history_of
from gateway.contracts import windows
from gateway.contracts.transaction import Transaction
from tests.entities import NOON_MS, make_stream
from tests.oracle import Oracle, differences

NULLABLE = {"device_id", "ip", "card_bin", "card_country"}


def silver_of(stream: list[Transaction]) -> pa.Table:
    """Rows as silver holds them, sorted as the offline engine wants them."""
    fields = [(f, pa.string()) for f in Transaction.__struct_fields__]
    types = dict(fields) | {
        "event_time_ms": pa.int64(),
        "amount_minor": pa.int64(),
        "latitude": pa.float64(),
        "longitude": pa.float64(),
    }
    return pa.Table.from_pylist([structs.asdict(t) for t in stream], pa.schema(list(types.items())))


def in_order(stream: list[Transaction]) -> list[Transaction]:
    return sorted(stream, key=lambda t: (t.event_time_ms, t.transaction_id))


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    events=st.integers(1, 200),
    step_ms=st.sampled_from([0, 1_000, 60_000, 1_800_000, 20_000_000]),
    disorder_ms=st.sampled_from([0, 240_000]),
)
def test_every_feature_of_every_row_equals_its_recount(seed: int, events: int, step_ms: int, disorder_ms: int) -> None:
    stream = in_order(make_stream(seed, events, max(step_ms, 1), disorder_ms))
    found = offline.offline_features(history_of(silver_of(stream)))
    oracle = Oracle()
    for t, row in zip(stream, found, strict=True):
        assert differences(oracle.observe(t), [float(x) for x in row]) == [], t.transaction_id


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32), step_ms=st.sampled_from([1_800_000, 20_000_000, 100_000_000]))
def test_labels_count_from_the_time_they_were_reported(seed: int, step_ms: int) -> None:
    stream, rng = in_order(make_stream(seed, 150, step_ms, 0)), random.Random(seed)
    reports = []
    for t in rng.sample(stream, 30):
        reported_ms = t.event_time_ms
        for is_fraud in rng.choice([[True], [True, False], [True, True], [False], [True, False, True]]):
            reported_ms += rng.choice([1, windows.DAY_MS, 7 * windows.DAY_MS, 9 * windows.DAY_MS])
            reports.append((reported_ms, t, is_fraud))
    reports.sort(key=lambda r: r[0])
    labels = pa.table(
        {
            "transaction_id": [t.transaction_id for _, t, _ in reports] + ["of nobody"],
            "is_fraud": [is_fraud for *_, is_fraud in reports] + [True],
            "reported_at_ms": [ms for ms, *_ in reports] + [stream[0].event_time_ms],
        }
    )
    found = offline.offline_features(history_of(silver_of(stream), labels))
    oracle, state = Oracle(), dict.fromkeys((t.transaction_id for t in stream), False)
    for t, row in zip(stream, found, strict=True):
        while reports and reports[0][0] <= t.event_time_ms:
            _, about, is_fraud = reports.pop(0)
            if state[about.transaction_id] != is_fraud:
                oracle.label(about, 1 if is_fraud else -1)
            state[about.transaction_id] = is_fraud
        assert differences(oracle.observe(t), [float(x) for x in row]) == [], t.transaction_id


def test_a_burst_over_the_heads_bound_counts_as_many_as_the_definition_says() -> None:
    burst = [structs.replace(t, event_time_ms=NOON_MS + 100 * n) for n, t in enumerate(make_stream(9, 400, 1, 0))]
    found = offline.offline_features(history_of(silver_of(burst)))
    oracle = Oracle()
    for t, row in zip(burst, found, strict=True):
        assert differences(oracle.observe(t), [float(x) for x in row]) == [], t.transaction_id


def test_chunks_don_t_show(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = in_order(make_stream(4, 300, 60_000, 0))
    whole = offline.offline_features(history_of(silver_of(stream)))
    monkeypatch.setattr(offline, "CHUNK_ROWS", 1)
    np.testing.assert_array_equal(offline.offline_features(history_of(silver_of(stream))), whole)
