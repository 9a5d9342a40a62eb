"""The compiled kernels against their slow twins: the intake against msgspec's decoding and checks, receipts against the plain encoder,
places in heads against the contract.

Features have their own: test_head_and_tiles_equal_a_recount.py compares them with the oracle, and here with the numpy of contracts.
"""

from __future__ import annotations

import random
import uuid
import zlib
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import structs

from gateway.contracts import layout
from gateway.contracts.decision import SEVERITY, ModelRef, Outcome, Receipt, RoutedBy
from gateway.contracts.feature_matrix import feature_matrix
from gateway.contracts.features import ENTITIES, FEATURE_NAMES, FINGERPRINT, LABELLED, request_columns
from gateway.contracts.transaction import CHANNELS, RefusedError, Transaction, check, holds_card_number
from gateway.contracts.windows import Asked, aggregate, nothing_held
from gateway.kafka.avro import encode_receipt, encode_transaction, receipt_of
from gateway.kernels import packed, raw
from gateway.kernels.intake import CLEAN, READ, UNREAD
from gateway.redis.store import request_only_matrix
from gateway.scoring.answers import gather
from gateway.scoring.job import requests_of
from gateway.scoring.receipts import Decided, encode_receipts
from gateway.scoring.requests import read_requests, transactions_of
from tests.entities import make_stream
from tests.unit.gateway.factories import NOW_MS, make_job, make_transaction

LONGS = st.integers(min_value=-(2**63), max_value=2**63 - 1)


def state_of(payload: bytes, now_ms: int = NOW_MS) -> int:
    return int(read_requests([payload], np.array([now_ms])).state[0])


@pytest.fixture(scope="module")
def stream() -> list[Transaction]:
    return make_stream(5, 300, 60_000, 1000)


def test_clean_rows_give_back_their_transactions(stream: list[Transaction]) -> None:
    now_ms = np.full(len(stream), max(t.event_time_ms for t in stream))
    requests = read_requests([encode_transaction(t) for t in stream], now_ms)
    assert requests.state.tolist() == [CLEAN] * len(stream)
    assert transactions_of(requests) == stream


def test_columns_are_those_of_the_contract(stream: list[Transaction]) -> None:
    jobs = [make_job(t) for t in stream]
    columns, requests = request_columns(stream), requests_of(jobs)
    assert np.array_equal(requests.t_ms, columns.t_ms)
    assert np.array_equal(requests.amount_minor, columns.amount_minor)
    nothing = np.zeros(len(stream) * len(ENTITIES), np.int64)
    no_dim = nothing.astype(np.uint16)
    asked = Asked(nothing, nothing, nothing, no_dim, no_dim)
    known = np.zeros((len(stream), len(ENTITIES)), bool)
    expected = feature_matrix(columns, aggregate(asked, nothing_held(len(nothing))), known)
    assert np.array_equal(request_only_matrix(requests), expected, equal_nan=True)


BAD = {
    "transaction_id": "t 1",
    "card_id": "",
    "customer_id": "x" * 65,
    "merchant_id": "m\n1",
    "amount_minor": -1,
    "currency": "EUX",
    "mcc": "12a4",
    "country": "de",
    "device_id": "",
    "ip": "1 2",
    "card_bin": "12345",
    "card_country": "D1",
    "latitude": 12.0,
    "event_time_ms": NOW_MS + 25 * 3_600_000,
}


@pytest.mark.parametrize("field", BAD)
def test_a_transaction_that_the_checks_refuse_is_never_clean(field: str) -> None:
    wrong = structs.replace(make_transaction(), **{field: BAD[field]})
    with pytest.raises(RefusedError):
        check(wrong, NOW_MS)
    assert state_of(encode_transaction(wrong)) != CLEAN


def test_a_card_number_is_never_clean_and_neither_is_what_looks_like_one() -> None:
    for card in ("4111111111111111", "4111-1111-1111-1111", "x4111111111111111", "77-4111111111111111-88", "0000000000000"):
        assert state_of(encode_transaction(make_transaction(card_id=card))) == READ
    for card in (
        "tok_000000000001",
        "123456789012",
        "4111-1111--1111-1111",
        "4111111111111112",
        "550e8400-e29b-41d4-a716-446655440001",
    ):
        assert state_of(encode_transaction(make_transaction(card_id=card))) == CLEAN


@given(st.text(alphabet="0123456789-_", min_size=13, max_size=64))
def test_no_id_that_holds_a_card_number_is_clean(text: str) -> None:
    refused = holds_card_number(text)
    clean = state_of(encode_transaction(make_transaction(card_id=text))) == CLEAN
    assert not (refused and clean)


