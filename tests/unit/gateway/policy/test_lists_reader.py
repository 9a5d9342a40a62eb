"""Records of list_changes as a gateway reads them: what is skipped for ever, and what waits for a registry that doesn't answer."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest

from gateway.contracts.lists import CHANGE_BYTES_MAX, ListChangeError
from gateway.contracts.registry import RegistryUnavailableError, SchemaRegistry
from gateway.contracts.topics import LIST_CHANGES, TOPICS
from gateway.contracts.wire import frame
from gateway.kafka import avro
from gateway.policy.lists import ChangeReader
from tests.unit.contracts.test_lists import make_change

KNOWN_ID, OTHER_ID, UNSEEN_ID = 7, 8, 9
CHANGE = make_change("card-1", expires_at_ms=5)
PAYLOAD = avro.encode(LIST_CHANGES, msgspec.to_builtins(CHANGE))


@pytest.fixture
def reader(tmp_path: Path) -> ChangeReader:
    """With a local copy of two schemas, and a registry that nobody serves."""
    for schema_id, topic in ((KNOWN_ID, LIST_CHANGES), (OTHER_ID, "labels")):
        (tmp_path / f"id-{schema_id}.json").write_text(json.dumps({"schema": TOPICS[topic].schema_text}))
    return ChangeReader(SchemaRegistry("http://127.0.0.1:1", tmp_path))


def test_avro_and_json_are_read_alike(reader: ChangeReader) -> None:
    assert reader.read(frame(KNOWN_ID, PAYLOAD)) == CHANGE
    assert reader.read(msgspec.json.encode(CHANGE)) == CHANGE


@pytest.mark.parametrize(
    "value",
    [
        None,
        b"",
        b"\0\0",
        b"null",
        frame(KNOWN_ID, PAYLOAD[:-1]),
        frame(KNOWN_ID, PAYLOAD + b"\0"),
        frame(OTHER_ID, PAYLOAD),
        frame(KNOWN_ID, avro.encode(LIST_CHANGES, msgspec.to_builtins(make_change("4111111111111111")))),
        b" " * (CHANGE_BYTES_MAX + 1),
    ],
)
def test_what_is_no_change_is_told_so(reader: ChangeReader, value: bytes | None) -> None:
    with pytest.raises(ListChangeError):
        reader.read(value)


def test_a_change_of_the_largest_size_is_read(reader: ChangeReader) -> None:
    text = msgspec.json.encode(CHANGE)
    assert reader.read(text + b" " * (CHANGE_BYTES_MAX - len(text))) == CHANGE


def test_a_schema_that_can_not_be_asked_for_now_is_no_reason_to_skip_a_change(reader: ChangeReader) -> None:
    with pytest.raises(RegistryUnavailableError):
        reader.read(frame(UNSEEN_ID, PAYLOAD))
