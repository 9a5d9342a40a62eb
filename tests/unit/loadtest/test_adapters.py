"""The public data sets as payments and labels, on small files with their columns."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gateway.contracts.instants import instant_ms
from gateway.contracts.transaction import check
from loadtest.adapters import FRAUD_LABEL_DELAY_MS, SPARKOV_MCC, Dataset, merchant_slug
from loadtest.events import LoadError


def handbook_row(number: int, at: str, amount: float = 12.34, fraud: int = 0) -> dict[str, Any]:
    return {
        "TRANSACTION_ID": number,
        "TX_DATETIME": datetime.fromisoformat(at),
        "CUSTOMER_ID": 596,
        "TERMINAL_ID": 3156,
        "TX_AMOUNT": amount,
        "TX_TIME_SECONDS": 31,
        "TX_TIME_DAYS": 0,
        "TX_FRAUD": fraud,
        "TX_FRAUD_SCENARIO": fraud,
    }


def sparkov_row(number: int, **changed: Any) -> dict[str, Any]:
    return {
        "transaction_id": number,
        "event_time": datetime.fromisoformat("2019-01-01T00:00:04.123"),
        "card_id": 171,
        "merchant": "fraud_O'Connell, Jenkins and Söhne",
        "category": "grocery_net",
        "amount": 75.99,
        "card_lat": 47.0,
        "card_long": -122.0,
        "merch_lat": 47.76,
        "merch_long": -122.95,
        "is_fraud": 0,
    } | changed


def write(path: Path, rows: list[dict[str, Any]], group_rows: int = 1_000) -> Path:
    table = pa.Table.from_pylist(rows)
    for i, field in enumerate(table.schema):
        if pa.types.is_timestamp(field.type):
            table = table.set_column(i, field.name, table.column(i).cast(pa.timestamp("us")))
    pq.write_table(table, path, row_group_size=group_rows)
    return path


def test_a_handbook_row_becomes_a_payment_without_its_label(tmp_path: Path) -> None:
    path = write(tmp_path / "h.parquet", [handbook_row(7, "2018-04-01T00:00:31", 57.16, fraud=1)])
    data = Dataset(path)
    (event,) = data.events()
    t = event.transaction
    assert (t.transaction_id, t.card_id, t.customer_id, t.merchant_id) == ("hb-7", "hb-c596", "hb-c596", "hb-t3156")
    assert (t.amount_minor, t.currency, t.event_time_ms) == (5_716, "EUR", instant_ms("2018-04-01T00:00:31"))
    assert event.is_fraud
    check(t, t.event_time_ms)
    (label,) = data.labels_remaining()
    assert (label.transaction_id, label.is_fraud, label.reported_at_ms) == ("hb-7", True, t.event_time_ms + FRAUD_LABEL_DELAY_MS)


def test_amounts_are_rounded_to_the_nearest_cent(tmp_path: Path) -> None:
    # 5 * 22.06 is not the double nearest to 110.30.
    amounts = [1.005, 0.0, 110.30000000000001, 5 * 22.06, 0.29, 4.35, 1_108.8500000000001]
    path = write(tmp_path / "h.parquet", [handbook_row(i, "2018-04-01T00:00:00", a) for i, a in enumerate(amounts)])
    minor = [e.transaction.amount_minor for e in Dataset(path).events()]
    assert minor[1:] == [0, 11_030, 11_030, 29, 435, 110_885]


def test_a_range_of_dates_is_half_open(tmp_path: Path) -> None:
    times = ["2018-08-07T23:59:59", "2018-08-08T00:00:00", "2018-08-09T23:59:59", "2018-08-10T00:00:00"]
    path = write(tmp_path / "h.parquet", [handbook_row(i, at) for i, at in enumerate(times)], group_rows=1)
    data = Dataset(path, instant_ms("2018-08-08"), instant_ms("2018-08-10"))
    assert data.count() == 2
    assert [e.transaction.transaction_id for e in data.events()] == ["hb-1", "hb-2"]


def test_rows_keep_the_order_of_the_file(tmp_path: Path) -> None:
    rows = [handbook_row(i, "2018-08-08T00:00:01") for i in (3, 5, 9)] + [handbook_row(1, "2018-08-08T00:00:02")]
    path = write(tmp_path / "h.parquet", rows)
    assert [e.transaction.transaction_id for e in Dataset(path).events()] == ["hb-3", "hb-5", "hb-9", "hb-1"]


def test_a_file_that_runs_backwards_is_refused(tmp_path: Path) -> None:
    rows = [handbook_row(1, "2018-08-08T00:00:02"), handbook_row(2, "2018-08-08T00:00:01")]
    for group_rows in (1, 1_000):
        with pytest.raises(LoadError, match="not in order"):
            list(Dataset(write(tmp_path / "h.parquet", rows, group_rows)).events())


def test_labels_wait_for_their_delay(tmp_path: Path) -> None:
    rows = [handbook_row(1, "2018-08-01T00:00:00", fraud=1), handbook_row(2, "2018-08-02T00:00:00", fraud=1)]
    data = Dataset(write(tmp_path / "h.parquet", rows))
    list(data.events())
    assert data.labels_due(instant_ms("2018-08-07T23:59:59")) == []
    assert [label.transaction_id for label in data.labels_due(instant_ms("2018-08-08"))] == ["hb-1"]
    assert [label.transaction_id for label in data.labels_remaining()] == ["hb-2"]


def test_a_sparkov_row_becomes_a_payment_with_a_place(tmp_path: Path) -> None:
    (event,) = Dataset(write(tmp_path / "s.parquet", [sparkov_row(3)])).events()
    t = event.transaction
    assert (t.transaction_id, t.card_id, t.merchant_id) == ("sk-3", "sk-c171", "sk-m-o-connell-jenkins-and-s-hne")
    assert (t.amount_minor, t.currency, t.mcc, t.channel) == (7_599, "USD", "5411", "ecom")
    assert (t.latitude, t.longitude) == (47.76, -122.95)
    assert t.event_time_ms == instant_ms("2019-01-01T00:00:04.123")
    check(t, t.event_time_ms)


def test_every_category_has_a_merchant_category_code(tmp_path: Path) -> None:
    rows = [sparkov_row(i, category=c) for i, c in enumerate(SPARKOV_MCC)]
    found = [e.transaction for e in Dataset(write(tmp_path / "s.parquet", rows)).events()]
    assert [t.mcc for t in found] == list(SPARKOV_MCC.values())
    assert {t.channel for t in found} == {"ecom", "pos"}


def test_a_slug_stays_within_the_pattern_of_ids() -> None:
    assert len(merchant_slug("fraud_" + "x, " * 100)) <= 64


def test_an_unknown_file_is_named_with_what_is_known(tmp_path: Path) -> None:
    with pytest.raises(LoadError, match="TRANSACTION_ID"):
        Dataset(write(tmp_path / "x.parquet", [{"a": 1}]))
    with pytest.raises(LoadError, match="can't be read"):
        Dataset(tmp_path / "missing.parquet")
    (tmp_path / "text.parquet").write_text("no parquet")
    with pytest.raises(LoadError, match="can't be read"):
        Dataset(tmp_path / "text.parquet")
