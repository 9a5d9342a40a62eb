"""A model's files together: model.onnx, golden.npz, metadata.json and extras in one directory, and the gateway's directory of such.

Called by `fraudgate train` and `fraudgate pull`. Knows nothing of MLflow. What the gateway reads changes by renames alone, so a
reader sees the old model or the new one, whole.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np

from gateway.contracts.features import FEATURE_NAMES, FINGERPRINT
from gateway.contracts.model_meta import (
    GOLDEN_FILE,
    METADATA_FILE,
    MODEL_FILE,
    PACKAGE_FILES,
    Manifest,
    ModelEntry,
    ModelMetadata,
    is_file_name,
    read_manifest,
    sha256_file,
    write_manifest,
)
from model_export.dataset import TrainingSet
from model_export.errors import OtherFeaturesError, PackageRefusedError
from model_export.training import TrainedModel

# Newest version directories of a name that stay whether in use or not: a gateway may still hold the manifest before this one.
KEPT_VERSIONS = 3
INCOMING_PREFIX = ".incoming-"


@dataclass(frozen=True, kw_only=True)
class RegisteredModel:
    """One version in a registry. `source` is where that registry keeps its files; `sha256` what it recorded of each of them, and
    `signature` the signature over them, if there is one.
    """

    name: str
    version: str
    source: str
    sha256: dict[str, str]
    signature: str | None = None


def metadata_of(name: str, version: str, data: TrainingSet, model: TrainedModel, onnx_sha256: str) -> ModelMetadata:
    return ModelMetadata(
        name=name,
        version=version,
        created_at_ms=time.time_ns() // 1_000_000,
        feature_fingerprint=FINGERPRINT,
        feature_names=list(FEATURE_NAMES),
        onnx_sha256=onnx_sha256,
        training_table=data.table,
        training_table_version=data.version,
        training_rows=model.training_rows,
        training_frauds=model.training_frauds,
        training_end_ms=int(data.event_time_ms[model.split.validation.stop - 1]),
        # JSON has no NaN: a precision of no alerts is left out.
        metrics={k: v for k, v in model.metrics.items() if np.isfinite(v)},
    )


def write_metadata(metadata: ModelMetadata, directory: Path) -> None:
    (directory / METADATA_FILE).write_bytes(msgspec.json.format(msgspec.json.encode(metadata), indent=2))


def verify_package(directory: Path, name: str, version: str, sha256: Mapping[str, str] | None = None) -> ModelEntry:
    """The manifest entry of the package in `directory`, when everything about it is right. Raises `PackageRefusedError`.

    `sha256` is what the registry recorded of each file, extras included; None for a package that is only being made, whose extras
    are whatever else the directory holds.
    """
    where = f"model {name} version {version}"
    found: dict[str, str] = {}
    for file in package_files(sha256 if sha256 is not None else sorted(path.name for path in directory.iterdir())):
        path = directory / file
        if not is_file_name(file):
            raise PackageRefusedError(f"{where}: {file!r} can't be a file of a package")
        if not path.is_file():
            raise PackageRefusedError(f"{where}: {file} is missing")
        found[file] = sha256_file(path)
        if sha256 is not None and file not in sha256:
            raise PackageRefusedError(f"{where}: the registry holds no sha256 of {file}; its registration did not come to its end")
        if sha256 is not None and sha256[file] != found[file]:
            raise PackageRefusedError(f"{where}: {file} is corrupted: its sha256 is {found[file]}, registered was {sha256[file]}")
    try:
        metadata = msgspec.json.decode((directory / METADATA_FILE).read_bytes(), type=ModelMetadata)
    except msgspec.DecodeError as exc:
        raise PackageRefusedError(f"{where}: {METADATA_FILE} can't be read: {exc}") from exc
    if (metadata.name, metadata.version) != (name, version):
        raise PackageRefusedError(f"{where}: {METADATA_FILE} is of {metadata.name} version {metadata.version}")
    if metadata.onnx_sha256 != found[MODEL_FILE]:
        raise PackageRefusedError(f"{where}: {MODEL_FILE} is not the file that {METADATA_FILE} names")
    if metadata.feature_fingerprint != FINGERPRINT or metadata.feature_names != list(FEATURE_NAMES):
        raise OtherFeaturesError(
            f"{where} was trained for features {metadata.feature_fingerprint}, this code computes {FINGERPRINT}; train anew with: "
            "fraudgate train"
        )
    _verify_golden(directory / GOLDEN_FILE, where)
    return ModelEntry(name=name, version=version, directory=f"{name}-{version}", files=found)


def package_files(recorded: Iterable[str]) -> tuple[str, ...]:
    """The files of a package of which `recorded` are known: those that every package has, then its extras."""
    return *PACKAGE_FILES, *(file for file in recorded if file not in PACKAGE_FILES)


def _verify_golden(path: Path, where: str) -> None:
    try:
        with np.load(path, allow_pickle=False) as golden:
            features, probability = golden["features"], golden["probability"]
    except (OSError, ValueError, KeyError, EOFError) as exc:
        raise PackageRefusedError(f"{where}: {GOLDEN_FILE} can't be read: {exc}") from exc
    if features.ndim != 2 or features.shape[1] != len(FEATURE_NAMES) or probability.shape != (len(features),) or not len(features):
        raise PackageRefusedError(f"{where}: {GOLDEN_FILE} has shapes {features.shape} and {probability.shape}")


def installed(models_path: Path, entry: ModelEntry) -> bool:
    """Whether the directory of `entry` is there with exactly its files."""
    directory = models_path / entry.directory
    return all((directory / file).is_file() and sha256_file(directory / file) == digest for file, digest in entry.files.items())


def place(models_path: Path, package: Path, entry: ModelEntry) -> None:
    """Moves a verified package (on the same file system) to where `entry` says, by one rename. Does nothing when it is there."""
    target = models_path / entry.directory
    if installed(models_path, entry):
        shutil.rmtree(package)
        return
    for file in entry.files:
        _sync(package / file)
    if target.exists():
        # What lies there is damaged. It is moved aside first, since a rename doesn't replace a directory with files in it.
        damaged = models_path / f"{INCOMING_PREFIX}damaged-{entry.directory}-{os.getpid()}"
        target.rename(damaged)
        package.rename(target)
        shutil.rmtree(damaged)
    else:
        package.rename(target)
    _sync(models_path)


def publish(models_path: Path, routes: Mapping[str, ModelEntry]) -> bool:
    """Makes `routes` what the gateway serves, by one rename of the manifest. False when that is what it said already.

    Then removes version directories beyond the newest KEPT_VERSIONS of each name that no route uses.
    """
    manifest = Manifest(routes=dict(routes))
    changed = current_manifest(models_path) != manifest
    if changed:
        write_manifest(models_path, manifest)
        _sync(models_path)
    _prune(models_path, manifest)
    return changed


def current_manifest(models_path: Path) -> Manifest | None:
    """The manifest, or None where there is none that can be read."""
    try:
        return read_manifest(models_path)
    except (FileNotFoundError, msgspec.DecodeError):
        return None


def _prune(models_path: Path, manifest: Manifest) -> None:
    used = {entry.directory for entry in manifest.routes.values()}
    for name in {entry.name for entry in manifest.routes.values()}:
        versions = [p for p in models_path.glob(f"{name}-*") if p.is_dir() and p.name.removeprefix(f"{name}-").isdecimal()]
        versions.sort(key=lambda p: int(p.name.removeprefix(f"{name}-")), reverse=True)
        for directory in versions[KEPT_VERSIONS:]:
            if directory.name not in used:
                shutil.rmtree(directory)


def _sync(path: Path) -> None:
    """So that a rename seen after a power cut never names a file whose bytes were lost."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
