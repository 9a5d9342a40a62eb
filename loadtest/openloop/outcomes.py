"""What became of each payment of a soak test, by number: written by `loadtest.openloop.steady`, read by `deploy.soak`.

Columns of plain numbers, 22 bytes a payment, so that millions of them fit into memory beside what is measured.
"""

from __future__ import annotations

import zlib
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gateway.contracts.decision import SEVERITY, Outcome
from gateway.contracts.reasons import Degraded

# Every KAFKA_EVERYth payment goes to Kafka, the others are posted.
KAFKA_EVERY = 10
# Beside HTTP statuses. MIXED_UP: an answer with another transaction_id. NOT_DUE: the run ended before.
ACKNOWLEDGED, MIXED_UP, FAILED, NOT_SENT, NOT_DUE = 1, 2, 0, -1, -2
UNKNOWN = -1
COLUMNS = {
    "status": "h",
    "attempts": "B",
    "outcome": "b",
    "score": "h",
    "degraded": "B",
    "reasons": "I",
    "latency_us": "i",
    "late_us": "i",
}
_EMPTY = {"status": NOT_DUE, "outcome": UNKNOWN, "score": UNKNOWN, "latency_us": UNKNOWN}
_OUTCOMES: dict[str, int] = {outcome.value: severity for outcome, severity in SEVERITY.items()}
_DEGRADED = {kind.value: 1 << place for place, kind in enumerate(Degraded)}
OUTCOMES = tuple(Outcome)


def is_kafka(number: int) -> bool:
    return number % KAFKA_EVERY == KAFKA_EVERY - 1


def outcome_number(outcome: str) -> int:
    return _OUTCOMES[outcome]


def degraded_bits(kinds: Sequence[str]) -> int:
    """One bit a kind, in the order of `Degraded`."""
    return sum(_DEGRADED[kind] for kind in kinds)


def degraded_names(bits: int) -> list[str]:
    return [name for name, bit in _DEGRADED.items() if bits & bit]


def reasons_hash(codes: Sequence[str]) -> int:
    """Equal codes in equal order have equal hashes; 0 for none."""
    return zlib.crc32(",".join(codes).encode()) if codes else 0


class Log:
    """Rows of `count` payments, filled in while they are sent. `latency_us` is from due to answer, `late_us` from due to the
    first attempt: over Kafka the sender's own delay, over HTTP also the wait for a connection when all are in use.
    """

    def __init__(self, count: int) -> None:
        self.status, self.attempts, self.outcome, self.score, self.degraded, self.reasons, self.latency_us, self.late_us = (
            array(code, [_EMPTY.get(name, 0)]) * count for name, code in COLUMNS.items()
        )

    def save(self, path: Path) -> None:
        columns: dict[str, Any] = {name: np.array(getattr(self, name)) for name in COLUMNS}
        np.savez(path, **columns)


def load(path: Path) -> dict[str, npt.NDArray[np.generic]]:
    """The columns of COLUMNS, each (count,)."""
    with np.load(path, allow_pickle=False) as file:
        return {name: file[name] for name in COLUMNS}
