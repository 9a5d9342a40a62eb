"""The local copy of what the schema registry said."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from gateway.contracts.registry import SchemaRegistry
from gateway.contracts.topics import TOPICS

THREADS, ROUNDS = 8, 25


def test_threads_that_keep_the_same_answer_do_not_take_each_others_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A gateway's loop, its list follower and its publisher learn the same ids in the first second."""
    monkeypatch.setattr(SchemaRegistry, "request", lambda *_: {"id": 1})
    registry = SchemaRegistry("http://127.0.0.1:1", tmp_path)
    together = threading.Barrier(THREADS)

    def learn(_: int) -> list[Any]:
        together.wait(30)
        return [registry.id_of(topic) for _ in range(ROUNDS) for topic in TOPICS]

    with ThreadPoolExecutor(THREADS) as pool:
        found = list(pool.map(learn, range(THREADS)))
    assert found == [[1] * ROUNDS * len(TOPICS)] * THREADS
    assert not list(tmp_path.glob("*.partial"))
    assert registry.schema(1) in {topic.schema_text for topic in TOPICS.values()}
