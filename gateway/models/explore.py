"""Exploration: a small, loss-capped share of what the model's score alone would decline is approved, so that its label becomes known.

Which payments is a matter of their transaction_id (contracts.routing.point_of), so it can be computed again later. Each receipt says what
the policy came to and the probability of what was done. Called by the scorers for the batches of a gateway that explores; a payment that
isn't declined costs a comparison.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from gateway.contracts.decision import SEVERITY, Outcome
from gateway.contracts.routing import EXPLORE_SALT, Routing
from gateway.kernels.intake import TRANSACTION_ID
from gateway.kernels.points import points
from gateway.metrics import Metrics
from gateway.policy import Decisions
from gateway.scoring.requests import Requests

DAY_MS = 86_400_000
DECLINE, MILDEST = SEVERITY[Outcome.DECLINE], SEVERITY[Outcome.APPROVE]
_SALT = np.uint64(EXPLORE_SALT)

Int64s = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


class LossCap:
    """What was approved by exploration today (UTC), minor units, by this process and, as far as told, by the others.

    The whole amount counts as lost, so a process by itself never exceeds the cap. `shared` says when the others' part was last known:
    with `stale_s` set nothing is explored after that. Several processes may exceed it by what each explores between two updates.
    """

    def __init__(self, clock_s: Callable[[], float], stale_s: float | None = None) -> None:
        self._clock_s = clock_s
        self._stale_s = stale_s
        self._shared_s = -np.inf
        self.day = -1
        # Known to all, and by this process since the last update.
        self.told_minor = 0
        self.own_minor = 0

    def turn(self, day: int) -> None:
        """Begin `day` if it is another."""
        if day != self.day:
            self.day, self.told_minor, self.own_minor = day, 0, 0

    @property
    def spent_minor(self) -> int:
        return self.told_minor + self.own_minor

    @property
    def usable(self) -> bool:
        return self._stale_s is None or self._clock_s() - self._shared_s < self._stale_s

    def shared(self, day: int, total_minor: int, sent_minor: int) -> None:
        """All processes together have spent `total_minor` on `day`, `sent_minor` of this one's included that weren't before."""
        if day == self.day:
            self.own_minor -= sent_minor
            # A Redis that lost its count doesn't give the money back.
            self.told_minor = max(total_minor, self.told_minor + sent_minor)
        self._shared_s = self._clock_s()


class Explorer:
    """Of both scorers. `now_ms` is the wall clock."""

    def __init__(self, cap: LossCap, metrics: Metrics, now_ms: Callable[[], int]) -> None:
        self.cap = cap
        self._metrics = metrics
        self._now_ms = now_ms

    def explore(self, routing: Routing, requests: Requests, rows: Int64s, decisions: Decisions) -> tuple[Int64s, Floats]:
        """What to do with each of `rows`, as places in SEVERITY, and the probability of just that. Arrays are (rows,).

        Decisions of a model are given. A payment may be explored when the model's score alone declines it, no rule having asked for
        anything more severe than approval, its amount is within routing's bound, and the cap has room for all of it.
        """
        severity, propensity = decisions.severity, np.ones(len(rows))
        may = severity == DECLINE
        if decisions.ruled is not None:
            may &= decisions.ruled == MILDEST
        amounts = requests.amount_minor[rows]
        may &= amounts <= routing.explore_amount_max_minor
        places = np.flatnonzero(may)
        cap, share = self.cap, routing.explore_share
        if not len(places) or not cap.usable:
            return severity, propensity
        cap.turn(self._now_ms() // DAY_MS)
        point = np.empty(len(places))
        points(requests.buf, requests.starts, requests.lengths, rows[places], TRANSACTION_ID, _SALT, point)
        severity = severity.copy()
        explored = explored_minor = held = 0
        for place, amount, at in zip(places.tolist(), amounts[places].tolist(), point.tolist(), strict=True):
            if cap.spent_minor + amount > routing.explore_loss_max_minor_per_day:
                # Nothing else can happen to it: its propensity stays 1.
                held += 1
            elif at < share:
                severity[place], propensity[place] = MILDEST, share
                cap.own_minor += amount
                explored += 1
                explored_minor += amount
            else:
                propensity[place] = 1 - share
        metrics = self._metrics
        metrics.explored.inc(explored)
        metrics.explored_minor.inc(explored_minor)
        metrics.explore_capped.inc(held)
        metrics.explore_spent_minor.set(cap.spent_minor)
        return severity, propensity
