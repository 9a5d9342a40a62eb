"""Writes the Helm chart's values.schema.json: python -m deploy.pages.chart_schema (make docs).

It follows the shape of values.yaml and the ranges of the settings, so that `helm install` refuses a value that isn't known and a setting
out of its range before anything runs.
"""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml

from gateway.contracts.settings import Settings

ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "deploy/chart/fraudgate"
SCHEMA_PATH = CHART / "values.schema.json"

# Settings that the chart's own values decide: addresses, paths, ports, names. Everything else may stand under `settings`.
CHART_SETTINGS = frozenset(
    {
        *("api_keys_path", "cache_dir", "checkpoints_uri", "client_key_path", "data_dir", "home", "host", "instance_id"),
        *("kafka_bootstrap", "maven_url", "mlflow_url", "model_dir", "model_public_key_path", "model_signing_key_path"),
        *("policy_path", "redis_url", "registry_url", "spool_dir", "tables_uri", "webhooks_path"),
        *("console_cases_url", "console_jobs_url", "trace_url"),
    }
)
# Maps whose keys are the user's or Kubernetes' own: by their last name, or by their whole path.
FREE = frozenset(
    {"affinity", "annotations", "labels", "nodeSelector", "podAnnotations", "resources", "podDisruptionBudget", "policy.files"}
)
SETTINGS = frozenset({"settings", "gateway.settings", "jobs.settings", "cases.settings"})
CHOICES: dict[str, list[str]] = {
    "gateway.kind": ["Deployment", "StatefulSet"],
    "gateway.spread.zone": ["DoNotSchedule", "ScheduleAnyway"],
    "gateway.spread.node": ["DoNotSchedule", "ScheduleAnyway"],
    "images.pullPolicy": ["Always", "IfNotPresent", "Never"],
    "gateway.service.type": ["ClusterIP", "LoadBalancer", "NodePort"],
    "cases.service.type": ["ClusterIP", "LoadBalancer", "NodePort"],
}
RANGES: dict[str, tuple[int, int]] = {
    "gateway.replicas": (0, 256),
    "gateway.workers": (1, 256),
    "gateway.preStopSeconds": (1, 120),
    "gateway.autoscaling.minReplicas": (1, 256),
    "gateway.autoscaling.maxReplicas": (1, 256),
    "gateway.autoscaling.cpuPercent": (10, 400),
    "models.everySeconds": (1, 86_400),
    "models.waitSeconds": (0, 86_400),
    "topics.waitSeconds": (0, 3600),
}
PATTERNS = {
    "images.gateway.digest": "^(sha256:[0-9a-f]{64})?$",
    "storage.tables": "^(s3a://.+)?$",
    "storage.checkpoints": "^(s3a://.+)?$",
}
PATTERNS |= {f"images.{name}.digest": PATTERNS["images.gateway.digest"] for name in ("jobs", "export")}
PATTERNS["models.from"] = "^((s3|file)://.+)?$"


def schema() -> dict[str, Any]:
    """The JSON Schema of the chart's values."""
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    made = _of(values, "")
    # Helm's own: what a parent chart hands down.
    made["properties"]["global"] = {"type": "object"}
    title = {"$schema": "http://json-schema.org/draft-07/schema#", "title": "Values of Fraudgate's chart"}
    return title | made | {"definitions": {"settings": _settings()}}


def _of(value: Any, path: str) -> dict[str, Any]:
    last = path.rsplit(".", 1)[-1]
    if path in SETTINGS:
        return {"$ref": "#/definitions/settings"}
    if isinstance(value, dict):
        if last in FREE or path in FREE:
            return {"type": "object"}
        properties = {name: _of(inner, f"{path}.{name}".lstrip(".")) for name, inner in value.items()}
        return {"type": "object", "properties": properties, "additionalProperties": False}
    if path in CHOICES:
        return {"enum": CHOICES[path]}
    if isinstance(value, bool):
        return {"type": "boolean"}
    if isinstance(value, list):
        return {"type": "array"}
    if value is None or isinstance(value, int):
        kind: dict[str, Any] = {"type": ["integer", "null"] if value is None else "integer"}
        least, most = RANGES.get(path, (0 if value == 0 else 1, None))
        return kind | {"minimum": least} | ({} if most is None else {"maximum": most})
    assert isinstance(value, str), f"{path} has a value of a kind that the schema doesn't know"
    return {"type": "string"} | ({"pattern": PATTERNS[path]} if path in PATTERNS else {})


def _settings() -> dict[str, Any]:
    properties: dict[str, Any] = {}
    for f in fields(Settings):
        if f.name in CHART_SETTINGS or f.name.endswith("_port"):
            continue
        whole = isinstance(f.default, int)
        bounds = {"type": "integer", "minimum": f.metadata["least"], "maximum": f.metadata["most"]} if whole else {"type": "string"}
        properties[f.name] = bounds | {"description": f.metadata["doc"]}
    return {"type": "object", "properties": properties, "additionalProperties": False}


def text() -> str:
    return json.dumps(schema(), indent=2) + "\n"


def write() -> None:
    SCHEMA_PATH.write_text(text())
    print(f"{SCHEMA_PATH} written")


if __name__ == "__main__":
    write()
