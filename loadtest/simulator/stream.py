"""The simulation as a stream: genuine slices and the incidents' payments merged in event-time order, labels beside them.

Memory is bounded by a slice, a day of recent traffic (at most RECENT_EVENTS_MAX payments), what the incidents still plan, and
the labels that are not due yet.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterator
from dataclasses import replace
from operator import itemgetter

import numpy as np

from gateway.contracts.label import Label
from gateway.contracts.transaction import Transaction
from loadtest.events import Event
from loadtest.simulator.config import DAY_MS, SimulatorConfig
from loadtest.simulator.genuine import Genuine, Row, Slice, recent_of
from loadtest.simulator.labels import GENUINE_LABEL_SHARE, labels_of
from loadtest.simulator.patterns import PATTERNS, Incident, Pattern
from loadtest.simulator.world import build_world

RECENT_EVENTS_MAX = 50_000
INCIDENTS_KEPT_MAX = 10_000
EVENTS_MAX = 10**10


class Simulator:
    """One run over simulated time. Not for several threads."""

    def __init__(self, config: SimulatorConfig) -> None:
        self.config = config
        self.world = build_world(config)
        self.incidents: deque[Incident] = deque(maxlen=INCIDENTS_KEPT_MAX)
        self._genuine = Genuine(config, self.world)
        self._patterns: list[Pattern] = [p for p in PATTERNS if config.shares.get(p.name, 0.0) > 0 and config.fraud_rate > 0]
        self._rng = np.random.default_rng([config.seed, 2])
        # How many fraudulent payments each pattern still owes; an incident starts when it owes half of one.
        self._owed = {p.name: float(self._rng.random()) * p.events_mean / 2 for p in self._patterns}
        self._planned: list[tuple[int, int, Row]] = []
        self._planned_count = 0
        self._recent: deque[Slice] = deque()
        self._slice_number = 0
        self._merged: Iterator[Event] = iter(())
        self._sent = 0
        self._labels: list[tuple[int, int, Label]] = []
        self._labels_count = 0

    def events(self, count: int) -> Iterator[Event]:
        """The next `count` payments in event-time order. A later call goes on where this one stopped."""
        assert count >= 0 and self._sent + count < EVENTS_MAX
        for _ in range(count):
            event = next(self._merged, None)
            while event is None:
                self._merged = iter(self._next_slice())
                event = next(self._merged, None)
            yield event

    def labels_due(self, now_ms: int) -> list[Label]:
        """Labels that became known by simulated time `now_ms` and were not handed out yet, in order."""
        due = []
        while self._labels and self._labels[0][0] <= now_ms:
            due.append(heapq.heappop(self._labels)[2])
        return due

    def labels_remaining(self) -> list[Label]:
        """Every label that was not handed out yet, in the order in which they will become known."""
        return self.labels_due(2**62)

    def _next_slice(self) -> list[Event]:
        genuine = self._genuine.slice(self._slice_number)
        rows: list[Row] = []
        while self._planned and self._planned[0][0] < genuine.end_ms:
            rows.append(heapq.heappop(self._planned)[2])
        # Two sorted runs: the sort merges them, genuine first at equal times.
        merged = sorted(genuine.rows + rows, key=itemgetter(0))
        events = [self._event(row) for row in merged]
        self._draw_labels(events)
        self._remember(genuine)
        self._plan(genuine)
        self._slice_number += 1
        return events

    def _event(self, row: Row) -> Event:
        self._sent += 1
        t = Transaction(
            # A letter between seed and number keeps the digits from running together to a card number.
            transaction_id=f"sim{self.config.seed}t{self._sent:08d}",
            event_time_ms=row[0],
            card_id=row[1],
            customer_id=row[2],
            merchant_id=row[3],
            amount_minor=row[4],
            currency=row[5],
            channel=row[6],  # type: ignore[arg-type]
            mcc=row[7],
            country=row[8],
            device_id=row[9],
            ip=row[10],
            card_bin=row[11],
            card_country=row[12],
            latitude=row[13],
            longitude=row[14],
        )
        return Event(t, row[15] is not None, row[15])

    def _draw_labels(self, events: list[Event]) -> None:
        rng = np.random.default_rng([self.config.seed, 3, self._slice_number])
        for event, chance in zip(events, rng.random(len(events)).tolist(), strict=True):
            if event.is_fraud or chance < GENUINE_LABEL_SHARE:
                t = event.transaction
                for label in labels_of(t.transaction_id, t.card_id, t.event_time_ms, event.is_fraud, chance, rng):
                    self._labels_count += 1
                    heapq.heappush(self._labels, (label.reported_at_ms, self._labels_count, label))

    def _remember(self, genuine: Slice) -> None:
        self._recent.append(replace(genuine, rows=[]))
        held = sum(len(s.card) for s in self._recent)
        while len(self._recent) > 1 and (held > RECENT_EVENTS_MAX or self._recent[0].end_ms < genuine.end_ms - DAY_MS):
            held -= len(self._recent.popleft().card)

    def _plan(self, genuine: Slice) -> None:
        """Start the incidents that the fraud rate asks for; their payments lie after this slice."""
        rate = self.config.fraud_rate / (1 - self.config.fraud_rate)
        recent: Slice | None = None
        for pattern in self._patterns:
            self._owed[pattern.name] += len(genuine.card) * rate * self.config.shares[pattern.name]
            while self._owed[pattern.name] >= pattern.events_mean / 2:
                recent = recent or recent_of(self._recent)
                at_ms = genuine.end_ms + int(self._rng.integers(0, self.config.slice_ms))
                incident = pattern.start(self.world, self._rng, at_ms, recent)
                if incident is None or not incident.rows:
                    break
                self._owed[pattern.name] -= len(incident.rows)
                self.incidents.append(incident)
                for row in incident.rows:
                    self._planned_count += 1
                    heapq.heappush(self._planned, (row[0], self._planned_count, row))
