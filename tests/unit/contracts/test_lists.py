"""The book of lists: what changes add up to, whoever adds them, and what each costs."""

from __future__ import annotations

import time
from collections.abc import Sequence

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.contracts.lists import (
    EXPIRES_AT_MS_MAX,
    LIST_ID_CHARS_MAX,
    LISTS_MAX,
    REASON_CHARS_MAX,
    ListAction,
    ListBook,
    ListChange,
    ListChangeError,
    book_as_of,
    book_of_blocks,
    change_of_fields,
    change_of_json,
    check_change,
)
from gateway.contracts.transaction import TEXT_LENGTH_MAX

NOW_MS = 1_795_500_000_000


def make_change(value: str = "card-1", list_id: str = "bad_cards", **changes: object) -> ListChange:
    change = ListChange(
        list_id=list_id,
        entity_field="card_id",
        action=ListAction.ADD,
        entity_value=value,
        expires_at_ms=None,
        reason="stolen",
        who="ann",
        at_ms=NOW_MS,
    )
    return msgspec.structs.replace(change, **changes)


def numbered(changes: Sequence[ListChange], first: int = 0) -> list[tuple[int, ListChange]]:
    return list(enumerate(changes, first))


def held(book: ListBook, value: str, field: str = "card_id", at_ms: int = NOW_MS) -> list[str]:
    return book.lists_of(field, value, at_ms)


def test_a_book_without_changes_is_version_0_and_holds_nothing() -> None:
    book = ListBook()
    assert (book.version, book.entries, book.lists) == (0, 0, {})
    assert not book.holds("card_id")
    assert book.masks("card_id", ["card-1", None], NOW_MS).tolist() == [0, 0]
    assert book.bit("bad_cards") == 0


def test_an_entry_counts_for_its_field_and_value_alone() -> None:
    book = ListBook().applied(numbered([make_change()]))
    assert book.version == 1
    bit = book.bit("bad_cards")
    assert bit > 0
    assert book.masks("card_id", ["card-2", "card-1", None, "card-1"], NOW_MS).tolist() == [0, bit, 0, bit]
    assert book.masks("customer_id", ["card-1"], NOW_MS).tolist() == [0]


def test_a_book_is_not_changed_by_the_next_one() -> None:
    first = ListBook().applied(numbered([make_change()]))
    second = first.applied(numbered([make_change(action=ListAction.REMOVE), make_change("card-2")], 1))
    assert (held(first, "card-1"), held(first, "card-2")) == (["bad_cards"], [])
    assert (held(second, "card-1"), held(second, "card-2")) == ([], ["bad_cards"])
    assert (first.version, second.version) == (1, 3)


def test_an_entry_ends_with_the_instant_it_is_judged_at_not_with_the_clock() -> None:
    changes = [make_change(expires_at_ms=NOW_MS), make_change("card-1", "watched")]
    book = ListBook().applied(numbered(changes))
    assert held(book, "card-1", at_ms=NOW_MS - 1) == ["bad_cards", "watched"]
    assert held(book, "card-1", at_ms=NOW_MS) == ["watched"]
    # A batch whose payments came at different times.
    times = np.array([NOW_MS - 1, NOW_MS])
    both = book.bit("bad_cards") | book.bit("watched")
    assert book.masks("card_id", ["card-1", "card-1"], times).tolist() == [both, book.bit("watched")]


def test_adding_again_replaces_the_expiry_and_counts_once() -> None:
    book = ListBook().applied(numbered([make_change(expires_at_ms=NOW_MS), make_change(expires_at_ms=NOW_MS + 10)]))
    assert held(book, "card-1", at_ms=NOW_MS + 9) == ["bad_cards"]
    assert book.lists == {"bad_cards": 1}
    forever = book.applied(numbered([make_change()], 2))
    assert held(forever, "card-1", at_ms=EXPIRES_AT_MS_MAX) == ["bad_cards"]


def test_removing_what_is_not_there_changes_nothing_but_the_version() -> None:
    book = ListBook().applied(numbered([make_change(action=ListAction.REMOVE)]))
    assert (book.version, book.entries) == (1, 0)


def test_one_entry_more_than_the_limit_is_refused_and_told() -> None:
    book = ListBook(entries_max=2).applied(numbered([make_change(f"card-{i}") for i in range(2)]))
    assert (book.entries, book.refused) == (2, 0)
    full = book.applied(numbered([make_change("card-2"), make_change("card-1", expires_at_ms=NOW_MS)], 2))
    # What stands there already can still be changed.
    assert (full.entries, full.refused, full.version) == (2, 1, 4)
    assert (held(full, "card-2"), held(full, "card-1")) == ([], [])
    freed = full.applied(numbered([make_change("card-0", action=ListAction.REMOVE), make_change("card-2")], 4))
    assert (held(freed, "card-2"), freed.refused) == (["bad_cards"], 0)


def test_one_list_more_than_the_limit_is_refused_until_another_is_empty() -> None:
    book = ListBook().applied(numbered([make_change("card-1", f"list-{i}") for i in range(LISTS_MAX + 1)]))
    assert (len(book.lists), book.refused) == (LISTS_MAX, 1)
    assert len({book.bit(list_id) for list_id in book.lists}) == LISTS_MAX
    [mask] = book.masks("card_id", ["card-1"], NOW_MS).tolist()
    assert mask == 2**LISTS_MAX - 1
    changes = [make_change("card-1", "list-5", action=ListAction.REMOVE), make_change("card-9", "list-62")]
    freed = book.applied(numbered(changes, book.version))
    assert (held(freed, "card-9"), freed.refused) == (["list-62"], 0)
    assert "list-62" not in held(freed, "card-1")


