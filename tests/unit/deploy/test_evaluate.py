"""`fraudgate evaluate` on small files of the handbook's columns."""

from __future__ import annotations

import json
from datetime import datetime, timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from deploy.evaluate import evaluate, features_of, files_of
from deploy.public_data import read_public
from gateway.contracts.features import FEATURE_INDEX, FEATURES, LABEL_AGGREGATES
from loadtest.events import LoadError

START = datetime(2018, 4, 1)  # noqa: DTZ001 - the file's times have no zone
DAYS = 50
PER_DAY = 60


def make_rows(seed: int = 1) -> dict[str, np.ndarray]:
    """Payments of 20 customers at 30 terminals over DAYS; fraud is more likely the larger the amount is."""
    rng = np.random.default_rng(seed)
    n = DAYS * PER_DAY
    amount = np.round(rng.lognormal(3, 1, n), 2)
    seconds = np.sort(rng.integers(0, DAYS * 86_400, n))
    return {
        "TRANSACTION_ID": np.arange(n),
        "TX_DATETIME": np.array([START + timedelta(seconds=int(s)) for s in seconds], "datetime64[us]"),
        "CUSTOMER_ID": rng.integers(0, 400, n),
        "TERMINAL_ID": rng.integers(0, 30, n),
        "TX_AMOUNT": amount,
        "TX_FRAUD": (rng.random(n) < np.where(amount > 60, 0.5, 0.01)).astype(np.int8),
        "TX_FRAUD_SCENARIO": rng.integers(0, 4, n),
    }


def write(path: Path, rows: dict[str, np.ndarray]) -> Path:
    pq.write_table(pa.table(rows), path)
    return path


def test_the_table_stands_beside_the_published_figures_and_the_plots_are_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(tmp_path / "payments.parquet", make_rows())
    status = evaluate(
        [f"--data={file}", "--test-from=2018-05-11", "--train-days", "7", "--weeks=1", f"--out={tmp_path / 'out'}", "--json"]
    )
    assert status == 0
    found = json.loads(capsys.readouterr().out)
    assert found["payments"] == DAYS * PER_DAY
    book, ours = found["models"].values()
    for model in (book, ours):
        assert 0.6 < model["auc"] <= 1
        assert 0 < model["ap"] <= 1
        assert 0 < model["cp100"] < 1
    assert found["published"]["xgboost_one_week"] == {"auc": 0.862, "ap": 0.639, "cp100": 0.273}
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"precision_recall.png", "calibration.png", "score_histogram.png"}
    assert all(p.read_bytes().startswith(b"\x89PNG") for p in (tmp_path / "out").iterdir())


def test_the_text_has_a_line_for_each_model_and_the_published_ones(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write(tmp_path / "payments.parquet", make_rows())
    assert (
        evaluate([f"--data={file}", "--test-from=2018-05-11", "--train-days", "7", "--weeks=1", f"--out={tmp_path / 'out'}"]) == 0
    )
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines[3:7]] == [
        "published: XGBoost, one week of training",
        "published: best in the book, four weeks' mean",
        "the book's 15 features, XGBoost as published",
        "fraudgate, 7 days of training",
    ]
    assert any(line.startswith("calibration on that week: mean probability 0.") for line in lines)


def test_a_file_in_two_parts_gives_what_the_whole_gives(tmp_path: Path) -> None:
    rows = make_rows()
    whole = read_public([write(tmp_path / "whole.parquet", rows)])
    half = len(rows["TX_AMOUNT"]) // 2
    parts = read_public(
        [
            write(tmp_path / "a.parquet", {k: v[:half] for k, v in rows.items()}),
            write(tmp_path / "b.parquet", {k: v[half:] for k, v in rows.items()}),
        ]
    )
    assert parts.silver.equals(whole.silver)
    assert parts.labels.equals(whole.labels)
    assert np.array_equal(parts.is_fraud, whole.is_fraud)


def test_of_a_folder_the_files_with_the_handbooks_transactions_are_read(tmp_path: Path) -> None:
    file = write(tmp_path / "payments.parquet", make_rows())
    pq.write_table(pa.table({"TRANSACTION_ID": [1]}), tmp_path / "features.parquet")
    assert files_of([tmp_path]) == [file]
    (tmp_path / "empty").mkdir()
    with pytest.raises(LoadError, match="holds no file of the handbook's transactions"):
        files_of([tmp_path / "empty"])


def test_the_same_payment_in_two_files_is_refused(tmp_path: Path) -> None:
    file = write(tmp_path / "payments.parquet", make_rows())
    with pytest.raises(LoadError, match="a transaction_id stands in the files twice"):
        read_public([file, file])


def test_a_test_week_outside_of_the_data_is_an_error_that_tells_what_the_data_hold(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(tmp_path / "payments.parquet", make_rows())
    assert evaluate([f"--data={file}", "--test-from=2018-08-08", f"--out={tmp_path}"]) == 1
    assert "the data, 2018-04-01 to 2018-05-20, don't hold the test week from 2018-08-08" in capsys.readouterr().err


def test_a_file_that_is_no_data_set_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "notes.parquet"
    pq.write_table(pa.table({"a": [1]}), file)
    assert evaluate([f"--data={file}", f"--out={tmp_path}"]) == 1
    assert "has the columns of no known data set" in capsys.readouterr().err


# The leaks that look like success.


def test_the_answer_never_reaches_a_feature_by_the_scenario_column(tmp_path: Path) -> None:
    rows = make_rows()
    features = features_of(read_public([write(tmp_path / "a.parquet", rows)]))
    other = features_of(read_public([write(tmp_path / "b.parquet", rows | {"TX_FRAUD_SCENARIO": np.zeros(DAYS * PER_DAY)})]))
    assert np.array_equal(features, other, equal_nan=True)


def test_no_label_of_the_last_seven_days_and_not_the_payments_own_reaches_a_feature(tmp_path: Path) -> None:
    rows = make_rows()
    at_us = rows["TX_DATETIME"].astype("datetime64[us]").astype(np.int64)
    row = DAYS * PER_DAY - 1
    recent = at_us > at_us[row] - 7 * 86_400 * 10**6
    flipped = rows | {"TX_FRAUD": np.where(recent, 1 - rows["TX_FRAUD"], rows["TX_FRAUD"])}
    features = features_of(read_public([write(tmp_path / "a.parquet", rows)]))
    other = features_of(read_public([write(tmp_path / "b.parquet", flipped)]))
    assert np.array_equal(features[row], other[row], equal_nan=True)


def test_labels_older_than_the_delay_do_reach_the_features_of_labels_and_no_others(tmp_path: Path) -> None:
    rows = make_rows()
    none = rows | {"TX_FRAUD": np.zeros(DAYS * PER_DAY, np.int8)}
    features = features_of(read_public([write(tmp_path / "a.parquet", rows)]))
    other = features_of(read_public([write(tmp_path / "b.parquet", none)]))
    changed = {i for i in range(features.shape[1]) if not np.array_equal(features[:, i], other[:, i], equal_nan=True)}
    assert changed == {FEATURE_INDEX[f.name] for f in FEATURES if f.aggregate in LABEL_AGGREGATES - {"label_count"}}
