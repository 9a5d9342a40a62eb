"""What the topics hold after a soak, read as any consumer would: committed records only, from the beginning, by clients of its own.

Called by `deploy.soak.run` once the load is over, so that reading takes nothing from what is measured. About 20 us a receipt, and memory
for numbers alone.
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
from confluent_kafka import OFFSET_BEGINNING, Consumer, KafkaError, KafkaException, Message, TopicPartition

from deploy.soak.history import Ints, Mask, Recorded
from gateway.contracts.reasons import Degraded
from gateway.contracts.registry import SchemaRegistry
from gateway.contracts.settings import Settings
from gateway.contracts.topics import DECISIONS, QUARANTINE, TRANSACTIONS
from gateway.contracts.wire import is_framed
from loadtest.encoding import Reader, UnreadableError
from loadtest.openloop.outcomes import UNKNOWN, degraded_bits, outcome_number, reasons_hash

POLL_MESSAGES_MAX = 10_000
POLL_S = 0.5
REACH_TIMEOUT_S = 30.0
FRAME_BYTES = 5
STRANGERS_MAX = 1000
READ_A_SECOND_LEAST = 4000
WITHOUT_REDIS = frozenset({Degraded.REQUEST_ONLY.value, Degraded.STATIC_POLICY.value})
# Errors that a client passes on while the broker is away for a moment.
_PASSING = (KafkaError._TRANSPORT, KafkaError._ALL_BROKERS_DOWN, KafkaError._RESOLVE, KafkaError._TIMED_OUT)


class TopicError(RuntimeError):
    """The topics can't be read. The message says why."""


def follow(settings: Settings, topic: str, take: Callable[[Message], None], done: Callable[[], bool], within_s: float) -> bool:
    """Give every committed record of `topic` to `take`, until all are read and `done` holds. False: not within `within_s`.

    Raises `TopicError`.
    """
    consumer = Consumer(
        {
            "bootstrap.servers": settings.bootstrap,
            "group.id": "fraudgate-soak",
            "isolation.level": "read_committed",
            "enable.auto.commit": False,
            "enable.partition.eof": True,
            "queued.max.messages.kbytes": 65_536,
            "log_level": 0,
        }
    )
    give_up_s = time.monotonic() + within_s
    try:
        partitions = consumer.list_topics(topic, timeout=REACH_TIMEOUT_S).topics[topic].partitions
        consumer.assign([TopicPartition(topic, p, OFFSET_BEGINNING) for p in partitions])
        ended: set[int] = set()
        while time.monotonic() < give_up_s:
            for message in consumer.consume(POLL_MESSAGES_MAX, POLL_S):
                error, partition = message.error(), message.partition()
                assert partition is not None
                if error is None:
                    ended.discard(partition)
                    take(message)
                elif error.code() == KafkaError._PARTITION_EOF:
                    ended.add(partition)
                elif error.code() not in _PASSING and not error.retriable():
                    raise TopicError(f"{topic} can't be read: {error}")
            if len(ended) == len(partitions) and done():
                return True
    except KafkaException as exc:
        raise TopicError(f"{topic} can't be read: {exc}") from exc
    finally:
        consumer.close()
    return False


class Receipts:
    """The receipts of run `run`'s `count` payments, by number."""

    def __init__(self, registry: SchemaRegistry, run: str, count: int) -> None:
        self._reader = Reader(DECISIONS, registry, ("transaction_id", "decision", "risk_score", "reasons", "degraded"))
        self._prefix, self._count = f"{run}-", count
        self.receipts = array("i", [0]) * count
        self.outcome = array("b", [UNKNOWN]) * count
        self.score = array("h", [UNKNOWN]) * count
        self.degraded = array("B", [0]) * count
        self.reasons = array("I", [0]) * count
        self.without_redis = array("B", [0]) * count
        self.strangers: list[str] = []

    def take(self, message: Message) -> None:
        try:
            record = self._reader.read(message.value() or b"")
        except UnreadableError as exc:
            self._stranger(f"unreadable ({exc}) at {message.partition()}:{message.offset()}")
            return
        i = number_of(record["transaction_id"], self._prefix, self._count)
        if i is None:
            self._stranger(record["transaction_id"])
            return
        self.receipts[i] += 1
        if WITHOUT_REDIS.intersection(record["degraded"]):
            self.without_redis[i] = 1
        if self.receipts[i] > 1:
            return
        self.outcome[i], self.score[i] = outcome_number(record["decision"]), record["risk_score"]
        if record["degraded"]:
            self.degraded[i] = degraded_bits(record["degraded"])
        if record["reasons"]:
            self.reasons[i] = reasons_hash(record["reasons"])

    def _stranger(self, name: str) -> None:
        if len(self.strangers) < STRANGERS_MAX:
            self.strangers.append(name)


