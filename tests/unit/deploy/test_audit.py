"""`fraudgate audit` on small Delta tables: what was written is intact, and every kind of change is found where it is."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from deltalake import write_deltalake

from deploy.history.audit import audit
from deploy.history.verify import Range, verify
from gateway.contracts import tables
from gateway.contracts.audit import append_audit
from gateway.contracts.settings import Settings, load_settings
from tests.factories_history import decision_rows, make_receipts, rewrite_decisions, schema_of, write_decisions, write_rows
from tests.unit.gateway.factories import NOW_MS

ROWS = 20
Rows = list[dict[str, Any]]


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    monkeypatch.setenv("FRAUDGATE_HOME", str(tmp_path))
    # Nobody listens there: what isn't in the local copy can't be had.
    monkeypatch.setenv("FRAUDGATE_REGISTRY_URL", "http://127.0.0.1:9")
    return load_settings()


def test_what_the_jobs_wrote_is_intact(settings: Settings, capsys: pytest.CaptureFixture[str]) -> None:
    write_decisions(settings, make_receipts(ROWS))
    assert audit([]) == 0
    out = capsys.readouterr().out
    assert f"{ROWS} in the chain" in out
    assert "partition 1: newest offset 9" in out
    assert "intact" in out


def _changed_byte(value: bytes) -> bytes:
    return value[:7] + bytes([value[7] ^ 1]) + value[8:]


def _payload(rows: Rows) -> None:
    rows[8]["payload"] = _changed_byte(rows[8]["payload"])


def _column(rows: Rows) -> None:
    rows[8]["decision"] = "decline"


def _score(rows: Rows) -> None:
    rows[8]["probability"] += 1e-12


def _feature(rows: Rows) -> None:
    rows[8]["features"] = [*rows[8]["features"][:-1], 0.25]


def _content_hash(rows: Rows) -> None:
    rows[8]["content_sha256"] = _changed_byte(rows[8]["content_sha256"])


def _chain_hash(rows: Rows) -> None:
    rows[8]["chain_sha256"] = _changed_byte(rows[8]["chain_sha256"])


def _removed(rows: Rows) -> None:
    del rows[8]


def _removed_first(rows: Rows) -> None:
    del rows[0]


def _removed_last(rows: Rows) -> None:
    del rows[-1]


def _swapped(rows: Rows) -> None:
    for name in ("payload", "content_sha256", "chain_sha256"):
        rows[8][name], rows[10][name] = rows[10][name], rows[8][name]


def _swapped_places(rows: Rows) -> None:
    rows[8]["offset"], rows[10]["offset"] = rows[10]["offset"], rows[8]["offset"]


def _schema(rows: Rows) -> None:
    rows[8]["schema_id"] = 4


def _taken_out_of_the_chain(rows: Rows) -> None:
    for name in ("payload", "schema_id", "content_sha256", "chain_sha256"):
        rows[8][name] = None


def _emptied(rows: Rows) -> None:
    rows[8]["payload"] = None


def _emptied_as_if_erased(rows: Rows) -> None:
    rows[8]["payload"] = None
    rows[8]["erased_at_ms"] = NOW_MS


def _twice(rows: Rows) -> None:
    rows.append(copy.deepcopy(rows[8]))


@pytest.mark.parametrize(
    ("tamper", "partition", "offset"),
    [
        (_payload, 0, 4),
        (_column, 0, 4),
        (_score, 0, 4),
        (_feature, 0, 4),
        (_content_hash, 0, 4),
        (_chain_hash, 0, 4),
        (_removed, 0, 5),
        (_removed_first, 0, 1),
        (_removed_last, 1, 9),
        (_swapped, 0, 4),
        (_swapped_places, 0, 5),
        (_schema, 0, 4),
        (_taken_out_of_the_chain, 0, 5),
        (_emptied, 0, 4),
        (_emptied_as_if_erased, 0, 4),
        (_twice, 0, 4),
    ],
)
def test_a_change_is_found_where_it_is(
    settings: Settings, capsys: pytest.CaptureFixture[str], tamper: Callable[[Rows], None], partition: int, offset: int
) -> None:
    rows = write_decisions(settings, make_receipts(ROWS))
    tamper(rows)
    rewrite_decisions(settings, rows)
    assert audit([]) == 1
    [first, *_] = [line for line in capsys.readouterr().out.splitlines() if ", offset " in line]
    assert first.startswith(f"  partition {partition}, offset {offset}: ")


def test_rows_from_before_the_chain_are_counted_and_the_chain_begins_behind_them(settings: Settings) -> None:
    rows = write_decisions(settings, make_receipts(ROWS))
    older = [row | dict.fromkeys(("payload", "schema_id", "content_sha256", "chain_sha256")) | {"offset": -1} for row in rows[:4]]
    write_rows(settings, tables.DECISIONS, older)
    verdict = verify(settings)
    assert (verdict.older, verdict.chained, verdict.broken) == (4, ROWS, 0)


def test_a_table_of_before_the_chain_is_no_break(settings: Settings) -> None:
    rows = decision_rows(make_receipts(3))
    names = [n for n in schema_of(tables.DECISIONS).names if n not in ("payload", "schema_id", "content_sha256", "chain_sha256")]
    schema = pa.schema([f for f in schema_of(tables.DECISIONS) if f.name in names])
    write_deltalake(tables.table_uri(settings.tables, tables.DECISIONS), pa.Table.from_pylist(rows, schema))
    assert (verify(settings).older, verify(settings).broken) == (3, 0)


def test_a_range_finds_only_what_is_in_it(settings: Settings) -> None:
    rows = write_decisions(settings, make_receipts(ROWS))
    _column(rows)
    rewrite_decisions(settings, rows)
    at_ms = NOW_MS + 8 * 1000
    assert verify(settings, Range(at_ms, at_ms + 1000)).broken == 1
    assert verify(settings, Range(at_ms + 1000, None)).broken == 0
    assert verify(settings, Range(None, at_ms)).broken == 0


def test_without_the_schema_it_says_so(settings: Settings, capsys: pytest.CaptureFixture[str]) -> None:
    write_decisions(settings, make_receipts(2))
    for path in settings.schemas_path.iterdir():
        path.unlink()
    assert audit([]) == 1
    assert "the schema 3 of receipts can't be had" in capsys.readouterr().err


def test_changes_say_who_when_and_what_from_the_table_and_from_the_model_directory(
    settings: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    entry = {"at_ms": NOW_MS, "who": "ann", "action": "list_add", "subject": "blocked-cards", "reason": "stolen", "detail": "{}"}
    write_rows(settings, tables.AUDIT, [entry | {"offset": 0}, entry | {"offset": 1, "who": "bob", "at_ms": NOW_MS + 5000}])
    settings.models_path.mkdir(parents=True)
    append_audit(
        settings.models_path,
        action="promote",
        subject="champion",
        before="1",
        after="2",
        by="eve",
        at_ms=NOW_MS + 1000,
        reason="better",
    )
    assert audit(["--changes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[2] for line in lines[1:]] == ["ann", "eve", "bob"]
    assert lines[2].endswith("promote            champion: 1 -> 2 (better)")
    assert audit(["--changes", "--who", "an"]) == 0
    assert capsys.readouterr().out.count("list_add") == 1
    assert audit(["--changes", "--action", "promote", "--json"]) == 0
    assert [e["who"] for e in json.loads(capsys.readouterr().out)] == ["eve"]
    assert audit(["--changes", "--to", str(NOW_MS)]) == 0
    assert capsys.readouterr().out == "no entries\n"
