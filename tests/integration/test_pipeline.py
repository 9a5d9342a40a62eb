"""The whole pipeline as a person runs it: the demo from an empty directory, a replay of public data, and a replay with kills.

One stack for the module: the demo starts it, trains the model and leaves everything running for the tests after it.
"""

from __future__ import annotations

import dataclasses
import json
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pyarrow.dataset as ds
import pytest
import redis
from confluent_kafka import Consumer, TopicPartition
from deltalake import DeltaTable

from deploy.explain import explanation_of
from deploy.history.backtest import compare
from deploy.history.backtest_rows import DeltaHistory
from deploy.history.list_books import read_books
from deploy.history.upkeep import order_receipts, vacuum
from deploy.receipts import model_of, receipt_in_tables
from deploy.stack import Stack
from gateway.contracts import layout, tables
from gateway.contracts.decision import Outcome
from gateway.contracts.features import ENTITY_INDEX, FEATURES
from gateway.contracts.instants import instant_ms
from gateway.contracts.settings import Settings
from gateway.contracts.topics import DECISIONS
from gateway.policy import load_policy
from loadtest.adapters import Dataset
from model_export.cost import CostModel
from tests.factories_history import read_rows, rewrite_decisions
from tests.factories_model import make_model_dir
from tests.helpers import local_settings, run_command, wait_until
from tests.receipts import Recount, read_topic

pytestmark = [pytest.mark.integration, pytest.mark.spark, pytest.mark.timeout(900)]

LIVE = 20_000
HISTORY = 30_000
SAMPLE = 1_000
EXPLAINED = 25
HANDBOOK = "handbook-2018-04-to-08.parquet"


@dataclasses.dataclass
class Pipeline:
    settings: Settings
    stack: Stack
    report: dict[str, Any]
    output: str

    def replay(self, data: Path, from_day: str, to_day: str, rate: int, report: Path) -> dict[str, Any]:
        """The accounting of `fraudgate replay`, which must have ended well."""
        options = ("--from", from_day, "--to", to_day, "--rate", str(rate), "--json", str(report))
        ended = run_command(self.settings, "replay", str(data), *options, timeout_s=300)
        assert ended.returncode == 0, ended.stdout + ended.stderr
        accounting: dict[str, Any] = json.loads(report.read_text())["accounting"]
        return accounting

    def receipts(self, from_day: str, to_day: str) -> list[dict[str, Any]]:
        """Receipts of handbook rows with event times in [from_day, to_day)."""
        first, end = instant_ms(from_day), instant_ms(to_day)
        found = read_topic(self.settings, DECISIONS)
        return [r for r in found if r["transaction_id"].startswith("hb-") and first <= r["transaction"]["event_time_ms"] < end]


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pipeline]:
    home = tmp_path_factory.mktemp("pipeline")
    settings = local_settings(home / "home")
    stack = Stack(settings)
    try:
        report = home / "demo.json"
        ended = run_command(
            settings, "demo", "--keep", "--live", str(LIVE), "--history", str(HISTORY), "--json", str(report), timeout_s=780
        )
        assert ended.returncode == 0, ended.stdout + ended.stderr
        yield Pipeline(settings, stack, json.loads(report.read_text()), ended.stdout)
    finally:
        stack.stop()


@pytest.fixture
def handbook() -> Path:
    path = Path(Settings().data_dir) / HANDBOOK
    if not path.exists():
        pytest.skip(f"{path} is not there: the public data sets are optional")
    return path


def test_the_demo_accounts_for_every_one_of_20000_transactions(pipeline: Pipeline) -> None:
    report = pipeline.report
    assert report["events_in"] == LIVE
    assert report["decided"] + report["quarantined"] == LIVE
    assert report["quarantined"] > 0, "the demo sends some payments that can't be read"
    assert report["unaccounted"] == report["duplicates"] == 0
    assert sum(report["decisions"].values()) == report["decided"]
    for name in ("bronze", "silver", "gold", "redis"):
        assert report["freshness_s"][name]["rows"] > 0
    assert 0 < report["model"]["average_precision"] <= 1