class Transactions:
    """How often each payment stands on the topic of transactions."""

    def __init__(self, run: str, count: int) -> None:
        self._prefix, self._count = f"{run}-", count
        self.counts = array("i", [0]) * count

    def take(self, message: Message) -> None:
        i = number_of(id_of(message.value() or b""), self._prefix, self._count)
        if i is not None:
            self.counts[i] += 1


def id_of(value: bytes) -> str:
    """The transaction_id, which stands first in both forms: Avro in wire format, and our own JSON. "" when it isn't there."""
    if not is_framed(value):
        found = value[19:].partition(b'"')[0] if value.startswith(b'{"transaction_id":"') else b""
    else:
        # A length (zigzag, one byte below 64) and the text.
        payload = value[FRAME_BYTES:]
        found = payload[1 : 1 + payload[0] // 2] if payload and payload[0] < 128 else b""
    return found.decode(errors="replace")


def number_of(transaction_id: str, prefix: str, count: int) -> int | None:
    """The payment's number, None for what isn't of this run."""
    tail = transaction_id.removeprefix(prefix)
    if len(tail) == len(transaction_id) or not tail.isdecimal() or int(tail) >= count:
        return None
    return int(tail)


def read_recorded(settings: Settings, run: str, accepted: Mask, within_s: float) -> Recorded:
    """Read both topics to their ends, and on until every accepted payment is there or time is over: what is missing then is lost.

    `within_s` is for what may still be on its way; reading itself gets as long as it needs at READ_A_SECOND_LEAST.
    """
    count = len(accepted)
    within_s += count / READ_A_SECOND_LEAST
    receipts = Receipts(SchemaRegistry(settings.registry, settings.schemas_path), run, count)
    transactions = Transactions(run, count)
    wanted = np.flatnonzero(accepted)

    def all_in(held: array[int]) -> Callable[[], bool]:
        return lambda: bool((np.frombuffer(held, np.int32)[wanted] > 0).all())

    follow(settings, DECISIONS, receipts.take, all_in(receipts.receipts), within_s)
    follow(settings, TRANSACTIONS, transactions.take, all_in(transactions.counts), within_s)
    return Recorded(
        receipts=ints(receipts.receipts),
        transactions=ints(transactions.counts),
        outcome=ints(receipts.outcome),
        score=ints(receipts.score),
        degraded=ints(receipts.degraded),
        reasons=ints(receipts.reasons),
        without_redis=ints(receipts.without_redis) > 0,
        strangers=receipts.strangers,
    )


def read_quarantine(settings: Settings, wanted: set[tuple[int, int]], within_s: float) -> list[tuple[int, int]]:
    """Where each record of the quarantine came from, once `wanted` are there or time is over."""
    reader = Reader(QUARANTINE, SchemaRegistry(settings.registry, settings.schemas_path), ("partition", "offset"))
    found: list[tuple[int, int]] = []

    def take(message: Message) -> None:
        record = reader.read(message.value() or b"")
        found.append((record["partition"], record["offset"]))

    follow(settings, QUARANTINE, take, lambda: wanted <= set(found), within_s)
    return found


def ints(held: array[int]) -> Ints:
    out: npt.NDArray[np.int64] = np.array(held).astype(np.int64)
    return out
