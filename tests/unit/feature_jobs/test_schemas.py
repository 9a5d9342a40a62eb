"""Which schema ids the jobs know, with a registry that is up, down, or knows more than it did."""

from __future__ import annotations

from pathlib import Path

import pytest

from feature_jobs.schemas import READ_TOPICS, SchemaBook
from gateway.contracts.registry import RegistryUnavailableError, SchemaRegistry
from gateway.contracts.topics import TOPICS


class FakeRegistry(SchemaRegistry):
    """Versions by subject; `down` makes every call fail as a connection would."""

    def __init__(self, copy_dir: Path | None = None) -> None:
        super().__init__("http://127.0.0.1:1", copy_dir)
        self.versions = {TOPICS[topic].subject: {i + 1: TOPICS[topic].schema_text} for i, topic in enumerate(READ_TOPICS)}
        self.down = False

    def request(self, method: str, path: str, body: dict[str, object] | None = None) -> object:
        if self.down:
            raise RegistryUnavailableError(path)
        _, _, subject, *rest = path.split("/")
        ids = self.versions[subject]
        if len(rest) == 1:
            return sorted(ids)
        return {"id": int(rest[1]), "schema": ids[int(rest[1])]}


def test_each_topic_knows_its_own_ids_only() -> None:
    book = SchemaBook(FakeRegistry())
    assert book.refresh()
    assert {topic: list(ids) for topic, ids in book.by_topic.items()} == {
        "transactions": [1],
        "decisions": [2],
        "labels": [3],
        "list_changes": [4],
        "audit": [5],
    }


def test_a_new_version_is_reported_once() -> None:
    registry = FakeRegistry()
    book = SchemaBook(registry)
    book.refresh()
    registry.versions["transactions-value"][9] = TOPICS["transactions"].schema_text
    assert book.refresh()
    assert not book.refresh()
    assert sorted(book.by_topic["transactions"]) == [1, 9]


def test_a_registry_that_goes_down_takes_nothing_away() -> None:
    registry = FakeRegistry()
    book = SchemaBook(registry)
    book.refresh()
    registry.down = True
    assert not book.refresh()
    assert list(book.by_topic["transactions"]) == [1]


def test_a_restart_with_the_registry_down_reads_the_local_copy(tmp_path: Path) -> None:
    SchemaBook(FakeRegistry(tmp_path)).refresh()
    down = FakeRegistry(tmp_path)
    down.down = True
    book = SchemaBook(down)
    book.refresh()
    assert list(book.by_topic["decisions"]) == [2]


def test_a_first_start_with_the_registry_down_says_so(tmp_path: Path) -> None:
    registry = FakeRegistry(tmp_path)
    registry.down = True
    with pytest.raises(RegistryUnavailableError):
        SchemaBook(registry).refresh()