def test_a_replay_2000_a_second_has_the_features_of_a_naive_recount(pipeline: Pipeline, handbook: Path, tmp_path: Path) -> None:
    accounting = pipeline.replay(handbook, "2018-08-08", "2018-08-10", 2_000, tmp_path / "replay.json")
    assert accounting["events_in"] == accounting["decided"] == 19_381
    assert accounting["unaccounted"] == accounting["duplicates"] == accounting["quarantined"] == 0
    recount = Recount(pipeline.receipts("2018-08-08", "2018-08-10"))
    assert len(recount.receipts) == 19_381
    assert recount.gaps() == []
    assert recount.differences(SAMPLE, seed=1) == []


@pytest.mark.slow
def test_killing_gateway_driver_and_redis_loses_nothing_and_counts_nothing_twice(
    pipeline: Pipeline, handbook: Path, tmp_path: Path
) -> None:
    stack, failures = pipeline.stack, []
    before = decided_count(pipeline)

    def kill_one_after_another() -> None:
        try:
            for name, after in (("gateway", 1_500), ("redis", 4_500), ("jobs", 6_500)):
                wait_until(lambda after=after: decided_count(pipeline) >= before + after, 60, f"{after} decisions")  # type: ignore[misc]
                stack.kill(name)
                stack.start([name])
        # Whatever went wrong in the thread belongs to the test.
        except BaseException as exc:  # noqa: BLE001
            failures.append(exc)

    thread = threading.Thread(target=kill_one_after_another)
    thread.start()
    accounting = pipeline.replay(handbook, "2018-08-10", "2018-08-11", 400, tmp_path / "replay.json")
    thread.join()
    assert failures == []
    assert accounting["events_in"] == accounting["decided"]
    assert accounting["unaccounted"] == accounting["duplicates"] == 0
    # All of the data set that was sent: by itself, this test follows no other that has sent two days before.
    first = "2018-08-08" if pipeline.receipts("2018-08-08", "2018-08-10") else "2018-08-10"
    sent = list(Dataset(handbook, instant_ms(first), instant_ms("2018-08-11")).events())
    wait_until(lambda: handbook_rows(pipeline, tables.SILVER) >= len(sent), 120, "silver holds every row")
    assert handbook_rows(pipeline, tables.SILVER) == len(sent)
    expected = Counter(("card", e.transaction.card_id) for e in sent) + Counter(
        ("merchant", e.transaction.merchant_id) for e in sent
    )
    wait_until(lambda: not tile_count_differences(pipeline, expected), 60, "the tiles hold every payment exactly once")


@pytest.mark.slow
def test_an_emptied_redis_is_refilled_while_scoring_goes_on_and_answers_say_so(
    pipeline: Pipeline, handbook: Path, tmp_path: Path
) -> None:
    def progress() -> layout.Progress | None:
        with redis.Redis.from_url(pipeline.settings.redis) as client:
            held = client.get(layout.PROGRESS_KEY)
        return None if held is None else msgspec.msgpack.decode(held, type=layout.Progress)

    before = decided_count(pipeline)
    failures: list[BaseException] = []

    def empty() -> None:
        try:
            wait_until(lambda: decided_count(pipeline) >= before + 4_000, 60, "4,000 decisions")
            with redis.Redis.from_url(pipeline.settings.redis) as client:
                client.flushall()
        # Whatever went wrong in the thread belongs to the test.
        except BaseException as exc:  # noqa: BLE001
            failures.append(exc)

    thread = threading.Thread(target=empty)
    thread.start()
    pipeline.replay(handbook, "2018-08-12", "2018-08-13", 800, tmp_path / "emptied.json")
    thread.join()
    assert failures == []
    wait_until(lambda: progress() is not None, 120, "the jobs have noticed and rebuilt")
    stale = [r for r in pipeline.receipts("2018-08-12", "2018-08-13") if "stale_features" in r["degraded"]]
    assert len(stale) > 1_000, "what was decided on an empty Redis says so"
    # Whole again once receipts from after the loss have come through.
    for day in range(13, 19):
        pipeline.replay(handbook, f"2018-08-{day}", f"2018-08-{day + 1}", 800, tmp_path / "after.json")
        held = progress()
        if held is not None and held.lost_at_ms == 0:
            break
    wait_until(lambda: (held := progress()) is not None and held.lost_at_ms == 0, 60, "Redis is whole again")
    accounting = pipeline.replay(handbook, "2018-08-20", "2018-08-21", 800, tmp_path / "whole.json")
    fresh = [r for r in pipeline.receipts("2018-08-20", "2018-08-21") if not r["degraded"] or "stale_features" not in r["degraded"]]
    assert len(fresh) > accounting["events_in"] // 2


