"""Settings: typed, bounded, and never guessed."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import pytest

from deploy import cli
from gateway.contracts.settings import ENV_PREFIX, SettingError, Settings, client_headers, load_settings, settings_env

FIELDS = {f.name: f for f in dataclasses.fields(Settings)}
NUMBERS = [name for name, f in FIELDS.items() if isinstance(f.default, int)]
TEXTS = [name for name, f in FIELDS.items() if not isinstance(f.default, int)]
# What runs until it is told to end, or is what somebody starts first.
LONG_RUNNING = {
    "serve": ["serve"],
    "workers": ["serve", "--workers", "2"],
    "jobs": ["jobs"],
    "cases": ["cases"],
    "maintain": ["maintain"],
    "retrain": ["retrain"],
    "parity": ["parity", "--live"],
    "up": ["up", "--all"],
    "status": ["status"],
    "deploy": ["deploy"],
    "reload": ["reload"],
}


def variable(name: str) -> str:
    return ENV_PREFIX + name.upper()


def refusal(name: str, text: str) -> str:
    with pytest.raises(SettingError) as caught:
        load_settings({variable(name): text})
    return str(caught.value)


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


@pytest.mark.parametrize("name", NUMBERS)
def test_every_number_is_refused_outside_its_range_which_is_named(name: str) -> None:
    least, most = FIELDS[name].metadata["least"], FIELDS[name].metadata["most"]
    assert least <= FIELDS[name].default <= most
    for text in (str(least - 1), str(most + 1), "many", "", "1.5", "1e3", "1_0", " 1", "\u0663", "9" * 4000):
        said = refusal(name, text)
        assert said.startswith(f"{variable(name)} must be a whole number in {least}..{most}, not {text[:40]!r}: ")
        assert said.endswith(FIELDS[name].metadata["doc"])


@pytest.mark.parametrize("name", NUMBERS)
def test_every_number_may_be_as_small_and_as_large_as_its_range_says(name: str) -> None:
    for value in (FIELDS[name].metadata["least"], FIELDS[name].metadata["most"]):
        # Those that are compared with another are given room by it.
        room = {"decision_budget_ms": 10_000, "feature_budget_ms": 1, "idempotency_window_s": 1, "dedup_window_s": 86_400} | {
            name: value
        }
        try:
            loaded = load_settings({variable(key): str(room[key]) for key in room})
        except SettingError as exc:
            assert "must be less than" in str(exc), exc
            assert name in ("feature_budget_ms", "decision_budget_ms")
        else:
            assert getattr(loaded, name) == value


@pytest.mark.parametrize("name", TEXTS)
def test_every_text_is_refused_when_it_can_not_be_right(name: str) -> None:
    said = refusal(name, "a\nb")
    assert said == f"{variable(name)} must be {FIELDS[name].metadata['kind'].words}: {FIELDS[name].metadata['doc']}"
    if FIELDS[name].default == "":
        assert getattr(load_settings({variable(name): ""}), name) == ""
    else:
        assert refusal(name, "").startswith(f"{variable(name)} must not be empty: ")


@pytest.mark.parametrize("name", FIELDS)
def test_every_misspelt_name_is_told_the_nearest(name: str) -> None:
    right = variable(name)
    # Two letters changed about, as fingers do.
    wrong = right[:-2] + right[-1] + right[-2] if right[-1] != right[-2] else right + "S"
    with pytest.raises(SettingError) as caught:
        load_settings({wrong: "1"})
    assert str(caught.value).startswith(f"{wrong} is not a setting; is {right} meant?")


def test_a_name_like_no_other_is_told_the_page() -> None:
    with pytest.raises(SettingError, match=r"^FRAUDGATE_QQQ is not a setting; docs/settings\.md lists them$"):
        load_settings({"FRAUDGATE_QQQ": "1"})


def test_the_defaults_are_what_their_own_checks_accept() -> None:
    assert load_settings(settings_env(Settings())) == dataclasses.replace(
        Settings(), home=str(Settings().home_path), cache_dir=str(Settings().cache_path)
    )


@pytest.mark.parametrize(
    ("name", "right", "wrong"),
    [
        ("kafka_bootstrap", "a:1,b.example:9092, [::1]:9", "a"),
        ("kafka_bootstrap", "10.0.0.1:65535", "10.0.0.1:65536"),
        ("kafka_bootstrap", "a:1", "kafka://a:1"),
        ("redis_url", "rediss://user:secret@a:6379/0", "a:6379"),
        ("redis_url", "redis+cluster://a:1,b:2", "redis+cluster://:6379"),
        ("redis_url", "redis://a", "http://a"),
        ("registry_url", "https://a/apis/ccompat/v7", "a:8081"),
        ("gateway_url", "http://a:1", "http://"),
        ("host", "::1", "http://a"),
        ("instance_id", "fraudgate-gateway-7d9f", "../0"),
        ("consumer_group", "fraudgate.gateway_1", "two words"),
        ("kafka_delivery", "at_least_once", "never"),
    ],
)
def test_a_text_has_the_form_of_what_it_names(name: str, right: str, wrong: str) -> None:
    assert getattr(load_settings({variable(name): right}), name) == right
    assert refusal(name, wrong).startswith(f"{variable(name)} must be ")


def test_a_refused_url_is_not_shown_for_its_password() -> None:
    assert "secret" not in refusal("redis_url", "redys://user:secret@host")


@pytest.mark.parametrize("argv", LONG_RUNNING.values(), ids=LONG_RUNNING)
@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ("FRAUDGATE_REDIS_PORT", "must be a whole number in 1..65535, not '0'"),
        ("FRAUDGATE_REDIS_PROT", "is FRAUDGATE_REDIS_PORT meant?"),
    ],
)
def test_every_long_running_command_ends_with_status_2_and_one_line(
    argv: list[str], bad: str, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["fraudgate", *argv])
    monkeypatch.setenv(bad, "0")
    assert cli.main() == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    [line] = printed.err.splitlines()
    assert line.startswith(f"fraudgate {argv[0]}: {bad} ")
    assert said in line
