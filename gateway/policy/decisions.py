"""What a policy sees of a batch, and what it makes of it."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from gateway.contracts.decision import Outcome
from gateway.contracts.lists import ListBook
from gateway.contracts.reasons import Reason
from gateway.scoring.requests import Requests

Int64s = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Matrix = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Columns:
    """`rows` of `requests`. By row: `matrix` (rows, features), `score` (rows,), NaN where no model scored, and when they were received,
    (rows,), which says what of the lists has expired.
    """

    requests: Requests
    rows: Int64s
    matrix: Matrix
    score: Floats
    received_at_ms: Int64s


# Nobody stands on any list.
NO_LISTS = ListBook()


@dataclass(frozen=True)
class Decisions:
    """By row: the outcome and its place in SEVERITY, the reasons (most severe first), and the ids of the live rules that fired, the lists
    that the payment stands on, the shadow rules that would have fired, and the rules that failed. `floors` are the scores from which
    challenge, review and decline begin, (rows, 3). `ruled` is the most severe outcome that a rule or a list asked for, 0 where none did;
    None when none did anywhere. Most rows have neither reasons nor hits, and share one empty list.
    """

    outcome: list[Outcome]
    severity: Int64s
    reasons: list[list[Reason]]
    rule_hits: list[list[str]]
    list_hits: list[list[str]]
    shadow_hits: list[list[str]]
    rule_errors: list[list[str]]
    floors: Floats
    ruled: Int64s | None = field(default=None)

    def stand_in(self) -> Int64s:
        """A score for a decision without one, (rows,): where its outcome begins."""
        floors = np.take_along_axis(self.floors, np.maximum(self.severity - 1, 0)[:, None], axis=1)[:, 0]
        return np.where(self.severity > 0, floors, 0).astype(np.int64)