def test_every_logged_feature_is_recomputed_to_the_bit(pipeline: Pipeline) -> None:
    """Of the demo (with history before it), the replay, and the replay during which gateway, driver and Redis were killed."""
    # Of the topic, not of silver alone: that may be behind as well, and then nothing seems to be missing.
    wanted = len({receipt["transaction_id"] for receipt in read_topic(pipeline.settings, DECISIONS)})
    wait_until(lambda: rows_of(pipeline, tables.DECISIONS) >= wanted, 120, "every receipt stands in its table")
    wait_until(lambda: not decisions_missing(pipeline), 120, "and its payment in silver")
    ended = run_command(pipeline.settings, "parity", "--json", timeout_s=120)
    report = json.loads(ended.stdout)
    assert report["examples"] == []
    assert ended.returncode == 0
    assert report["different"] == 0
    # What a busy machine decided without Redis has no features to compare.
    assert report["rows"] > 10_000
    assert report["compared"] == report["equal"] == report["rows"] * len(FEATURES)


def test_receipts_of_the_demo_are_explained_and_their_counterfactuals_flip_them(pipeline: Pipeline) -> None:
    table = DeltaTable(tables.table_uri(pipeline.settings.tables, tables.DECISIONS)).to_pyarrow_dataset()
    scored = ds.field("probability").is_valid() & (ds.field("decision") != Outcome.APPROVE.value)
    ids = table.to_table(columns=["transaction_id"], filter=scored)["transaction_id"].to_pylist()[:EXPLAINED]
    assert len(ids) == EXPLAINED
    policy, flipped = load_policy(""), 0
    for transaction_id in ids:
        receipt = receipt_in_tables(pipeline.settings, transaction_id)
        with model_of(pipeline.settings, receipt) as loaded:
            found = explanation_of(receipt, loaded, policy)
        assert found.decided_again == receipt.decision
        assert found.notes == []
        assert abs(sum(p.contribution for p in found.by_feature) + found.expected - found.margin) <= 1e-5
        if found.approved_if is not None:
            assert found.approved_if.decision == Outcome.APPROVE.value
            flipped += 1
    assert flipped >= EXPLAINED * 0.8


