"""`python -m loadtest.openloop.kafka_out`: reads `decisions`, committed records only, and says how long each payment took to get there.

Knows of the producer only the beginning of its transaction ids, its rate and when it began. Of a receipt it reads the transaction id,
which comes first. Counts every decision: one that comes twice, or never, is told. Costs about 4 us of CPU a decision. A record counts
as read when the call that fetched it returns, up to POLL_S after it came.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from dataclasses import asdict
from typing import Any

import msgspec
import numpy as np
from confluent_kafka import Consumer, KafkaException, TopicPartition

from gateway.contracts.settings import load_settings
from gateway.contracts.topics import DECISIONS
from gateway.contracts.wire import HEADER
from loadtest.openloop.report import cpu_s, tell
from loadtest.openloop.schedule import Record, Schedule, Windows

POLL_S = 0.001
BATCH_MAX = 2000
REACH_TIMEOUT_S = 10.0
# Of a backlog: this share of it is not timed at its beginning, while the gateway joins its group and warms up, nor at its end.
LEAD_SHARE, TRAIL_SHARE = 0.25, 0.05


def number_of(value: bytes, prefix: bytes) -> int:
    """The number in a receipt's transaction id, -1 for another run's. `prefix` is RUN-."""
    at = HEADER.size
    size = value[at] >> 1
    if value[at] & 0x81:
        # Ids have at most 64 characters; a longer length, or a negative one, is no receipt of ours.
        size = (value[at] & 0x7F | value[at + 1] << 7) >> 1
        at += 1
    text = value[at + 1 : at + 1 + size]
    return int(text[len(prefix) :]) if text.startswith(prefix) else -1


def follow(bootstrap: str) -> Consumer:
    """A consumer of all partitions of `decisions` from where they end now."""
    consumer = Consumer(
        {
            "bootstrap.servers": bootstrap,
            "group.id": f"bench-{time.time_ns()}",
            "isolation.level": "read_committed",
            "enable.auto.commit": False,
            "log_level": 0,
        }
    )
    partitions = consumer.list_topics(DECISIONS, timeout=REACH_TIMEOUT_S).topics[DECISIONS].partitions
    ends = []
    for p in partitions:
        end = consumer.get_watermark_offsets(TopicPartition(DECISIONS, p), timeout=REACH_TIMEOUT_S)[1]
        ends.append(TopicPartition(DECISIONS, p, end))
    consumer.assign(ends)
    return consumer


class Reader:
    """Counts decisions by number; when there is a schedule, also how long each took. `read` is one call for what is there."""

    def __init__(self, consumer: Consumer, run: str, count: int) -> None:
        self._consumer = consumer
        self._prefix = f"{run}-".encode()
        self._times = bytearray(count)
        self.record = Record(count)
        self.decided = self.duplicates = self.foreign = 0
        self.failure: str | None = None

    def read(self, schedule: Schedule | None) -> None:
        messages = self._consumer.consume(BATCH_MAX, POLL_S)
        now = time.monotonic()
        times, latency, prefix = self._times, self.record.latency_s, self._prefix
        for message in messages:
            value = message.value()
            if message.error() is not None or value is None:
                self.failure = str(message.error())
                continue
            i = number_of(value, prefix)
            if i < 0:
                self.foreign += 1
            elif times[i]:
                self.duplicates += 1
            else:
                times[i] = 1
                self.decided += 1
                if schedule is not None:
                    latency[i] = now - schedule.due_s(i)


def drain(reader: Reader, count: int, within_s: float) -> dict[str, Any]:
    """A backlog: tells an edge when it begins to count and when it ends to."""
    first, last = int(count * LEAD_SHARE), int(count * (1 - TRAIL_SHARE))
    give_up = time.monotonic() + within_s
    begun: tuple[float, int] | None = None
    used: list[float] = []
    while reader.decided < last and time.monotonic() < give_up:
        reader.read(None)
        if begun is None and reader.decided >= first:
            used.append(cpu_s())
            begun = time.monotonic(), reader.decided
            tell(edge=0, done=reader.decided)
    seconds = 0.0 if begun is None else time.monotonic() - begun[0]
    timed = 0 if begun is None else reader.decided - begun[1]
    if begun is not None:
        used.append(cpu_s())
        tell(edge=1, done=reader.decided)
    # The rest, so that the next run begins with none of it.
    while reader.decided < count and time.monotonic() < give_up:
        reader.read(None)
    return {"timed": timed, "seconds": seconds, "cpu_s": np.diff(used).tolist(), "complete": reader.decided == count}


def on_schedule(reader: Reader, schedule: Schedule, windows: Windows, drain_s: float) -> dict[str, Any]:
    """Until every decision is there, or `drain_s` after the last payment was due."""
    edges_s = [schedule.start_s + s for s in windows.edges_s()]
    stop_s = edges_s[-1] + drain_s
    used: list[float] = []
    decided: list[int] = []
    while (now := time.monotonic()) < stop_s and (reader.decided < schedule.count or len(used) < len(edges_s)):
        while len(used) < len(edges_s) and now >= edges_s[len(used)]:
            used.append(cpu_s())
            decided.append(reader.decided)
            tell(edge=len(used) - 1, done=reader.decided)
        reader.read(schedule)
    end_s = time.monotonic()
    found = [reader.record.window(k, windows, schedule, end_s) for k in range(windows.count)]
    return {
        "windows": [asdict(w) | {"reached_rate": w.reached_rate} for w in found],
        "cpu_s": np.diff(used).tolist(),
        "decided_by_window": np.diff(decided).tolist(),
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m loadtest.openloop.kafka_out", description=__doc__)
    parser.add_argument("--run", required=True, help="beginning of the transaction ids")
    parser.add_argument("--rate", type=float, metavar="N", help="the producer's rate (default: a backlog)")
    parser.add_argument("--count", type=int, required=True, metavar="N", help="payments that were or will be sent")
    parser.add_argument("--warm-up", type=float, default=3.0, metavar="S", help="the producer's")
    parser.add_argument("--seconds", type=float, default=5.0, metavar="S", help="of a window")
    parser.add_argument("--windows", type=int, default=3, metavar="N", help="the producer's")
    parser.add_argument("--within-s", type=float, default=60.0, metavar="S", help="the longest wait (default %(default)s)")
    options = parser.parse_args(argv)
    try:
        consumer = follow(load_settings().bootstrap)
    except KafkaException as exc:
        print(f"load: Kafka can't be read: {exc}", file=sys.stderr)
        return 1
    reader = Reader(consumer, options.run, options.count)
    gc.collect()
    gc.disable()
    # Fetching begins with the first call.
    consumer.consume(1, 0.5)
    tell(ready=True)
    if options.rate:
        # Whoever started us passes on when the producer began.
        start_s = float(msgspec.json.decode(sys.stdin.buffer.readline())["start_s"])
        schedule = Schedule(options.rate, start_s, options.count)
        found = on_schedule(reader, schedule, Windows(options.warm_up, options.seconds, options.windows), options.within_s)
    else:
        found = drain(reader, options.count, options.within_s)
    found |= {
        "decided": reader.decided,
        "missing": options.count - reader.decided,
        "duplicates": reader.duplicates,
        "failure": reader.failure,
    }
    tell(result=found)
    consumer.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
