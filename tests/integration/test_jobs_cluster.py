"""The Spark job on a real Redis Cluster: tiles on every master, and again when one master has lost its data."""

from __future__ import annotations

import dataclasses
import secrets
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest

from deploy.stack import Stack
from feature_jobs import redis_client
from gateway.contracts import layout
from gateway.contracts.features import ENTITIES
from gateway.contracts.settings import Settings
from gateway.contracts.transaction import Transaction
from tests.helpers import run_command
from tests.integration.test_jobs import make_sent, produce
from tests.redis_nodes import running_cluster

pytestmark = [pytest.mark.integration, pytest.mark.spark, pytest.mark.slow, pytest.mark.timeout(900)]

FIRST, ALL = 400, 600


def test_tiles_are_written_to_every_master_and_again_to_one_that_lost_them(
    stack: Stack, settings: Settings, tmp_path: Path
) -> None:
    assert stack.pid("kafka")
    with running_cluster(tmp_path) as cluster:
        own = dataclasses.replace(
            settings, redis_url=cluster.url, tables_uri=str(tmp_path / "tables"), checkpoints_uri=str(tmp_path / "checkpoints")
        )
        sent = make_sent(f"cluster{secrets.token_hex(3)}")
        produce(own, sent, 0, FIRST)
        run_jobs(own)
        assert tiled(own, sent.transactions[:FIRST]) == counted(sent.transactions[:FIRST])
        cluster.nodes[1].client.flushall()
        lost = tiled(own, sent.transactions[:FIRST])
        assert 0 < sum(lost.values()) < FIRST * len(ENTITIES)
        produce(own, sent, FIRST, ALL)
        run_jobs(own)
        assert tiled(own, sent.transactions[:ALL]) == counted(sent.transactions[:ALL])


def run_jobs(settings: Settings) -> None:
    ended = run_command(settings, "jobs", "--once", timeout_s=400)
    assert ended.returncode == 0, ended.stdout + ended.stderr


def counted(transactions: Sequence[Transaction]) -> Counter[tuple[str, str]]:
    """How many transactions each entity has."""
    return Counter((e.name, entity_id) for t in transactions for e in ENTITIES if (entity_id := getattr(t, e.field)) is not None)


def tiled(settings: Settings, transactions: Sequence[Transaction]) -> Counter[tuple[str, str]]:
    """How many the tiles of a day hold, of each entity that `transactions` name."""
    found: Counter[tuple[str, str]] = Counter()
    with redis_client.connect(settings.redis) as client:
        for name in counted(transactions):
            value = client.get(layout.tiles_key(*name))
            if value is None:
                continue
            assert isinstance(value, bytes)
            index = next(i for i, e in enumerate(ENTITIES) if e.name == name[0])
            tiles = layout.unpack_tiles([value], [index], [layout.key_check(*name)]).tiles
            found[name] = int(tiles["count"][tiles["resolution_min"] == layout.DAY_MIN].sum())
    return found
