"""What erasure does outside of the tables, on real Redis and Kafka."""

from __future__ import annotations

import dataclasses
import secrets

import pytest
import redis

from deploy.history.erase import Person, erase_in_redis
from deploy.history.publish import NotPublishedError, publish_audit
from deploy.stack import Stack
from gateway.contracts import layout
from gateway.contracts.audit import AuditRecord
from gateway.contracts.settings import Settings
from gateway.contracts.topics import AUDIT
from tests.receipts import read_topic

pytestmark = [pytest.mark.integration]


def test_redis_loses_every_value_of_the_customer_and_nobody_elses(stack: Stack, settings: Settings) -> None:
    name = f"erase{secrets.token_hex(4)}"
    person = Person(
        f"{name}-a", {f"{name}-t1"}, {"customer": {f"{name}-a"}, "card": {f"{name}-card"}, "device": set(), "ip": set()}
    )
    mine = [
        layout.head_key("card", f"{name}-card"),
        layout.tiles_key("customer", f"{name}-a"),
        layout.labels_key("customer", f"{name}-a"),
        layout.idempotency_key(f"{name}-t1"),
    ]
    other = layout.tiles_key("customer", f"{name}-ab")
    with redis.Redis.from_url(settings.redis) as client:
        for key in (*mine, other):
            client.set(key, b"x")
        assert erase_in_redis(settings, person) == len(mine)
        assert [client.exists(key) for key in mine] == [0] * len(mine)
        assert client.delete(other) == 1


def test_an_audit_record_is_in_the_topic_before_anything_is_done(stack: Stack, settings: Settings) -> None:
    subject = f"erasure {secrets.token_hex(8)}"
    record = AuditRecord(
        at_ms=5, who="ann", action="customer_erased", subject=subject, before=None, after=None, reason="r", detail='{"rows": []}'
    )
    publish_audit(settings, [record])
    assert [r["who"] for r in read_topic(settings, AUDIT) if r["subject"] == subject] == ["ann"]


def test_without_a_schema_or_a_broker_it_says_that_nobody_was_told(settings: Settings) -> None:
    record = AuditRecord(at_ms=5, who="ann", action="x", subject="y", before=None, after=None)
    nowhere = dataclasses.replace(settings, registry_url="http://127.0.0.1:9", home=f"{settings.home}/nowhere")
    with pytest.raises(NotPublishedError, match="schema"):
        publish_audit(nowhere, [record])