def test_ids_of_many_digits_are_mostly_clean() -> None:
    rng = random.Random(5)
    ids = [str(uuid.UUID(int=rng.getrandbits(128), version=4)) for _ in range(500)]
    ids += [str(rng.randrange(10**15, 10**18)) for _ in range(500)]
    clean = [state_of(encode_transaction(make_transaction(card_id=i))) == CLEAN for i in ids]
    assert sum(clean) > 900
    assert not any(holds_card_number(i) for i, is_clean in zip(ids, clean, strict=True) if is_clean)


@given(st.binary(max_size=200))
def test_no_bytes_are_read_beyond_their_end(noise: bytes) -> None:
    good = encode_transaction(make_transaction())
    requests = read_requests([noise, good], np.full(2, NOW_MS))
    assert requests.state[1] == CLEAN
    assert requests.state[0] == UNREAD or encode_transaction(transactions_of(requests)[0] or make_transaction()) == noise


def damaged(payload: bytes) -> Iterator[bytes]:
    rng = random.Random(7)
    for _ in range(3000):
        changed = bytearray(payload)
        for _ in range(rng.randrange(1, 3)):
            changed[rng.randrange(len(changed))] = rng.randrange(256)
        cut = rng.randrange(len(changed) + 1) if rng.random() < 0.2 else len(changed)
        yield bytes(changed[:cut])


def test_what_is_clean_in_damaged_records_passes_the_checks_and_is_written_alike() -> None:
    payload = encode_transaction(make_transaction(device_id="d-1", ip="10.0.0.1", card_bin="411111", latitude=1.5, longitude=2.5))
    clean = 0
    for wrong in damaged(payload):
        requests = read_requests([wrong], np.array([NOW_MS]))
        if requests.state[0] == CLEAN:
            [t] = transactions_of(requests)
            assert t is not None
            assert t.channel in CHANNELS
            check(t, NOW_MS)
            assert encode_transaction(t) == wrong
            clean += 1
    assert clean > 50


@given(LONGS)
def test_longs_are_written_as_avro_does(value: int) -> None:
    out = np.zeros(16, np.uint8)
    end = raw.put_long(out, 0, value)
    expected, rest = bytearray(), (value << 1) ^ (value >> 63)
    while rest > 0x7F:
        expected.append(rest & 0x7F | 0x80)
        rest >>= 7
    expected.append(rest)
    assert out[:end].tobytes() == bytes(expected)


@given(st.binary(max_size=50), st.binary(max_size=50))
def test_checksums_are_those_of_zlib(first: bytes, second: bytes) -> None:
    data = np.frombuffer(first + second + b"-", np.uint8)
    assert raw.crc32(data, 0, len(first), 0) == zlib.crc32(first)
    assert raw.crc32(data, len(first), len(second), zlib.crc32(first)) == zlib.crc32(first + second)


def make_head(told: list[int | None], rest: bytes = b"", version: int = layout.LAYOUT_VERSION) -> bytes:
    """A card's head whose events tell these places or, where None, don't."""
    events = np.zeros(len(told), layout.HEAD_EVENT)
    events["transaction"] = np.arange(len(told)) + 1
    events["seq"] = [layout.SEQ_NEXT if place is None else place for place in told]
    return layout.HEAD_HEADER.pack(version, 0, 0, 77, 5, 0, 0) + rest + events.tobytes()


@given(st.lists(st.none() | st.integers(1, 9), max_size=20), st.sampled_from([0, 3, 4, 5]), st.booleans())
def test_places_in_a_head_are_those_of_the_contract(gaps: list[int | None], rest: int, begins: bool) -> None:
    told: list[int | None] = [7] if begins else []
    place = 7
    for gap in gaps:
        place += gap or 1
        told.append(place if gap else None)
    head = make_head(told, bytes(rest))
    buf = np.frombuffer(head, np.uint8)
    try:
        events = layout.head_events(head, 0, 77)
    except layout.UnknownLayoutError:
        assert not packed.sound_head(buf, 0, 77, 0, len(head))
        return
    assert packed.sound_head(buf, 0, 77, 0, len(head))
    start = packed.events_from(len(head))
    found = [packed.place_in(buf, start, len(head), np.uint64(i + 1)) for i in range(len(told))]
    assert found == events["seq"].tolist()
    assert packed.place_in(buf, start, len(head), np.uint64(10**9)) == found[-1] + 1


