"""The chart as it is rendered with each values file: what no API server checks, and what helm must refuse."""

from __future__ import annotations

import copy
import importlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from deploy.cli import GROUPS
from deploy.pages.chart_schema import CHART
from gateway.metrics import Metrics
from gateway.policy.folder import SHIPPED, read_folder
from gateway.policy.slot import open_policy
from tests.chart.rendering import LEAST, VALUES, RenderError, helm, one, render, render_text, values_file
from tests.chart.rules import RULES, Manifest, containers, is_ours, name_of, pod_of, pods
from tests.chart.tools import KUBERNETES_VERSION, Tools
from tests.unit.deploy.dockerfiles import COMMANDS

pytestmark = [pytest.mark.chart, pytest.mark.slow]

# Every part that a values file may leave out, at once.
EVERYTHING: dict[str, Any] = LEAST | {
    "policy": {"files": {f"{name}": data.decode() for name, data in read_folder(SHIPPED).items()}},
    "webhooks": {"secret": "fraudgate-webhooks"},
    "models": {"publicKey": {"secret": "keys"}, "signingKey": {"secret": "keys"}, "from": "s3://bucket/models"},
    "monitoring": {"serviceMonitor": {"enabled": True}, "prometheusRule": {"enabled": True}, "dashboards": {"enabled": True}},
    "gateway": {
        "workers": 4,
        "kafkaDoor": False,
        "autoscaling": {"inFlightPerPod": 200, "lagRecordsPerPod": 2000},
        "ingress": {"enabled": True, "host": "fraud.example.com", "className": "nginx", "tlsSecret": "tls"},
        "nodeSelector": {"pool": "payments"},
        "tolerations": [{"key": "payments", "operator": "Exists"}],
        "settings": {"in_flight_max": 2048},
    },
    "settings": {"explore_loss_max_minor_per_day": 1_000_000_000, "decision_budget_ms": 60},
    "retrain": {"days": 28},
}


def shapes() -> list[tuple[str, tuple[str, ...], dict[str, Any] | None]]:
    files: list[tuple[str, tuple[str, ...], dict[str, Any] | None]] = [(name, (name,), None) for name in VALUES]
    return [*files, ("least", (), LEAST), ("everything", (), EVERYTHING)]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
@pytest.mark.parametrize(("name", "files", "values"), shapes(), ids=[shape[0] for shape in shapes()])
def test_the_rendered_chart_keeps_the_rule(
    name: str,
    files: tuple[str, ...],
    values: dict[str, Any] | None,
    rule: Callable[[list[Manifest]], list[str]],
    tools: Tools,
    tmp_path: Path,
) -> None:
    manifests = render(tools, tmp_path, *files, values=values)
    assert len(manifests) > 20
    assert rule(manifests) == []


@pytest.mark.parametrize("name", VALUES)
def test_helm_has_nothing_to_say(name: str, tools: Tools) -> None:
    said = helm(tools, "lint", "--strict", str(CHART), "--kube-version", KUBERNETES_VERSION, "-f", str(values_file(name)))
    assert "0 chart(s) failed" in said


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"kafka": {"bootstrap": ""}}, "kafka.bootstrap is needed"),
        ({"redis": {"url": ""}}, "redis.url or redis.urlSecret is needed"),
        ({"apiKeys": {"secret": ""}}, "apiKeys.secret is needed"),
        ({"settings": {"decision_budget_ms": 4}}, "decision_budget_ms"),
        ({"settings": {"decision_budget": 50}}, "decision_budget"),
        ({"settings": {"redis_url": "redis://x"}}, "redis_url"),
        ({"gateway": {"kind": "DaemonSet"}}, "kind"),
        ({"gateway": {"replica": 3}}, "replica"),
        ({"images": {"gateway": {"digest": "latest"}}}, "digest"),
        ({"gateway": {"autoscaling": {"cpuPercent": None}}}, "looks at nothing"),
        ({"storage": {"tables": "s3://bucket"}}, "tables"),
        ({"policy": {"configMap": {"name": "mine"}}}, "which key is which file"),
        ({"embedded": {"objectStore": {"enabled": True}}}, "storage.credentialsSecret"),
    ],
)
def test_helm_refuses_values_that_can_not_be_meant(values: dict[str, Any], said: str, tools: Tools, tmp_path: Path) -> None:
    with pytest.raises(RenderError, match=said):
        render(tools, tmp_path, values=merged(LEAST, values))


def merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    made = copy.deepcopy(base)
    for key, value in over.items():
        made[key] = merged(made.get(key, {}), value) if isinstance(value, dict) else value
    return made


@pytest.mark.parametrize(("name", "files", "values"), shapes(), ids=[shape[0] for shape in shapes()])
def test_every_container_runs_a_command_of_its_image_with_options_that_the_command_has(
    name: str,
    files: tuple[str, ...],
    values: dict[str, Any] | None,
    tools: Tools,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    known = {command.name: command for group in GROUPS.values() for command in group}
    seen = set()
    for workload, template in pods(render(tools, tmp_path, *files, values=values)):
        for container in filter(is_ours, containers(template)):
            image = container["image"].split("/")[-1].split(":")[0].removeprefix("fraudgate-")
            if "command" in container:
                assert container["command"][0] in ("cp", "mkdir", "python"), f"{name_of(workload)}: {container['name']}"
                continue
            command, *options = container["args"]
            assert command in COMMANDS[image], f"{name}: the image {image} can't run {command}"
            with pytest.raises(SystemExit):
                getattr(importlib.import_module(known[command].module), known[command].function)(["--help"])
            text = capsys.readouterr().out
            assert [option for option in options if option.split("=")[0] not in text] == []
            seen.add(command)
    assert {"serve", "jobs", "cases", "pull", "topics", "retrain", "train", "maintain"} <= seen


def test_large_numbers_reach_the_settings_whole(tools: Tools, tmp_path: Path) -> None:
    data = one(render(tools, tmp_path, values=EVERYTHING), "ConfigMap", "fraudgate-gateway")["data"]
    assert data["FRAUDGATE_EXPLORE_LOSS_MAX_MINOR_PER_DAY"] == "1000000000"
    assert data["FRAUDGATE_IN_FLIGHT_MAX"] == "2048"


def test_a_changed_setting_starts_the_pods_anew_and_an_unchanged_one_does_not(tools: Tools, tmp_path: Path) -> None:
    def checksum(values: dict[str, Any]) -> str:
        template = pod_of(one(render(tools, tmp_path, values=values), "Deployment", "fraudgate-gateway"))
        assert template is not None
        return str(template["metadata"]["annotations"]["checksum/settings"])

    before = checksum(LEAST)
    assert checksum(LEAST | {"gateway": {"replicas": 7}}) == before
    assert checksum(LEAST | {"settings": {"decision_budget_ms": 61}}) != before


def test_the_autoscaler_and_the_deployment_do_not_both_set_the_replicas(tools: Tools, tmp_path: Path) -> None:
    scaled = one(render(tools, tmp_path, values=LEAST), "Deployment", "fraudgate-gateway")
    fixed = one(render(tools, tmp_path, "small"), "Deployment", "fraudgate-gateway")
    assert ("replicas" in scaled["spec"], fixed["spec"]["replicas"]) == (False, 2)


def test_the_autoscaler_asks_for_metrics_that_the_gateway_has(tools: Tools, tmp_path: Path) -> None:
    scaler = one(render(tools, tmp_path, values=EVERYTHING), "HorizontalPodAutoscaler", "fraudgate-gateway")
    asked = {m["pods"]["metric"]["name"] for m in scaler["spec"]["metrics"] if m["type"] == "Pods"}
    assert len(asked) == 2
    text = Metrics().text().decode()
    assert [name for name in asked if f"# TYPE {name} gauge" not in text] == []


def test_gateways_on_volumes_have_names_of_their_own_and_keep_what_they_could_not_deliver(tools: Tools, tmp_path: Path) -> None:
    gateway = one(render(tools, tmp_path, "managed"), "StatefulSet", "fraudgate-gateway")
    assert gateway["spec"]["persistentVolumeClaimRetentionPolicy"] == {"whenDeleted": "Retain", "whenScaled": "Retain"}
    [serves] = gateway["spec"]["template"]["spec"]["containers"]
    identity = [e for e in serves["env"] if e["name"] == "FRAUDGATE_INSTANCE_ID"]
    assert identity == [{"name": "FRAUDGATE_INSTANCE_ID", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}}]
    assert {"name": "home", "mountPath": "/var/lib/fraudgate"} in serves["volumeMounts"]


