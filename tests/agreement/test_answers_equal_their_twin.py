"""What the kernel packs for retries against msgspec's encoder, and its digests against hashlib's."""

from __future__ import annotations

import hashlib

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import structs

from gateway.contracts.decision import SEVERITY, Answer, ModelRef, Outcome
from gateway.contracts.layout import CLAIM_BYTES, idempotency_key, txn_hash
from gateway.contracts.transaction import TEXT_LENGTH_MAX
from gateway.kernels.digests import DIGEST_BYTES, md5
from gateway.redis.backend import Kept, _store_packed
from gateway.scoring.answers import REASONS, Note, answer_in, encode_answers, gather
from gateway.scoring.job import Job, fingerprint_of, requests_of
from gateway.scoring.requests import fingerprints_of, hashes_of
from tests.unit.gateway.factories import make_job, make_transaction

TTL_MS = 600_000
IDS = st.from_regex(r"[A-Za-z0-9._:\-]{1,64}", fullmatch=True)
WORDS = st.lists(st.text(max_size=40), max_size=3).map(tuple)
NOTES = st.tuples(st.lists(st.sampled_from(sorted(REASONS)), max_size=4).map(tuple), WORDS, WORDS)
REFS = st.none() | st.builds(ModelRef, st.text(max_size=300), st.text(max_size=5), st.just("champion"))
ROWS = st.lists(
    st.tuples(
        IDS,
        st.sampled_from(list(Outcome)),
        st.integers(0, 1000),
        st.none() | st.floats(0, 1),
        NOTES,
        REFS,
        st.floats(0, 1e9),
    ),
    min_size=1,
    max_size=6,
    unique_by=lambda row: row[0],
)
Row = tuple[str, Outcome, int, float | None, Note, ModelRef | None, float]


def job_of(transaction_id: str) -> Job:
    return make_job(make_transaction(transaction_id), offset=7)


def answer_of(row: Row) -> Answer:
    transaction_id, outcome, score, probability, (reasons, hits, kinds), ref, latency_ms = row
    return Answer(
        transaction_id=transaction_id,
        decision=outcome,
        risk_score=score,
        probability=probability,
        reasons=[REASONS[code] for code in reasons],
        rule_hits=list(hits),
        model=ref,
        degraded=list(kinds),
        latency_ms=latency_ms,
    )


@given(ROWS)
def test_records_and_commands_are_those_of_the_plain_encoder(rows: list[Row]) -> None:
    # A row before them, so that places in the batch and places among the answers differ.
    jobs = [job_of("before"), *map(job_of, [row[0] for row in rows])]
    requests = requests_of(jobs)
    refs = list(dict.fromkeys(row[5] for row in rows))
    found = encode_answers(
        requests,
        np.arange(1, len(jobs)),
        b"".join(job.claim for job in jobs[1:]),
        np.array([SEVERITY[row[1]] for row in rows]),
        np.array([row[2] for row in rows]),
        np.array([np.nan if row[3] is None else row[3] for row in rows]),
        gather([row[4] for row in rows]),
        refs,
        np.array([refs.index(row[5]) for row in rows]),
        np.array([row[6] for row in rows]),
        TTL_MS,
    )
    expected = [job.claim + msgspec.msgpack.encode(answer_of(row)) for job, row in zip(jobs[1:], rows, strict=True)]
    assert found.records == expected
    kept = [Kept(idempotency_key(row[0]), record, TTL_MS) for row, record in zip(rows, expected, strict=True)]
    assert found.commands == b"".join(map(_store_packed, kept))
    assert list(map(answer_in, found.records)) == list(map(answer_of, rows))


def test_the_longest_texts_fit_the_bytes_that_are_set_aside() -> None:
    jobs = [job_of(letter * TEXT_LENGTH_MAX) for letter in "ab"]
    n, notes = len(jobs), gather([((), (), ())] * len(jobs))
    zeros, score = np.zeros(n, np.int64), np.full(n, 1000)
    claims = b"".join(job.claim for job in jobs)
    found = encode_answers(
        requests_of(jobs), np.arange(n), claims, zeros, score, np.full(n, 0.5), notes, [None], zeros, np.full(n, 1e9), TTL_MS
    )
    assert [answer_in(record).transaction_id for record in found.records] == [job.transaction_id for job in jobs]
    assert found.commands.startswith(b"*5\r\n") and found.commands.endswith(b"$6\r\n600000\r\n")


def test_claims_that_are_too_few_are_an_error() -> None:
    job, zero = make_job(), np.zeros(1, np.int64)
    nothing = gather([((), (), ())])
    with pytest.raises(AssertionError):
        encode_answers(
            requests_of([job]), zero, job.claim[: CLAIM_BYTES - 1], zero, zero, np.zeros(1), nothing, [None], zero, np.zeros(1), 1
        )


@given(st.lists(st.binary(max_size=300), min_size=1, max_size=8))
def test_digests_are_those_of_hashlib(pieces: list[bytes]) -> None:
    lengths = np.array(list(map(len, pieces)))
    out = np.empty((len(pieces), DIGEST_BYTES), np.uint8)
    # A buffer of no bytes has no address.
    md5(np.frombuffer(b"".join(pieces) + b".", np.uint8), np.cumsum(lengths) - lengths, lengths, out)
    assert [row.tobytes() for row in out] == [hashlib.md5(piece, usedforsecurity=False).digest() for piece in pieces]


@pytest.mark.parametrize("length", [0, 1, 54, 55, 56, 57, 63, 64, 65, 119, 120, 128])
def test_digests_at_the_edges_of_blocks(length: int) -> None:
    data, out = b"x" * length, np.empty((1, DIGEST_BYTES), np.uint8)
    md5(np.frombuffer(data + b".", np.uint8), np.zeros(1, np.int64), np.array([length]), out)
    assert out.tobytes() == hashlib.md5(data, usedforsecurity=False).digest()


def test_fingerprints_and_hashes_of_a_batch_are_those_of_its_transactions() -> None:
    jobs = [job_of(f"t-{i}" * (i + 1)) for i in range(9)]
    jobs.append(make_job(structs.replace(make_transaction("bare"), device_id=None, ip=None)))
    requests = requests_of(jobs)
    prints = fingerprints_of(requests)
    assert [prints[i * DIGEST_BYTES :][:DIGEST_BYTES] for i in range(len(jobs))] == [fingerprint_of(job.payload) for job in jobs]
    assert hashes_of(requests).tolist() == [txn_hash(job.transaction_id) for job in jobs]
