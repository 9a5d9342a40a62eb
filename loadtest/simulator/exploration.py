"""What a policy lets one see of simulated payments: declined ones keep their label to themselves, but for a few that are explored.

For tests of estimates that must not fall for that. As the gateway explores: of the payments that the score declines, up to an amount,
a share is approved at random, until the amounts let through so have come to the day's limit; the chance is logged.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from loadtest.simulator.config import DAY_MS

Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Explored:
    """(payments,): `let_through` whether the payment went through and its label can be seen; `chance` under which it did: 1 where the score
    doesn't decline, 0 where exploration can't touch it. `spent_minor_a_day_most`: the most let through so on any day."""

    let_through: Bools
    chance: npt.NDArray[np.float64]
    spent_minor_a_day_most: int


def explore(
    declined: Bools,
    amount_minor: npt.NDArray[np.int64],
    event_time_ms: npt.NDArray[np.int64],
    *,
    share: float,
    amount_max_minor: int,
    loss_max_minor_per_day: int,
    seed: int,
) -> Explored:
    """Payments in the order of time, (payments,) each. Raises ValueError for a share that isn't one."""
    if not 0 <= share <= 1:
        raise ValueError("share must be between 0 and 1")
    drawn = np.random.default_rng(seed).random(len(declined)) < share
    chance = np.where(declined, 0.0, 1.0)
    through = ~declined
    day, spent, most = -1, 0, 0
    for i in np.flatnonzero(declined & (amount_minor <= amount_max_minor)).tolist():
        if event_time_ms[i] // DAY_MS != day:
            day, spent = int(event_time_ms[i] // DAY_MS), 0
        # All of an explored payment may be lost, so that it must fit in whole.
        if spent + int(amount_minor[i]) > loss_max_minor_per_day:
            continue
        chance[i] = share
        if drawn[i]:
            through[i] = True
            spent += int(amount_minor[i])
            most = max(most, spent)
    return Explored(through, chance, most)
