"""The published row of the benchmark comes out of the published features and parameters: so split and metrics are the book's."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from deploy.evaluate import TEST_FROM
from deploy.public_data import read_public
from feature_jobs.handbook import handbook_features
from feature_jobs.training_set import codes_of
from gateway.contracts.instants import instant_ms
from gateway.contracts.settings import Settings
from model_export.benchmark import DAY_MS, Payments, fold, ranking
from model_export.evaluate import PUBLISHED_ONE_WEEK, Evaluation

TRANSACTIONS = "handbook-2018-04-to-08.parquet"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_xgboost_as_published_ranks_the_test_week_as_published() -> None:
    path = Path(Settings().data_dir) / TRANSACTIONS
    if not path.exists():
        pytest.skip(f"{path} is not there: the public data sets are optional")
    data = read_public([path])
    day = data.silver["event_time_ms"].to_numpy() // DAY_MS
    payments = Payments(day, codes_of(data.silver["customer_id"])[0], data.is_fraud)
    test_day = instant_ms(TEST_FROM) // DAY_MS
    chosen = fold(payments, test_day)
    # Counts that the book's split is known by, and what a ranking that knows the answer reaches.
    assert (len(chosen.train), int(payments.is_fraud[chosen.train].sum())) == (67_240, 598)
    assert (len(chosen.test), int(payments.is_fraud[chosen.test].sum())) == (58_264, 385)
    assert ranking(payments, chosen.test, payments.is_fraud[chosen.test].astype(np.float64)).cp100 == pytest.approx(
        0.3971, abs=5e-5
    )
    found = Evaluation(payments, handbook_features(data.silver, data.labels).astype(np.float32)).published(test_day).ranking
    assert (round(found.auc, 3), round(found.ap, 3), round(found.cp100, 3)) == (
        PUBLISHED_ONE_WEEK.auc,
        PUBLISHED_ONE_WEEK.ap,
        PUBLISHED_ONE_WEEK.cp100,
    )
