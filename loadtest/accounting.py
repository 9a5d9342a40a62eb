"""What became of everything that was sent: each payment decided, quarantined, or missing; late or twice; right or wrong.

An independent read_committed consumer follows `decisions` and `transactions.quarantine` from where they ended before the run, in
a thread beside the senders, and notes when each record became readable.
"""

from __future__ import annotations

import math
import threading
import time
from array import array
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from confluent_kafka import Consumer, KafkaException, Message, TopicPartition

from gateway.contracts.decision import Outcome
from gateway.contracts.registry import RegistryUnavailableError, SchemaRegistry
from gateway.contracts.topics import DECISIONS, QUARANTINE, TRANSACTIONS
from loadtest.encoding import Reader, UnreadableError
from loadtest.events import LoadError
from loadtest.latency import Latency, latency_of
from loadtest.ledger import DOORS, Ledger
from loadtest.quality import average_precision, precision_recall

OUTCOMES: tuple[str, ...] = tuple(o.value for o in Outcome)
NONE = -1
REACH_TIMEOUT_S = 10.0
POLL_MESSAGES_MAX = 500
POLL_S = 0.2
# Once everything is accounted for, reading goes on until this long nothing came, so that duplicates show.
QUIET_S = 1.5
# When nothing came for this long and payments are missing, they may have been decided before the run.
LOOK_BACK_AFTER_S = 5.0
LOOK_BACK_MAX_S = 60.0
IDS_SHOWN_MAX = 20


@dataclass(frozen=True)
class Quality:
    """Against the truth of the decided payments. `average_precision` covers the `scored` ones that a model rated."""

    frauds: int
    precision_flagged: float
    recall_flagged: float
    precision_declined: float
    recall_declined: float
    average_precision: float
    scored: int


@dataclass(frozen=True)
class Accounting:
    """`quarantined` counts payments without a decision; `unaccounted` has neither. Ids are in order of sending.

    `decided_before` counts payments that were decided by an earlier run within the idempotency window: the gateway takes them for
    retries, which get no second receipt.
    """

    events_in: int
    decided: int
    quarantined: int
    decided_before: int
    unaccounted: list[str]
    duplicates: list[str]
    outcomes: dict[str, int]
    degraded: dict[str, int]
    quarantine_reasons: dict[str, int]
    latency: dict[str, Latency]  # by door, until the decision could be read
    quality: Quality
    other_decisions: int
    waited_s: float

    @property
    def complete(self) -> bool:
        return not self.unaccounted and not self.duplicates


@dataclass
class _Seen:
    """By row of the ledger; grown as rows appear."""

    decisions: array[int] = field(default_factory=lambda: array("i"))
    outcome: array[int] = field(default_factory=lambda: array("b"))
    probability: array[float] = field(default_factory=lambda: array("d"))
    available_s: array[float] = field(default_factory=lambda: array("d"))
    quarantined: array[int] = field(default_factory=lambda: array("b"))

    def grow(self, rows: int) -> None:
        more = rows - len(self.decisions)
        if more > 0:
            self.decisions.extend([0] * more)
            self.outcome.extend([NONE] * more)
            self.probability.extend([math.nan] * more)
            self.available_s.extend([math.nan] * more)
            self.quarantined.extend([0] * more)


