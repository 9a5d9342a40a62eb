"""Fits XGBoost on the older part of a training set and measures it on the newest part.

Called by `fraudgate train`. 100,000 rows by 82 features take some seconds on two cores (docs/models.md has the figures).
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import xgboost

from model_export.dataset import FRAUDS_MIN, Floats, TrainingSet
from model_export.errors import TrainingSetError
from model_export.metrics import quality

TRAIN_SHARE = 0.70
VALIDATION_SHARE = 0.15
assert 0 < TRAIN_SHARE < TRAIN_SHARE + VALIDATION_SHARE < 1

# Fewer frauds than this in a part make early stopping and the metrics a matter of luck.
PART_FRAUDS_MIN = 5
# However bunched in time, the fewest frauds that a training set may have can be cut so that each part gets its own.
assert int(FRAUDS_MIN * (1 - TRAIN_SHARE - VALIDATION_SHARE)) >= PART_FRAUDS_MIN
TRAIN_ROWS_MIN = 200

ROUNDS_MAX = 400
EARLY_STOPPING_ROUNDS = 30
SEED = 20_180_808


@dataclass(frozen=True)
class Split:
    """Three slices of the time-ordered rows: all of `train` is older than all of `validation`, and that than all of `test`."""

    train: slice
    validation: slice
    test: slice


@dataclass(frozen=True, kw_only=True)
class TrainedModel:
    """`booster` holds exactly the trees up to the best round of early stopping. `params` is what it was trained with.

    `metrics` are those of `model_export.metrics.quality` on the test part, under test_*, and on the validation part, under
    validation_*; `training_rows` and `training_frauds` count the rows that the trees were grown on.
    """

    booster: xgboost.Booster
    params: dict[str, str | int | float]
    split: Split
    metrics: dict[str, float]
    trees: int
    rounds_run: int
    training_rows: int
    training_frauds: int


def time_split(data: TrainingSet) -> Split:
    """70 % oldest rows to train, 15 % to stop early, 15 % newest to measure; rows of one instant stay together.

    Where frauds are so bunched in time that a part would see too few, the cuts are put at the same shares of the frauds instead.
    Raises `TrainingSetError` when that doesn't help either.
    """
    by_rows = (data.event_time_ms[int(data.rows * share)] for share in (TRAIN_SHARE, TRAIN_SHARE + VALIDATION_SHARE))
    split = _split_at(data, *by_rows)
    if _too_small(data, split) is None:
        return split
    fraud_times = data.event_time_ms[data.is_fraud]
    by_frauds = (fraud_times[int(len(fraud_times) * share)] for share in (TRAIN_SHARE, TRAIN_SHARE + VALIDATION_SHARE))
    split = _split_at(data, *by_frauds)
    problem = _too_small(data, split)
    if problem is not None:
        raise TrainingSetError(
            f"version {data.version} of {data.table} can't be cut by time into train, validation and test: {problem}; "
            "it needs labels over a longer time"
        )
    return split


def _split_at(data: TrainingSet, validation_from_ms: np.int64, test_from_ms: np.int64) -> Split:
    first, second = (int(np.searchsorted(data.event_time_ms, t, side="left")) for t in (validation_from_ms, test_from_ms))
    return Split(slice(0, first), slice(first, second), slice(second, data.rows))


def _too_small(data: TrainingSet, split: Split) -> str | None:
    """What a part lacks, or None."""
    for name, part in (("train", split.train), ("validation", split.validation), ("test", split.test)):
        rows, frauds = part.stop - part.start, int(data.is_fraud[part].sum())
        if frauds < PART_FRAUDS_MIN:
            return f"{name} has {frauds} frauds of at least {PART_FRAUDS_MIN}"
        if rows == frauds:
            return f"{name} has no genuine payment"
    if split.train.stop < TRAIN_ROWS_MIN:
        return f"train has {split.train.stop} rows of at least {TRAIN_ROWS_MIN}"
    return None


def default_params(fraud_rate: float, threads: int | None = None) -> dict[str, str | int | float]:
    """Parameters of XGBoost, each for a reason.

    base_score: the prior, given outright, since the version's own estimate of it is not the same in each XGBoost and an export
    has to carry it. No scale_pos_weight: weighting frauds up would shift every probability, and the risk score and the policy's
    thresholds read probabilities. max_delta_step bounds leaf weights, which is what rare positives need instead.
    """
    return {
        "objective": "binary:logistic",
        "eval_metric": "logloss",
        "tree_method": "hist",
        "base_score": fraud_rate,
        "eta": 0.1,
        "max_depth": 5,
        "min_child_weight": 2.0,
        "max_delta_step": 2.0,
        "lambda": 2.0,
        "subsample": 0.8,
        "colsample_bytree": 0.7,
        "seed": SEED,
        "nthread": threads or len(os.sched_getaffinity(0)),
    }


def train(data: TrainingSet, threads: int | None = None, rounds_max: int = ROUNDS_MAX) -> TrainedModel:
    """A model of `data`, measured on its newest part. Seeded: the same rows give the same trees. Raises `TrainingSetError`."""
    split = time_split(data)
    labels = data.is_fraud.astype(np.float32)
    fraud_rate = float(labels[split.train].mean())
    params = default_params(fraud_rate, threads)
    grown_on = xgboost.QuantileDMatrix(data.features[split.train], labels[split.train], nthread=params["nthread"])
    stopped_on = xgboost.QuantileDMatrix(
        data.features[split.validation], labels[split.validation], ref=grown_on, nthread=params["nthread"]
    )
    history: dict[str, dict[str, list[float]]] = {}
    booster = xgboost.train(
        params,
        grown_on,
        num_boost_round=rounds_max,
        evals=[(stopped_on, "validation")],
        early_stopping_rounds=EARLY_STOPPING_ROUNDS,
        evals_result=history,
        verbose_eval=False,
    )
    trees = booster.best_iteration + 1
    booster = booster[:trees]
    metrics = {
        f"{name}_{metric}": value
        for name, part in (("test", split.test), ("validation", split.validation))
        for metric, value in quality(data.is_fraud[part], probabilities(booster, data.features[part])).items()
    }
    return TrainedModel(
        booster=booster,
        params=params,
        split=split,
        metrics=metrics,
        trees=trees,
        rounds_run=len(history["validation"]["logloss"]),
        training_rows=split.train.stop,
        training_frauds=int(data.is_fraud[split.train].sum()),
    )


def probabilities(booster: xgboost.Booster, rows: Floats) -> npt.NDArray[np.float32]:
    """Probability of fraud, (rows,), from XGBoost itself. NaN is missing; infinities are ordered like any other number."""
    out: npt.NDArray[np.float32] = np.asarray(booster.inplace_predict(rows, missing=np.nan), np.float32)
    assert out.shape == (len(rows),)
    return out
