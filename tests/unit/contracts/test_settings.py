"""Settings: typed, bounded, and never guessed."""

from __future__ import annotations

from pathlib import Path

import pytest

from gateway.contracts.settings import SettingError, Settings, client_headers, load_settings


def test_defaults_need_no_environment() -> None:
    settings = load_settings({})
    assert settings.bootstrap == "127.0.0.1:19092"
    assert settings.registry.endswith("/apis/ccompat/v7")


def test_a_port_moves_what_is_derived_from_it() -> None:
    assert load_settings({"FRAUDGATE_REDIS_PORT": "7001"}).redis == "redis://127.0.0.1:7001/0"


@pytest.mark.parametrize("value", ["0", "65536", "-1", "", "80.5", "http"])
def test_a_bad_value_is_named_with_its_range(value: str) -> None:
    with pytest.raises(SettingError, match=r"FRAUDGATE_KAFKA_PORT must be a whole number in 1\.\.65535"):
        load_settings({"FRAUDGATE_KAFKA_PORT": value})


def test_a_misspelt_setting_is_refused() -> None:
    with pytest.raises(SettingError, match="FRAUDGATE_KAFAK_PORT is not a setting"):
        load_settings({"FRAUDGATE_KAFAK_PORT": "1"})


def test_budgets_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(SettingError, match="FEATURE_BUDGET_MS must be less"):
        load_settings({"FRAUDGATE_FEATURE_BUDGET_MS": "80"})


def test_a_cluster_without_a_host_is_refused_at_the_start() -> None:
    with pytest.raises(SettingError, match="FRAUDGATE_REDIS_URL"):
        load_settings({"FRAUDGATE_REDIS_URL": "redis+cluster://:6379"})
    assert load_settings({"FRAUDGATE_REDIS_URL": "redis+cluster://a:1,b:2"}).redis == "redis+cluster://a:1,b:2"


def test_our_own_callers_send_the_key_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "key"
    path.write_text("fg_abc\n")
    assert client_headers(Settings(client_key_path=str(path))) == {"Authorization": "Bearer fg_abc"}
    assert client_headers(Settings()) == {}


@pytest.mark.parametrize("content", [None, b"", b"two keys", b"fg_a\r\nHost: x", b"\xff", b"k" * 129])
def test_a_file_that_holds_no_key_is_refused_without_showing_it(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "key"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(SettingError) as caught:
        client_headers(Settings(client_key_path=str(path)))
    assert "FRAUDGATE_CLIENT_KEY_PATH" in str(caught.value)
    assert "fg_a" not in str(caught.value)
