"""A label: what became known about a transaction, when, and from whom; and which of several labels stands.

Labels of one transaction contradict each other: an analyst finds nothing, weeks later a chargeback comes, then it is reversed. What
stands is the greatest by `precedence`, whatever the order in which they arrive:

1. the more final word (`STANDING`): a confirmed fraud and a reversal, whoever says so; then what a chargeback says that is neither yet;
   then the finding of an analyst or a merchant that nothing was wrong; then what they merely reported;
2. among equals the later one, by the time from which it holds, then by the time at which it was reported;
3. then by source (chargeback, analyst, refund), by state (reversed, confirmed, false_positive, reported), and fraud before genuine.

So who takes back a confirmed fraud says `reversed`, not `false_positive`; and a chargeback that comes late corrects an analyst who had
let the payment pass. Nothing beyond that decides: two labels that tie say the same. As of a time means: of those reported by then.
"""

from __future__ import annotations

from typing import Literal, get_args

import msgspec
import numpy as np
import numpy.typing as npt

LabelSource = Literal["chargeback", "refund", "analyst"]
LabelState = Literal["reported", "confirmed", "false_positive", "reversed"]

# How final a word is, from 1.
STANDING: dict[tuple[LabelSource, LabelState], int] = {
    ("chargeback", "reversed"): 4,
    ("chargeback", "confirmed"): 4,
    ("chargeback", "false_positive"): 3,
    ("chargeback", "reported"): 3,
    ("analyst", "reversed"): 4,
    ("analyst", "confirmed"): 4,
    ("analyst", "false_positive"): 2,
    ("analyst", "reported"): 1,
    ("refund", "reversed"): 4,
    ("refund", "confirmed"): 4,
    ("refund", "false_positive"): 2,
    ("refund", "reported"): 1,
}
assert len(STANDING) == len(get_args(LabelSource)) * len(get_args(LabelState))
# Weakest first.
SOURCES: tuple[LabelSource, ...] = ("refund", "analyst", "chargeback")
STATES: tuple[LabelState, ...] = ("reported", "false_positive", "confirmed", "reversed")
# "source/state" of each, by which columns of labels are coded; after them whatever else a table might hold, which stands below all.
WORDS: tuple[str, ...] = tuple(f"{source}/{state}" for source, state in STANDING)
NO_WORD = len(WORDS)
_WORD_STANDING = np.array([*STANDING.values(), 0], np.int64)
_WORD_TIE = np.array([SOURCES.index(o) * len(STATES) + STATES.index(a) for o, a in STANDING] + [-1], np.int64)

Int64s = npt.NDArray[np.int64]
Precedence = tuple[int, int, int, int, int, bool]


class Label(msgspec.Struct, frozen=True, kw_only=True):
    """`reported_at_ms` is when the label became known (event time of the same clock as the transaction's).

    `amount_minor` is how much of the payment it is about (a partial refund or chargeback), minor units of the transaction's currency;
    None: all of it. `effective_at_ms` is from when it holds, for instance the day on which a scheme books a chargeback; None: since
    `reported_at_ms`. Labels written before these fields were there read None.
    """

    transaction_id: str
    card_id: str
    is_fraud: bool
    source: LabelSource
    state: LabelState
    reported_at_ms: int
    amount_minor: int | None = None
    effective_at_ms: int | None = None


def precedence(
    source: LabelSource, state: LabelState, effective_at_ms: int | None, reported_at_ms: int, is_fraud: bool
) -> Precedence:
    """Of a transaction's labels the one with the greatest stands; the last element says whether that is fraud."""
    holds_ms = reported_at_ms if effective_at_ms is None else effective_at_ms
    return STANDING[source, state], holds_ms, reported_at_ms, SOURCES.index(source), STATES.index(state), is_fraud


def precedence_of(label: Label) -> Precedence:
    return precedence(label.source, label.state, label.effective_at_ms, label.reported_at_ms, label.is_fraud)


def precedence_order(word: Int64s, holds_ms: Int64s, reported_at_ms: Int64s, is_fraud: npt.NDArray[np.bool_]) -> Int64s:
    """The rows from the least `precedence` to the greatest, all columns (rows,); `word` is the place in WORDS, NO_WORD for none of them.

    `holds_ms` is effective_at_ms, where it isn't given reported_at_ms.
    """
    order: Int64s = np.lexsort((is_fraud, _WORD_TIE[word], reported_at_ms, holds_ms, _WORD_STANDING[word])).astype(np.int64)
    return order
