"""`python -m loadtest.openloop.kafka_in`: payments to the transactions topic at a constant rate, or all at once as a backlog.

Messages are made beforehand; one wake-up a millisecond hands librdkafka what is due. Costs 8 to 21 us of CPU a payment at 10,000 a
second beside a warm broker, librdkafka's threads in it. When the schedule began (on the machine's monotonic clock) is told to the
reader at the other end, `kafka_out`, which works out from a decision's transaction id when its payment was due.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from array import array

import numpy as np
from confluent_kafka import KafkaError, Message, Producer

from gateway.contracts.registry import SchemaRegistry
from gateway.contracts.settings import load_settings
from gateway.contracts.topics import LIBRDKAFKA_PARTITIONER, SCORED_HEADER, SCORED_NEVER, TRANSACTIONS
from loadtest.encoding import avro_encoder
from loadtest.openloop.payments import People, payments
from loadtest.openloop.report import cpu_s, tell
from loadtest.openloop.schedule import Schedule, Windows

TICK_S = 0.001
# librdkafka's default. At 1 ms the producer alone took 52 us of CPU a payment at 10,000 a second, and the broker as much.
LINGER_MS = 5
FLUSH_TIMEOUT_S = 30.0
FULL_TIMEOUT_S = 30.0
BUFFERED_MESSAGES_MAX = 1_000_000


class Sender:
    """Hands messages to librdkafka when they are due. `failed` counts those that Kafka didn't take."""

    def __init__(self, bootstrap: str, messages: list[tuple[str, bytes]], *, history: bool = False) -> None:
        self._messages = messages
        self._headers = [(SCORED_HEADER, SCORED_NEVER)] if history else None
        self.failed = 0
        self.behind_s = array("d")
        self._producer = Producer(
            {
                "bootstrap.servers": bootstrap,
                "partitioner": LIBRDKAFKA_PARTITIONER,
                "enable.idempotence": True,
                "acks": "all",
                "linger.ms": LINGER_MS,
                "queue.buffering.max.messages": BUFFERED_MESSAGES_MAX,
                "delivery.report.only.error": True,
                "log_level": 0,
            }
        )

    def _note(self, error: KafkaError | None, _: Message) -> None:
        if error is not None:
            self.failed += 1

    def _produce(self, i: int) -> None:
        key, value = self._messages[i]
        give_up = None
        while True:
            try:
                if self._headers is None:
                    self._producer.produce(TRANSACTIONS, value, key, on_delivery=self._note)
                else:
                    self._producer.produce(TRANSACTIONS, value, key, on_delivery=self._note, headers=self._headers)
            except BufferError:
                give_up = give_up or time.monotonic() + FULL_TIMEOUT_S
                if time.monotonic() > give_up:
                    raise
                self._producer.poll(0.1)
            else:
                return

    def at_once(self) -> None:
        for i in range(len(self._messages)):
            self._produce(i)
            if i % 1000 == 0:
                self._producer.poll(0)
        self.flush()

    def on_schedule(self, schedule: Schedule, windows: Windows, edges: list[float]) -> None:
        """Returns when the last is sent. Appends to `edges` the CPU used at each edge of a window."""
        edges_s = [schedule.start_s + s for s in windows.edges_s()]
        sent = 0
        time.sleep(max(0.0, schedule.start_s - time.monotonic()))
        while True:
            now = time.monotonic()
            while len(edges) < len(edges_s) and now >= edges_s[len(edges)]:
                edges.append(cpu_s())
                tell(edge=len(edges) - 1, done=sent)
            if sent == schedule.count and len(edges) == len(edges_s):
                return
            due = schedule.due_by(now)
            while sent < due:
                self._produce(sent)
                self.behind_s.append(now - schedule.due_s(sent))
                sent += 1
            self._producer.poll(0)
            rest = now + TICK_S - time.monotonic()
            if rest > 0:
                time.sleep(rest)

    def flush(self) -> None:
        self.failed += self._producer.flush(FLUSH_TIMEOUT_S)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m loadtest.openloop.kafka_in", description=__doc__)
    parser.add_argument("--rate", type=float, metavar="N", help="payments a second (default: a backlog, all at once)")
    parser.add_argument("--count", type=int, default=100_000, metavar="N", help="of a backlog (default %(default)s)")
    parser.add_argument("--history", action="store_true", help="mark a backlog as history, which is never decided")
    parser.add_argument("--warm-up", type=float, default=3.0, metavar="S", help="seconds that don't count (default %(default)s)")
    parser.add_argument("--seconds", type=float, default=5.0, metavar="S", help="of a window (default %(default)s)")
    parser.add_argument("--windows", type=int, default=3, metavar="N", help="default %(default)s")
    parser.add_argument("--run", required=True, help="beginning of the transaction ids")
    parser.add_argument("--cards", type=int, default=People.cards, metavar="N", help="default %(default)s")
    parser.add_argument("--merchants", type=int, default=People.merchants, metavar="N", help="default %(default)s")
    parser.add_argument("--seed", type=int, default=7, help="of the payments (default %(default)s)")
    options = parser.parse_args(argv)
    settings = load_settings()
    windows = Windows(options.warm_up, options.seconds, options.windows)
    count = int(windows.total_s * options.rate) if options.rate else options.count
    if not 1 <= count <= 5_000_000:
        parser.error("1 to 5,000,000 payments can be made")
    encode = avro_encoder(TRANSACTIONS, SchemaRegistry(settings.registry, settings.schemas_path))
    begin_in_s = 2.0 + count * 3e-5
    first_ms = time.time_ns() // 1_000_000 + int(begin_in_s * 1000)
    start_s = time.monotonic() + begin_in_s
    made = payments(People(options.cards, options.merchants), options.run, count, first_ms, options.rate or 20_000.0, options.seed)
    sender = Sender(settings.bootstrap, [(t.card_id, encode(t)) for t in made], history=options.history)
    gc.collect()
    gc.disable()
    if not options.rate:
        sender.at_once()
        tell(result={"sent": count, "failed": sender.failed})
        return 0
    start_s = max(start_s, time.monotonic() + 0.1)
    tell(start_s=start_s)
    used: list[float] = []
    sender.on_schedule(Schedule(options.rate, start_s, count), windows, used)
    sender.flush()
    behind = np.quantile(np.array(sender.behind_s), [0.99, 1.0]) * 1000
    tell(
        result={
            "sent": count,
            "failed": sender.failed,
            "cpu_s": np.diff(used).tolist(),
            "behind_p99_ms": float(behind[0]),
            "behind_max_ms": float(behind[1]),
        }
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
