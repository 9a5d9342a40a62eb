"""What the tables hold after a soak: every accepted payment once in silver and once among the receipts, and features as recomputed.

Called by `deploy.soak.run` when the load is over; waits until the streams have caught up, within bounds.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow.compute as pc

from deploy.demo import table_rows
from deploy.soak.history import Ints, Mask, numbers
from feature_jobs.parity import NoReceiptsError, Report, check_parity
from feature_jobs.training_set import read_table
from gateway.contracts import tables
from gateway.contracts.settings import Settings
from loadtest.openloop.shoppers import card_prefix

LOOK_S = 2.0
# One closed community of cards: what the features of its payments rest on lies within it (loadtest.openloop.shoppers).
COMMUNITY = 0
# Of the sampled receipts so many may rest on an order that nobody can tell any more.
UNVERIFIABLE_MOST = 0.05


@dataclass(frozen=True)
class Features:
    """Of the receipts of one community: `compared` bit by bit, those that said of themselves what they lack, and what differed."""

    receipts: int
    compared: int
    values: int
    different: int
    without: int
    stale: int
    unverifiable: int
    late: int
    examples: list[str]

    def complaints(self) -> list[str]:
        if not self.receipts:
            return ["no receipt was there to compare features of"]
        found = []
        if self.different:
            found.append(
                f"{self.different:,} of {self.values:,} feature values are not what they should be: {', '.join(self.examples)}"
            )
        if not self.compared and self.receipts > self.without + self.stale:
            found.append("no feature value could be compared")
        if self.unverifiable > UNVERIFIABLE_MOST * self.receipts:
            found.append(f"{self.unverifiable:,} of {self.receipts:,} receipts rest on an order that nobody can tell")
        return found


def wait_for_tables(settings: Settings, wanted: int, within_s: float, alive: Callable[[], bool]) -> bool:
    """Until silver and decisions have `wanted` rows. False: not in time, or the streams have ended."""
    give_up_s = time.monotonic() + within_s
    while time.monotonic() < give_up_s and alive():
        if all(table_rows(settings, name) >= wanted for name in (tables.SILVER, tables.DECISIONS)):
            return True
        time.sleep(LOOK_S)
    return False


def rows_of(settings: Settings, table: str, run: str, count: int) -> Ints:
    """How often each payment of the run stands in a table, by number."""
    prefix = f"{run}-"
    held = read_table(settings, table, ["transaction_id"], pc.starts_with(pc.field("transaction_id"), pattern=prefix))
    if held is None or not held.num_rows:
        return np.zeros(count, np.int64)
    found: npt.NDArray[np.int64] = pc.utf8_slice_codeunits(held["transaction_id"], len(prefix)).cast("int64").to_numpy()
    return np.bincount(found[found < count], minlength=count)


def check_tables(accepted: Mask, silver: Ints, decisions: Ints) -> dict[str, list[str]]:
    """Numbers of payments by what is wrong with them."""
    return {
        "not in silver": numbers(accepted & (silver == 0)),
        "twice in silver": numbers(silver > 1),
        "not in the table decisions": numbers(accepted & (decisions == 0)),
        "twice in the table decisions": numbers(decisions > 1),
    }


def check_features(settings: Settings) -> Features:
    try:
        report = check_parity(settings, cards=card_prefix(COMMUNITY))
    except NoReceiptsError:
        return Features(0, 0, 0, 0, 0, 0, 0, 0, [])
    return features_of(report)


def features_of(report: Report) -> Features:
    return Features(
        receipts=report.receipts,
        compared=report.rows,
        values=report.compared,
        different=report.different_values,
        without=report.missing_rows,
        stale=report.stale_rows,
        unverifiable=report.unverifiable_rows,
        late=report.late_rows,
        examples=[f"{d.transaction_id} {d.feature} {d.logged!r} instead of {d.recomputed!r}" for d in report.examples[:5]],
    )
