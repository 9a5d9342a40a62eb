"""When each payment is to be sent. Open loop: the schedule doesn't wait for answers."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Pace:
    """A fixed `rate_per_s`, or event time `speed` times as fast as it was, or neither: as fast as possible."""

    rate_per_s: float | None = None
    speed: float | None = None

    def __post_init__(self) -> None:
        assert self.rate_per_s is None or self.speed is None
        if (self.rate_per_s is not None and self.rate_per_s <= 0) or (self.speed is not None and self.speed <= 0):
            raise ValueError("a rate or speed must be above 0")

    def due_s(self, sequence: int, since_first_ms: int) -> float | None:
        """Seconds after the start at which the `sequence`-th payment (from 0) is due; None: at once.

        `since_first_ms` is its event time after that of the first payment.
        """
        if self.rate_per_s is not None:
            return sequence / self.rate_per_s
        if self.speed is not None:
            return since_first_ms / 1000.0 / self.speed
        return None


@dataclass
class Punctuality:
    """How well a sender kept its schedule. Late is more than LATE_S behind."""

    LATE_S = 0.1

    late: int = 0
    behind_max_s: float = 0.0

    def note(self, behind_s: float) -> None:
        if behind_s > self.behind_max_s:
            self.behind_max_s = behind_s
        if behind_s > self.LATE_S:
            self.late += 1
