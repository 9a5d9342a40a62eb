from pathlib import Path

import pytest

from gateway.api_keys import KeyBook, Scope, create_key, revoke_key
from gateway.console.access import Access, NotHereError, OtherSiteError
from gateway.contracts.settings import CONSOLE_GUARDED, CONSOLE_OPEN, SettingError, load_settings
from gateway.errors import ForbiddenError, UnauthorizedError

HERE = {"host": "127.0.0.1:18080"}


def with_key(tmp_path: Path, scope: Scope) -> tuple[Access, dict[str, str], KeyBook]:
    path = tmp_path / "keys.json"
    secret, _ = create_key(path, scope, [scope], 100)
    book = KeyBook(path)
    return Access(book, CONSOLE_GUARDED), HERE | {"authorization": f"Bearer {secret}"}, book


@pytest.mark.parametrize("scope", ["review", "admin"])
def test_a_key_of_an_analyst_or_an_administrator_opens_the_console_from_anywhere(tmp_path: Path, scope: Scope) -> None:
    access, headers, _ = with_key(tmp_path, scope)
    assert access.check(headers, "10.1.2.3") == scope
    assert access.asks_for_key


def test_a_payment_services_key_does_not_and_neither_does_none(tmp_path: Path) -> None:
    access, headers, _ = with_key(tmp_path, "score")
    with pytest.raises(ForbiddenError):
        access.check(headers, "127.0.0.1")
    with pytest.raises(UnauthorizedError):
        access.check(HERE, "127.0.0.1")


def test_a_revoked_key_is_shut_out(tmp_path: Path) -> None:
    access, headers, book = with_key(tmp_path, "review")
    revoke_key(tmp_path / "keys.json", "review")
    book.refresh()
    with pytest.raises(UnauthorizedError):
        access.check(headers, "127.0.0.1")


def test_without_keys_it_is_for_this_machine_by_its_own_names() -> None:
    access = Access(None, CONSOLE_GUARDED)
    for host in ("127.0.0.1:18080", "localhost", "[::1]:18080"):
        assert access.check({"host": host}, "127.0.0.1") == ""
    with pytest.raises(NotHereError):
        access.check(HERE, "10.1.2.3")
    with pytest.raises(NotHereError):
        # A name of somebody else that leads here: a page of theirs must not read the console through this machine's browser.
        access.check({"host": "rebound.example:18080"}, "127.0.0.1")


def test_a_page_of_another_site_is_refused_whatever_the_setting() -> None:
    for setting in (CONSOLE_GUARDED, CONSOLE_OPEN):
        with pytest.raises(OtherSiteError):
            Access(None, setting).check(HERE | {"origin": "https://elsewhere.example"}, "127.0.0.1")
        Access(None, setting).check(HERE | {"origin": "http://127.0.0.1:18080"}, "127.0.0.1")


def test_open_asks_nobody() -> None:
    assert Access(None, CONSOLE_OPEN).check({"host": "console.bank.example"}, "10.1.2.3") == ""


def test_a_setting_that_is_none_of_three_is_named() -> None:
    with pytest.raises(SettingError, match="CONSOLE_ACCESS must be guarded, open or off"):
        load_settings({"FRAUDGATE_CONSOLE_ACCESS": "yes"})
