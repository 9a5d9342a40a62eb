"""The chart as helm renders it. Called by the tests of the chart."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import yaml

from deploy.pages.chart_schema import CHART
from tests.chart.rules import Manifest
from tests.chart.tools import KUBERNETES_VERSION, Tools

RELEASE, NAMESPACE = "fraudgate", "payments"
HELM_TIMEOUT_S = 60
VALUES = ("small", "managed", "embedded")
# The least that must be said: what values.yaml has no default for.
LEAST: dict[str, Any] = {
    "kafka": {"bootstrap": "kafka:9092"},
    "redis": {"url": "redis://redis:6379/0"},
    "schemaRegistry": {"url": "http://registry:8081"},
    "mlflow": {"url": "http://mlflow:5000"},
    "apiKeys": {"secret": "fraudgate-api-keys"},
}


class RenderError(RuntimeError):
    """What helm had to say."""


def values_file(name: str) -> Path:
    return CHART / f"values-{name}.yaml"


def helm(tools: Tools, *arguments: str) -> str:
    """Standard output. Raises `RenderError`."""
    done = subprocess.run([str(tools.helm), *arguments], capture_output=True, text=True, timeout=HELM_TIMEOUT_S, check=False)
    if done.returncode != 0:
        raise RenderError(done.stdout + done.stderr)
    return done.stdout


def render_text(tools: Tools, tmp_path: Path, *files: str, values: dict[str, Any] | None = None, chart: Path = CHART) -> str:
    """With the values files of these names in their order, and `values` last. Raises `RenderError`."""
    options: list[str] = []
    for name in files:
        options += ["-f", str(chart / f"values-{name}.yaml")]
    if values is not None:
        path = tmp_path / "values.yaml"
        path.write_text(yaml.safe_dump(values))
        options += ["-f", str(path)]
    where = ("--namespace", NAMESPACE, "--kube-version", KUBERNETES_VERSION)
    return helm(tools, "template", RELEASE, str(chart), *where, *options)


def render(tools: Tools, tmp_path: Path, *files: str, values: dict[str, Any] | None = None, chart: Path = CHART) -> list[Manifest]:
    return [m for m in yaml.safe_load_all(render_text(tools, tmp_path, *files, values=values, chart=chart)) if m]


def one(manifests: list[Manifest], kind: str, name: str) -> Manifest:
    [found] = [m for m in manifests if m["kind"] == kind and m["metadata"]["name"] == name]
    return found
