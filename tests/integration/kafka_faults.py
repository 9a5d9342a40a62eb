"""A steady flow of transactions through the Kafka door while something is done to it, and a reader that counts each one's receipts."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

from confluent_kafka import KafkaError, Message, Producer

from deploy.ports import free_ports
from gateway.contracts.settings import Settings
from gateway.contracts.topics import DECISIONS, LIBRDKAFKA_PARTITIONER, TRANSACTIONS
from gateway.contracts.transaction import encode_json
from tests.helpers import RunningCommand, running_command
from tests.integration.gateway_helpers import Tail, make_transaction, name, ready_without

READY_WITHIN_S = 60
CARDS = 211
FRAME_BYTES = 5
LOG_LINES = 80


class Receipts(Tail):
    """How often each transaction_id stands on `decisions`, for a reader of committed records."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings, DECISIONS)
        self.counts: Counter[str] = Counter()
        self._counted = 0

    def count(self) -> Counter[str]:
        for m in self.messages[self._counted :]:
            payload = (m.value() or b"")[FRAME_BYTES:]
            # The first field of a receipt is its transaction_id: a length (zigzag, below 64) and the text.
            self.counts[payload[1 : 1 + payload[0] // 2].decode()] += 1
        self._counted = len(self.messages)
        return self.counts

    def wait_decided(self, ids: set[str], within_s: float) -> float:
        """Read until all of `ids` are decided, others may come all the time. How long it took, in seconds."""
        began_s = time.monotonic()
        while self.decided(ids) < len(ids):
            assert time.monotonic() < began_s + within_s, f"{len(ids) - self.decided(ids)} not within {within_s:.0f} s"
            self.read_for(0.3)
        return time.monotonic() - began_s

    def read_for(self, seconds: float) -> None:
        until_s = time.monotonic() + seconds
        while time.monotonic() < until_s:
            self._read(0.1)

    def decided(self, ids: set[str]) -> int:
        return len(ids & self.count().keys())


class Flow:
    """Sends `rate` transactions a second of CARDS cards until it is ended."""

    def __init__(self, settings: Settings, rate: int) -> None:
        self.sent: list[str] = []
        self.delivered: set[str] = set()
        self.errors: list[str] = []
        self._rate = rate
        self._prefix = name("flow")
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(settings,))
        self._thread.start()

    def _run(self, settings: Settings) -> None:
        producer = Producer(
            {
                "bootstrap.servers": settings.bootstrap,
                "partitioner": LIBRDKAFKA_PARTITIONER,
                "enable.idempotence": True,
                "linger.ms": 5,
                "log_level": 0,
                "error_cb": lambda error: self.errors.append(str(error)),
            }
        )
        began_s = time.monotonic()
        while not self._ended.wait(0.02):
            while len(self.sent) < (time.monotonic() - began_s) * self._rate:
                i = len(self.sent)
                t = make_transaction(f"{self._prefix}-{i}", card_id=f"card-{self._prefix}-{i % CARDS}")
                producer.produce(TRANSACTIONS, encode_json(t), t.card_id, on_delivery=partial(self._told, t.transaction_id))
                self.sent.append(t.transaction_id)
            producer.poll(0)
        self._left = producer.flush(60)

    def _told(self, transaction_id: str, error: KafkaError | None, _: Message) -> None:
        if error is None:
            self.delivered.add(transaction_id)
        else:
            self.errors.append(str(error))

    def state(self) -> str:
        """What the broker has acknowledged, for whoever asks where a payment went."""
        return f"{len(self.sent)} sent, {len(self.delivered)} acknowledged, errors: {self.errors[-5:]}"

    def end(self) -> set[str]:
        """Every transaction that was sent, once the broker has them all."""
        self._ended.set()
        self._thread.join()
        assert self._left == 0
        return set(self.sent)


@contextmanager
def gateways(settings: Settings, folder: Path, count: int) -> Iterator[list[tuple[RunningCommand, Settings]]]:
    """`count` gateways of one group, all ready. Nothing waits long for Redis or Kafka in them."""
    with ExitStack() as running:
        found = []
        for i, port in enumerate(free_ports(count)):
            own = dataclasses.replace(
                settings, gateway_port=port, instance_id=f"{folder.name}-{i}", feature_budget_ms=1000, decision_budget_ms=3000
            )
            found.append((running.enter_context(running_command(own, "serve", log_path=folder / f"gateway-{i}.log")), own))
        for command, own in found:
            command.wait_until(lambda own=own: ready_without(own, "redis", "kafka"), READY_WITHIN_S, "the gateway is ready")  # type: ignore[misc]
        try:
            yield found
        except BaseException:
            # What the gateways had to say is the first question of whoever sees the test fail.
            for i in range(count):
                lines = (folder / f"gateway-{i}.log").read_text(errors="replace").splitlines()[-LOG_LINES:]
                print(f"\nthe end of the log of gateway {i}:", *lines, sep="\n  ", flush=True)
            raise


def assert_each_decided_once(tail: Receipts, sent: set[str], what: str, within_s: float = 120) -> None:
    """And say so in figures."""
    try:
        tail.read_until(lambda: tail.decided(sent) == len(sent), within_s)
    finally:
        print(f"\n{tail.decided(sent)} of {len(sent)} were decided", flush=True)
    twice = {i for i in sent if tail.counts[i] > 1}
    print(f"\n{what}: {len(sent)} transactions, {len(twice)} decided twice, {len(sent - tail.counts.keys())} lost", flush=True)
    assert twice == set()
