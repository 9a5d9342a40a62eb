"""Bursts of declines: many at one merchant, on one device or of one card BIN within a sliding window. Pure: knows neither tables nor Kafka.

Called by feature_jobs/burst_stream.py with the declines of each commit of `decisions`; some 3 microseconds a decline. Each entity has a
clock of its own, the newest event time of its declines, so that one sender's clock moves nobody else's window.

A burst begins with the decline that makes them `threshold` within `window_ms`, and goes on until there are fewer than half of that, or no
decline for two windows: however many come in between, it is one burst. Its id follows from what it is about and when it began, so whoever
reads the same commits again finds the same.
"""

from __future__ import annotations

import hashlib
from bisect import insort
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

# Entities, as columns of the table `decisions`.
MERCHANT, DEVICE, BIN = "merchant_id", "device_id", "card_bin"
ENTITIES = (MERCHANT, DEVICE, BIN)
BEGUN, ENDED = "begun", "ended"
# An entity is forgotten when it had no decline for so many windows.
FORGOTTEN_WINDOWS = 2
# Of more entities than are allowed, room is made for this share of them at a time.
EVICTED_SHARE = 0.05

Key = tuple[str, str]


@dataclass(frozen=True)
class Decline:
    """`entities` are the values of ENTITIES that it has."""

    transaction_id: str
    event_time_ms: int
    decided_at_ms: int
    entities: Mapping[str, str]


@dataclass(frozen=True)
class Burst:
    """A burst that begins or ends (`state`). `began_ms` is the event time of its first decline; `declines` how many it took to begin.

    `transaction_id`, `at_ms` and `decided_at_ms` are those of the decline with which it begins.
    """

    state: str
    entity: str
    entity_value: str
    began_ms: int
    at_ms: int
    decided_at_ms: int
    declines: int
    transaction_id: str

    @property
    def id(self) -> str:
        return hashlib.sha256(f"{self.entity}/{self.entity_value}/{self.began_ms}".encode()).hexdigest()[:32]


@dataclass
class _Entity:
    """(event time, version) of the newest declines, in order of time, at most as many as make a burst; and the burst that goes on."""

    declines: list[tuple[int, int]] = field(default_factory=list)
    burst: Burst | None = None


class Windows:
    """`thresholds` by entity; 0: none of its bursts are looked for. Holds at most `entities_max` entities."""

    def __init__(self, thresholds: Mapping[str, int], window_ms: int, entities_max: int) -> None:
        self._thresholds = {name: n for name, n in thresholds.items() if n}
        self._window_ms = window_ms
        self._entities_max = entities_max
        self._entities: dict[Key, _Entity] = {}
        self.evicted = 0

    def __len__(self) -> int:
        return len(self._entities)

    @property
    def active(self) -> int:
        return sum(e.burst is not None for e in self._entities.values())

    @property
    def replay_from(self) -> int | None:
        """The oldest version of which a decline is still held; None without any."""
        return min((version for e in self._entities.values() for _, version in e.declines), default=None)

    def restore(self, bursts: Iterable[Burst]) -> None:
        """Bursts that had begun and not ended, after `fill` has seen the declines that were held then."""
        for burst in bursts:
            if burst.entity in self._thresholds:
                self._entities.setdefault((burst.entity, burst.entity_value), _Entity()).burst = burst

    def fill(self, declines: Iterable[Decline], version: int) -> None:
        """Declines whose bursts have been told already."""
        for decline in declines:
            for name, value in decline.entities.items():
                if name in self._thresholds:
                    self._put((name, value), decline.event_time_ms, version)

    def add(self, declines: Iterable[Decline], version: int) -> list[Burst]:
        """Bursts that begin and end with these declines, in order."""
        changed: list[Burst] = []
        for decline in declines:
            for name, value in decline.entities.items():
                if name not in self._thresholds:
                    continue
                entity = self._put((name, value), decline.event_time_ms, version)
                inside = [ms for ms, _ in entity.declines if ms > entity.declines[-1][0] - self._window_ms]
                threshold = self._thresholds[name]
                if entity.burst is not None and len(inside) < max(1, threshold // 2):
                    changed.append(_ended(entity.burst))
                    entity.burst = None
                if entity.burst is None and len(inside) >= threshold:
                    entity.burst = Burst(
                        state=BEGUN,
                        entity=name,
                        entity_value=value,
                        began_ms=inside[0],
                        at_ms=decline.event_time_ms,
                        decided_at_ms=decline.decided_at_ms,
                        declines=len(inside),
                        transaction_id=decline.transaction_id,
                    )
                    changed.append(entity.burst)
        return changed

    def forget(self, clock_ms: int) -> list[Burst]:
        """Drops entities without a decline for FORGOTTEN_WINDOWS before `clock_ms`, and the quietest when there are too many.

        Returns the bursts that end with that.
        """
        oldest_ms = clock_ms - FORGOTTEN_WINDOWS * self._window_ms
        gone = [key for key, e in self._entities.items() if not e.declines or e.declines[-1][0] <= oldest_ms]
        left = len(self._entities) - len(gone)
        if left > self._entities_max:
            chosen = set(gone)
            # Those in a burst last.
            quiet = sorted((e.burst is not None, e.declines[-1][0], key) for key, e in self._entities.items() if key not in chosen)
            room = left - self._entities_max + int(self._entities_max * EVICTED_SHARE)
            evicted = [key for *_, key in quiet[:room]]
            self.evicted += len(evicted)
            gone += evicted
        ended = [burst for key in gone if (burst := self._entities.pop(key).burst) is not None]
        return [_ended(burst) for burst in sorted(ended, key=lambda b: (b.at_ms, b.entity, b.entity_value))]

    def _put(self, key: Key, event_time_ms: int, version: int) -> _Entity:
        entity = self._entities.get(key)
        if entity is None:
            entity = self._entities[key] = _Entity()
        insort(entity.declines, (event_time_ms, version))
        if len(entity.declines) > self._thresholds[key[0]]:
            entity.declines.pop(0)
        return entity


def _ended(burst: Burst) -> Burst:
    return Burst(
        state=ENDED,
        entity=burst.entity,
        entity_value=burst.entity_value,
        began_ms=burst.began_ms,
        at_ms=burst.at_ms,
        decided_at_ms=burst.decided_at_ms,
        declines=burst.declines,
        transaction_id=burst.transaction_id,
    )
