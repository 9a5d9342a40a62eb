"""The history of a soak: what callers were told and what the topics hold, brought together.

Pure: columns in, complaints out. For every payment of the load, by its number: was it accepted, how often was it decided, and does its
receipt say what its caller was told. `deploy.soak.topics` reads the topics, `loadtest.openloop.outcomes` what callers were told.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from loadtest.openloop.outcomes import ACKNOWLEDGED, KAFKA_EVERY, MIXED_UP, NOT_DUE

SHOWN_MAX = 10
Ints = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]


def mask(found: npt.NDArray[np.bool_]) -> Mask:
    """For the type checker: numpy's comparisons are of any type."""
    return found


@dataclass(frozen=True)
class Sent:
    """What the sender saw, by payment number; columns as in `loadtest.openloop.outcomes`, all (count,) int64."""

    status: Ints
    attempts: Ints
    outcome: Ints
    score: Ints
    degraded: Ints
    reasons: Ints
    latency_us: Ints
    late_us: Ints

    @property
    def count(self) -> int:
        return len(self.status)

    @property
    def by_kafka(self) -> Mask:
        return mask(np.arange(self.count) % KAFKA_EVERY == KAFKA_EVERY - 1)

    @property
    def answered(self) -> Mask:
        return mask(~self.by_kafka & (self.status == 200))

    @property
    def accepted(self) -> Mask:
        """Somebody was told that it is taken: by an answer, or by Kafka's acknowledgement."""
        return mask(self.answered | (self.by_kafka & (self.status == ACKNOWLEDGED)))

    @property
    def due(self) -> Mask:
        return mask(self.status != NOT_DUE)


@dataclass(frozen=True)
class Recorded:
    """What the topics hold, by payment number: how often a receipt and a transaction stand there, what the first receipt says, whether any
    of its receipts was made without Redis, and names of receipts that belong to no payment of the load.
    """

    receipts: Ints
    transactions: Ints
    outcome: Ints
    score: Ints
    degraded: Ints
    reasons: Ints
    without_redis: Mask
    strangers: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Poison:
    """Where poison was put on the topic, as (partition, offset), and where quarantined records say they came from."""

    put: list[tuple[int, int]] = field(default_factory=list)
    quarantined: list[tuple[int, int]] = field(default_factory=list)


@dataclass
class History:
    """Numbers of payments by what is wrong with them, `counts` how many there are of each, and what was looked at.

    `decided_anew` counts payments that their caller sent twice and that have two receipts, of which one at least was made while Redis was
    out of reach: docs/api.md says that this may be, so that it is told and is no violation.
    """

    accepted: int
    decided: int
    unanswered_decided: int
    decided_anew: int
    wrong: dict[str, list[str]]

    @property
    def counts(self) -> dict[str, int]:
        return {name: len(found) for name, found in self.wrong.items()}

    @property
    def clean(self) -> bool:
        return not any(self.wrong.values())

    def complaints(self) -> list[str]:
        return [
            f"{MEANING[name]}: {len(found)} ({', '.join(found[:SHOWN_MAX])}{' ...' if len(found) > SHOWN_MAX else ''})"
            for name, found in self.wrong.items()
            if found
        ]


MEANING = {
    "lost": "accepted, and no decision stands on the topic decisions",
    "duplicated": "decided more than once",
    "invented": "decisions of payments that nobody sent",
    "changed": "the caller was told something else than the receipt says",
    "mixed_up": "the caller was given another payment's answer",
    "not_published": "accepted, and not on the topic transactions",
    "published_twice": "more than once on the topic transactions",
    "poison_lost": "unreadable, and not in quarantine",
    "poison_twice": "unreadable, and more than once in quarantine",
    "quarantined_unasked": "in quarantine, though nothing was wrong with it",
}


def check(sent: Sent, recorded: Recorded, poison: Poison) -> History:
    """Everything that is wrong with a history."""
    accepted, answered = sent.accepted, sent.answered
    receipts, transactions = recorded.receipts, recorded.transactions
    same = np.ones(sent.count, bool)
    for told, kept in (
        (sent.outcome, recorded.outcome),
        (sent.score, recorded.score),
        (sent.degraded, recorded.degraded),
        (sent.reasons, recorded.reasons),
    ):
        same &= told == kept
    anew = (receipts > 1) & (sent.attempts > 1) & recorded.without_redis
    # What was never sent can't be decided.
    invented = list(recorded.strangers) + numbers(~sent.due & (receipts > 0))
    put, quarantined = Counter(poison.put), Counter(poison.quarantined)
    return History(
        accepted=int(accepted.sum()),
        decided=int((receipts > 0).sum()),
        unanswered_decided=int((sent.due & ~accepted & (receipts > 0)).sum()),
        decided_anew=int(anew.sum()),
        wrong={
            "lost": numbers(accepted & (receipts == 0)),
            "duplicated": numbers((receipts > 1) & ~anew),
            "invented": invented,
            "changed": numbers(answered & (receipts > 0) & ~same & ~anew),
            "mixed_up": numbers(sent.status == MIXED_UP),
            "not_published": numbers(accepted & (transactions == 0)),
            "published_twice": numbers((transactions > 1) & ~anew),
            "poison_lost": places(put.keys() - quarantined.keys()),
            "poison_twice": places({place for place, n in quarantined.items() if n > 1}),
            "quarantined_unasked": places(quarantined.keys() - put.keys()),
        },
    )


def numbers(where: Mask) -> list[str]:
    return [str(i) for i in np.flatnonzero(where).tolist()]


def places(found: set[tuple[int, int]]) -> list[str]:
    return [f"{partition}:{offset}" for partition, offset in sorted(found)]
