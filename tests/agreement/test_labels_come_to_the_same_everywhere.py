"""Whatever the order in which a payment's labels arrive: statistics, training sets, reports and gold hold the one that stands."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
import pytest
from deltalake import DeltaTable, write_deltalake
from hypothesis import given, settings
from hypothesis import strategies as st
from pyspark.sql import SparkSession
from pyspark.sql import functions as F
from pyspark.sql.types import StructType

from deploy.toolchain import spark_env
from feature_jobs.gold import LABEL_COLUMNS, Gold, label_precedence
from feature_jobs.known_labels import label_changes, standing
from feature_jobs.label_changes import KNOWN_COLUMNS, LABEL_SCHEMA, PAYMENT_COLUMNS, changes_of
from feature_jobs.lake import DDL, TRANSACTION_DDL, create_tables
from feature_jobs.metrics import Metrics
from feature_jobs.session import build_session
from gateway.contracts import tables
from gateway.contracts.label import SOURCES, STATES, Label, precedence_of
from gateway.contracts.settings import Settings
from model_export.live import read_labels
from tests.helpers import local_settings

PAYMENTS = 3
TIMES = st.integers(1, 4)
LABEL = st.builds(
    Label,
    transaction_id=st.integers(0, PAYMENTS - 1).map(lambda n: f"t{n}"),
    card_id=st.just("c"),
    is_fraud=st.booleans(),
    source=st.sampled_from(SOURCES),
    state=st.sampled_from(STATES),
    reported_at_ms=TIMES,
    effective_at_ms=st.none() | TIMES,
)
IDS = pa.chunked_array([[f"t{n}" for n in range(PAYMENTS)]])


def stands(labels: list[Label], as_of_ms: int = 10**15) -> dict[str, bool]:
    """The slow twin: each payment's strongest label, one by one."""
    found: dict[str, Label] = {}
    for label in labels:
        held = found.get(label.transaction_id)
        if label.reported_at_ms <= as_of_ms and (held is None or precedence_of(label) > precedence_of(held)):
            found[label.transaction_id] = label
    return {i: label.is_fraud for i, label in found.items()}


def table_of(labels: list[Label], first_offset: int = 0) -> pa.Table:
    place: dict[str, Any] = {"partition": 0, "kafka_timestamp": None}
    rows = [msgspec.structs.asdict(label) | place | {"offset": first_offset + n} for n, label in enumerate(labels)]
    return pa.Table.from_pylist(rows, LABEL_SCHEMA)


def payments() -> pa.Table:
    kinds = {"transaction_id": pa.string(), "customer_id": pa.string(), "merchant_id": pa.string()}
    rows = [{"transaction_id": i} | {name: 0 for name in PAYMENT_COLUMNS if name not in kinds} for i in IDS.to_pylist()]
    return pa.Table.from_pylist(rows, pa.schema([(name, kinds.get(name, pa.int64())) for name in PAYMENT_COLUMNS]))


def counted(batches: list[list[Label]]) -> dict[str, int]:
    """What the stream of labels adds up to by payment, batch by batch: each sees of the earlier ones what stands in the table."""
    known = pa.table({name: pa.array([], pa.null()) for name in KNOWN_COLUMNS})
    out: dict[str, int] = {}
    offset = 0
    for batch in batches:
        rows, _ = changes_of(table_of(batch, offset), payments(), known)
        known = pa.concat_tables([known, rows.select(KNOWN_COLUMNS)], promote_options="permissive")
        offset += len(batch)
        for i, change in zip(rows["transaction_id"].to_pylist(), rows["change"].to_pylist(), strict=True):
            out[i] = out.get(i, 0) + change
            assert out[i] in (0, 1)
    return out


@settings(max_examples=150, deadline=None)
@given(labels=st.lists(LABEL, max_size=12), data=st.data())
def test_statistics_end_the_same_in_any_order_and_any_batches(labels: list[Label], data: st.DataObject) -> None:
    arrived = data.draw(st.permutations(labels))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(labels)), max_size=4)))
    batches = [arrived[a:b] for a, b in itertools.pairwise([0, *cuts, len(labels)])]
    assert counted(batches) == {i: int(fraud) for i, fraud in stands(labels).items()}


@settings(max_examples=150, deadline=None)
@given(labels=st.lists(LABEL, max_size=12), as_of_ms=st.integers(0, 5), data=st.data())
def test_training_sets_know_at_each_time_what_stood_then_in_labels_and_in_features(
    labels: list[Label], as_of_ms: int, data: st.DataObject
) -> None:
    arrived = table_of(data.draw(st.permutations(labels)))
    assert standing(arrived, as_of_ms) == stands(labels, as_of_ms)
    changes = label_changes(IDS, arrived)
    then = np.bincount(changes.row, np.where(changes.known <= as_of_ms, changes.change, 0), PAYMENTS).astype(int)
    assert dict(zip(IDS.to_pylist(), then.tolist(), strict=True)) == dict.fromkeys(IDS.to_pylist(), 0) | {
        i: int(fraud) for i, fraud in stands(labels, as_of_ms).items()
    }


