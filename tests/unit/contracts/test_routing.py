"""routing.json and guard.json: what is written is read, what can't be is refused, and a reader never sees half of either."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from gateway.contracts.routing import (
    FILE_BYTES_MAX,
    GUARD_FILE,
    ROUTING_FILE,
    Routing,
    RoutingError,
    Verdict,
    clear_guard,
    default_routing,
    read_guard,
    read_routing,
    take_out,
    write_routing,
)
from gateway.contracts.settings import Settings


def make_verdict(digest: str = "ab" * 32) -> Verdict:
    return Verdict(name="fraudgate", version="2", digest=digest, test="declines", detail="", at_ms=1)


def test_what_was_written_is_read_and_without_a_file_there_is_nothing(tmp_path: Path) -> None:
    assert read_routing(tmp_path) is None
    asked = Routing(challenger_share=0.25, explore_share=0.01, explore_amount_max_minor=5_000, explore_loss_max_minor_per_day=9)
    write_routing(tmp_path, asked)
    assert read_routing(tmp_path) == asked
    assert [p.name for p in tmp_path.iterdir()] == [ROUTING_FILE]


@pytest.mark.parametrize(
    "change",
    [
        {"challenger_share": 1.01},
        {"challenger_share": -0.1},
        {"challenger_share": float("nan")},
        {"explore_share": 2.0},
        {"explore_amount_max_minor": -1},
        {"explore_loss_max_minor_per_day": 10**13},
    ],
)
def test_shares_and_amounts_that_can_not_be_are_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    with pytest.raises(RoutingError, match=next(iter(change))):
        write_routing(tmp_path, Routing(**change))
    assert read_routing(tmp_path) is None


@pytest.mark.parametrize(
    "text", ["{", '{"challenger_share": 2}', '{"share": 0.1}', '{"challenger_share": "half"}', " " * (FILE_BYTES_MAX + 1)]
)
def test_a_file_that_says_something_else_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / ROUTING_FILE).write_text(text)
    with pytest.raises(RoutingError, match=ROUTING_FILE):
        read_routing(tmp_path)


def test_the_settings_are_what_holds_without_a_file() -> None:
    settings = Settings(challenger_share_permille=5, explore_share_permille=20, explore_amount_max_minor=100)
    assert default_routing(settings) == Routing(challenger_share=0.005, explore_share=0.02, explore_amount_max_minor=100)


def test_of_many_who_take_a_challenger_out_one_is_the_first(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        firsts = list(pool.map(lambda _: take_out(tmp_path, make_verdict()), range(16)))
    assert sum(firsts) == 1
    assert take_out(tmp_path, make_verdict("cd" * 32))
    assert read_guard(tmp_path).out.keys() == {"ab" * 32, "cd" * 32}
    assert len(clear_guard(tmp_path)) == 2
    assert read_guard(tmp_path).out == {}
    assert clear_guard(tmp_path) == []


def test_a_guard_file_that_can_not_be_read_is_an_error_not_an_all_clear(tmp_path: Path) -> None:
    (tmp_path / GUARD_FILE).write_text("{")
    with pytest.raises(RoutingError, match=GUARD_FILE):
        read_guard(tmp_path)
