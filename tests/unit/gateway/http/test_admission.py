"""The limit that finds itself, on a simulated gateway: one thread that decides in batches and spends time on refusing too."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from gateway.http.admission import LIMIT_LEAST, AdaptiveLimit

BUDGET_S = 0.08
BATCH_ROWS_MAX = 256
BATCH_S = 0.001
IN_FLIGHT_MAX = 4096


@dataclass
class Simulated:
    """Decides a transaction in `row_s` and refuses one in `shed_s`, both of CPU. `waits_s` a batch for something else."""

    row_s: float
    shed_s: float
    waits_s: float = 0.0
    now_s: float = 0.0
    arrived_s: float = 0.0
    pending: list[float] = field(default_factory=list)
    latencies: list[tuple[float, float]] = field(default_factory=list)
    refused: list[float] = field(default_factory=list)
    limit: AdaptiveLimit = field(default_factory=lambda: AdaptiveLimit(IN_FLIGHT_MAX, BUDGET_S))

    @property
    def capacity(self) -> float:
        return BATCH_ROWS_MAX / (BATCH_S + BATCH_ROWS_MAX * self.row_s)

    def run(self, rate: float, until_s: float) -> None:
        """Transactions come evenly, `rate` a second."""
        in_batch = 0
        while self.now_s < until_s:
            began_s = self.now_s
            batch, self.pending = self.pending[:BATCH_ROWS_MAX], self.pending[BATCH_ROWS_MAX:]
            in_batch = len(batch)
            busy_s = BATCH_S + in_batch * self.row_s if batch else 0.0002
            end_s = self.now_s + busy_s + (self.waits_s if batch else 0.0)
            while self.arrived_s <= end_s:
                if len(self.pending) + in_batch >= self.limit.limit:
                    self.refused.append(self.arrived_s)
                    end_s += self.shed_s
                    busy_s += self.shed_s
                else:
                    self.pending.append(self.arrived_s)
                self.arrived_s += 1 / rate
            self.now_s = end_s
            if batch:
                self.latencies += [(at_s, end_s - at_s) for at_s in batch]
                lag_s = busy_s / 2 if busy_s / (end_s - began_s) > 0.5 else 0.0002
                self.limit.note(end_s, end_s - batch[in_batch // 2], len(self.pending) + in_batch, lag_s)
                in_batch = 0

    def between(self, from_s: float, to_s: float) -> list[float]:
        return sorted(latency_s for at_s, latency_s in self.latencies if from_s <= at_s < to_s)


@pytest.mark.parametrize("times", [2, 5])
@pytest.mark.parametrize("row_s", [0.0001, 0.001])
def test_an_overload_costs_a_tenth_of_the_goodput_at_most_and_keeps_what_is_accepted_in_time(times: int, row_s: float) -> None:
    gateway = Simulated(row_s, shed_s=row_s / 100)
    gateway.run(0.5 * gateway.capacity, 5)
    assert gateway.refused == []
    gateway.run(times * gateway.capacity, 25)
    accepted = gateway.between(7, 25)
    assert len(accepted) / 18 >= 0.9 * gateway.capacity
    assert accepted[int(len(accepted) * 0.99)] < 0.1
    gateway.run(0.5 * gateway.capacity, 35)
    assert [at_s for at_s in gateway.refused if at_s > 26] == []
    after = gateway.between(26, 35)
    assert after[int(len(after) * 0.99)] < 0.05


def test_a_slow_redis_is_no_overload() -> None:
    gateway = Simulated(0.0001, shed_s=0.000001, waits_s=0.035)
    gateway.run(1000, 20)
    assert gateway.refused == []
    assert gateway.limit.limit == IN_FLIGHT_MAX


def test_the_limit_ends_at_its_bounds() -> None:
    limit = AdaptiveLimit(100, BUDGET_S)
    for i in range(1000):
        limit.note(float(i), 1.0, 1000, 0.02)
    assert limit.limit == LIMIT_LEAST
    for i in range(1000, 2000):
        limit.note(float(i), 0.001, 1000, 0.02)
    assert limit.limit == 100
    assert AdaptiveLimit(1, BUDGET_S).limit == 1


def test_lateness_counts_once_it_lasts_and_then_once_a_latency() -> None:
    limit = AdaptiveLimit(1000, BUDGET_S)
    for now_s in (1.0, 1.01, 1.09):
        limit.note(now_s, 0.041, 1000, 0.02)
    assert limit.limit == 1000
    for now_s in (1.1, 1.11, 1.14):
        limit.note(now_s, 0.041, 1000, 0.02)
    assert limit.limit == 900
    limit.note(1.15, 0.08, 1000, 0.02)
    assert limit.limit == 450


def test_a_single_stall_refuses_nobody() -> None:
    gateway = Simulated(0.0001, shed_s=0.000001)
    gateway.run(1000, 5)
    gateway.now_s += 0.5
    gateway.run(1000, 10)
    assert gateway.refused == []
