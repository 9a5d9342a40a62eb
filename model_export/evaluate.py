"""How good models on the pipeline's own features are, on a public data set, by the published split and metrics.

`Evaluation` is called by `fraudgate evaluate` (deploy/evaluate.py), which has the features from the project's backfill. What it tries for a
test week is chosen on earlier weeks alone, whose labels were known when the week began. One fit of a week of training takes seconds.
"""

from __future__ import annotations

import itertools
import os
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import xgboost

from model_export.benchmark import WEEK_DAYS, Fold, Payments, Ranking, fold, ranking
from model_export.dataset import Floats
from model_export.training import default_params

# How XGBoost was told to train for the published row "XGBoost (100/0.3/6)": its defaults of that time.
PUBLISHED_PARAMS: dict[str, str | int | float] = {
    "objective": "binary:logistic",
    "base_score": 0.5,
    "tree_method": "exact",
    "eta": 0.3,
    "max_depth": 6,
    "seed": 0,
}
PUBLISHED_ROUNDS = 100
# (AUC ROC, AP, CP@100), quoted: chapter 3, BaselineModeling, cell 41; and the best of any model anywhere in the book, chapter 5.
PUBLISHED_ONE_WEEK = Ranking(0.862, 0.639, 0.273)
PUBLISHED_BEST_MEAN = Ranking(0.872, 0.694, 0.304)

# Tried on the validation weeks, on top of model_export.training.default_params.
CANDIDATES: dict[str, dict[str, int | float]] = {
    "depth 3": {"max_depth": 3},
    "depth 4": {"max_depth": 4},
    "depth 5": {"max_depth": 5},
}
ROUNDS = tuple(range(20, 201, 20))
# Weeks before the test week whose labels are all known when it begins: it starts 7 days after the last of them is labelled.
VALIDATION_WEEKS_BEFORE = (2, 3)


@dataclass(frozen=True)
class Recipe:
    """`validation_ap` is the mean AP on the validation weeks."""

    candidate: str
    rounds: int
    validation_ap: float


@dataclass(frozen=True)
class Tested:
    """A model on one test week. `probability` is (rows of the fold's test,)."""

    fold: Fold
    train_days: int
    recipe: Recipe | None
    ranking: Ranking
    probability: npt.NDArray[np.float32]
    booster: xgboost.Booster


@dataclass
class Evaluation:
    """`features` (rows, any) of `payments`, in the same order; `threads` for XGBoost. Fits are remembered."""

    payments: Payments
    features: Floats
    threads: int = len(os.sched_getaffinity(0))
    _curves: dict[tuple[int, int, str], list[float]] = field(default_factory=dict)

    def published(self, test_day: int) -> Tested:
        """What the book's XGBoost reaches when `features` are the book's own."""
        chosen = fold(self.payments, test_day)
        params = PUBLISHED_PARAMS | {"nthread": self.threads}
        booster = xgboost.train(params, self._matrix(chosen.train), num_boost_round=PUBLISHED_ROUNDS)
        return self._tested(chosen, WEEK_DAYS, None, booster)

    def ours(self, test_day: int, train_days: int) -> Tested:
        """The best recipe of the validation weeks, trained for this week and tested on it. Raises ValueError when a week lacks frauds."""
        recipe = self._choose(test_day, train_days)
        chosen = fold(self.payments, test_day, train_days)
        booster = xgboost.train(
            self._params(chosen, CANDIDATES[recipe.candidate]), self._quantised(chosen.train), num_boost_round=recipe.rounds
        )
        return self._tested(chosen, train_days, recipe, booster)

    def _choose(self, test_day: int, train_days: int) -> Recipe:
        weeks = [test_day - WEEK_DAYS * before for before in VALIDATION_WEEKS_BEFORE]
        tried = {
            (name, rounds): ap
            for name in CANDIDATES
            for rounds, ap in zip(
                ROUNDS, np.mean([self._curve(week, train_days, name) for week in weeks], axis=0).tolist(), strict=True
            )
        }
        (name, rounds), ap = max(tried.items(), key=lambda item: item[1])
        return Recipe(name, rounds, ap)

    def _curve(self, test_day: int, train_days: int, candidate: str) -> list[float]:
        """AP of a candidate on the week from `test_day`, at each of ROUNDS."""
        key = (test_day, train_days, candidate)
        if key not in self._curves:
            chosen = fold(self.payments, test_day, train_days)
            booster = xgboost.train(
                self._params(chosen, CANDIDATES[candidate]), self._quantised(chosen.train), num_boost_round=ROUNDS[-1]
            )
            rows = self.features[chosen.test]
            margin = np.zeros(len(rows), np.float64)
            curve = []
            for first, end in itertools.pairwise((0, *ROUNDS)):
                # Each part of the trees adds to the margin; what base_score adds each time changes no order.
                margin += booster.inplace_predict(rows, iteration_range=(first, end), predict_type="margin", missing=np.nan)
                curve.append(ranking(self.payments, chosen.test, margin).ap)
            self._curves[key] = curve
        return self._curves[key]

    def _params(self, chosen: Fold, candidate: dict[str, int | float]) -> dict[str, Any]:
        return default_params(float(self.payments.is_fraud[chosen.train].mean()), self.threads) | candidate

    def _tested(self, chosen: Fold, train_days: int, recipe: Recipe | None, booster: xgboost.Booster) -> Tested:
        found = np.asarray(booster.inplace_predict(self.features[chosen.test], missing=np.nan), np.float32)
        return Tested(chosen, train_days, recipe, ranking(self.payments, chosen.test, found), found, booster)

    def _matrix(self, rows: npt.NDArray[np.int64]) -> xgboost.DMatrix:
        return xgboost.DMatrix(self.features[rows], self.payments.is_fraud[rows], nthread=self.threads)

    def _quantised(self, rows: npt.NDArray[np.int64]) -> xgboost.DMatrix:
        return xgboost.QuantileDMatrix(self.features[rows], self.payments.is_fraud[rows], nthread=self.threads)


def weeks_of(first_day: int, end_day: int, test_day: int, train_days: int, count: int) -> list[int]:
    """Up to `count` test weeks, whole weeks apart from `test_day`, newest last: the newest that lie within the days [first_day, end_day).

    No later than `count - 1` weeks after `test_day`, so that more data doesn't move them away from it; each has `train_days` of
    training and its validation weeks in the data.
    """
    reach = max(train_days, WEEK_DAYS) + WEEK_DAYS * (1 + max(VALIDATION_WEEKS_BEFORE))
    last = min(test_day + WEEK_DAYS * (count - 1), test_day + (end_day - WEEK_DAYS - test_day) // WEEK_DAYS * WEEK_DAYS)
    weeks = [last - WEEK_DAYS * i for i in range(count)]
    return sorted(week for week in weeks if week - reach >= first_day)