def test_an_unchanged_policy_decides_every_receipt_again_as_it_did(pipeline: Pipeline) -> None:
    """With features and without, with a model and without: gateway and Redis were killed meanwhile."""
    history = DeltaHistory(pipeline.settings, None, None, time.time_ns() // 1_000_000, 7)
    policy = load_policy("")
    found = compare(policy, policy, history.parts(), read_books(pipeline.settings), CostModel())
    assert found.payments > LIVE * 0.9
    assert sum(history.left_out.values()) == 0
    assert found.current.as_logged == found.current.logged == found.payments
    assert found.changed == 0


@pytest.mark.slow
def test_every_decision_comes_out_identical_after_model_and_policy_have_changed_and_files_were_rewritten(
    pipeline: Pipeline, tmp_path: Path
) -> None:
    """Of the demo and the replays, with kills among them; then one changed byte is found."""
    settings = pipeline.settings
    wait_until(lambda: not decisions_missing(pipeline), 120, "every receipt stands in its table")
    policy = tmp_path / "policy"
    for name, text in load_policy("").files.items():
        (policy / name).parent.mkdir(parents=True, exist_ok=True)
        (policy / name).write_bytes(text.replace(b"challenge: 600", b"challenge: 10"))
    changed = dataclasses.replace(settings, policy_path=str(policy))
    Stack(changed).restart("gateway")
    make_model_dir(settings.models_path, version="1000", seed=7)
    ended = run_command(changed, "maintain", "--once", timeout_s=300)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    order_receipts(settings, always=True)
    vacuum(settings, tables.DECISIONS, hours=0)
    ended = run_command(changed, "replay-decision", "--all", "--json", timeout_s=300)
    report = json.loads(ended.stdout)
    assert (report["different"], report["not_replayed"]) == ([], {})
    assert report["identical"] == report["decisions"] >= LIVE * 0.9
    assert ended.returncode == 0
    ended = run_command(changed, "audit", timeout_s=300)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    pipeline.stack.stop(["jobs"])
    change_a_byte(settings)
    ended = run_command(changed, "audit", timeout_s=300)
    assert ended.returncode == 1
    assert "BROKEN in 1 places" in ended.stdout


def change_a_byte(settings: Settings) -> None:
    """Of one payload."""
    rows = read_rows(settings, tables.DECISIONS)
    payload = rows[17]["payload"]
    rows[17]["payload"] = payload[:-9] + bytes([payload[-9] ^ 1]) + payload[-8:]
    rewrite_decisions(settings, rows)


def decisions_missing(pipeline: Pipeline) -> int:
    """Payments in silver whose receipt isn't in its table yet; history never has one."""
    return rows_of(pipeline, tables.SILVER) - HISTORY - rows_of(pipeline, tables.DECISIONS)


def rows_of(pipeline: Pipeline, table: str) -> int:
    return int(DeltaTable(tables.table_uri(pipeline.settings.tables, table)).count())


def decided_count(pipeline: Pipeline) -> int:
    """About how many decisions there are, cheaply: where the topic's partitions end."""
    consumer = Consumer({"bootstrap.servers": pipeline.settings.bootstrap, "group.id": "tests-never-committed"})
    try:
        partitions = consumer.list_topics(DECISIONS, timeout=10).topics[DECISIONS].partitions
        return sum(consumer.get_watermark_offsets(TopicPartition(DECISIONS, p), timeout=10)[1] for p in partitions)
    finally:
        consumer.close()


def handbook_rows(pipeline: Pipeline, name: str) -> int:
    ids = DeltaTable(tables.table_uri(pipeline.settings.tables, name)).to_pyarrow_table(columns=["transaction_id"])[
        "transaction_id"
    ]
    found = [i for i in ids.to_pylist() if i.startswith("hb-")]
    assert len(found) == len(set(found)), "a transaction stands twice in the table"
    return len(found)


def tile_count_differences(pipeline: Pipeline, expected: Counter[tuple[str, str]]) -> list[str]:
    """Entities whose tiles of a day add up to another number of payments."""
    lines = []
    with redis.Redis.from_url(pipeline.settings.redis) as client:
        names = list(expected)
        values = client.mget([layout.tiles_key(*name) for name in names])
        assert isinstance(values, list)
        for name, value in zip(names, values, strict=True):
            found = 0
            if value is not None:
                records = layout.unpack_tiles([value], [ENTITY_INDEX[name[0]]], [layout.key_check(*name)]).tiles
                found = int(records["count"][records["resolution_min"] == 1440].sum())
            if found != expected[name]:
                lines.append(f"{name}: {found} in tiles, {expected[name]} sent")
    return lines