def label(state: str, source: str, is_fraud: bool, reported_at_ms: int, effective_at_ms: int | None = None) -> Label:
    return Label(
        transaction_id="t0",
        card_id="c",
        is_fraud=is_fraud,
        source=source,  # type: ignore[arg-type]
        state=state,  # type: ignore[arg-type]
        reported_at_ms=reported_at_ms,
        effective_at_ms=effective_at_ms,
    )


def test_a_late_chargeback_corrects_the_analyst_who_let_the_payment_pass_and_a_reversal_corrects_the_chargeback() -> None:
    passed, charged = label("false_positive", "analyst", False, 2), label("reported", "chargeback", True, 40, 1)
    taken_back, again = label("reversed", "chargeback", False, 60), label("confirmed", "chargeback", True, 80)
    story = [passed, charged, taken_back, again]
    for arrival in itertools.permutations(story):
        known = [standing(table_of(list(arrival)), at).get("t0") for at in (1, 10, 50, 70, 90)]
        assert known == [None, False, True, False, True]
        assert counted([[one] for one in arrival]) == {"t0": 1}
    # A reversal that holds from before the confirmation doesn't undo it, however late it is told.
    assert stands([*story, label("reversed", "chargeback", False, 99, 70)]) == {"t0": True}


@settings(max_examples=15, deadline=None)
@given(labels=st.lists(LABEL, min_size=1, max_size=12), as_of_ms=st.integers(0, 5))
def test_reports_on_live_traffic_read_what_stands(
    tmp_path_factory: pytest.TempPathFactory, labels: list[Label], as_of_ms: int
) -> None:
    own = Settings(home=str(tmp_path_factory.mktemp("labels")))
    write_deltalake(tables.table_uri(own.tables, tables.LABELS), table_of(labels).drop_columns("kafka_timestamp"))
    found = read_labels(own, IDS, as_of_ms)
    expected = stands(labels, as_of_ms)
    assert found.known.tolist() == [i in expected for i in IDS.to_pylist()]
    assert found.is_fraud.tolist() == [expected.get(i, False) for i in IDS.to_pylist()]


@pytest.fixture(scope="module")
def spark(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SparkSession]:
    own = local_settings(tmp_path_factory.mktemp("spark"))
    with pytest.MonkeyPatch.context() as patch:
        for name, value in spark_env(own.cache_path).items():
            patch.setenv(name, value)
        session = build_session(own)
    yield session
    session.stop()


@pytest.mark.spark
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning")
def test_gold_orders_all_labels_as_the_contract_does(spark: SparkSession) -> None:
    labels = [
        label(state, source, fraud, reported, effective)
        for state, source, fraud, (reported, effective) in itertools.product(
            STATES, SOURCES, (False, True), ((1, None), (2, None), (1, 2), (2, 1))
        )
    ]
    rows = table_of(labels).drop_columns("kafka_timestamp")
    named = [F.col(source).alias(name) for name, source in LABEL_COLUMNS.items()]
    frame = spark.createDataFrame(rows).select("offset", *named).orderBy(label_precedence(""))
    order = [row["offset"] for row in frame.collect()]
    # (1, None) and (1, 1) would tie, and say the same; none of these do.
    assert order == sorted(range(len(labels)), key=lambda n: precedence_of(labels[n]))


@pytest.mark.spark
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning")
def test_gold_keeps_what_stands_whatever_comes_in_which_batch(spark: SparkSession, tmp_path: Path) -> None:
    rnd = random.Random(4)
    labels = [
        msgspec.structs.replace(
            label(rnd.choice(STATES), rnd.choice(SOURCES), rnd.random() < 0.5, rnd.randrange(1, 9), rnd.choice([None, 3, 7])),
            transaction_id=f"t{n % 40}",
        )
        for n in range(160)
    ]
    own = Settings(home=str(tmp_path))
    create_tables(spark, own)
    gold = Gold(spark, own, Metrics())
    columns = [name for name in LABEL_SCHEMA.names if name not in ("partition", "offset", "kafka_timestamp")]
    empty = StructType.fromDDL(f"t struct<{TRANSACTION_DDL}, scored_by string>, d struct<{DDL[tables.DECISIONS]}>")
    assert isinstance(empty, StructType)
    for batch_id in range(3):
        rows = table_of(labels[batch_id::3]).drop_columns("kafka_timestamp")
        came = spark.createDataFrame(rows).select(
            F.lit("l").alias("kind"),
            F.current_timestamp().alias("kafka_timestamp"),
            *(F.lit(None).cast(field.dataType).alias(field.name) for field in empty.fields),
            F.struct(*columns).alias("l"),
        )
        gold.write(came, batch_id)
    held = DeltaTable(tables.table_uri(own.tables, tables.GOLD_DECISIONS)).to_pyarrow_table().to_pylist()
    strongest = {one.transaction_id: one for one in sorted(labels, key=precedence_of)}
    assert {row["transaction_id"]: (row["is_fraud"], row["label_source"], row["label_state"]) for row in held} == {
        i: (one.is_fraud, one.source, one.state) for i, one in strongest.items()
    }
