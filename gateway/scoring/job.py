"""One transaction on its way through the scorer, and what became of it. Shared by both doors."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

import numpy as np

from gateway.contracts.decision import Answer, Door, Outcome
from gateway.contracts.layout import CLAIM_BYTES, FINGERPRINT_BYTES, POSITION
from gateway.contracts.transaction import Transaction
from gateway.kernels.intake import READ, UNREAD
from gateway.scoring.answers import answer_in
from gateway.scoring.requests import Requests, read_requests, transactions_of
from gateway.tracing.trace import Trace


@dataclass(slots=True, eq=False)
class Job:
    """`payload` is the transaction as a record of schemas/transaction.avsc in its shortest form; it has been checked.

    `claim` is its fingerprint and the position that it came from, CLAIM_BYTES: what an idempotency record begins with. `overtakes` is the
    claim of a gateway that owes its answer, in whose place this one decides.

    `arrived_ms` is the wall clock at arrival (HTTP) or the record's timestamp (Kafka); `received_s` is time.monotonic().

    `deadline_s` (time.monotonic()) is None where nobody waits.
    """

    transaction_id: str
    card_id: bytes
    payload: bytes
    claim: bytes
    door: Door
    arrived_ms: int
    received_ms: int
    received_s: float
    deadline_s: float | None
    partition: int | None = None
    offset: int | None = None
    # The caller wants the model's reasons for an approval too.
    explain: bool = False
    # The caller's W3C context of a trace, or that of the decision's own span once it is traced; goes on with the receipt.
    traceparent: bytes | None = None
    overtakes: bytes | None = None
    # It has not waited for another process yet.
    patient: bool = True

    @property
    def held_claim(self) -> bytes:
        """What Redis holds for it while it is decided."""
        return self.claim if self.overtakes is None else self.overtakes

    @property
    def fingerprint(self) -> bytes:
        return self.claim[:FINGERPRINT_BYTES]

    @property
    def transaction(self) -> Transaction:
        """Decoded anew each time, 10 us: for the few that somebody wants to look at whole."""
        [t] = transactions_of(requests_of([self]), READ)
        assert t is not None, "a job's payload is a whole record"
        return t


def fingerprint_of(payload: bytes) -> bytes:
    """16 bytes that differ when any field of the transaction does, whichever door it came through."""
    return hashlib.md5(payload, usedforsecurity=False).digest()


def http_job(
    transaction_id: str,
    card_id: bytes,
    payload: bytes,
    fingerprint: bytes,
    received_ms: int,
    claimed_ms: int,
    received_s: float,
    deadline_s: float | None,
    process: int,
) -> Job:
    """A job of the HTTP door. `process` is a number of 32 bits: two processes must not share it."""
    return Job(
        transaction_id=transaction_id,
        card_id=card_id,
        payload=payload,
        claim=fingerprint + POSITION.pack(b"h", 0, process, claimed_ms),
        door=Door.HTTP,
        arrived_ms=received_ms,
        received_ms=received_ms,
        received_s=received_s,
        deadline_s=deadline_s,
    )


def requests_of(jobs: Sequence[Job]) -> Requests:
    """The columns of the jobs' transactions, which have been checked before."""
    requests = read_requests([job.payload for job in jobs], np.full(len(jobs), -1, np.int64))
    assert UNREAD not in requests.state, "a job's payload is a whole record"
    return requests


def claimed_ago_ms(claim: bytes, now_ms: int) -> int | None:
    """How old a claim of the HTTP door is, None for one of the Kafka door."""
    door, _, _, claimed_ms = POSITION.unpack_from(claim, FINGERPRINT_BYTES)
    return None if door == b"k" else now_ms - claimed_ms


def kafka_position(partition: int, offset: int) -> bytes:
    return POSITION.pack(b"k", 0, partition, offset)


class Verdict(Enum):
    """What the scorer did with a job."""

    DECIDED = "decided"
    # The same body came before, by another position: it is answered alike and counts once.
    DUPLICATE = "duplicate"
    # The transaction_id came before with another body.
    CONFLICT = "conflict"
    # The same body came before and has no answer yet.
    IN_PROGRESS = "in_progress"


class Result:
    """What became of `job`. `answer` is None for CONFLICT and IN_PROGRESS, and for a DUPLICATE whose first has no answer yet.

    `receipt` (Avro payload) and `outcome` stand only in what was DECIDED. An answer that is given as the `record` which holds it is
    unpacked when somebody asks: nobody does at the Kafka door. `free_in_s`: when what is IN_PROGRESS over HTTP may be decided by another.
    """

    __slots__ = ("_answer", "_record", "free_in_s", "job", "outcome", "receipt", "trace", "verdict")

    def __init__(
        self,
        job: Job,
        verdict: Verdict,
        *,
        answer: Answer | None = None,
        record: bytes | None = None,
        receipt: bytes | None = None,
        outcome: Outcome | None = None,
        free_in_s: float | None = None,
    ) -> None:
        self.job = job
        self.verdict = verdict
        self.receipt = receipt
        self.outcome = outcome
        self.free_in_s = free_in_s
        self._answer = answer
        self._record = record
        # Of the few that are traced.
        self.trace: Trace | None = None

    @property
    def answer(self) -> Answer | None:
        if self._answer is None and self._record is not None and len(self._record) > CLAIM_BYTES:
            self._answer = answer_in(self._record)
        return self._answer
