"""Bronze, silver and gold beside what is promised of them, as the feature jobs' metrics tell it over time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from gateway.console.samples import Samples
from gateway.contracts import tables
from gateway.contracts.metrics import FRESH_WITHIN_S

# By stream, the table whose rows are counted.
TABLE_OF = {"bronze": tables.BRONZE, "silver": tables.SILVER, "gold": tables.GOLD_DECISIONS}
assert set(TABLE_OF) == set(FRESH_WITHIN_S)
# Without a new batch for so many times its promise while payments come, a table stands still.
STILL_FACTOR = 3.0
ROWS, FRESHNESS, BATCHES = "fraudgate_jobs_rows_total", "fraudgate_jobs_freshness_seconds", "fraudgate_jobs_batch_seconds_count"


@dataclass
class _Seen:
    mark: tuple[float | None, ...]
    changed_s: float
    # False until something was written while somebody looked: before, when that was isn't known.
    changed: bool = False


class Tables:
    """Notices when each table was last written to."""

    def __init__(self) -> None:
        self._seen: dict[str, _Seen] = {}

    def note(self, jobs: Samples, now_s: float) -> None:
        for name in FRESH_WITHIN_S:
            mark = (jobs.total(ROWS, table=TABLE_OF[name]), jobs.total(FRESHNESS, query=name), jobs.total(BATCHES, query=name))
            seen = self._seen.get(name)
            if seen is None:
                self._seen[name] = _Seen(mark, now_s)
            elif seen.mark != mark:
                self._seen[name] = _Seen(mark, now_s, True)

    def shown(self, jobs: Samples | None, now_s: float, *, flowing_s: float) -> list[dict[str, Any]]:
        """A row for each table. `flowing_s`: for how long payments have come without a pause.

        `state`: fresh, late, still (nothing is written although payments come), unknown (nothing was written yet, or the jobs were never
        heard of).
        """
        rows = []
        for name, promised_s in FRESH_WITHIN_S.items():
            fresh_s = None if jobs is None else jobs.total(FRESHNESS, query=name)
            seen = self._seen.get(name)
            since_s = None if seen is None else now_s - seen.changed_s
            state = "fresh"
            if fresh_s is None:
                state = "unknown"
            elif since_s is not None and min(since_s, flowing_s) > promised_s * STILL_FACTOR:
                state = "still"
            elif fresh_s > promised_s:
                state = "late"
            rows.append(
                {
                    "name": name,
                    "rows": None if jobs is None else jobs.total(ROWS, table=TABLE_OF[name]),
                    "fresh_s": fresh_s,
                    "promised_s": promised_s,
                    "written_s": since_s if seen is not None and seen.changed else None,
                    "state": state,
                }
            )
        return rows
