"""The alerts, judged by Prometheus' own promtool: each fires when it must, and not just under its limit."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from deploy.monitoring import rules
from deploy.monitoring.alerts import ALERTS, BY_NAME
from deploy.monitoring.config import INHIBITED, alertmanager_yml, prometheus_yml
from deploy.monitoring.slo import PAGE, SLOS, TICKET
from gateway.contracts.metrics import SERIES
from gateway.contracts.settings import Settings
from tests.alert_cases import CASES, Case
from tests.tools import needs_alertmanager, needs_prometheus, run_tool

ROOT = Path(__file__).resolve().parent.parent.parent.parent
# Those whose cases last hours or days: promtool takes half a minute for each.
LONG = frozenset(name for name in BY_NAME if "Burn" in name) - {"DecisionsBurnFast"}
RUNBOOK_PARTS = ("## Meaning", "## Check", "## Act")


def promtool_tests(name: str, interval: str) -> dict[str, Any]:
    """A file for `promtool test rules`: the cases of one alert that have a value each `interval`."""
    expr = f'count(ALERTS{{alertname="{name}",alertstate="firing"}} > 0) > bool 0'

    def test(case: Case, fires: bool, i: int) -> dict[str, Any]:
        samples = [{"labels": "{}", "value": 1}] if fires else []
        return {
            "interval": case.interval,
            "name": f"{name} {'fires' if fires else 'is silent'} {i}",
            "input_series": [{"series": series, "values": values} for series, values in case.series.items()],
            "promql_expr_test": [{"expr": expr, "eval_time": case.at, "exp_samples": samples}],
        }

    cases = CASES[name]
    wanted = [(c, True, i) for i, c in enumerate(cases.fires)] + [(c, False, i) for i, c in enumerate(cases.silent)]
    tests = [test(*w) for w in wanted if w[0].interval == interval]
    return {"rule_files": ["rules.yml"], "evaluation_interval": interval, "tests": tests}


def rules_of(name: str) -> str:
    """The rule of one alert and the recording rules that it reads: promtool evaluates whatever is there at each step of days."""
    groups = rules.rules()["groups"]
    alert = next(rule for group in groups for rule in group["rules"] if rule.get("alert") == name)
    recording = [rule for group in groups for rule in group["rules"] if "record" in rule]
    slo = alert["labels"].get("slo")
    wanted = [r for r in recording if r["record"] in alert["expr"] and r.get("labels", {}).get("slo") == slo]
    # What those read in turn comes first.
    wanted = [r for r in recording if r not in wanted and any(r["record"] in other["expr"] for other in wanted)] + wanted
    return yaml.safe_dump({"groups": [{"name": "one", "rules": [*wanted, alert]}]}, sort_keys=False, width=100_000)


def judge(folder: Path, name: str) -> list[str]:
    """What promtool says against the cases of an alert, under the rules.yml in `folder`."""
    complaints = []
    for interval in sorted({c.interval for c in (*CASES[name].fires, *CASES[name].silent)}):
        (folder / "tests.yml").write_text(yaml.safe_dump(promtool_tests(name, interval), width=100_000))
        done = run_tool("promtool", "test", "rules", str(folder / "tests.yml"))
        if done.returncode:
            complaints.append(done.stdout + done.stderr)
    return complaints


@needs_prometheus
@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in LONG else n for n in BY_NAME])
def test_an_alert_fires_when_it_must_and_not_just_under_its_limit(tmp_path: Path, name: str) -> None:
    (tmp_path / "rules.yml").write_text(rules_of(name))
    assert CASES[name].fires
    assert CASES[name].silent
    assert judge(tmp_path, name) == []


@needs_prometheus
@pytest.mark.parametrize(
    ("name", "before", "after"),
    [
        ("KafkaLagGrows", "> 10000", "> 9999"),
        ("RedisMemoryHigh", "> 0.85", "> 0.86"),
        ("StreamStandsStill", "> 120", "> 119"),
        pytest.param("DecisionsBurnFast", "> 0.0144", "> 0.0139", marks=pytest.mark.slow),
        pytest.param("DecisionsBurnFast", "> 0.006", "> 0.0062", marks=pytest.mark.slow),
        pytest.param("LatencyBurnSlow", "> 0.01", "> 0.012", marks=pytest.mark.slow),
    ],
)
def test_a_limit_that_is_moved_a_little_is_noticed(tmp_path: Path, name: str, before: str, after: str) -> None:
    text = rules_of(name)
    assert before in text
    (tmp_path / "rules.yml").write_text(text.replace(before, after))
    assert judge(tmp_path, name) != []


def test_every_alert_has_its_cases() -> None:
    assert set(CASES) == set(BY_NAME)


def test_the_committed_rules_are_those_of_the_code() -> None:
    assert rules.RULES_PATH.read_text() == rules.text(), "run make docs"


@needs_prometheus
def test_prometheus_finds_nothing_wrong_with_the_rules_and_the_configuration(tmp_path: Path) -> None:
    checked = run_tool("promtool", "check", "rules", str(rules.RULES_PATH))
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert "FAILED" not in checked.stdout + checked.stderr
    settings = Settings(home=str(tmp_path), alertmanager_url="https://alerts.example:9093/manager")
    (tmp_path / "prometheus.yml").write_text(prometheus_yml(settings, rules.RULES_PATH))
    checked = run_tool("promtool", "check", "config", str(tmp_path / "prometheus.yml"))
    assert checked.returncode == 0, checked.stdout + checked.stderr


@needs_alertmanager
@pytest.mark.parametrize(
    "urls", [{}, {"alert_page_url": "http://127.0.0.1:1/page", "alert_ticket_url": "http://127.0.0.1:1/ticket"}]
)
def test_alertmanager_finds_nothing_wrong_with_its_configuration(tmp_path: Path, urls: dict[str, Any]) -> None:
    token = tmp_path / "token"
    token.write_text("secret-of-the-pager")
    text = alertmanager_yml(Settings(home=str(tmp_path), alert_token_path=str(token), **urls))
    assert "secret-of-the-pager" not in text
    (tmp_path / "alertmanager.yml").write_text(text)
    checked = run_tool("amtool", "check-config", str(tmp_path / "alertmanager.yml"))
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_rules_name_only_series_that_are_exported_or_recorded() -> None:
    content = rules.rules()
    found = [rule for group in content["groups"] for rule in group["rules"]]
    recorded = {rule["record"] for rule in found if "record" in rule}
    for rule in found:
        for name in re.findall(r"fraudgate[a-z0-9_:]+", rule["expr"]):
            assert name in SERIES or name in recorded, f"{rule}: {name}"


def test_labels_that_a_rule_selects_by_are_labels_of_the_metric() -> None:
    for rule in (rule for group in rules.rules()["groups"] for rule in group["rules"]):
        for name, selector in re.findall(r"(fraudgate_[a-z0-9_]+)\{([^}]*)\}", rule["expr"]):
            for label, value in re.findall(r'([a-z_]+)=~?"([^"]*)"', selector):
                known = {known.name: known.values for known in SERIES[name].labels}
                if label == "le":
                    assert float(value) in SERIES[name].buckets
                    continue
                assert label in known, f"{name} has no {label}"
                assert not known[label] or set(value.split("|")) <= set(known[label]), f"{name}: {label} is never {value}"


def test_every_alert_has_a_runbook_that_says_what_it_means_what_to_check_and_what_to_do() -> None:
    folder = rules.RUNBOOKS_PATH
    assert {path.stem for path in folder.glob("*.md")} == set(BY_NAME)
    for name in BY_NAME:
        text = (folder / f"{name}.md").read_text()
        assert text.startswith(f"# {name}\n"), name
        places = [text.index(part) for part in RUNBOOK_PARTS]
        assert places == sorted(places), name
        # A command of this project, or one of a tool, that can be typed.
        assert re.search(r"^    \S", text, re.MULTILINE), name


def test_the_commands_of_runbooks_are_commands_of_ours() -> None:
    cli = (ROOT / "deploy/cli.py").read_text()
    for path in rules.RUNBOOKS_PATH.glob("*.md"):
        for command in re.findall(r"fraudgate ([a-z][a-z-]+)", path.read_text()):
            assert f'"{command}"' in cli, f"{path.name}: fraudgate {command}"


def test_what_pages_is_what_customers_feel_or_what_is_lost() -> None:
    assert {alert.severity for alert in ALERTS} == {PAGE, TICKET}
    slow = [alert for alert in ALERTS if alert.name.endswith("Slow")]
    assert {alert.severity for alert in slow} == {TICKET}
    assert len(slow) >= len(SLOS)


def test_what_is_inhibited_is_there() -> None:
    components = {alert.component for alert in ALERTS}
    for cause, matcher in INHIBITED:
        assert cause in BY_NAME
        label, operator, pattern = re.fullmatch(r'([a-z]+)(=~?)"(.+)"', matcher).groups()  # type: ignore[union-attr]
        values = components if label == "component" else set(BY_NAME)
        for alternative in pattern.split("|") if operator == "=~" else [pattern]:
            matched = {v for v in values if re.fullmatch(alternative, v)}
            assert matched, f"{cause} inhibits {alternative}, which is nothing"
            assert cause not in matched or label == "component", f"{cause} inhibits itself"


def test_no_cause_is_silenced_by_what_it_silences() -> None:
    by_component = {alert.name: alert.component for alert in ALERTS}
    for cause, matcher in INHIBITED:
        pattern = matcher.partition('"')[2].rstrip('"')
        if matcher.startswith("component"):
            assert not re.fullmatch(pattern, by_component[cause]), cause
