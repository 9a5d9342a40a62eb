"""What of the chart can be told without helm: its generated files are current, and the rules for what it renders can fail."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml

from deploy.pages.chart_schema import CHART, CHART_SETTINGS, SCHEMA_PATH, schema, text
from gateway.contracts.settings import Settings
from gateway.supervisor import LEAVE_TIMEOUT_S
from tests.chart import rules
from tests.chart.rules import Manifest

LABELS = {"app.kubernetes.io/name": "fraudgate", "app.kubernetes.io/component": "gateway"}


def good() -> list[Manifest]:
    """A workload, its settings, its Service and its policies, about which no rule complains."""
    closed = {"allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]}}
    probe = {"httpGet": {"path": "/healthz", "port": "http"}}
    container = {
        "name": "gateway",
        "image": "registry.example.com/fraudgate-gateway:1",
        "args": ["serve"],
        "envFrom": [{"configMapRef": {"name": "settings"}}],
        "env": [{"name": "FRAUDGATE_REDIS_URL", "valueFrom": {"secretKeyRef": {"name": "redis", "key": "url"}}}],
        "ports": [{"name": "http", "containerPort": 18080}],
        **dict.fromkeys(("startupProbe", "readinessProbe", "livenessProbe"), probe),
        "lifecycle": {"preStop": {"sleep": {"seconds": 5}}},
        "securityContext": closed,
        "resources": {"requests": {"cpu": "1", "memory": "1Gi"}, "limits": {"memory": "1Gi"}},
        "volumeMounts": [{"name": "home", "mountPath": "/var/lib/fraudgate"}, {"name": "tmp", "mountPath": "/tmp"}],  # noqa: S108
    }
    pod = {
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "securityContext": {"runAsNonRoot": True, "runAsUser": 10001, "seccompProfile": {"type": "RuntimeDefault"}},
        "terminationGracePeriodSeconds": 45,
        "containers": [container],
        "volumes": [{"name": "home", "emptyDir": {}}, {"name": "tmp", "emptyDir": {}}],
    }
    metadata = {"name": "gateway", "labels": LABELS}
    reach = {"to": [{"podSelector": {"matchLabels": LABELS}}], "ports": [{"port": 18080}]}
    made: list[Manifest] = [
        {"kind": "Deployment", "metadata": metadata, "spec": {"template": {"metadata": metadata, "spec": pod}}},
        {"kind": "ConfigMap", "metadata": {"name": "settings"}, "data": {"FRAUDGATE_MLFLOW_URL": "http://gateway:80"}},
        {
            "kind": "Service",
            "metadata": metadata,
            "spec": {"selector": LABELS, "ports": [{"name": "http", "port": 80, "targetPort": "http"}]},
        },
        {"kind": "NetworkPolicy", "metadata": metadata, "spec": {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}},
        {"kind": "NetworkPolicy", "metadata": metadata, "spec": {"podSelector": {}, "policyTypes": ["Egress"], "egress": [reach]}},
    ]
    return copy.deepcopy(made)


def pod(manifests: list[Manifest]) -> dict[str, Any]:
    found: dict[str, Any] = manifests[0]["spec"]["template"]["spec"]
    return found


def container(manifests: list[Manifest]) -> dict[str, Any]:
    found: dict[str, Any] = pod(manifests)["containers"][0]
    return found


Break = Callable[[list[Manifest]], object]
BROKEN: list[tuple[Callable[[list[Manifest]], list[str]], Break]] = [
    (rules.service_complaints, lambda m: m[2]["spec"]["ports"][0].update(targetPort="web")),
    (rules.service_complaints, lambda m: m[2]["spec"].update(selector={"app.kubernetes.io/component": "other"})),
    (rules.probe_complaints, lambda m: container(m).pop("livenessProbe")),
    (rules.probe_complaints, lambda m: container(m).update(readinessProbe={"httpGet": {"path": "/", "port": "metrics"}})),
    (rules.setting_complaints, lambda m: m[1]["data"].update(FRAUDGATE_DECISION_BUDGET="50")),
    (rules.setting_complaints, lambda m: m[1]["data"].update(FRAUDGATE_DECISION_BUDGET_MS="2")),
    (rules.setting_complaints, lambda m: container(m)["env"].append(container(m)["env"][0])),
    (rules.security_complaints, lambda m: pod(m)["securityContext"].pop("runAsNonRoot")),
    (rules.security_complaints, lambda m: pod(m).pop("enableServiceLinks")),
    (rules.security_complaints, lambda m: pod(m).pop("automountServiceAccountToken")),
    (rules.security_complaints, lambda m: container(m)["securityContext"].update(readOnlyRootFilesystem=False)),
    (rules.security_complaints, lambda m: container(m)["securityContext"].update(capabilities={})),
    (rules.security_complaints, lambda m: container(m)["env"].append({"name": "REDIS_PASSWORD", "value": "x"})),
    (rules.security_complaints, lambda m: m.append({"kind": "Secret", "metadata": {"name": "keys"}})),
    (rules.volume_complaints, lambda m: pod(m)["volumes"].append({"name": "spare"})),
    (rules.volume_complaints, lambda m: pod(m)["volumes"].pop()),
    (rules.volume_complaints, lambda m: container(m)["volumeMounts"].pop(0)),
    (rules.resource_complaints, lambda m: container(m)["resources"].pop("requests")),
    (rules.resource_complaints, lambda m: container(m)["resources"]["limits"].update(cpu="1")),
    (rules.leaving_complaints, lambda m: pod(m).update(terminationGracePeriodSeconds=int(5 + LEAVE_TIMEOUT_S) - 1)),
    (rules.leaving_complaints, lambda m: container(m).pop("lifecycle")),
    (rules.network_complaints, lambda m: m[3]["spec"].update(policyTypes=["Ingress"])),
    (rules.network_complaints, lambda m: m[4]["spec"]["egress"][0]["ports"][0].update(port=5000)),
    (rules.network_complaints, lambda m: m[4]["spec"].update(egress=[])),
]


@pytest.mark.parametrize("rule", rules.RULES, ids=lambda rule: rule.__name__)
def test_no_rule_complains_of_a_good_chart(rule: Callable[[list[Manifest]], list[str]]) -> None:
    assert rule(good()) == []


@pytest.mark.parametrize(("rule", "breaks"), BROKEN, ids=lambda value: getattr(value, "__name__", "").replace("<lambda>", ""))
def test_each_rule_complains_of_what_it_is_for(rule: Callable[[list[Manifest]], list[str]], breaks: Break) -> None:
    manifests = good()
    breaks(manifests)
    assert len(rule(manifests)) >= 1


def test_the_schema_of_the_values_is_current() -> None:
    assert SCHEMA_PATH.read_text() == text(), "run: python -m deploy.pages.chart_schema"


@pytest.mark.parametrize(("name", "place"), [("dashboards", "dashboards/json"), ("rules.yml", "rules.yml")])
def test_the_chart_has_the_rules_and_the_dashboards_of_the_monitoring(name: str, place: str) -> None:
    linked = CHART / "files" / name
    assert linked.is_symlink()
    assert linked.resolve(strict=True) == CHART.parents[1] / "monitoring" / place


def test_every_setting_is_either_the_users_or_the_charts() -> None:
    users = set(schema()["definitions"]["settings"]["properties"])
    others = {f.name for f in fields(Settings)} - users
    assert users.isdisjoint(CHART_SETTINGS)
    assert CHART_SETTINGS <= others
    assert [name for name in others - CHART_SETTINGS if not name.endswith("_port")] == []


@pytest.mark.parametrize("path", sorted(CHART.glob("values-*.yaml")), ids=lambda path: path.stem)
def test_a_values_file_names_only_values_that_there_are(path: Path) -> None:
    def unknown(values: dict[str, Any], known: dict[str, Any], at: str) -> list[str]:
        found = []
        for name, value in values.items():
            inner = known.get("properties", {}).get(name)
            if inner is None and known.get("additionalProperties") is False:
                found.append(f"{at}{name}")
            elif isinstance(value, dict) and inner is not None:
                inner = made["definitions"]["settings"] if "$ref" in inner else inner
                found += unknown(value, inner, f"{at}{name}.")
        return found

    made = schema()
    assert unknown(yaml.safe_load(path.read_text()), made, "") == []
    assert unknown({"gateway": {"replica": 1}, "settings": {"nothing": 1}}, made, "") == ["gateway.replica", "settings.nothing"]
