"""What a gateway tells the audit topic: policies whole, or that they were too large; the models' audit file line by line, once."""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import fastavro
import msgspec
import pytest

from gateway.audit import REASON_CHARS_MAX, AuditForwarder, policy_loaded, policy_refused
from gateway.contracts.audit import AUDIT_FILE, DETAIL_BYTES_MAX, AuditRecord, append_audit
from gateway.contracts.topics import AUDIT, TOPICS
from gateway.kafka.records import Record
from gateway.policy import Policy
from tests.unit.gateway.policy.factories import make_policy, make_rule

pytestmark = pytest.mark.anyio
SCHEMA = fastavro.parse_schema(json.loads(TOPICS[AUDIT].schema_text))


def told(record: Record) -> AuditRecord:
    assert record.topic == AUDIT
    fields: Any = fastavro.schemaless_reader(io.BytesIO(record.payload), SCHEMA, None)
    return msgspec.convert(fields, AuditRecord)


class Sent:
    """Stands for gateway.kafka.publisher.Publisher.send: takes all, or has no room."""

    def __init__(self) -> None:
        self.records: list[AuditRecord] = []
        self.full = False

    def send(self, records: Sequence[Record]) -> asyncio.Future[None]:
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        if self.full:
            future.cancel()
        else:
            self.records += [told(record) for record in records]
            future.set_result(None)
        return future


def test_a_policy_is_told_whole_so_that_it_can_be_made_again() -> None:
    policy = make_policy(make_rule("amount_minor > 5"), name="täglich")
    record = told(policy_loaded(policy, "before"))
    assert (record.action, record.subject, record.before, record.after) == ("policy_loaded", policy.digest, "before", policy.digest)
    files = {name: text.encode() for name, text in json.loads(record.detail).items()}
    assert Policy(files, "audit").digest == policy.digest


@pytest.mark.parametrize("over", [0, 1])
def test_a_policy_too_large_for_a_message_is_told_without_its_text(over: int) -> None:
    policy = make_policy(make_rule("amount_minor > 5"))
    frame = len(json.dumps({"f": ""}))
    policy.files = {"f": b"x" * (DETAIL_BYTES_MAX - frame + over)}
    record = told(policy_loaded(policy, None))
    assert (record.detail == "") == bool(over)
    assert (record.reason != "") == bool(over)


def test_a_refusal_says_why_within_bounds() -> None:
    record = told(policy_refused("/etc/policy", "digest", "x" * (REASON_CHARS_MAX + 1)))
    assert (record.action, record.subject, record.after) == ("policy_refused", "/etc/policy", "digest")
    assert len(record.reason) == REASON_CHARS_MAX


async def test_each_entry_of_the_models_is_sent_once_in_order(tmp_path: Path) -> None:
    sent, cursor = Sent(), tmp_path / "home" / "cursor"
    forwarder = AuditForwarder(tmp_path, cursor, sent.send)
    assert await forwarder.forward() == 0
    for i in range(3):
        append_audit(tmp_path, action="promote", subject=f"s{i}", before=None, after="2", reason="r", by="ann")
    assert await forwarder.forward() == 3
    assert await forwarder.forward() == 0
    # Half a line waits for its end, and what can't be read is left out.
    with (tmp_path / AUDIT_FILE).open("a") as file:
        file.write('{"at_ms": 1, "wh')
    assert await forwarder.forward() == 0
    append_audit(tmp_path, action="route", subject="s3", before=None, after="2")
    # Another process goes on where this one was.
    assert await AuditForwarder(tmp_path, cursor, sent.send).forward() == 1
    assert [record.subject for record in sent.records] == ["s0", "s1", "s2", "s3"]
    assert [record.action for record in sent.records] == ["promote"] * 3 + ["route"]
    # Another file is read from its beginning.
    (tmp_path / AUDIT_FILE).unlink()
    append_audit(tmp_path, action="route", subject="s4", before=None, after="2")
    assert await forwarder.forward() == 1


async def test_what_could_not_be_taken_is_sent_again(tmp_path: Path) -> None:
    sent = Sent()
    forwarder = AuditForwarder(tmp_path, tmp_path / "cursor", sent.send)
    append_audit(tmp_path, action="promote", subject="s", before=None, after="2")
    sent.full = True
    assert await forwarder.forward() == 0
    sent.full = False
    assert await forwarder.forward() == 1


async def test_one_process_at_a_time_forwards(tmp_path: Path) -> None:
    append_audit(tmp_path, action="promote", subject="s", before=None, after="2")
    first = Sent()
    gate: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def slow(records: Sequence[Record]) -> asyncio.Future[None]:
        first.send(records)
        return gate

    cursor = tmp_path / "cursor"
    sending = asyncio.create_task(AuditForwarder(tmp_path, cursor, slow).forward())
    while not first.records:  # noqa: ASYNC110
        await asyncio.sleep(0)
    second = Sent()
    assert await AuditForwarder(tmp_path, cursor, second.send).forward() == 0
    gate.set_result(None)
    assert await sending == 1
    assert second.records == []
