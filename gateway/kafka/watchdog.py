"""Notices a Kafka door that no longer makes progress although there is something to consume, whatever its own client believes.

It asks the broker itself, with a client of its own, in a thread of its own: the offsets the group has committed, the ends of the
partitions, and, before it acts, whether there is really a message to read. First it has the session restarted; when the same offset
still stands after as long again, the process ends with `EXIT_STUCK`, for its supervisor to start another. A broker that can't be asked
proves nothing.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Collection, Mapping
from typing import Protocol

from confluent_kafka import OFFSET_BEGINNING, Consumer, KafkaException, TopicPartition

from gateway.contracts.topics import TRANSACTIONS

log = logging.getLogger(__name__)

# sysexits.h calls it EX_SOFTWARE.
EXIT_STUCK = 70
# How long the process has to finish what is under way before it ends at once.
LEAVE_S = 20.0
ASK_TIMEOUT_S = 5.0
# Questions within the time that a partition may stand still.
LOOKS = 5


class Probe(Protocol):
    def behind(self) -> dict[int, int]:
        """The committed offset (-1: none) of each partition that has more. Raises KafkaException."""

    def readable(self, partition: int, offset: int) -> bool:
        """True when a consumer that starts at `offset` gets a message. Raises KafkaException."""


class GroupProbe:
    """Asks the broker without joining the group."""

    def __init__(self, bootstrap: str, group: str) -> None:
        self._consumer = Consumer(
            {
                "bootstrap.servers": bootstrap,
                "group.id": group,
                "isolation.level": "read_committed",
                "enable.auto.commit": False,
                "auto.offset.reset": "earliest",
                "log_level": 2,
                "error_cb": lambda _: None,
            }
        )

    def behind(self) -> dict[int, int]:
        partitions = self._consumer.list_topics(TRANSACTIONS, timeout=ASK_TIMEOUT_S).topics[TRANSACTIONS].partitions
        asked = [TopicPartition(TRANSACTIONS, p) for p in partitions]
        found = {}
        for at in self._consumer.committed(asked, timeout=ASK_TIMEOUT_S):
            start, end = self._consumer.get_watermark_offsets(TopicPartition(TRANSACTIONS, at.partition), timeout=ASK_TIMEOUT_S)
            if end > max(at.offset, start):
                found[at.partition] = max(at.offset, -1)
        return found

    def readable(self, partition: int, offset: int) -> bool:
        # The rest of a partition may be the markers of its producers' transactions, which nobody can consume.
        self._consumer.assign([TopicPartition(TRANSACTIONS, partition, offset if offset >= 0 else OFFSET_BEGINNING)])
        try:
            message = self._consumer.poll(ASK_TIMEOUT_S)
            return message is not None and message.error() is None
        finally:
            self._consumer.unassign()

    def close(self) -> None:
        self._consumer.close()


class Standstill:
    """Which partitions have stood at one offset for `limit_s` seconds, and for how many times that long."""

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        # By partition: its offset, since when it counts, and how often it was told.
        self._seen: dict[int, tuple[int, float, int]] = {}

    def look(self, now_s: float, behind: Mapping[int, int], ours: Collection[int]) -> dict[int, int]:
        """Times told, this one included, by partition. The time to the next telling begins anew."""
        seen, told = {}, {}
        for partition, offset in behind.items():
            if partition not in ours:
                continue
            before, since_s, times = self._seen.get(partition, (offset, now_s, 0))
            if before != offset:
                since_s, times = now_s, 0
            if now_s - since_s >= self._limit_s:
                since_s, times = now_s, times + 1
                told[partition] = times
            seen[partition] = (offset, since_s, times)
        self._seen = seen
        return told


class Watchdog:
    """`ours` says which partitions this gateway is to move, None when it is in no group. `note` is told how long one has stood still,
    seconds. All callbacks come from its thread.
    """

    def __init__(
        self,
        probe: Probe,
        limit_s: float,
        *,
        ours: Callable[[], Collection[int] | None],
        restart: Callable[[], None],
        leave: Callable[[], None],
        note: Callable[[float], None] = lambda _: None,
        clock_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._probe = probe
        self._limit_s = limit_s
        self._standstill = Standstill(limit_s)
        self._ours = ours
        self._restart = restart
        self._leave = leave
        self._note = note
        # Where a readable partition stands still, and since when.
        self._stuck: dict[int, tuple[int, float]] = {}
        self._clock_s = clock_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="kafka-watchdog", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """It ends by itself soon; nobody waits for the question it may be at."""
        self._stop.set()

    def _run(self) -> None:
        while not self._stop.wait(self._limit_s / LOOKS):
            self.look()

    def look(self) -> None:
        """Ask once, and act on the answer."""
        try:
            behind = self._probe.behind()
            ours = self._ours()
            told = self._standstill.look(self._clock_s(), behind, behind if ours is None else ours)
            told = {p: times for p, times in told.items() if self._probe.readable(p, behind[p])}
            self._note_stuck(behind, told)
        except (KafkaException, KeyError) as exc:
            log.debug("watchdog: Kafka can't be asked: %r", exc)
            self._standstill = Standstill(self._limit_s)
            self._note_stuck({}, {})
            return
        if not told or self._stop.is_set():
            return
        if max(told.values()) > 1:
            log.critical("watchdog: partitions %s stand still after a new session too; this process ends", sorted(told))
            self._leave()
        else:
            log.error("watchdog: partitions %s stand still; a new session starts", sorted(told))
            self._restart()

    def _note_stuck(self, behind: Mapping[int, int], told: Mapping[int, int]) -> None:
        now_s = self._clock_s()
        self._stuck = {p: (offset, since_s) for p, (offset, since_s) in self._stuck.items() if behind.get(p) == offset}
        for partition, times in told.items():
            self._stuck.setdefault(partition, (behind[partition], now_s - times * self._limit_s))
        self._note(max((now_s - since_s for _, since_s in self._stuck.values()), default=0.0))


def leave_process() -> None:
    """SIGTERM to ourselves, so that callers are answered, and the end in any case. The status is `EXIT_STUCK`."""
    last_resort = threading.Timer(LEAVE_S, os._exit, [EXIT_STUCK])
    last_resort.daemon = True
    last_resort.start()
    os.kill(os.getpid(), signal.SIGTERM)
