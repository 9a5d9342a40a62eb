"""`fraudgate policy check | show`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gateway.contracts.settings import ENV_PREFIX
from gateway.policy.commands import policy
from gateway.policy.folder import SHIPPED
from gateway.policy.policy import load_policy
from tests.unit.gateway.policy.factories import make_list, make_rule, policy_files


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A policy with rules in all states."""
    rules = [make_rule("score > 1", state, state=state) for state in ("live", "shadow", "off")]
    alert = {"name": "a", "outcomes": ["decline"], "lists": ["bad"], "webhooks": ["desk"], "amount_minor_least": 5000}
    lists = (make_list("bad", "block"), make_list("good", "allow"), make_list("odd", "watch"))
    (tmp_path / "rules").mkdir()
    for name, data in policy_files(*rules, lists=lists, alerts=(alert,)).items():
        (tmp_path / name).write_bytes(data)
    return tmp_path


def test_a_policy_that_can_be_used_is_told_with_its_digest(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert policy(["check", str(folder)]) == 0
    out = capsys.readouterr().out
    assert "3 rules (1 live, 1 shadow, 1 off), 3 lists, 2 bands, 1 alerts" in out
    assert load_policy(str(folder)).digest in out


def test_every_problem_is_told_and_the_exit_status_is_1(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rules = folder / "rules/all.yaml"
    rules.write_text(rules.read_text().replace("score > 1", "scroe > 1"))
    assert policy(["check", str(folder)]) == 1
    told = capsys.readouterr().err.splitlines()
    assert [line.rsplit(": ", 1)[1] for line in told[:-1]] == ["there is no field or feature scroe; did you mean score?"] * 3
    assert told[0].startswith(f"{rules}:6:9: rule 'live'")
    assert told[-1] == "fraudgate policy: 3 problems; this policy can't be used"
    assert policy(["check", "--json", str(folder)]) == 1
    assert len(json.loads(capsys.readouterr().out)["problems"]) == 3


def test_show_tells_what_is_asked_in_which_order(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert policy(["show", str(folder)]) == 0
    out = capsys.readouterr().out
    at = [out.index(f"\n{title}") for title in ("Block lists:", "Allow lists:", "Watch lists:", "Rules, ", "Bands, ", "Alerts:")]
    assert at == sorted(at)
    assert "outcomes decline; lists bad; from 5,000; to desk" in out
    assert "approve (fails open)" in out and "review (fails closed)" in out
    for state in ("live", "shadow", "off"):
        assert f"  {state:<24} {state:<7} review" in out


def test_show_has_the_policy_of_the_settings_without_a_folder(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert policy(["show", "--json"]) == 0
    shipped = json.loads(capsys.readouterr().out)
    assert shipped["digest"] == load_policy(str(SHIPPED)).digest
    assert {rule["file"] for rule in shipped["rules"]} == {"rules/velocity.yaml", "rules/travel.yaml", "rules/amounts.yaml"}
    monkeypatch.setenv(f"{ENV_PREFIX}POLICY_PATH", str(folder))
    assert policy(["show", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["name"] == "test"
