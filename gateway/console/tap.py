"""What the console sees of single decisions: a sample of them, taken from the scorers.

While nobody watches, a batch costs the scorer one look at `watching`. While somebody does, each decision costs a fraction of a microsecond
for the scores by route, and a few receipts a second are kept, as the bytes that go to Kafka anyway: they are decoded when they are shown.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from gateway.contracts.decision import RISK_SCORE_MAX, Outcome
from gateway.scoring.job import Result

# Kept a second: all that isn't approved up to the first, and of what is approved the second.
NOTABLE_PER_S_MAX, APPROVED_PER_S_MAX = 6, 2
WAITING_MAX = 64
SCORE_BINS = 10


@dataclass
class Scores:
    """Decisions of one route: how many, and how many by tenth of the score."""

    count: int = 0
    bins: list[int] = field(default_factory=lambda: [0] * SCORE_BINS)


class Tap:
    """`watching` is set by the gatherer. Everything here runs on the gateway's event loop."""

    def __init__(self, clock_s: Callable[[], float] = time.monotonic) -> None:
        self.watching = False
        self._clock_s = clock_s
        self._second = -1
        self._notable = self._approved = 0
        self._waiting: deque[bytes] = deque(maxlen=WAITING_MAX)
        self.scores: dict[str, Scores] = {}
        # Decided since somebody watches, and of them those that were kept to be shown.
        self.seen = self.kept = 0

    def offer(self, results: Iterable[Result | None]) -> None:
        """What a batch came to."""
        second = int(self._clock_s())
        if second != self._second:
            self._second, self._notable, self._approved = second, 0, 0
        scores = self.scores
        for result in results:
            if result is None or result.receipt is None or result.answer is None:
                continue
            answer = result.answer
            self.seen += 1
            if answer.model is not None:
                of_route = scores.get(answer.model.route)
                if of_route is None:
                    of_route = scores[answer.model.route] = Scores()
                of_route.count += 1
                of_route.bins[min(SCORE_BINS - 1, answer.risk_score * SCORE_BINS // RISK_SCORE_MAX)] += 1
            if answer.decision is Outcome.APPROVE:
                if self._approved >= APPROVED_PER_S_MAX:
                    continue
                self._approved += 1
            elif self._notable >= NOTABLE_PER_S_MAX:
                continue
            else:
                self._notable += 1
            self.kept += 1
            self._waiting.append(result.receipt)

    def take(self) -> list[bytes]:
        """The receipts kept since the last time, oldest first."""
        taken = list(self._waiting)
        self._waiting.clear()
        return taken

    def forget(self) -> None:
        """Nobody watches any more."""
        self.watching = False
        self._waiting.clear()
        self.scores.clear()
        self.seen = self.kept = 0
