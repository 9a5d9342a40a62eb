"""The chart before a real Kubernetes API server: taken as it is, refused when it is broken, and upgraded from the release before."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from deploy.pages.chart_schema import CHART
from tests.chart.apiserver import ApiServer
from tests.chart.rendering import LEAST, VALUES, helm, one, render, render_text
from tests.chart.rules import Manifest, service_complaints
from tests.chart.test_rendered import EVERYTHING
from tests.chart.tools import Tools

pytestmark = [pytest.mark.chart, pytest.mark.slow]

Break = Callable[[list[Manifest]], None]


def gateway(manifests: list[Manifest]) -> dict[str, Any]:
    found: dict[str, Any] = one(manifests, "Deployment", "fraudgate-gateway")["spec"]
    return found


@pytest.mark.parametrize("name", VALUES)
def test_the_server_takes_the_chart(name: str, tools: Tools, server: ApiServer, tmp_path: Path) -> None:
    text = render_text(tools, tmp_path, name)
    done = server.try_apply(text)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert done.stdout.count("(server dry run)") == len([m for m in yaml.safe_load_all(text) if m])


@pytest.mark.parametrize("values", [LEAST, EVERYTHING], ids=["least", "everything"])
def test_the_server_takes_the_least_and_everything(values: dict[str, Any], tools: Tools, server: ApiServer, tmp_path: Path) -> None:
    done = server.try_apply(render_text(tools, tmp_path, values=values))
    assert (done.returncode, done.stderr) == (0, "")


def _selector(manifests: list[Manifest]) -> None:
    gateway(manifests)["selector"]["matchLabels"]["app.kubernetes.io/component"] = "gatway"


def _quantity(manifests: list[Manifest]) -> None:
    gateway(manifests)["template"]["spec"]["containers"][0]["resources"]["limits"]["memory"] = "1536Mb"


def _autoscaler(manifests: list[Manifest]) -> None:
    one(manifests, "HorizontalPodAutoscaler", "fraudgate-gateway")["spec"] |= {"minReplicas": 20, "maxReplicas": 10}


def _misspelt(manifests: list[Manifest]) -> None:
    container = gateway(manifests)["template"]["spec"]["containers"][0]
    container["readinesProbe"] = container.pop("readinessProbe")


def _no_rollout(manifests: list[Manifest]) -> None:
    gateway(manifests)["strategy"]["rollingUpdate"] = {"maxSurge": 0, "maxUnavailable": 0}


def _limit(manifests: list[Manifest]) -> None:
    gateway(manifests)["template"]["spec"]["containers"][0]["resources"]["limits"]["memory"] = "1Mi"


def _root(manifests: list[Manifest]) -> None:
    gateway(manifests)["template"]["spec"]["securityContext"]["runAsNonRoot"] = False


def _old_version(manifests: list[Manifest]) -> None:
    one(manifests, "PodDisruptionBudget", "fraudgate-gateway")["apiVersion"] = "policy/v1beta1"


def _schedule(manifests: list[Manifest]) -> None:
    one(manifests, "CronJob", "fraudgate-maintain")["spec"]["schedule"] = "15 */6 * *"


def _mount(manifests: list[Manifest]) -> None:
    gateway(manifests)["template"]["spec"]["volumes"].pop(0)


@pytest.mark.parametrize(
    ("breaks", "said"),
    [
        (_selector, "`selector` does not match template `labels`"),
        (_quantity, "quantities must match the regular expression"),
        (_autoscaler, "must be greater than or equal to `minReplicas`"),
        (_misspelt, 'unknown field "spec.template.spec.containers[0].readinesProbe"'),
        (_no_rollout, "may not be 0 when `maxSurge` is 0"),
        (_limit, "must be less than or equal to memory limit"),
        (_root, "runAsNonRoot"),
        (_old_version, "no matches for kind"),
        (_schedule, "expected exactly 5 fields"),
        (_mount, 'Not found: "kernels"'),
    ],
    ids=lambda value: value.__name__.strip("_") if callable(value) else "",
)
def test_a_broken_chart_is_refused(breaks: Break, said: str, tools: Tools, server: ApiServer, tmp_path: Path) -> None:
    manifests = render(tools, tmp_path, values=LEAST)
    breaks(manifests)
    done = server.try_apply(yaml.safe_dump_all(manifests))
    assert done.returncode != 0
    assert said in done.stderr


def test_a_port_that_no_container_has_is_seen_by_us_where_the_server_sees_nothing(
    tools: Tools, server: ApiServer, tmp_path: Path
) -> None:
    manifests = render(tools, tmp_path, values=LEAST)
    one(manifests, "Service", "fraudgate-gateway")["spec"]["ports"][0]["targetPort"] = "web"
    assert server.try_apply(yaml.safe_dump_all(manifests)).returncode == 0
    assert service_complaints(manifests) == ["Service/fraudgate-gateway: no container has the port web"]


def next_release(tmp_path: Path) -> Path:
    """The chart as a later version of itself."""
    chart = tmp_path / "next"
    shutil.copytree(CHART, chart)
    text = (chart / "Chart.yaml").read_text()
    (chart / "Chart.yaml").write_text(
        text.replace("version: 0.1.0", "version: 0.2.0").replace('appVersion: "0.1.0"', 'appVersion: "0.2.0"')
    )
    return chart


@pytest.mark.parametrize("name", VALUES)
def test_a_release_is_upgraded_in_place(name: str, tools: Tools, server: ApiServer, tmp_path: Path) -> None:
    """Selectors, claims and Jobs can't be changed: the server refuses an upgrade that tries."""
    before = render_text(tools, tmp_path, name)
    kept = server.kubectl("apply", "--server-side", "--validate=strict", "-f", "-", text=before)
    assert kept.returncode == 0, kept.stderr
    try:
        changed: dict[str, Any] = {
            "settings": {"decision_budget_ms": 70},
            "images": {"tag": "next"},
            "gateway": {"resources": {"requests": {"cpu": "2"}}, "podAnnotations": {"changed": "yes"}},
            "jobs": {"settings": {"spark_cores": 4}},
            "maintain": {"schedule": "0 3 * * *"},
        }
        after = render_text(tools, tmp_path, name, values=changed, chart=next_release(tmp_path))
        done = server.kubectl("apply", "--server-side", "--dry-run=server", "--validate=strict", "-f", "-", text=after)
        assert done.returncode == 0, done.stderr
        broken = copy.deepcopy([m for m in yaml.safe_load_all(after) if m])
        for manifest in broken:
            if manifest["kind"] == "StatefulSet" and manifest["metadata"]["name"] == "fraudgate-jobs":
                for part in (manifest["spec"]["selector"]["matchLabels"], manifest["spec"]["template"]["metadata"]["labels"]):
                    part["helm.sh/chart"] = "fraudgate-0.2.0"
        refused = server.kubectl("apply", "--server-side", "--dry-run=server", "-f", "-", text=yaml.safe_dump_all(broken))
        assert refused.returncode != 0
        assert "updates to statefulset spec for fields other than" in refused.stderr
    finally:
        gone = server.kubectl("delete", "--wait=false", "--cascade=background", "-f", "-", text=before)
        assert gone.returncode == 0, gone.stderr


def test_the_notes_say_when_gateways_are_more_than_partitions(tools: Tools, server: ApiServer, tmp_path: Path) -> None:
    path = tmp_path / "values.yaml"
    path.write_text(yaml.safe_dump(LEAST))
    where = (f"--kubeconfig={server.config}", "--namespace=elsewhere")
    said = helm(tools, "install", "fraudgate", str(CHART), "--dry-run=server", "-f", str(path), *where)
    assert "Of 12 gateways only 4 can take part in the Kafka door" in said
