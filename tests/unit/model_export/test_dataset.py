"""The training set is read as the table holds it, or refused with a reason that tells what to do."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from deltalake import CommitProperties, write_deltalake

from gateway.contracts.features import FEATURE_INDEX, FEATURE_NAMES, FINGERPRINT
from model_export.dataset import FINGERPRINT_PREFIX, FRAUDS_MIN, ROWS_MIN, read_training_set, training_set_of
from model_export.errors import TrainingSetError
from model_export.versions import data_digest
from tests.factories_model import START_MS, make_features, make_labels, make_rows, make_training_set, write_training_set


def refusal(rows: pa.Table) -> str:
    with pytest.raises(TrainingSetError) as refused:
        training_set_of(rows, "training_set", 7)
    return str(refused.value)


def with_column(rows: pa.Table, name: str, values: pa.Array) -> pa.Table:
    return rows.set_column(rows.schema.get_field_index(name), name, values)


def test_rows_come_in_order_of_time_with_nan_kept(tmp_path: Path) -> None:
    write_training_set(tmp_path, rows=800, seed=3)
    data = read_training_set(str(tmp_path))
    assert (data.rows, data.version) == (800, 0)
    assert data.event_time_ms[0] == START_MS
    assert (np.diff(data.event_time_ms) > 0).all()
    assert np.array_equal(data.features, make_features(800, 3), equal_nan=True)
    assert np.array_equal(data.is_fraud, make_labels(make_features(800, 3), 3))


def test_rows_of_one_instant_come_in_order_of_their_id() -> None:
    rows = make_rows(600)
    rows = with_column(rows, "event_time_ms", pa.array([START_MS] * 600, pa.int64()))
    assert np.array_equal(training_set_of(rows, "t", 0).features, make_features(600), equal_nan=True)


def test_columns_may_stand_in_any_order() -> None:
    rows = make_rows(600)
    shuffled = rows.select(list(reversed(rows.schema.names)))
    assert np.array_equal(training_set_of(shuffled, "t", 0).features, make_features(600), equal_nan=True)


def test_an_older_version_can_be_read(tmp_path: Path) -> None:
    write_training_set(tmp_path, rows=600, seed=1)
    write_training_set(tmp_path, rows=700, seed=2)
    assert read_training_set(str(tmp_path), 0).rows == 600
    assert read_training_set(str(tmp_path)).rows == 700
    assert read_training_set(str(tmp_path)).version == 1


def test_a_missing_table_names_the_command_that_writes_it(tmp_path: Path) -> None:
    with pytest.raises(TrainingSetError, match="fraudgate training-set"):
        read_training_set(str(tmp_path))


def test_a_missing_version_is_named(tmp_path: Path) -> None:
    write_training_set(tmp_path, rows=600)
    with pytest.raises(TrainingSetError, match="can't be read at version 9"):
        read_training_set(str(tmp_path), 9)


def test_features_of_another_fingerprint_are_refused_though_the_names_are_the_same(tmp_path: Path) -> None:
    write_training_set(tmp_path, rows=600, fingerprint="0123456789abcdef")
    with pytest.raises(TrainingSetError, match="written for features 0123456789abcdef"):
        read_training_set(str(tmp_path))


def test_a_feature_that_the_table_lacks_is_named() -> None:
    assert "missing card_count_1h; unknown none" in refusal(make_rows(600).drop_columns(["card_count_1h"]))


def test_a_feature_that_the_contract_lacks_is_named() -> None:
    rows = make_rows(600).append_column("card_count_90d", pa.array(np.zeros(600, np.float32)))
    assert "missing none; unknown card_count_90d" in refusal(rows)


def test_an_empty_table_is_refused() -> None:
    assert "has no rows" in refusal(make_rows(600).slice(0, 0))


def test_one_row_too_few_is_refused() -> None:
    assert f"has {ROWS_MIN - 1} rows" in refusal(make_rows(ROWS_MIN - 1))


@pytest.mark.parametrize("frauds", [0, FRAUDS_MIN - 1])
def test_too_few_frauds_are_refused(frauds: int) -> None:
    rows = with_column(make_rows(600), "is_fraud", pa.array([i < frauds for i in range(600)]))
    assert f"has {frauds} frauds" in refusal(rows)


def test_nothing_but_frauds_is_refused() -> None:
    assert "has 0 genuine rows" in refusal(with_column(make_rows(600), "is_fraud", pa.array([True] * 600)))


def test_a_row_without_a_label_is_refused() -> None:
    rows = with_column(make_rows(600), "is_fraud", pa.array([None, *[True] * 599]))
    assert "1 rows whose is_fraud is null" in refusal(rows)


def test_infinity_is_refused_with_the_feature_that_holds_it() -> None:
    values = make_features(600)[:, FEATURE_INDEX["card_count_1h"]].copy()
    values[5] = np.inf
    assert "infinite values in card_count_1h" in refusal(with_column(make_rows(600), "card_count_1h", pa.array(values)))


def test_labels_may_be_integers_and_features_doubles() -> None:
    rows = make_rows(600)
    integers = with_column(rows, "is_fraud", rows["is_fraud"].cast(pa.int32()))
    doubles = with_column(integers, FEATURE_NAMES[0], rows[FEATURE_NAMES[0]].cast(pa.float64()))
    assert training_set_of(doubles, "t", 0).frauds == training_set_of(rows, "t", 0).frauds


def test_countries_follow_their_rows_and_older_tables_do_without() -> None:
    rows = make_rows(600)
    # The last digit of each payment's id, so that a row of another payment is seen.
    named = rows.append_column(
        "country", pa.array([None if i.endswith("0") else f"C{i[-1]}" for i in rows["transaction_id"].to_pylist()])
    )
    found = training_set_of(named, "t", 0).country
    assert found is not None
    assert found.tolist()[:11] == ["", *(f"C{i}" for i in range(1, 10)), ""]
    assert training_set_of(rows, "t", 0).country is None


def test_what_the_commit_says_the_table_was_made_from_is_kept(tmp_path: Path) -> None:
    uri = write_training_set(tmp_path, rows=600)
    said = {"userMetadata": FINGERPRINT_PREFIX + FINGERPRINT, "fraudgate.as_of_ms": "17", "fraudgate.labels_version": "3"}
    write_deltalake(uri, make_rows(600), mode="overwrite", commit_properties=CommitProperties(custom_metadata=said))
    assert read_training_set(str(tmp_path)).made_from == {"fraudgate.as_of_ms": "17", "fraudgate.labels_version": "3"}
    assert read_training_set(str(tmp_path), 0).made_from == {}


def test_equal_rows_have_an_equal_digest_and_a_changed_label_another() -> None:
    data = make_training_set(600)
    assert data_digest(data) == data_digest(dataclasses.replace(data, version=9, table="elsewhere"))
    changed = data.is_fraud.copy()
    changed[0] = not changed[0]
    assert data_digest(data) != data_digest(dataclasses.replace(data, is_fraud=changed))
