"""The schema registry's REST interface (Confluent's), as much as we need, with a local copy for when it is down.

Called at start-up and when a new schema id appears, never on the hot path.
"""

from __future__ import annotations

import json
import os
import threading
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from gateway.contracts.topics import TOPICS, Topic

TIMEOUT_S = 5.0
CONTENT_TYPE = "application/vnd.schemaregistry.v1+json"


class RegistryUnavailableError(RuntimeError):
    """The registry did not answer, and the local copy doesn't hold what was asked."""


class UnknownSchemaError(LookupError):
    """The registry answered that it has no such schema."""


class IncompatibleSchemaError(ValueError):
    """The registry refused a schema as incompatible with those before it."""


class SchemaRegistry:
    """`url` is the root of the Confluent interface (http://host:port/apis/ccompat/v7); `copy_dir` keeps what was seen."""

    def __init__(self, url: str, copy_dir: Path | None = None) -> None:
        if not url.startswith(("http://", "https://")):
            raise ValueError("the registry's URL must start with http:// or https://")
        self._url = url.rstrip("/")
        self._copy_dir = copy_dir

    def request(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        """One call. Raises `UnknownSchemaError` (404), `IncompatibleSchemaError` (409) or else `RegistryUnavailableError`."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self._url + path, data, {"Content-Type": CONTENT_TYPE}, method=method)  # noqa: S310
        try:
            with urllib.request.urlopen(request, timeout=TIMEOUT_S) as reply:  # noqa: S310
                return json.load(reply)
        except urllib.error.HTTPError as exc:
            if exc.code == 404:
                raise UnknownSchemaError(path) from exc
            if exc.code == 409:
                raise IncompatibleSchemaError(path) from exc
            raise RegistryUnavailableError(f"{method} {path}: status {exc.code}") from exc
        except (OSError, ValueError) as exc:
            raise RegistryUnavailableError(f"{method} {path}: {exc}") from exc

    def set_compatibility(self, subject: str, level: str) -> None:
        self.request("PUT", f"/config/{subject}", {"compatibility": level})

    def register(self, topic: Topic) -> int:
        """The id of the topic's schema as this code has it, registered if it is new."""
        schema = topic.schema_text
        schema_id = int(self.request("POST", f"/subjects/{topic.subject}/versions", {"schema": schema})["id"])
        self._keep(f"subject-{topic.subject}.json", {"id": schema_id, "schema": schema})
        self._keep(f"id-{schema_id}.json", {"schema": schema})
        return schema_id

    def id_of(self, topic_name: str) -> int:
        """The id of the topic's schema as this code has it, from the registry or else from the local copy."""
        topic = TOPICS[topic_name]
        try:
            return self.register(topic)
        except RegistryUnavailableError:
            kept = self._kept(f"subject-{topic.subject}.json")
            if kept is None or kept["schema"] != topic.schema_text:
                raise
            return int(kept["id"])

    def schema(self, schema_id: int) -> str:
        """The text of a schema by id. Ids never change their meaning, so the local copy comes first."""
        kept = self._kept(f"id-{schema_id}.json")
        if kept is not None:
            return str(kept["schema"])
        text = str(self.request("GET", f"/schemas/ids/{schema_id}")["schema"])
        self._keep(f"id-{schema_id}.json", {"schema": text})
        return text

    def ids_of_subject(self, subject: str) -> dict[int, str]:
        """Every registered version of a subject: schema id to text, from the registry or else from the local copy."""
        try:
            versions = self.request("GET", f"/subjects/{subject}/versions")
        except RegistryUnavailableError:
            kept = self._kept(f"versions-{subject}.json")
            if kept is None:
                raise
            return {int(schema_id): str(text) for schema_id, text in kept.items()}
        found = {}
        for version in versions:
            entry = self.request("GET", f"/subjects/{subject}/versions/{version}")
            found[int(entry["id"])] = str(entry["schema"])
        self._keep(f"versions-{subject}.json", {str(schema_id): text for schema_id, text in found.items()})
        return found

    def _kept(self, name: str) -> dict[str, Any] | None:
        if self._copy_dir is None:
            return None
        try:
            kept: dict[str, Any] = json.loads((self._copy_dir / name).read_text())
        except FileNotFoundError:
            return None
        return kept

    def _keep(self, name: str, value: dict[str, Any]) -> None:
        if self._copy_dir is None:
            return
        self._copy_dir.mkdir(parents=True, exist_ok=True)
        # Threads of one process keep the same answer at the same time.
        partial = self._copy_dir / f"{name}.{os.getpid()}.{threading.get_ident()}.partial"
        partial.write_text(json.dumps(value))
        partial.replace(self._copy_dir / name)