@pytest.mark.parametrize("name", VALUES)
def test_there_is_one_driver_and_its_successor_waits_for_its_end(name: str, tools: Tools, tmp_path: Path) -> None:
    manifests = render(tools, tmp_path, name)
    drivers = [w for w, template in pods(manifests) if any(c.get("args") == ["jobs"] for c in containers(template))]
    assert [(w["kind"], w["spec"]["replicas"]) for w in drivers] == [("StatefulSet", 1)]


def test_tasks_that_run_by_the_clock_do_not_run_twice_at_once_and_training_runs_by_hand_only(tools: Tools, tmp_path: Path) -> None:
    manifests = render(tools, tmp_path, values=LEAST)
    tasks = {m["metadata"]["name"]: m["spec"] for m in manifests if m["kind"] == "CronJob"}
    assert sorted(tasks) == ["fraudgate-maintain", "fraudgate-retrain", "fraudgate-train"]
    assert {t["concurrencyPolicy"] for t in tasks.values()} == {"Forbid"}
    assert {name: t["suspend"] for name, t in tasks.items() if t["suspend"]} == {"fraudgate-train": True}


def test_other_settings_of_topics_are_another_job(tools: Tools, tmp_path: Path) -> None:
    def name(values: dict[str, Any]) -> str:
        [job] = [m for m in render(tools, tmp_path, values=values) if m["kind"] == "Job"]
        return str(job["metadata"]["name"])

    assert name(LEAST) == name(LEAST)
    assert len({name(LEAST), name(LEAST | {"settings": {"kafka_partitions": 8}}), name(LEAST | {"images": {"tag": "2"}})}) == 3


def test_a_policy_in_the_values_is_the_one_that_the_gateway_reads(tools: Tools, tmp_path: Path) -> None:
    """Mounted as a kubelet does: files are links into a folder that a link names, which is exchanged."""
    manifests = render(tools, tmp_path, values=EVERYTHING)
    data = one(manifests, "ConfigMap", "fraudgate-policy")["data"]
    template = pod_of(one(manifests, "Deployment", "fraudgate-gateway"))
    assert template is not None
    [volume] = [v for v in template["spec"]["volumes"] if v["name"] == "policy"]
    mount = tmp_path / "policy"
    real = mount / "..2026_11_26"
    for item in volume["configMap"]["items"]:
        path = real / item["path"]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(data[item["key"]])
    (mount / "..data").symlink_to(real.name)
    for name in {item["path"].split("/")[0] for item in volume["configMap"]["items"]}:
        (mount / name).symlink_to(f"..data/{name}")
    assert read_folder(mount) == read_folder(SHIPPED)
    slot = open_policy(str(mount), on_change=lambda *_: None, on_refused=lambda _: None)
    assert slot.policy.digest == open_policy("", on_change=lambda *_: None, on_refused=lambda _: None).policy.digest


def test_only_score_is_to_be_had_from_outside(tools: Tools, tmp_path: Path) -> None:
    ingress = one(render(tools, tmp_path, values=EVERYTHING), "Ingress", "fraudgate-gateway")
    paths = [(p["path"], p["pathType"]) for rule in ingress["spec"]["rules"] for p in rule["http"]["paths"]]
    assert paths == [("/score", "Exact")]


def test_prometheus_knows_each_process_by_the_name_that_the_alerts_use(tools: Tools, tmp_path: Path) -> None:
    monitors = [m for m in render(tools, tmp_path, values=EVERYTHING) if m["kind"] == "ServiceMonitor"]
    names = {
        r["replacement"] for m in monitors for e in m["spec"]["endpoints"] for r in e["relabelings"] if r["targetLabel"] == "job"
    }
    assert names == {"gateway", "jobs", "cases"}
    asked = set(re.findall(r'up\{job="([^"]+)"\}', (CHART.parents[1] / "monitoring/rules.yml").read_text()))
    assert asked == names


def test_the_alerts_reach_the_operator_as_they_are(tools: Tools, tmp_path: Path) -> None:
    rule = one(render(tools, tmp_path, values=EVERYTHING), "PrometheusRule", "fraudgate")
    assert rule["spec"] == yaml.safe_load((CHART.parents[1] / "monitoring/rules.yml").read_text())


def test_what_is_rendered_is_the_same_every_time(tools: Tools, tmp_path: Path) -> None:
    assert render_text(tools, tmp_path, values=EVERYTHING) == render_text(tools, tmp_path, values=EVERYTHING)
