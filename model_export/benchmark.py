"""The published benchmark: which rows train and test a model, and how its ranking is judged. Pure functions of arrays.

Source: "Reproducible Machine Learning for Credit Card Fraud Detection" (Le Borgne, Siblini, Lebichot, Bontempi; 2022), chapters 3
to 5: train on a block of days, leave a week for labels to come, test on the week after, without customers whose card was known to
be compromised. Called by `fraudgate evaluate`. All arrays are by payment, in order of time.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from sklearn.metrics import average_precision_score, roc_auc_score

Bools = npt.NDArray[np.bool_]
Int64s = npt.NDArray[np.int64]
Scores = npt.NDArray[np.floating]

DAY_MS = 86_400_000
WEEK_DAYS = 7
# Days between the last day of training and the first of the test: what a label takes to be known.
DELAY_DAYS = 7
CARDS_PER_DAY = 100


@dataclass(frozen=True)
class Payments:
    """`day` counts from the epoch (UTC); `customer` is any number a customer. (rows,) each, in order of time."""

    day: Int64s
    customer: Int64s
    is_fraud: Bools


@dataclass(frozen=True)
class Fold:
    """Places of the rows. The test's first day is `test_day`; every training row's label is known by then."""

    test_day: int
    train: Int64s
    test: Int64s


@dataclass(frozen=True)
class Ranking:
    """`auc` and `ap` over all rows of the test; `cp100` the mean over its days of the card precision among 100 cards."""

    auc: float
    ap: float
    cp100: float


def fold(payments: Payments, test_day: int, train_days: int = WEEK_DAYS) -> Fold:
    """The fold whose test week begins on `test_day`, trained on the `train_days` before the delay.

    Test day k leaves out every customer with a fraud in the last training week or in a day since whose labels are known by then: the
    filter is the same however long the training. Raises ValueError when a part has no fraud or no genuine payment.
    """
    trained_to = test_day - DELAY_DAYS
    filter_from = trained_to - WEEK_DAYS
    day, fraud = payments.day, payments.is_fraud
    train = np.flatnonzero((day >= trained_to - train_days) & (day < trained_to))
    kept = []
    for k in range(WEEK_DAYS):
        known = np.unique(payments.customer[fraud & (day >= filter_from) & (day < trained_to + k)])
        rows = np.flatnonzero(day == test_day + k)
        kept.append(rows[~np.isin(payments.customer[rows], known)])
    test = np.concatenate(kept)
    for name, rows in (("training", train), ("test", test)):
        frauds = int(fraud[rows].sum())
        if frauds == 0 or frauds == len(rows):
            raise ValueError(
                f"the {name} days of the test week from {date_of(test_day)} have {len(rows)} payments, {frauds} of them frauds"
            )
    return Fold(test_day, train, test)


def ranking(payments: Payments, rows: Int64s, score: Scores) -> Ranking:
    """How well `score`, (rows,), ranks the payments at the places `rows`."""
    fraud = payments.is_fraud[rows]
    return Ranking(
        auc=float(roc_auc_score(fraud, score)),
        ap=float(average_precision_score(fraud, score)),
        cp100=card_precision(payments, rows, score),
    )


def card_precision(payments: Payments, rows: Int64s, score: Scores, cards: int = CARDS_PER_DAY) -> float:
    """Mean over the days of the share of compromised cards among the `cards` with the highest scores.

    A card's score is the highest of its payments of that day. A card that was found is not looked at again on later days.
    """
    day, customer, fraud = payments.day[rows], payments.customer[rows], payments.is_fraud[rows]
    found = np.zeros(0, customer.dtype)
    precision = []
    for d in np.unique(day):
        here = (day == d) & ~np.isin(customer, found)
        card, place = np.unique(customer[here], return_inverse=True)
        highest = np.full(len(card), -np.inf)
        np.maximum.at(highest, place, score[here])
        compromised = np.zeros(len(card), bool)
        np.logical_or.at(compromised, place, fraud[here])
        top = np.argsort(-highest, kind="stable")[:cards]
        found = np.union1d(found, card[top][compromised[top]])
        precision.append(float(compromised[top].sum()) / cards)
    return float(np.mean(precision))


def date_of(day: int) -> str:
    return str(np.datetime64(day, "D"))