@pytest.mark.parametrize(
    "changes",
    [
        {"list_id": ""},
        {"list_id": "l" * (LIST_ID_CHARS_MAX + 1)},
        {"entity_value": ""},
        {"entity_value": "v" * (TEXT_LENGTH_MAX + 1)},
        {"entity_value": "4111111111111111"},
        {"reason": "r" * (REASON_CHARS_MAX + 1)},
        {"entity_field": "amount_minor"},
        {"expires_at_ms": 0},
        {"expires_at_ms": EXPIRES_AT_MS_MAX + 1},
    ],
)
def test_a_change_out_of_bounds_is_refused(changes: dict[str, object]) -> None:
    with pytest.raises(ListChangeError):
        check_change(msgspec.structs.replace(make_change(), **changes))
    with pytest.raises(ListChangeError):
        change_of_fields(msgspec.to_builtins(msgspec.structs.replace(make_change(), **changes)))


def test_a_change_is_read_from_avro_fields_and_from_json_alike() -> None:
    change = make_change(expires_at_ms=NOW_MS)
    assert change_of_fields(msgspec.to_builtins(change)) == change
    assert change_of_json(msgspec.json.encode(change)) == change
    for broken in (b"", b"{}", b"[1]", msgspec.json.encode(change)[:-1], b'{"action": "purge"}'):
        with pytest.raises(ListChangeError):
            change_of_json(broken)


def test_changes_must_come_in_order() -> None:
    book = ListBook().applied(numbered([make_change()]))
    with pytest.raises(ValueError, match="behind version"):
        book.applied([(0, make_change())])
    with pytest.raises(ValueError, match="before"):
        book.applied([(4, make_change())], version=4)
    with pytest.raises(ValueError, match="version -1"):
        book_as_of([], -1)


def test_what_could_not_be_read_has_a_version_too() -> None:
    book = ListBook().applied([(1, make_change())], version=5)
    assert book.version == 5
    assert ListBook().applied([], version=2).version == 2


changes_of_all_kinds = st.lists(
    st.builds(
        make_change,
        st.sampled_from(["a", "b", "c"]),
        st.sampled_from(["l1", "l2", "l3"]),
        action=st.sampled_from(list(ListAction)),
        entity_field=st.sampled_from(["card_id", "ip"]),
        expires_at_ms=st.sampled_from([None, NOW_MS, NOW_MS + 1]),
    ),
    max_size=40,
)


@given(changes_of_all_kinds, st.integers(0, 40), st.integers(1, 7))
def test_a_book_equals_a_plain_recount_however_its_changes_were_taken_in(
    changes: list[ListChange], version: int, step: int
) -> None:
    version = min(version, len(changes))
    plain: dict[tuple[str, str, str], int | None] = {}
    for change in changes[:version]:
        key = (change.list_id, change.entity_field, change.entity_value)
        if change.action is ListAction.ADD:
            plain[key] = change.expires_at_ms
        else:
            plain.pop(key, None)
    book = book_as_of(numbered(changes), version)
    stepped = ListBook()
    for at in range(0, version, step):
        stepped = stepped.applied(numbered(changes[at : min(at + step, version)], at))
    kept = book_of_blocks(book.version, book.digest, book.places(), book.blocks())
    for other in (book, stepped, kept):
        assert (other.version, other.digest) == (version, book.digest)
        assert other.entries == len(plain)
        for field in ("card_id", "ip"):
            assert other.holds(field) == any(f == field for _, f, _ in plain)
            for value in ("a", "b", "c"):
                for at_ms in (NOW_MS - 1, NOW_MS, NOW_MS + 1):
                    expected = sorted(
                        list_id
                        for (list_id, f, v), ends in plain.items()
                        if (f, v) == (field, value) and (ends is None or at_ms < ends)
                    )
                    assert other.lists_of(field, value, at_ms) == expected


@given(changes_of_all_kinds.filter(len))
def test_other_changes_make_another_digest(changes: list[ListChange]) -> None:
    book = book_as_of(numbered(changes), len(changes))
    other = [*changes[:-1], msgspec.structs.replace(changes[-1], who="bob")]
    assert book_as_of(numbered(other), len(changes)).digest != book.digest
    assert book_as_of(numbered(changes), len(changes) - 1).digest != book.digest


def test_a_change_of_many_entries_copies_few_of_them() -> None:
    book = ListBook().applied(numbered([make_change(f"card-{i}") for i in range(100_000)]))
    before = {id(block) for _, block in book.blocks()}
    next_book = book.applied([(book.version, make_change("card-x"))])
    copied = [block for _, block in next_book.blocks() if id(block) not in before]
    assert len(copied) == 1
    assert len(copied[0]) < 1000
    began_s = time.perf_counter()
    assert next_book.masks("card_id", ["card-7"] * 10_000, NOW_MS).all()
    # 0.2 microseconds a value where nothing else runs.
    assert time.perf_counter() - began_s < 0.1
