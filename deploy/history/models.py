"""A model as the gateway ran it, found by the digest that a receipt carries: in a model directory, or else in the registry."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import msgspec

from gateway.contracts.model_meta import METADATA_FILE, ModelEntry, ModelMetadata, is_file_name, sha256_file
from gateway.contracts.settings import Settings
from gateway.errors import ModelRefusedError
from gateway.models.model import Model, load_package

# A model that is looked into serves none.
NO_ROUTE = "none"


class NoModelError(RuntimeError):
    """The model can't be had, or not be run by this code. The message says why."""


@dataclass(frozen=True)
class Kept:
    """A model and the folder of its package."""

    folder: Path
    model: Model


@contextmanager
def model_by_digest(settings: Settings, name: str, version: str, digest: str) -> Iterator[Kept]:
    """The model whose file has that sha256; a download lives as long as the context. Raises `NoModelError`."""
    for path in sorted(settings.models_path.glob(f"*/{METADATA_FILE}")):
        if digest_of(path) == digest:
            yield Kept(path.parent, _load(path.parent, name, version))
            return
    with tempfile.TemporaryDirectory(prefix="fraudgate-model-") as tmp:
        folder = Path(tmp) / "model"
        _download(settings, name, version, folder)
        if digest_of(folder / METADATA_FILE) != digest:
            raise NoModelError(
                f"{name} version {version} in the registry is another model than the receipt's, whose sha256 is {digest}"
            )
        yield Kept(folder, _load(folder, name, version))


def digest_of(metadata: Path) -> str | None:
    """The sha256 of the model beside a metadata file, None when that can't be read."""
    try:
        return msgspec.json.decode(metadata.read_bytes(), type=ModelMetadata).onnx_sha256
    except (OSError, msgspec.DecodeError):
        return None


def _load(folder: Path, name: str, version: str) -> Model:
    """Everything about the package is checked by the gateway's own loader."""
    try:
        files = {path.name: sha256_file(path) for path in sorted(folder.iterdir()) if path.is_file() and is_file_name(path.name)}
        return load_package(folder, ModelEntry(name=name, version=version, directory=folder.name, files=files), NO_ROUTE)
    except (ModelRefusedError, OSError) as exc:
        raise NoModelError(str(exc)) from exc


def _download(settings: Settings, name: str, version: str, folder: Path) -> None:
    # Loading MLflow's client takes some seconds, which only a model that isn't here any more is worth.
    from model_export.errors import ModelExportError
    from model_export.registry import Registry

    registry = Registry(settings.mlflow)
    try:
        registry.check()
        found = registry.find_version(name, version)
        if found is None:
            raise NoModelError(f"{name} version {version} is neither in {settings.models_path} nor in the registry")
        registry.download(found, folder)
    except ModelExportError as exc:
        raise NoModelError(f"{name} version {version} is not in {settings.models_path}, and {exc}") from exc
