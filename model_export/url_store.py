"""A published model directory on a file store or S3, in the layout of the gateway's own: manifest.json and a folder a version.

`fraudgate publish` writes it, packages first and the manifest last; `fraudgate pull --from` reads it with the same verification as from
MLflow. S3 takes its credentials, region and endpoint from the usual variables (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_REGION,
AWS_ENDPOINT_URL).
"""

from __future__ import annotations

from pathlib import Path

import msgspec
import pyarrow as pa
from pyarrow import fs

from gateway.contracts.model_meta import MANIFEST_FILE, Manifest, ModelEntry, is_file_name, is_route, read_manifest, sha256_file
from model_export.checks import FILE_BYTES_MAX
from model_export.errors import PackageRefusedError, RegistryRefusedError, RegistryUnavailableError
from model_export.package import RegisteredModel

SCHEMES = ("file://", "s3://")
MANIFEST_BYTES_MAX = 1_000_000
PARTIAL_SUFFIX = ".partial"


class UrlStore:
    """The directory at `url`, file:///directory or s3://bucket/prefix. Raises `RegistryRefusedError` for another address."""

    def __init__(self, url: str) -> None:
        if not url.startswith(SCHEMES):
            raise RegistryRefusedError(f"{url} is no address of a model directory: file:///directory or s3://bucket/prefix")
        self._url = url
        try:
            self._fs, self._root = fs.FileSystem.from_uri(url.rstrip("/"))
        except (pa.ArrowInvalid, OSError) as exc:
            raise RegistryRefusedError(f"{url} can't be opened: {exc}") from exc
        # S3 has no directories and no renames, and each object appears whole; on a file system neither is so.
        self._local = isinstance(self._fs, fs.LocalFileSystem)
        self._read_once: Manifest | None = None

    def check(self) -> None:
        """Reads the manifest anew; what follows goes by it. Raises `RegistryUnavailableError` or `RegistryRefusedError`."""
        self._read_once = None
        self._manifest()

    def routes(self, name: str) -> list[str]:
        """The routes that the manifest gives to models of that name."""
        return sorted(route for route, entry in self._manifest().routes.items() if entry.name == name and is_route(route))

    def find(self, name: str, alias: str) -> RegisteredModel | None:
        """The version on a route, None when there is none."""
        entry = self._manifest().routes.get(alias)
        if entry is None or entry.name != name:
            return None
        # Both become paths here, and whoever can write there may be nobody to trust.
        if not entry.version.isdecimal() or entry.directory != f"{entry.name}-{entry.version}":
            raise PackageRefusedError(f"{self._url}: the manifest names a version or a directory that can't be one of a model")
        return RegisteredModel(
            name=entry.name, version=entry.version, source=entry.directory, sha256=dict(entry.files), signature=entry.signature
        )

    def download(self, model: RegisteredModel, directory: Path) -> None:
        """A package's files into `directory`, which is created. What they are worth is for the caller to verify."""
        directory.mkdir(parents=True)
        for file in model.sha256:
            if not is_file_name(file):
                raise PackageRefusedError(f"{self._url}: {file!r} can't be a file of a package")
            (directory / file).write_bytes(self._read(f"{model.source}/{file}", FILE_BYTES_MAX))

    def publish(self, models_path: Path) -> int:
        """Copies what the manifest of `models_path` names, then the manifest; files that are there already are copied again.

        Returns how many files. Raises `RegistryRefusedError` when there is no manifest or a file isn't what it says,
        `RegistryUnavailableError` when the store can't be written.
        """
        try:
            manifest = read_manifest(models_path)
        except (FileNotFoundError, msgspec.DecodeError) as exc:
            raise RegistryRefusedError(f"{models_path} holds no models to publish; bring some with: fraudgate pull") from exc
        entries = {entry.directory: entry for entry in manifest.routes.values()}
        for entry in entries.values():
            for file in entry.files:
                self._publish_file(models_path, entry, file)
        self._write(MANIFEST_FILE, (models_path / MANIFEST_FILE).read_bytes())
        return sum(len(entry.files) for entry in entries.values()) + 1

    def _publish_file(self, models_path: Path, entry: ModelEntry, file: str) -> None:
        path = models_path / entry.directory / file
        if not path.is_file() or sha256_file(path) != entry.files[file]:
            raise RegistryRefusedError(f"{path} is not what {MANIFEST_FILE} says; mend it with: fraudgate pull")
        self._write(f"{entry.directory}/{file}", path.read_bytes())

    def _manifest(self) -> Manifest:
        if self._read_once is not None:
            return self._read_once
        try:
            self._read_once = msgspec.json.decode(self._read(MANIFEST_FILE, MANIFEST_BYTES_MAX), type=Manifest)
        except msgspec.DecodeError as exc:
            raise RegistryRefusedError(f"{self._url}/{MANIFEST_FILE} can't be read: {exc}") from exc
        return self._read_once

    def _read(self, path: str, bytes_max: int) -> bytes:
        try:
            with self._fs.open_input_stream(f"{self._root}/{path}") as stream:
                content: bytes = stream.read(bytes_max + 1)
        except FileNotFoundError as exc:
            raise RegistryRefusedError(
                f"there is no {path} at {self._url}; publish one with: fraudgate publish --to {self._url}"
            ) from exc
        except OSError as exc:
            raise RegistryUnavailableError(f"{self._url} can't be read: {exc}") from exc
        if len(content) > bytes_max:
            raise PackageRefusedError(f"{self._url}: {path} is larger than {bytes_max} bytes")
        return content

    def _write(self, path: str, content: bytes) -> None:
        """Whole or not at all, for a reader."""
        target = f"{self._root}/{path}"
        try:
            if self._local:
                self._fs.create_dir(target.rsplit("/", 1)[0], recursive=True)
            partial = f"{target}{PARTIAL_SUFFIX}" if self._local else target
            with self._fs.open_output_stream(partial) as stream:
                stream.write(content)
            if self._local:
                self._fs.move(partial, target)
        except OSError as exc:
            raise RegistryUnavailableError(f"{self._url} can't be written: {exc}") from exc
