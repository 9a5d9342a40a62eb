"""MLflow: where a trained model is logged, gets its version and its alias, and is fetched from again.

Called by the commands that train, promote and pull; the gateway never asks MLflow. Importing this module loads MLflow's client, which
takes some seconds; of the package only modules of commands do it.

A version counts as complete when its tags hold the sha256 of each of its files and, written last, the verdict of its admission. A
command that is killed on the way leaves a version without a verdict, which gets no alias.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import shutil
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path

import msgspec
import requests
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from mlflow import MlflowClient
from mlflow.artifacts import download_artifacts
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, RunTag
from mlflow.entities.model_registry import ModelVersion as MlflowVersion
from mlflow.exceptions import MlflowException, RestException

from gateway.contracts.audit import AuditEntry
from gateway.contracts.features import FINGERPRINT
from gateway.contracts.model_meta import METADATA_FILE, MODEL_FILE, PACKAGE_FILES, ModelEntry, is_file_name, is_route, sha256_file
from gateway.contracts.tables import TRAINING_SET
from model_export.admission import Admission, with_report
from model_export.dataset import MADE_FROM_PREFIX, TrainingSet
from model_export.errors import RegistryRefusedError, RegistryUnavailableError
from model_export.export import Export, write_export
from model_export.package import RegisteredModel, metadata_of, package_files, write_metadata
from model_export.signing import sign
from model_export.training import TrainedModel
from model_export.versions import ModelVersion, code_version, data_digest

# The first question finds out whether anybody is there; a busy server may take longer over the ones that follow.
CHECK_TIMEOUT_S = 5
REQUEST_TIMEOUT_S = 10
REQUEST_RETRIES = 1
READY_WAIT_S = 10
ARTIFACT_PATH = "model"
PLOTS_PATH = "plots"
SHA256_TAG = "fraudgate.sha256."
SIGNATURE_TAG = "fraudgate.signature"
ADMISSION_TAG = "fraudgate.admission"
# The version that the candidate was compared with.
AGAINST_TAG = "fraudgate.admission_against"
AUDIT_TAG = "fraudgate.audit."
# Tags of a version that tell what it was made of, beside the run's parameters.
CODE_VERSION_TAG = "fraudgate.code_version"
TRAINING_TABLE_TAG = "fraudgate.training_table"
TRAINING_TABLE_VERSION_TAG = "fraudgate.training_table_version"
TRAINING_ROWS_TAG = "fraudgate.training_rows"
TRAINING_DATA_TAG = "fraudgate.training_data"
TRAINING_AS_OF_TAG = "fraudgate.training_as_of_ms"
TRAINING_UNTIL_TAG = "fraudgate.training_until_ms"
# What the commit of a training set calls the two.
MADE_AS_OF, MADE_UNTIL = "fraudgate.as_of_ms", "fraudgate.end_ms"
VERSIONS_SHOWN_MAX = 200
NOTE_CHARS_MAX = 5000
# MLflow's limit for the digest of a data set, and its name for what a data set was used for.
DATASET_DIGEST_CHARS = 36
DATASET_CONTEXT = "mlflow.data.context"
# Audit entries that stay with a registered model; the file of the model directory keeps them all.
AUDIT_TAGS_MAX = 500
NOT_FOUND = "RESOURCE_DOES_NOT_EXIST"
INVALID = "INVALID_PARAMETER_VALUE"
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
        self,
        name: str,
        data: TrainingSet,
        model: TrainedModel,
        exported: Export,
        admission: Admission,
        *,
        pictures: Mapping[str, bytes] | None = None,
        signing_key: Ed25519PrivateKey | None = None,
    ) -> RegisteredModel:
        """Logs a model as a new version of `name`, admitted or refused; no alias points at it yet.

        Raises `RegistryUnavailableError` or `RegistryRefusedError`; then the version, if there is one, has no verdict.
        """
        exported = with_report(exported, admission)
        with tempfile.TemporaryDirectory(prefix="fraudgate-model-") as tmp, self._asking(f"register {name}"):
            files = Path(tmp) / ARTIFACT_PATH
            plots = Path(tmp) / PLOTS_PATH
            files.mkdir()
            plots.mkdir()
            run_id, artifact_uri = self._create_run(name)
            try:
                self._log(run_id, data, model, admission)
                write_export(exported, files)
                for picture, content in (pictures or {}).items():
                    (plots / picture).write_bytes(content)
                self._client.log_artifacts(run_id, tmp)
                source = f"{artifact_uri}/{ARTIFACT_PATH}"
                registered = self._create_version(name, run_id, source, data, model, files, tuple(exported.extras), signing_key)
                self._client.set_terminated(run_id)
            except BaseException:
                # A run that failed must not look as if it still ran. The error itself matters more than whether this can be said.
                with contextlib.suppress(MlflowException, requests.RequestException):
                    self._client.set_terminated(run_id, "FAILED")
                raise
            if admission.champion is not None:
                self._client.set_model_version_tag(name, registered.version, AGAINST_TAG, admission.champion)
            self._client.set_model_version_tag(name, registered.version, ADMISSION_TAG, admission.verdict)
        return registered

    def set_alias(self, name: str, alias: str, version: str) -> None:
        """Points `alias` at a version. Raises `RegistryUnavailableError` or `RegistryRefusedError`."""
        with self._asking(f"point {name}@{alias} at version {version}"):
            self._client.set_registered_model_alias(name, alias, version)

    def remove_alias(self, name: str, alias: str) -> None:
        """Takes the alias away. Raises `RegistryUnavailableError` or `RegistryRefusedError`."""
        with self._asking(f"remove {name}@{alias}"):
            self._client.delete_registered_model_alias(name, alias)

    def versions(self, name: str) -> list[ModelVersion]:
        """Newest first, at most VERSIONS_SHOWN_MAX, with the metrics of their runs; none when there is no such model."""
        with self._asking(f"list the versions of {name}"):
            found = self._client.search_model_versions(
                f"name = '{name}'", max_results=VERSIONS_SHOWN_MAX, order_by=["version_number DESC"]
            )
            aliases = self._aliases(name) if found else {}
            return [self._described(version, aliases) for version in found]

    def version(self, name: str, version: str) -> ModelVersion | None:
        """One version, None when there is none. Raises `RegistryUnavailableError`."""
        with self._asking(f"look up {name} version {version}"):
            try:
                found = self._client.get_model_version(name, version)
            except MlflowException as exc:
                if exc.error_code in (NOT_FOUND, INVALID):
                    return None
                raise
            return self._described(found, self._aliases(name))

    def note_audit(self, name: str, entry: AuditEntry) -> None:
        """Keeps an audit entry with the registered model as well, where every machine and MLflow's pages see it."""
        with self._asking(f"note what was done to {name}"):
            tags = self._client.get_registered_model(name).tags
            mine = sorted(key for key in tags if key.startswith(AUDIT_TAG))
            key = f"{AUDIT_TAG}{entry.at_ms:014d}"
            while key in tags:
                key += "+"
            self._client.set_registered_model_tag(name, key, msgspec.json.encode(entry).decode())
            for old in mine[: max(0, len(mine) + 1 - AUDIT_TAGS_MAX)]:
                self._client.delete_registered_model_tag(name, old)

    def audit(self, name: str) -> list[AuditEntry]:
        """The entries kept with the registered model, oldest first; none when there is no such model."""
        with self._asking(f"read what was done to {name}"):
            try:
                tags = self._client.get_registered_model(name).tags
            except MlflowException as exc:
                if exc.error_code == NOT_FOUND:
                    return []
                raise
        entries = []
        for key in sorted(key for key in tags if key.startswith(AUDIT_TAG)):
            # Tags can be edited by hand; one that was spoilt tells nothing.
            with contextlib.suppress(msgspec.DecodeError):
                entries.append(msgspec.json.decode(tags[key], type=AuditEntry))
        return entries

    def _aliases(self, name: str) -> dict[str, str]:
        return {alias: str(version) for alias, version in self._client.get_registered_model(name).aliases.items()}

    def _described(self, found: MlflowVersion, aliases: dict[str, str]) -> ModelVersion:
        tags, version = found.tags, str(found.version)
        try:
            metrics = dict(self._client.get_run(found.run_id).data.metrics) if found.run_id else {}
        except MlflowException as exc:
            # Whoever deletes a run leaves its versions.
            if exc.error_code != NOT_FOUND:
                raise
            metrics = {}

        def number(tag: str) -> int | None:
            return int(tags[tag]) if tags.get(tag, "").isdecimal() else None

        return ModelVersion(
            name=found.name,
            version=version,
            aliases=sorted(alias for alias, of in aliases.items() if of == version),
            admission=tags.get(ADMISSION_TAG),
            against=tags.get(AGAINST_TAG),
            created_at_ms=int(found.creation_timestamp),
            training_table=tags.get(TRAINING_TABLE_TAG),
            training_table_version=number(TRAINING_TABLE_VERSION_TAG),
            training_rows=number(TRAINING_ROWS_TAG),
            training_data=tags.get(TRAINING_DATA_TAG),
            training_as_of_ms=number(TRAINING_AS_OF_TAG),
            training_until_ms=number(TRAINING_UNTIL_TAG),
            code_version=tags.get(CODE_VERSION_TAG),
            metrics=metrics,
        )

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
                if exc.error_code in (NOT_FOUND, INVALID):
                    return None
                raise
        sha256 = {tag.removeprefix(SHA256_TAG): value for tag, value in found.tags.items() if tag.startswith(SHA256_TAG)}
        return RegisteredModel(
            name=name, version=str(found.version), source=found.source, sha256=sha256, signature=found.tags.get(SIGNATURE_TAG)
        )

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

    def _log(self, run_id: str, data: TrainingSet, model: TrainedModel, admission: Admission) -> None:
        params = {
            **model.params,
            "trees": model.trees,
            "rounds_run": model.rounds_run,
            "training_table": data.table,
            "training_table_version": data.version,
            "training_rows": model.training_rows,
            "training_frauds": model.training_frauds,
            "feature_fingerprint": FINGERPRINT,
            "code_version": code_version(),
            "admission_champion": admission.champion or "none",
            **{key.removeprefix(MADE_FROM_PREFIX): value for key, value in data.made_from.items()},
        }
        now_ms = time.time_ns() // 1_000_000
        self._client.log_batch(
            run_id,
            metrics=[Metric(key, v, now_ms, 0) for key, v in model.metrics.items() if math.isfinite(v)],
            params=[Param(key, str(value)) for key, value in params.items()],
            tags=[RunTag("mlflow.note.content", _note(data, admission)), RunTag(ADMISSION_TAG, admission.verdict)],
        )
        source = msgspec.json.encode({"uri": data.table, "delta_version": data.version}).decode()
        profile = msgspec.json.encode({"num_rows": data.rows, "num_frauds": data.frauds}).decode()
        dataset = Dataset(TRAINING_SET, data_digest(data)[:DATASET_DIGEST_CHARS], "delta_table", source, profile=profile)
        self._client.log_inputs(run_id, [DatasetInput(dataset, [InputTag(DATASET_CONTEXT, "training")])])

    def _create_version(
        self,
        name: str,
        run_id: str,
        source: str,
        data: TrainingSet,
        model: TrainedModel,
        files: Path,
        extras: tuple[str, ...],
        signing_key: Ed25519PrivateKey | None,
    ) -> RegisteredModel:
        """The version's number first, since metadata.json holds it; then that file; then what makes it complete but for the verdict."""
        try:
            self._client.create_registered_model(name)
        except MlflowException as exc:
            if exc.error_code != ALREADY_THERE:
                raise
        version = str(self._client.create_model_version(name, source, run_id, await_creation_for=READY_WAIT_S).version)
        write_metadata(metadata_of(name, version, data, model, sha256_file(files / MODEL_FILE)), files)
        self._client.log_artifact(run_id, str(files / METADATA_FILE), ARTIFACT_PATH)
        sha256 = {file: sha256_file(files / file) for file in (*PACKAGE_FILES, *extras)}
        entry = ModelEntry(name=name, version=version, directory=f"{name}-{version}", files=sha256)
        signature = None if signing_key is None else sign(entry, signing_key)
        tags = {
            **{SHA256_TAG + file: digest for file, digest in sha256.items()},
            CODE_VERSION_TAG: code_version(),
            TRAINING_TABLE_TAG: data.table,
            TRAINING_TABLE_VERSION_TAG: str(data.version),
            TRAINING_ROWS_TAG: str(data.rows),
            TRAINING_DATA_TAG: data_digest(data),
            TRAINING_AS_OF_TAG: data.made_from.get(MADE_AS_OF, ""),
            TRAINING_UNTIL_TAG: data.made_from.get(MADE_UNTIL, ""),
            SIGNATURE_TAG: signature or "",
        }
        for tag, value in tags.items():
            if value:
                self._client.set_model_version_tag(name, version, tag, value)
        return RegisteredModel(name=name, version=version, source=source, sha256=sha256, signature=signature)

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


def _note(data: TrainingSet, admission: Admission) -> str:
    """What MLflow's page of the run says of it."""
    lines = [f"{data.rows} rows of {data.table}, Delta version {data.version}", "", f"Admission: {admission.verdict}", ""]
    lines += [f"- {'ok' if check.passed else 'FAILED'} {check.name}: {check.found}" for check in admission.checks]
    return "\n".join(lines)[:NOTE_CHARS_MAX]
