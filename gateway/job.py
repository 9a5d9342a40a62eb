"""One transaction on its way through the scorer, and what became of it. Shared by both doors."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from enum import Enum

from gateway.contracts.decision import Answer, Door
from gateway.contracts.layout import POSITION
from gateway.contracts.transaction import Transaction, encode_json

HTTP_POSITION = POSITION.pack(b"h", 0, 0, 0)


@dataclass(slots=True, eq=False)
class Job:
    """`arrived_ms` is the wall clock at arrival (HTTP) or the record's timestamp (Kafka); `received_s` is time.monotonic().

    `deadline_s` (time.monotonic()) is None where nobody waits.
    """

    transaction: Transaction
    fingerprint: bytes
    position: bytes
    door: Door
    arrived_ms: int
    received_ms: int
    received_s: float
    deadline_s: float | None
    partition: int | None = None
    offset: int | None = None

    @property
    def claim(self) -> bytes:
        return self.fingerprint + self.position


def fingerprint_of(t: Transaction) -> bytes:
    """16 bytes that differ when any field does."""
    return hashlib.md5(encode_json(t), usedforsecurity=False).digest()


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
