"""What a backtest decides again of a public data set: its payments, with features and scores as they would have been.

Features are those of the pipeline's own backfill. Each week is scored by a model of its own, trained on the 28 days that end a week before
it begins, so that their labels were there (`fraudgate evaluate` says how good such models are).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import xgboost

from deploy.evaluate import features_of, risk_scores
from deploy.history.backtest_rows import DAY_MS, NO_LISTS_VERSION, PART_ROWS, Floats, Known, NoHistoryError, Part, requests_of
from deploy.public_data import PublicData, read_public
from model_export.benchmark import DELAY_DAYS, WEEK_DAYS
from model_export.training import default_params

TRAIN_DAYS = 28
# Among what `fraudgate evaluate` tries; not chosen anew for each week.
MODEL = {"max_depth": 4}
ROUNDS = 100


@dataclass
class PublicHistory:
    """The payments of `paths` in [from_ms, to_ms), by default of the newest month. Their labels are all known."""

    paths: Sequence[Path]
    from_ms: int | None
    to_ms: int | None
    threads: int
    say: Callable[[str], object] = lambda _: None
    part_rows: int = PART_ROWS
    left_out: Counter[str] = field(default_factory=Counter)

    def parts(self) -> Iterator[Part]:
        """Raises `NoHistoryError` and `loadtest.events.LoadError`."""
        self.say("reading")
        data = read_public(self.paths)
        t_ms = data.silver["event_time_ms"].to_numpy()
        last_day = int(t_ms[-1]) // DAY_MS
        first_of_month = np.array(last_day, "datetime64[D]").astype("datetime64[M]").astype("datetime64[D]").astype(np.int64)
        from_ms = int(first_of_month) * DAY_MS if self.from_ms is None else self.from_ms
        to_ms = int(t_ms[-1]) + 1 if self.to_ms is None else self.to_ms
        first, end = np.searchsorted(t_ms, [from_ms, to_ms]).tolist()
        if first == end:
            raise NoHistoryError("the data have no payments of that time")
        self.say(f"computing the features of {len(t_ms)} payments")
        features = features_of(data)
        score = self._scores(data, features, t_ms // DAY_MS, first, end)
        for at in range(first, end, self.part_rows):
            yield _part(data, features, score, at, min(at + self.part_rows, end))

    def _scores(
        self, data: PublicData, features: np.ndarray[tuple[int, int], np.dtype[np.float32]], day: np.ndarray, first: int, end: int
    ) -> Floats:
        """(all rows,): of the rows from `first` to `end` risk scores, of the others NaN."""
        score = np.full(len(day), np.nan)
        for week in range(int(day[first]), int(day[end - 1]) + 1, WEEK_DAYS):
            trained_to = week - DELAY_DAYS
            train = np.flatnonzero((day >= trained_to - TRAIN_DAYS) & (day < trained_to))
            fraud = data.is_fraud[train]
            if not fraud.any() or fraud.all():
                raise NoHistoryError(
                    f"there are no {TRAIN_DAYS} days with frauds a week before {np.datetime64(week, 'D')} to train a model on"
                )
            self.say(f"training for the week from {np.datetime64(week, 'D')} on {len(train)} payments")
            params = default_params(float(fraud.mean()), self.threads) | MODEL
            matrix = xgboost.QuantileDMatrix(features[train], fraud, nthread=self.threads)
            booster = xgboost.train(params, matrix, num_boost_round=ROUNDS)
            rows = np.flatnonzero((day >= week) & (day < week + WEEK_DAYS))
            rows = rows[(rows >= first) & (rows < end)]
            if len(rows):
                score[rows] = risk_scores(np.asarray(booster.inplace_predict(features[rows], missing=np.nan)))
        return score


def _part(data: PublicData, features: np.ndarray, score: Floats, first: int, end: int) -> Part:
    payments = data.silver.slice(first, end - first).combine_chunks()
    n = payments.num_rows
    return Part(
        transaction_id=pa.concat_arrays(payments["transaction_id"].chunks),
        customer_id=pa.concat_arrays(payments["customer_id"].chunks),
        requests=requests_of(payments),
        matrix=np.ascontiguousarray(features[first:end]),
        score=score[first:end],
        received_at_ms=payments["event_time_ms"].to_numpy().astype(np.int64),
        has_features=np.ones(n, bool),
        lists_version=np.full(n, NO_LISTS_VERSION),
        known=np.where(data.is_fraud[first:end], Known.FRAUD, Known.GENUINE).astype(np.int8),
        logged=np.full(n, -1),
    )
