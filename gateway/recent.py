"""What this gateway decided lately, in memory: the second line behind the idempotency records in Redis.

While Redis is down or slower than its budget there is no record to find, neither the one of a first decision nor a place to leave
one. A retry that reaches the same gateway is recognised here all the same. Bounded: the oldest go first.
"""

from __future__ import annotations

from collections import OrderedDict

from gateway.contracts.decision import Door
from gateway.contracts.layout import FINGERPRINT_BYTES, POSITION
from gateway.job import Job

# About half a kilobyte each.
DECISIONS_MAX = 100_000
CLAIM_BYTES = FINGERPRINT_BYTES + POSITION.size


class RecentDecisions:
    """Records as Redis would hold them: claim (fingerprint and position), then the packed answer."""

    def __init__(self, decisions_max: int = DECISIONS_MAX) -> None:
        self._decisions_max = decisions_max
        self._records: OrderedDict[str, bytes] = OrderedDict()

    def __len__(self) -> int:
        return len(self._records)

    def add(self, job: Job, answer: bytes) -> None:
        records = self._records
        records[job.transaction.transaction_id] = job.claim + answer
        if len(records) > self._decisions_max:
            records.popitem(last=False)

    def settles(self, job: Job) -> bytes | None:
        """The record that settles `job`, None when it is to be decided: it is new, or comes again from its position in Kafka."""
        record = self._records.get(job.transaction.transaction_id)
        if record is not None and job.door is Door.KAFKA and record[:CLAIM_BYTES] == job.claim:
            return None
        return record
