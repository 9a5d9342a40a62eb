"""The corpus says what the contract says."""

from __future__ import annotations

import io
import json
from typing import Any

import fastavro
import pytest

from gateway.contracts.reasons import Refusal
from gateway.contracts.topics import TOPICS, TRANSACTIONS
from gateway.contracts.transaction import MESSAGE_BYTES_MAX, RefusedError, Transaction, decode_json, from_fields
from gateway.contracts.wire import is_framed, unframe
from loadtest.hostile import HostileCase, hostile_cases

NOW_MS = 1_780_000_000_000
SCHEMA_ID = 4
CASES = hostile_cases(NOW_MS, SCHEMA_ID)
SCHEMA = fastavro.parse_schema(json.loads(TOPICS[TRANSACTIONS].schema_text))


def decode_avro(value: bytes) -> Transaction:
    """The plain way, without caches: size, frame, schema, record, checks."""
    if len(value) > MESSAGE_BYTES_MAX:
        raise RefusedError(Refusal.TOO_LARGE)
    try:
        schema_id, payload = unframe(value)
    except ValueError as exc:
        raise RefusedError(Refusal.MALFORMED_AVRO) from exc
    if schema_id != SCHEMA_ID:
        raise RefusedError(Refusal.UNKNOWN_SCHEMA_ID)
    try:
        fields: Any = fastavro.schemaless_reader(io.BytesIO(payload), SCHEMA, None)
    # fastavro raises whatever its decoder runs into.
    except Exception as exc:
        raise RefusedError(Refusal.MALFORMED_AVRO) from exc
    return from_fields(fields, NOW_MS)


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_the_contract_refuses_as_the_corpus_says(case: HostileCase) -> None:
    assert is_framed(case.value) == (case.kind == "avro")
    found: tuple[Refusal | None, str | None] = (None, None)
    try:
        t = decode_avro(case.value) if case.kind == "avro" else decode_json(case.value, NOW_MS)
    except RefusedError as refused:
        found = refused.reason, refused.field
    else:
        assert t.transaction_id == case.transaction_id
    assert found == (case.refusal, case.field)


def test_every_refusal_of_a_message_has_a_case() -> None:
    assert {c.refusal for c in CASES} == {*Refusal, None} - {Refusal.IDEMPOTENCY_CONFLICT}


def test_cases_have_names_and_transactions_of_their_own() -> None:
    assert len({c.name for c in CASES}) == len(CASES)
    ids = [c.transaction_id for c in CASES if c.refusal is None]
    assert len(set(ids)) == len(ids)
