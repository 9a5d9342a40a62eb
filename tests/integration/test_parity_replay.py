"""A month of each public data set through the whole pipeline while gateway and Spark are killed: not one feature value may differ.

About ten minutes on two cores: `make test-slow`.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis
from confluent_kafka import Consumer, TopicPartition
from deltalake import DeltaTable

from deploy.stack import Stack
from gateway.contracts import layout, tables
from gateway.contracts.features import FEATURES
from gateway.contracts.settings import Settings
from gateway.contracts.topics import DECISIONS
from tests.helpers import local_settings, run_command, wait_until

pytestmark = [pytest.mark.integration, pytest.mark.spark, pytest.mark.slow, pytest.mark.timeout(2400)]

RATE = 2_000
WARM_UP = ("handbook-2018-04-to-08.parquet", "2018-07-31", "2018-08-01")
REPLAYS = (
    ("handbook-2018-04-to-08.parquet", "2018-08-01", "2018-09-01"),
    ("sparkov-2019-01-to-05.parquet", "2019-05-01", "2019-06-01"),
)
# What is killed once so many decisions have been made.
KILLS = (("jobs", 40_000), ("gateway", 90_000), ("jobs", 150_000), ("gateway", 220_000))
SENT_MIN = 300_000
# Those flagged stale are left out: a fifth to a quarter, more the further Spark lags on a loaded machine.
COMPARED_MIN = 200_000


@pytest.fixture
def stack(tmp_path: Path) -> Iterator[Stack]:
    running = Stack(local_settings(tmp_path / "home"))
    try:
        running.up(everything=True)
        yield running
    finally:
        running.stop()


def replay(settings: Settings, name: str, first: str, end: str, folder: Path) -> int:
    """Sends the payments of a period with their labels; how many there were, all of them decided once."""
    path = Path(Settings().data_dir) / name
    if not path.exists():
        pytest.skip(f"{path} is not there: the public data sets are optional")
    report = folder / f"{name}.json"
    options = ("--from", first, "--to", end, "--rate", str(RATE), "--labels", "--wait-s", "300", "--json", str(report))
    ended = run_command(settings, "replay", str(path), *options, timeout_s=900)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    accounting = json.loads(report.read_text())["accounting"]
    assert accounting["unaccounted"] == accounting["duplicates"] == 0
    return int(accounting["events_in"])


def tiles_are_written(settings: Settings) -> bool:
    with redis.Redis.from_url(settings.redis) as client:
        return client.get(layout.PROGRESS_KEY) is not None


def decided(settings: Settings) -> int:
    """About how many decisions there are: where the topic's partitions end."""
    consumer = Consumer({"bootstrap.servers": settings.bootstrap, "group.id": "tests-never-committed"})
    try:
        partitions = consumer.list_topics(DECISIONS, timeout=10).topics[DECISIONS].partitions
        return sum(consumer.get_watermark_offsets(TopicPartition(DECISIONS, p), timeout=10)[1] for p in partitions)
    finally:
        consumer.close()


def rows_of(settings: Settings, name: str) -> int:
    return int(DeltaTable(tables.table_uri(settings.tables, name)).to_pyarrow_table(columns=["transaction_id"]).num_rows)


def test_no_feature_differs_over_two_months_of_payments_with_two_kills_each(stack: Stack, tmp_path: Path) -> None:
    settings, failures, done = stack.settings, [], threading.Event()

    def kill() -> None:
        try:
            for name, after in KILLS:
                wait_until(lambda after=after: done.is_set() or decided(settings) >= after, 900, f"{after} decisions")  # type: ignore[misc]
                assert not done.is_set(), f"the replay ended before {name} was killed"
                stack.kill(name)
                stack.start([name])
        # Whatever went wrong in the thread belongs to the test.
        except BaseException as exc:  # noqa: BLE001
            failures.append(exc)

    # Until the first batch is in Redis, every decision says that its features are stale.
    sent = replay(settings, *WARM_UP, tmp_path)
    wait_until(lambda: tiles_are_written(settings), 120, "the first batch of tiles")
    killer = threading.Thread(target=kill)
    killer.start()
    for month in REPLAYS:
        sent += replay(settings, *month, tmp_path)
    done.set()
    killer.join()
    assert failures == []
    assert sent > SENT_MIN
    wait_until(
        lambda: rows_of(settings, tables.DECISIONS) == rows_of(settings, tables.SILVER) == sent, 600, "all receipts in Delta"
    )
    ended = run_command(settings, "parity", timeout_s=600)
    print(ended.stdout)
    ended = run_command(settings, "parity", "--json", timeout_s=600)
    parity = json.loads(ended.stdout)
    assert parity["examples"] == []
    assert (ended.returncode, parity["different"]) == (0, 0)
    assert parity["rows"] >= COMPARED_MIN
    assert parity["compared"] == parity["rows"] * len(FEATURES)
    assert DeltaTable(tables.table_uri(settings.tables, tables.LABEL_CHANGES)).to_pyarrow_table().num_rows > 1_000