class Accountant:
    """`start` before the first payment, `finish` after the last. One run each."""

    def __init__(
        self,
        bootstrap: str,
        registry: SchemaRegistry,
        ledger: Ledger,
        *,
        idempotency_window_s: float,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._bootstrap = bootstrap
        self._window_s = idempotency_window_s
        self._starts: list[TopicPartition] = []
        self._before: set[int] = set()
        self._ledger = ledger
        self._clock = clock
        self._decisions = Reader(DECISIONS, registry, ("transaction_id", "decision", "probability", "degraded"))
        # Read by another thread than the others.
        self._decisions_before = Reader(DECISIONS, registry, ("transaction_id",))
        self._quarantine = Reader(QUARANTINE, registry, ("reason", "topic", "partition", "offset", "value"))
        self._transactions = Reader(TRANSACTIONS, registry, ("transaction_id",))
        self._seen = _Seen()
        self._accounted = 0
        self._degraded: Counter[str] = Counter()
        self._reasons: Counter[str] = Counter()
        # Quarantined messages whose position the sender's acknowledgement has not told yet.
        self._positions_unmatched: list[tuple[int, int]] = []
        self._other = 0
        self._last_record = time.monotonic()
        self._stopped = threading.Event()
        self._failure: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="accountant", daemon=True)
        self._consumer = Consumer(
            {
                "bootstrap.servers": bootstrap,
                "group.id": "fraudgate-accounting",
                "isolation.level": "read_committed",
                "enable.auto.commit": False,
                "fetch.wait.max.ms": 20,
                "log_level": 0,
            }
        )

    def start(self) -> None:
        """Note where both topics end and follow them from there. Raises `LoadError` when Kafka doesn't answer."""
        try:
            self._started_s = self._clock()
            for topic in (DECISIONS, QUARANTINE):
                partitions = self._consumer.list_topics(topic, timeout=REACH_TIMEOUT_S).topics[topic].partitions
                for p in partitions:
                    _, end = self._consumer.get_watermark_offsets(TopicPartition(topic, p), timeout=REACH_TIMEOUT_S)
                    self._starts.append(TopicPartition(topic, p, end))
            self._consumer.assign(self._starts)
        except KafkaException as exc:
            raise LoadError(f"the topics {DECISIONS} and {QUARANTINE} can't be read: {exc}") from exc
        self._thread.start()

    @property
    def accounted(self) -> int:
        """Payments decided or quarantined so far."""
        return self._accounted

    def finish(self, deadline_s: float, progress: Callable[[int], None] | None = None) -> Accounting:
        """Wait until every payment of the ledger is accounted for and QUIET_S brought nothing more, at most `deadline_s`.

        Raises `LoadError` when reading failed.
        """
        started = time.monotonic()
        reported = 0
        looked_back = False
        while (waited := time.monotonic() - started) < deadline_s and self._failure is None:
            if progress is not None:
                progress(self._accounted - reported)
                reported = self._accounted
            quiet_s = time.monotonic() - max(self._last_record, started)
            if self._accounted + len(self._before) >= len(self._ledger) and quiet_s >= QUIET_S:
                break
            if not looked_back and quiet_s >= LOOK_BACK_AFTER_S:
                looked_back = True
                self._look_back()
            self._stopped.wait(POLL_S)
        self._stopped.set()
        self._thread.join(REACH_TIMEOUT_S)
        self._consumer.close()
        if self._failure is not None:
            raise LoadError(f"the decisions can't be read: {self._failure}") from self._failure
        return self._result(waited)

    def _look_back(self) -> None:
        """Find payments that had been decided before the run, within the idempotency window. At most LOOK_BACK_MAX_S."""
        give_up = time.monotonic() + LOOK_BACK_MAX_S
        ends = {p.partition: p.offset for p in self._starts if p.topic == DECISIONS}
        since_ms = int((self._started_s - self._window_s) * 1000)
        consumer = Consumer(
            {
                "bootstrap.servers": self._bootstrap,
                "group.id": "fraudgate-accounting-before",
                "isolation.level": "read_committed",
                "enable.auto.commit": False,
                "enable.partition.eof": True,
                "log_level": 0,
            }
        )
        try:
            times = [TopicPartition(DECISIONS, p, since_ms) for p in ends]
            # An offset below 0 stands for the end: nothing is that young.
            found = consumer.offsets_for_times(times, timeout=REACH_TIMEOUT_S)
            starts = [p for p in found if 0 <= p.offset < ends[p.partition]]
            consumer.assign(starts)
            open_partitions = {p.partition for p in starts}
            while open_partitions and time.monotonic() < give_up:
                for message in consumer.consume(POLL_MESSAGES_MAX, POLL_S):
                    partition, offset = message.partition(), message.offset()
                    assert partition is not None
                    if message.error() is not None or offset is None or offset >= ends[partition]:
                        open_partitions.discard(partition)
                        continue
                    row = self._ledger.rows.get(self._decisions_before.read(message.value() or b"")["transaction_id"])
                    if row is not None and not self._row_seen(row):
                        self._before.add(row)
        except KafkaException as exc:
            raise LoadError(f"earlier decisions can't be read: {exc}") from exc
        finally:
            consumer.close()

    def _row_seen(self, row: int) -> bool:
        seen = self._seen
        return row < len(seen.quarantined) and (seen.decisions[row] > 0 or seen.quarantined[row] > 0)

    def _run(self) -> None:
        try:
            while not self._stopped.is_set():
                messages = self._consumer.consume(POLL_MESSAGES_MAX, POLL_S)
                now = self._clock()
                for message in messages:
                    self._take(message, now)
                self._match_positions()
        except (KafkaException, RegistryUnavailableError, UnreadableError) as exc:
            self._failure = exc

    def _take(self, message: Message, now: float) -> None:
        error = message.error()
        if error is not None:
            # librdkafka recovers by itself from all but these; a broker that is gone for a while is none of them.
            if error.fatal():
                raise KafkaException(error)
            return
        self._last_record = time.monotonic()
        value = message.value() or b""
        if message.topic() == DECISIONS:
            self._decision(self._decisions.read(value), now)
        else:
            self._quarantined(self._quarantine.read(value))

    def _decision(self, record: dict[str, Any], now: float) -> None:
        row = self._ledger.rows.get(record["transaction_id"])
        if row is None:
            self._other += 1
            return
        seen = self._seen
        seen.grow(row + 1)
        seen.decisions[row] += 1
        if seen.decisions[row] > 1:
            return
        if not seen.quarantined[row]:
            self._accounted += 1
        seen.outcome[row] = OUTCOMES.index(record["decision"])
        seen.available_s[row] = now
        if record["probability"] is not None:
            seen.probability[row] = record["probability"]
        self._degraded.update(record["degraded"])

    def _quarantined(self, record: dict[str, Any]) -> None:
        self._reasons[record["reason"]] += 1
        try:
            row = self._ledger.rows.get(self._transactions.read(record["value"]).get("transaction_id", ""))
        except (UnreadableError, TypeError):
            row = None
        if row is not None:
            self._put_aside(row)
        elif record["topic"] == TRANSACTIONS:
            self._positions_unmatched.append((record["partition"], record["offset"]))

    def _match_positions(self) -> None:
        for position in list(self._positions_unmatched):
            row = self._ledger.positions.get(position)
            if row is not None:
                self._positions_unmatched.remove(position)
                self._put_aside(row)

    def _put_aside(self, row: int) -> None:
        self._seen.grow(row + 1)
        if not self._seen.quarantined[row]:
            self._seen.quarantined[row] = 1
            if not self._seen.decisions[row]:
                self._accounted += 1

    def _result(self, waited_s: float) -> Accounting:
        ledger, seen, n = self._ledger, self._seen, len(self._ledger)
        seen.grow(n)
        decisions = np.array(seen.decisions[:n], np.int64)
        quarantined = np.array(seen.quarantined[:n], np.int64) > 0
        outcome = np.array(seen.outcome[:n], np.int64)
        is_fraud = np.array(ledger.is_fraud[:n], np.int64) > 0
        probability = np.array(seen.probability[:n], np.float64)
        door = np.array(ledger.door[:n], np.int64)
        seconds = np.array(seen.available_s[:n], np.float64) - np.array(ledger.intended_s[:n], np.float64)
        decided = decisions > 0
        flagged = precision_recall(outcome[decided] != OUTCOMES.index(Outcome.APPROVE), is_fraud[decided])
        declined = precision_recall(outcome[decided] == OUTCOMES.index(Outcome.DECLINE), is_fraud[decided])
        scored = ~np.isnan(probability)
        before = np.zeros(n, bool)
        before[list(self._before)] = True
        before &= ~decided & ~quarantined
        return Accounting(
            events_in=n,
            decided=int(decided.sum()),
            quarantined=int((quarantined & ~decided).sum()),
            decided_before=int(before.sum()),
            unaccounted=[ledger.ids[i] for i in np.flatnonzero(~decided & ~quarantined & ~before).tolist()],
            duplicates=[ledger.ids[i] for i in np.flatnonzero(decisions > 1).tolist()],
            outcomes={o: int((outcome == i).sum()) for i, o in enumerate(OUTCOMES)},
            degraded=dict(self._degraded),
            quarantine_reasons=dict(self._reasons),
            latency={d: latency_of(seconds[decided & (door == i)].tolist()) for i, d in enumerate(DOORS) if (door == i).any()},
            quality=Quality(
                frauds=int(is_fraud[decided].sum()),
                precision_flagged=flagged[0],
                recall_flagged=flagged[1],
                precision_declined=declined[0],
                recall_declined=declined[1],
                average_precision=average_precision(probability[scored], is_fraud[scored]),
                scored=int(scored.sum()),
            ),
            other_decisions=self._other,
            waited_s=waited_s,
        )


