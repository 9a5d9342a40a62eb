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

from gateway.contracts.decision import Route
from gateway.contracts.model_meta import REGISTERED_NAME, ModelEntry
from model_export.errors import ModelExportError, RegistryRefusedError
from model_export.package import INCOMING_PREFIX, RegisteredModel, installed, place, publish, verify_package

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


def pull_models(models_path: Path, source: ModelSource, name: str = REGISTERED_NAME) -> Pulled:
    """Champion, and challenger and the shadows where those aliases are set, from `source` into the gateway's model directory.

    A second call without a change in the source downloads nothing and writes nothing. Raises what the source raises,
    `RegistryRefusedError` (no champion), `PackageRefusedError` or `PullRunningError`; then the manifest is as it was.
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
            return _bring(models_path, source, wanted)
        finally:
            _remove_leftovers(models_path)


def _bring(models_path: Path, source: ModelSource, wanted: dict[str, RegisteredModel]) -> Pulled:
    entries: dict[str, ModelEntry] = {}
    incoming: list[tuple[Path, ModelEntry]] = []
    for model in {m.version: m for m in wanted.values()}.values():
        entry = _already_there(models_path, model)
        if entry is None:
            package = models_path / f"{INCOMING_PREFIX}{model.name}-{model.version}"
            source.download(model, package)
            entry = verify_package(package, model.name, model.version, model.sha256)
            incoming.append((package, entry))
        entries[model.version] = entry
    # All are verified before the first gets its place.
    for package, entry in incoming:
        place(models_path, package, entry)
    routes = {route: entries[model.version] for route, model in wanted.items()}
    changed = publish(models_path, routes)
    return Pulled(routes=routes, fetched=[entry.version for _, entry in incoming], changed=changed)


def _already_there(models_path: Path, model: RegisteredModel) -> ModelEntry | None:
    """The entry of a version that lies in the directory, whole and as the registry recorded it."""
    entry = ModelEntry(name=model.name, version=model.version, directory=f"{model.name}-{model.version}", files=model.sha256)
    if not model.sha256 or not installed(models_path, entry):
        return None
    return verify_package(models_path / entry.directory, model.name, model.version, model.sha256)


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