@pytest.mark.parametrize("version", [layout.LAYOUT_VERSION - 1, layout.LAYOUT_VERSION + 1])
def test_a_head_of_another_layout_is_refused_by_both(version: int) -> None:
    head = make_head([0, None], version=version)
    assert not packed.sound_head(np.frombuffer(head, np.uint8), 0, 77, 0, len(head))
    with pytest.raises(layout.UnknownLayoutError):
        layout.head_events(head, 0, 77)


class StubModel:
    """What a receipt says of a model."""

    def __init__(self, version: str, route: str) -> None:
        self.ref = ModelRef(name="fraudgate", version=version, route=route)
        self.digest = version * 32


@pytest.mark.parametrize("from_kafka", [True, False])
@pytest.mark.parametrize("scored", [True, False])
def test_receipts_are_those_of_the_plain_encoder(stream: list[Transaction], from_kafka: bool, scored: bool) -> None:
    rng = np.random.default_rng(3)
    jobs = [make_job(t, offset=1000 + i if from_kafka else None) for i, t in enumerate(stream)]
    rows = np.arange(0, len(jobs), 2)
    n = len(rows)
    matrix = rng.normal(size=(n, len(FEATURE_NAMES))).astype(np.float32)
    models = [StubModel("1", "champion"), StubModel("22", "challenger"), None] if scored else [None]
    notes = [(("A",), (), ()), ((), (), ("stale_features",)), (("A", "B"), ("r1", "r2"), ("x",)), ((), (), ())]
    tails = [((), (), ()), (("l1",), ("s1", "s2"), ()), ((), (), ("broken",))]
    decided = Decided(
        requests=requests_of(jobs),
        rows=rows,
        jobs=[jobs[i] for i in rows],
        decided_at_ms=NOW_MS + 3,
        severity=rng.integers(0, 4, n),
        score=rng.integers(0, 1001, n),
        probability=rng.random(n) if scored else np.full(n, np.nan),
        notes=gather([notes[i % 4] for i in range(n)]),
        models=models,  # type: ignore[arg-type]
        model=rng.integers(0, len(models), n),
        routed_by=RoutedBy.SHARE if scored else RoutedBy.ONLY,
        policy_severity=rng.integers(0, 4, n),
        propensity=rng.random(n),
        matrix=matrix,
        seq=rng.integers(-1, 2**53, (n, len(ENTITIES))),
        label_changes=rng.integers(-1, 100, (n, len(LABELLED))),
        tiles_age_ms=1234 if scored else None,
        policy_digest="p" * 64,
        code_version="1.2.3",
        admit_us=rng.integers(-5, 10_000, n),
        steps_us=[1, 200, 30_000],
        tails=[tails[i % 3] for i in range(n)] if scored else None,
        lists_version=1_000_000 if scored else -1,
    )
    outcomes = list(Outcome)
    assert [SEVERITY[o] for o in outcomes] == [0, 1, 2, 3]
    for k, written in enumerate(encode_receipts(decided)):
        job = decided.jobs[k]
        reasons, hits, degraded = decided.notes.distinct[decided.notes.place[k]]
        model = models[decided.model[k]]
        list_hits, shadow_hits, rule_errors = tails[0] if decided.tails is None else decided.tails[k]
        expected = Receipt(
            transaction_id=job.transaction.transaction_id,
            transaction=job.transaction,
            door=job.door,
            source_partition=job.partition,
            source_offset=job.offset,
            received_at_ms=job.received_ms,
            decided_at_ms=NOW_MS + 3,
            decision=outcomes[int(decided.severity[k])],
            risk_score=int(decided.score[k]),
            probability=float(decided.probability[k]) if scored else None,
            reasons=list(reasons),
            rule_hits=list(hits),
            degraded=list(degraded),
            model_name=None if model is None else model.ref.name,
            model_version=None if model is None else model.ref.version,
            model_digest=None if model is None else model.digest,
            route=None if model is None else model.ref.route,
            feature_fingerprint=FINGERPRINT,
            features=matrix[k].tolist(),
            observed_seq=decided.seq[k].tolist(),
            label_changes=decided.label_changes[k].tolist(),
            tiles_age_ms=decided.tiles_age_ms,
            policy_digest="p" * 64,
            code_version="1.2.3",
            admit_us=int(decided.admit_us[k]),
            features_us=1,
            model_us=200,
            policy_us=30_000,
            routed_by=decided.routed_by,
            policy_decision=outcomes[int(decided.policy_severity[k])],
            propensity=float(decided.propensity[k]),
            list_hits=list(list_hits),
            shadow_hits=list(shadow_hits),
            rule_errors=list(rule_errors),
            lists_version=decided.lists_version,
        )
        assert written == encode_receipt(expected)
        assert receipt_of(written).transaction == job.transaction