def _ids(ids: list[str]) -> str:
    if not ids:
        return "0"
    more = f" and {len(ids) - IDS_SHOWN_MAX} more" if len(ids) > IDS_SHOWN_MAX else ""
    return f"{len(ids)}: {', '.join(ids[:IDS_SHOWN_MAX])}{more}"


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.4f}"


def table(a: Accounting) -> str:
    """The accounting as lines of text for people."""
    q = a.quality
    lines = [
        ("events in", f"{a.events_in}"),
        ("decided", f"{a.decided}"),
        ("quarantined", f"{a.quarantined}"),
        *([("retries of payments decided before", f"{a.decided_before}")] if a.decided_before else []),
        ("unaccounted", _ids(a.unaccounted)),
        ("duplicates", _ids(a.duplicates)),
    ]
    lines += [(f"decision {name}", f"{count}") for name, count in a.outcomes.items()]
    lines += [(f"degraded {name}", f"{count}") for name, count in sorted(a.degraded.items())]
    lines += [(f"quarantine {name}", f"{count}") for name, count in sorted(a.quarantine_reasons.items())]
    for door, latency in a.latency.items():
        lines.append((f"{door} to receipt p50 / p99 / p99.9 / max, ms", quantiles(latency)))
    lines += [
        ("frauds among the decided", f"{q.frauds}"),
        ("precision / recall, all but approve", f"{_number(q.precision_flagged)} / {_number(q.recall_flagged)}"),
        ("precision / recall, decline", f"{_number(q.precision_declined)} / {_number(q.recall_declined)}"),
        ("average precision", f"{_number(q.average_precision)} over {q.scored} scored by a model"),
    ]
    width = max(len(name) for name, _ in lines)
    return "\n".join(f"{name:<{width}}  {text}" for name, text in lines)


def quantiles(latency: Latency) -> str:
    """p50 / p99 / p99.9 / max in milliseconds."""
    values = (latency.p50_ms, latency.p99_ms, latency.p999_ms, latency.max_ms)
    return "-" if math.isnan(latency.p50_ms) else " / ".join(f"{v:.1f}" for v in values)
