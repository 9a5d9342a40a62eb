"""What this gateway decided lately, in memory: the second line behind the idempotency records in Redis.

While Redis is down or slower than its budget there is no record to find, neither the one of a first decision nor a place to leave
one. A retry that reaches the same gateway is recognised here all the same. Bounded in number, the oldest go first, and in time, by
the idempotency window: after that a transaction_id is new again, here as in Redis.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Sequence

from gateway.contracts.decision import Door
from gateway.contracts.layout import CLAIM_BYTES
from gateway.scoring.job import Job

# About half a kilobyte each.
DECISIONS_MAX = 100_000


class RecentDecisions:
    """Records as Redis would hold them: claim (fingerprint and position), then the packed answer."""

    def __init__(self, window_s: float, clock_s: Callable[[], float] = time.monotonic, decisions_max: int = DECISIONS_MAX) -> None:
        self._window_s = window_s
        self._clock_s = clock_s
        self._decisions_max = decisions_max
        # By transaction_id, the oldest first: the record and until when it counts.
        self._records: OrderedDict[str, tuple[bytes, float]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._records)

    def add(self, decided: Sequence[tuple[Job, bytes]]) -> None:
        """Jobs and their records."""
        records = self._records
        until_s = self._clock_s() + self._window_s
        for job, record in decided:
            # What is there already goes to the end.
            records.pop(job.transaction_id, None)
            records[job.transaction_id] = record, until_s
        while len(records) > self._decisions_max:
            records.popitem(last=False)

    def settles(self, job: Job) -> bytes | None:
        """The record that settles `job`, None when it is to be decided: it is new, or comes again from its position in Kafka."""
        record, counts_until_s = self._records.get(job.transaction_id, (None, 0.0))
        if record is None or self._clock_s() >= counts_until_s:
            return None
        return None if job.door is Door.KAFKA and record[:CLAIM_BYTES] == job.claim else record
