"""Brings the models that the registry's aliases point at into the gateway's model directory.

Called by `fraudgate pull`, by hand or on a schedule. Whatever goes wrong, the models that are there stay as they are, and the
gateway serves on: files come into a hidden directory, are verified there, and only then get their place and a new manifest.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import msgspec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from gateway.contracts.decision import Route
from gateway.contracts.model_meta import ADMISSION_FILE, MODEL_FILE, REGISTERED_NAME, ModelEntry
from model_export.admission import read_report
from model_export.errors import ModelExportError, PackageRefusedError, RegistryRefusedError
from model_export.package import INCOMING_PREFIX, RegisteredModel, installed, place, publish, verify_package
from model_export.signing import verify_signature

LOCK_FILE = ".pull.lock"


class ModelSource(Protocol):
    """Where models come from: `model_export.registry.Registry`, or anything else that keeps versions under aliases.

    Its methods raise a `ModelExportError`.
    """

    def check(self) -> None:
        """Returns when the source answers."""

    def routes(self, name: str) -> list[str]:
        """The aliases of `name` that are routes of the gateway."""

    def find(self, name: str, alias: str) -> RegisteredModel | None:
        """The version that the alias points at, or None."""

    def download(self, model: RegisteredModel, directory: Path) -> None:
        """The files of its package into `directory`, which is created."""


class PullRunningError(ModelExportError):
    """Another pull works on the same directory."""


@dataclass(frozen=True, kw_only=True)
class Pulled:
    """`routes` is what the manifest says now; `fetched` the versions downloaded; `changed` whether the manifest changed."""

    routes: dict[str, ModelEntry]
    fetched: list[str]
    changed: bool


def pull_models(
    models_path: Path, source: ModelSource, name: str = REGISTERED_NAME, public_key: Ed25519PublicKey | None = None
) -> Pulled:
    """Champion, and challenger and the shadows where those aliases are set, from `source` into the gateway's model directory.

    Takes only versions whose own report says that they were admitted and, with a `public_key`, that its owner signed. A second call
    without a change in the source downloads nothing and writes nothing. Raises what the source raises, `RegistryRefusedError` (no
    champion), `PackageRefusedError` or `PullRunningError`; then the manifest is as it was.
    """
    source.check()
    wanted = {route: found for route in source.routes(name) if (found := source.find(name, route)) is not None}
    if Route.CHAMPION.value not in wanted:
        raise RegistryRefusedError(
            f"the registry has no model {name} with the alias {Route.CHAMPION.value}; make one with: fraudgate train"
        )
    models_path.mkdir(parents=True, exist_ok=True)
    with _locked(models_path):
        _remove_leftovers(models_path)
        try:
            return _bring(models_path, source, wanted, public_key)
        finally:
            _remove_leftovers(models_path)


def _bring(
    models_path: Path, source: ModelSource, wanted: dict[str, RegisteredModel], public_key: Ed25519PublicKey | None
) -> Pulled:
    entries: dict[str, ModelEntry] = {}
    incoming: list[tuple[Path, ModelEntry]] = []
    for model in {m.version: m for m in wanted.values()}.values():
        package = models_path / f"{model.name}-{model.version}"
        fetch = not _already_there(package, model)
        if fetch:
            package = models_path / f"{INCOMING_PREFIX}{model.name}-{model.version}"
            source.download(model, package)
        entry = _verified(package, model, public_key)
        if fetch:
            incoming.append((package, entry))
        entries[model.version] = entry
    # All are verified before the first gets its place.
    for package, entry in incoming:
        place(models_path, package, entry)
    routes = {route: entries[model.version] for route, model in wanted.items()}
    changed = publish(models_path, routes)
    return Pulled(routes=routes, fetched=[entry.version for _, entry in incoming], changed=changed)


def _already_there(package: Path, model: RegisteredModel) -> bool:
    """Whether the version lies in its directory, whole and as the registry recorded it."""
    entry = ModelEntry(name=model.name, version=model.version, directory=package.name, files=model.sha256)
    return bool(model.sha256) and installed(package.parent, entry)


def _verified(package: Path, model: RegisteredModel, public_key: Ed25519PublicKey | None) -> ModelEntry:
    """The manifest entry of a package that may go live. Raises `PackageRefusedError`."""
    found = verify_package(package, model.name, model.version, model.sha256)
    entry = msgspec.structs.replace(found, signature=model.signature)
    where = f"model {model.name} version {model.version}"
    try:
        admission = read_report(package)
    except msgspec.DecodeError as exc:
        raise PackageRefusedError(f"{where}: {ADMISSION_FILE} can't be read: {exc}") from exc
    if admission is None:
        raise PackageRefusedError(f"{where} has no admission report; train anew with: fraudgate train")
    if not admission.passed:
        failed = ", ".join(check.name for check in admission.failed())
        raise PackageRefusedError(f"{where} was refused admission: {failed}")
    if MODEL_FILE not in admission.files or any(entry.files.get(file) != digest for file, digest in admission.files.items()):
        raise PackageRefusedError(f"{where}: its admission report is of other files")
    if public_key is not None:
        verify_signature(entry, public_key)
    return entry


def _remove_leftovers(models_path: Path) -> None:
    """What a pull that was killed left behind. Under the lock, so none of it is in use."""
    for leftover in models_path.glob(f"{INCOMING_PREFIX}*"):
        shutil.rmtree(leftover)


@contextlib.contextmanager
def _locked(models_path: Path) -> Iterator[None]:
    """One pull at a time; the kernel lets go of the lock when its process ends, however it ends."""
    fd = os.open(models_path / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as exc:
            raise PullRunningError(f"another fraudgate pull is at work in {models_path}") from exc
        yield
    finally:
        os.close(fd)
