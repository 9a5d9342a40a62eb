"""One transaction on its way through the scorer, and what became of it. Shared by both doors."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

import numpy as np

from gateway.contracts.decision import Answer, Door
from gateway.contracts.layout import POSITION
from gateway.contracts.transaction import Transaction
from gateway.kernels.intake import READ, UNREAD
from gateway.requests import Requests, read_requests, transactions_of
from gateway.trace import Trace

HTTP_POSITION = POSITION.pack(b"h", 0, 0, 0)


@dataclass(slots=True, eq=False)
class Job:
    """`payload` is the transaction as a record of schemas/transaction.avsc in its shortest form, `fingerprint` of it; it has been checked.

    `arrived_ms` is the wall clock at arrival (HTTP) or the record's timestamp (Kafka); `received_s` is time.monotonic().

    `deadline_s` (time.monotonic()) is None where nobody waits.
    """

    transaction_id: str
    card_id: bytes
    payload: bytes
    fingerprint: bytes
    position: bytes
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

    @property
    def claim(self) -> bytes:
        return self.fingerprint + self.position

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
    transaction_id: str, card_id: bytes, payload: bytes, received_ms: int, received_s: float, deadline_s: float | None
) -> Job:
    """A job of the HTTP door."""
    return Job(
        transaction_id=transaction_id,
        card_id=card_id,
        payload=payload,
        fingerprint=fingerprint_of(payload),
        position=HTTP_POSITION,
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


@dataclass(slots=True, eq=False)
class Result:
    """`answer` is None for CONFLICT and IN_PROGRESS, and for a DUPLICATE whose first has no answer yet.

    `receipt` (Avro payload) stands only in what was DECIDED.
    """

    job: Job
    verdict: Verdict
    answer: Answer | None = None
    receipt: bytes | None = None
    # Of the few that are traced.
    trace: Trace | None = None
