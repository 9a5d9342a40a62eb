"""MLflow: where a trained model is logged, gets its version and its alias, and is fetched from again.

Called by `fraudgate train` and `fraudgate pull`; the gateway never asks MLflow. Importing this module loads MLflow's client, which
takes some seconds; of the package only `commands` does it.

A version counts as complete when its tags hold the sha256 of each of its files; the alias is set last. A command that is killed on
the way leaves a version without an alias, which nobody pulls.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import logging
import math
import os
import shutil
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import msgspec
import requests
from mlflow import MlflowClient
from mlflow.artifacts import download_artifacts
from mlflow.entities import Metric, Param, RunTag
from mlflow.exceptions import MlflowException, RestException

from gateway.contracts.model_meta import METADATA_FILE, MODEL_FILE, PACKAGE_FILES, is_file_name, is_route, sha256_file
from model_export.checks import Check
from model_export.dataset import TrainingSet
from model_export.errors import RegistryRefusedError, RegistryUnavailableError
from model_export.export import Export, write_export
from model_export.package import RegisteredModel, metadata_of, package_files, write_metadata
from model_export.training import TrainedModel

# The first question finds out whether anybody is there; a busy server may take longer over the ones that follow.
CHECK_TIMEOUT_S = 5
REQUEST_TIMEOUT_S = 10
REQUEST_RETRIES = 1
READY_WAIT_S = 10
ARTIFACT_PATH = "model"
CHECKS_FILE = "checks.json"
SHA256_TAG = "fraudgate.sha256."
NOT_FOUND = "RESOURCE_DOES_NOT_EXIST"
ALREADY_THERE = "RESOURCE_ALREADY_EXISTS"

# MLflow's own defaults retry an unreachable server for minutes. Whoever sets these variables outright is obeyed.
for _name, _value in {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": REQUEST_TIMEOUT_S,
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": REQUEST_RETRIES,
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": 1,
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}.items():
    os.environ.setdefault(_name, str(_value))


class Registry:
    """The registry at `url` (http://..., or sqlite:///... without a server). Nothing is asked before the first call."""

    def __init__(self, url: str, timeout_s: float = CHECK_TIMEOUT_S) -> None:
        """`timeout_s` bounds the question of `check`; the other calls have the environment's MLFLOW_HTTP_REQUEST_TIMEOUT."""
        # MLflow tells of each step at INFO, amid the table that a person reads.
        logging.getLogger("mlflow").setLevel(logging.WARNING)
        self._url = url
        self._timeout_s = timeout_s
        self._client = MlflowClient(tracking_uri=url, registry_uri=url)

    def check(self) -> None:
        """One quick question. Raises `RegistryUnavailableError` within `timeout_s` when nobody answers."""
        if not self._url.startswith(("http://", "https://")):
            return
        request = urllib.request.Request(f"{self._url.rstrip('/')}/health")  # noqa: S310 - the scheme is checked above
        try:
            with urllib.request.urlopen(request, timeout=self._timeout_s) as answer:  # noqa: S310
                answer.read()
        except urllib.error.HTTPError:
            # Somebody answers, and a proxy in front may not know /health: the calls that follow tell more.
            return
        except (OSError, ValueError) as exc:
            raise self._unavailable(exc) from exc

    def register(
        self, name: str, alias: str, data: TrainingSet, model: TrainedModel, exported: Export, checks: list[Check]
    ) -> RegisteredModel:
        """Logs a checked model as a new version of `name` and points `alias` at it, last of all.

        Raises `RegistryUnavailableError` or `RegistryRefusedError`; then no alias has moved.
        """
        with tempfile.TemporaryDirectory(prefix="fraudgate-model-") as tmp, self._asking(f"register {name}"):
            files = Path(tmp)
            run_id, artifact_uri = self._create_run(name)
            try:
                self._log(run_id, data, model)
                write_export(exported, files)
                extras = tuple(exported.extras)
                (files / CHECKS_FILE).write_bytes(msgspec.json.format(msgspec.json.encode(checks), indent=2))
                self._client.log_artifacts(run_id, tmp, ARTIFACT_PATH)
                registered = self._create_version(name, run_id, f"{artifact_uri}/{ARTIFACT_PATH}", data, model, files, extras)
                self._client.set_terminated(run_id)
            except BaseException:
                # A run that failed must not look as if it still ran. The error itself matters more than whether this can be said.
                with contextlib.suppress(MlflowException, requests.RequestException):
                    self._client.set_terminated(run_id, "FAILED")
                raise
            self._client.set_registered_model_alias(name, alias, registered.version)
        return registered

    def routes(self, name: str) -> list[str]:
        """The aliases of `name` that the gateway serves or shadows; none when there is no such model."""
        with self._asking(f"look up {name}"):
            try:
                aliases = self._client.get_registered_model(name).aliases
            except MlflowException as exc:
                if exc.error_code == NOT_FOUND:
                    return []
                raise
        return sorted(alias for alias in aliases if is_route(alias))

    def find(self, name: str, alias: str) -> RegisteredModel | None:
        """The version that `alias` points at, or None when there is no such model or alias. Raises `RegistryUnavailableError`."""
        with self._asking(f"look up {name}@{alias}"):
            try:
                found = self._client.get_model_version_by_alias(name, alias)
            except MlflowException as exc:
                # Which of the two an alias that isn't set gets depends on the store behind.
                if exc.error_code in (NOT_FOUND, "INVALID_PARAMETER_VALUE"):
                    return None
                raise
        sha256 = {tag.removeprefix(SHA256_TAG): value for tag, value in found.tags.items() if tag.startswith(SHA256_TAG)}
        return RegisteredModel(name=name, version=str(found.version), source=found.source, sha256=sha256)

    def download(self, model: RegisteredModel, directory: Path) -> None:
        """A package's files into `directory`, which is created. Raises `RegistryUnavailableError` or `RegistryRefusedError`."""
        with self._asking(f"download {model.name} version {model.version}"):
            directory.mkdir(parents=True)
            for file in package_files(model.sha256):
                if not is_file_name(file):
                    raise RegistryRefusedError(f"{model.name} version {model.version}: {file!r} can't be a file of a package")
                got = download_artifacts(f"{model.source}/{file}", dst_path=str(directory), tracking_uri=self._url)
                if Path(got) != directory / file:
                    shutil.move(got, directory / file)

    def _create_run(self, name: str) -> tuple[str, str]:
        """(run id, artifact URI) of a new run in the experiment of that name."""
        experiment = self._client.get_experiment_by_name(name)
        try:
            experiment_id = experiment.experiment_id if experiment is not None else self._client.create_experiment(name)
        except MlflowException as exc:
            if exc.error_code != ALREADY_THERE:
                raise
            experiment_id = self._client.get_experiment_by_name(name).experiment_id
        run = self._client.create_run(experiment_id)
        return run.info.run_id, run.info.artifact_uri

    def _log(self, run_id: str, data: TrainingSet, model: TrainedModel) -> None:
        params = {
            **model.params,
            "trees": model.trees,
            "rounds_run": model.rounds_run,
            "training_table": data.table,
            "training_table_version": data.version,
            "training_rows": model.training_rows,
            "training_frauds": model.training_frauds,
            "fraudgate_version": importlib.metadata.version("fraudgate"),
        }
        now_ms = time.time_ns() // 1_000_000
        self._client.log_batch(
            run_id,
            metrics=[Metric(key, v, now_ms, 0) for key, v in model.metrics.items() if math.isfinite(v)],
            params=[Param(key, str(value)) for key, value in params.items()],
            tags=[RunTag("mlflow.note.content", f"{data.rows} rows of {data.table}, Delta version {data.version}")],
        )

    def _create_version(
        self, name: str, run_id: str, source: str, data: TrainingSet, model: TrainedModel, files: Path, extras: tuple[str, ...]
    ) -> RegisteredModel:
        """The version's number first, since metadata.json holds it; then that file; then the digests that make it complete."""
        try:
            self._client.create_registered_model(name)
        except MlflowException as exc:
            if exc.error_code != ALREADY_THERE:
                raise
        version = str(self._client.create_model_version(name, source, run_id, await_creation_for=READY_WAIT_S).version)
        write_metadata(metadata_of(name, version, data, model, sha256_file(files / MODEL_FILE)), files)
        self._client.log_artifact(run_id, str(files / METADATA_FILE), ARTIFACT_PATH)
        sha256 = {file: sha256_file(files / file) for file in (*PACKAGE_FILES, *extras)}
        for file, digest in sha256.items():
            self._client.set_model_version_tag(name, version, SHA256_TAG + file, digest)
        return RegisteredModel(name=name, version=version, source=source, sha256=sha256)

    @contextlib.contextmanager
    def _asking(self, what: str) -> Iterator[None]:
        """Maps MLflow's errors to ours: those it answered with, and those of not being answered."""
        try:
            yield
        except MlflowException as exc:
            # An error of the client's own has no code but this one: it got no answer that it could use.
            if exc.error_code == "INTERNAL_ERROR" and not isinstance(exc, RestException):
                raise self._unavailable(exc) from exc
            raise RegistryRefusedError(f"MLflow at {self._url} could not {what}: {exc.message}") from exc
        except requests.RequestException as exc:
            raise self._unavailable(exc) from exc

    def _unavailable(self, exc: Exception) -> RegistryUnavailableError:
        why = str(getattr(exc, "reason", exc)).strip().split("\n", 1)[0]
        return RegistryUnavailableError(
            f"MLflow does not answer at {self._url} ({why}); start it with: fraudgate up, or set FRAUDGATE_MLFLOW_URL "
            "(FRAUDGATE_MLFLOW_PORT for a local one) to where it is"
        )
