"""What pull leaves in the gateway's model directory, whatever the registry hands out."""

from __future__ import annotations

import fcntl
import os
import shutil
from pathlib import Path

import msgspec
import numpy as np
import pytest

from gateway.contracts.model_meta import (
    ADMISSION_FILE,
    EXPLANATION_FILE,
    GOLDEN_FILE,
    MANIFEST_FILE,
    METADATA_FILE,
    MODEL_FILE,
    PACKAGE_FILES,
    REFERENCE_FILE,
    ModelMetadata,
    is_route,
    read_manifest,
    sha256_file,
)
from gateway.errors import ModelRefusedError
from gateway.models.model import load_model
from model_export.admission import Admission, report_bytes
from model_export.checks import Check
from model_export.errors import ModelExportError, PackageRefusedError, RegistryRefusedError, RegistryUnavailableError
from model_export.package import INCOMING_PREFIX, RegisteredModel
from model_export.pull import LOCK_FILE, PullRunningError, pull_models
from tests.factories_model import make_model_dir

PASSED_REPORT = Admission(verdict="passed", checked_at_ms=1, champion=None, checks=[], slices=[], files={})


def digests(package: Path, *files: str) -> dict[str, str]:
    return {file: sha256_file(package / file) for file in files}


def report_of(package: Path) -> Admission:
    return msgspec.structs.replace(PASSED_REPORT, files=digests(package, MODEL_FILE, GOLDEN_FILE))


class DirectorySource:
    """A registry of directories: as much of one as pull sees."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self.aliases: dict[str, RegisteredModel] = {}
        self.downloads: list[str] = []
        self.up = True

    def add(self, version: str, *aliases: str, seed: int = 1) -> Path:
        """Registers a small real model and points the aliases at it; returns where its files lie."""
        made = make_model_dir(self._root, version=version, seed=seed, rows=1000, trees=5)
        entry = made.routes["champion"]
        kept = self._root / f"kept-{version}"
        shutil.copytree(self._root / entry.directory, kept, dirs_exist_ok=True)
        (kept / ADMISSION_FILE).write_bytes(report_bytes(report_of(kept)))
        model = RegisteredModel(
            name=entry.name, version=version, source=str(kept), sha256=dict(entry.files) | digests(kept, ADMISSION_FILE)
        )
        self.aliases |= dict.fromkeys(aliases, model)
        return kept

    def check(self) -> None:
        if not self.up:
            raise RegistryUnavailableError("it is down")

    def routes(self, name: str) -> list[str]:
        return [alias for alias, model in self.aliases.items() if model.name == name and is_route(alias)]

    def find(self, name: str, alias: str) -> RegisteredModel | None:
        found = self.aliases.get(alias)
        return found if found is not None and found.name == name else None

    def download(self, model: RegisteredModel, directory: Path) -> None:
        self.downloads.append(model.version)
        shutil.copytree(model.source, directory)


@pytest.fixture
def source(tmp_path: Path) -> DirectorySource:
    return DirectorySource(tmp_path / "registry")


@pytest.fixture
def models(tmp_path: Path) -> Path:
    return tmp_path / "models"


def snapshot(models: Path) -> dict[str, tuple[int, int]]:
    """Inode and modification time of every file, hidden ones too, but for the lock."""
    files = [p for p in models.rglob("*") if p.is_file() and p.name != LOCK_FILE]
    return {str(p.relative_to(models)): (p.stat().st_ino, p.stat().st_mtime_ns) for p in files}


def directories(models: Path) -> list[str]:
    return sorted(p.name for p in models.iterdir() if p.is_dir())


def test_champion_arrives_whole(source: DirectorySource, models: Path) -> None:
    kept = source.add("1", "champion")
    pulled = pull_models(models, source)
    assert (pulled.fetched, pulled.changed) == (["1"], True)
    entry = read_manifest(models).routes["champion"]
    assert entry.files == digests(kept, *PACKAGE_FILES, EXPLANATION_FILE, ADMISSION_FILE)
    assert all(sha256_file(models / entry.directory / file) == digest for file, digest in entry.files.items())
    assert directories(models) == ["fraudgate-1"]


def test_pulling_again_downloads_nothing_and_writes_nothing(source: DirectorySource, models: Path) -> None:
    source.add("1", "champion")
    pull_models(models, source)
    before = snapshot(models)
    again = pull_models(models, source)
    assert (again.fetched, again.changed) == ([], False)
    assert snapshot(models) == before
    assert source.downloads == ["1"]


def test_challenger_comes_along_when_it_is_set_and_goes_when_it_is_not(source: DirectorySource, models: Path) -> None:
    source.add("1", "champion")
    source.add("2", "challenger", seed=2)
    pull_models(models, source)
    assert {route: e.version for route, e in read_manifest(models).routes.items()} == {"champion": "1", "challenger": "2"}
    del source.aliases["challenger"]
    assert pull_models(models, source).changed
    assert set(read_manifest(models).routes) == {"champion"}


def test_every_shadow_comes_along_and_other_aliases_do_not(source: DirectorySource, models: Path) -> None:
    source.add("1", "champion", "best-of-march")
    source.add("2", "shadow", "shadow-deep", seed=2)
    pull_models(models, source)
    assert set(read_manifest(models).routes) == {"champion", "shadow", "shadow-deep"}


def test_extras_travel_with_the_model_and_a_damaged_one_is_refused(source: DirectorySource, models: Path) -> None:
    kept = source.add("1", "champion")
    (kept / REFERENCE_FILE).write_bytes(b"{}")
    source.aliases["champion"].sha256.update(digests(kept, REFERENCE_FILE))
    pull_models(models, source)
    entry = read_manifest(models).routes["champion"]
    assert set(entry.files) == {*PACKAGE_FILES, EXPLANATION_FILE, ADMISSION_FILE, REFERENCE_FILE}
    extra = models / entry.directory / REFERENCE_FILE
    assert extra.read_bytes() == b"{}"
    extra.write_bytes(b"[]")
    with pytest.raises(ModelRefusedError, match=REFERENCE_FILE):
        load_model(models, "champion")
    (kept / REFERENCE_FILE).write_bytes(b"[]")
    with pytest.raises(PackageRefusedError, match=r"reference\.npz is corrupted"):
        pull_models(models, source)


def test_a_version_whose_report_says_refused_does_not_come_whatever_alias_it_has(source: DirectorySource, models: Path) -> None:
    kept = source.add("1", "champion")
    failed = Check(name="quality", passed=False, found="worse")
    refused = msgspec.structs.replace(PASSED_REPORT, verdict="refused", checks=[failed])
    (kept / ADMISSION_FILE).write_bytes(report_bytes(refused))
    source.aliases["champion"].sha256.update(digests(kept, ADMISSION_FILE))
    with pytest.raises(PackageRefusedError, match="version 1 was refused admission: quality"):
        pull_models(models, source)
    assert not (models / MANIFEST_FILE).exists()


def test_a_version_with_the_report_of_another_model_does_not_come(source: DirectorySource, models: Path) -> None:
    kept, other = source.add("1", "champion"), source.add("2", seed=2)
    for report in (report_of(other), PASSED_REPORT):
        (kept / ADMISSION_FILE).write_bytes(report_bytes(report))
        source.aliases["champion"].sha256.update(digests(kept, ADMISSION_FILE))
        with pytest.raises(PackageRefusedError, match="admission report is of other files"):
            pull_models(models, source)
    assert not (models / MANIFEST_FILE).exists()


def test_a_version_without_a_report_does_not_come(source: DirectorySource, models: Path) -> None:
    kept = source.add("1", "champion")
    (kept / ADMISSION_FILE).unlink()
    del source.aliases["champion"].sha256[ADMISSION_FILE]
    with pytest.raises(PackageRefusedError, match="no admission report"):
        pull_models(models, source)
    assert not (models / MANIFEST_FILE).exists()


@pytest.mark.parametrize("name", ["../manifest.json", "/etc/passwd", ".hidden", "A" * 65])
def test_a_file_name_that_leads_elsewhere_is_refused(source: DirectorySource, models: Path, name: str) -> None:
    source.add("1", "champion")
    source.aliases["champion"].sha256[name] = "0" * 64
    with pytest.raises(PackageRefusedError, match="can't be a file of a package"):
        pull_models(models, source)
    assert not (models / MANIFEST_FILE).exists()


def test_one_version_on_both_routes_is_downloaded_once(source: DirectorySource, models: Path) -> None:
    source.add("1", "champion", "challenger")
    pull_models(models, source)
    assert source.downloads == ["1"]
    assert set(read_manifest(models).routes) == {"champion", "challenger"}


def test_a_move_of_the_alias_back_needs_no_download(source: DirectorySource, models: Path) -> None:
    source.add("1", "champion")
    first = source.aliases["champion"]
    pull_models(models, source)
    source.add("2", "champion", seed=2)
    pull_models(models, source)
    source.aliases["champion"] = first
    assert pull_models(models, source).fetched == []
    assert read_manifest(models).routes["champion"].version == "1"


def test_three_versions_stay_and_those_in_use(source: DirectorySource, models: Path) -> None:
    source.add("1", "challenger")
    for version in range(2, 7):
        source.add(str(version), "champion", seed=version)
        pull_models(models, source)
    assert directories(models) == ["fraudgate-1", "fraudgate-4", "fraudgate-5", "fraudgate-6"]


def test_nothing_that_is_not_a_version_of_ours_is_removed(source: DirectorySource, models: Path) -> None:
    (models / "fraudgate-notes").mkdir(parents=True)
    (models / "other-1").mkdir()
    for version in range(1, 6):
        source.add(str(version), "champion", seed=version)
        pull_models(models, source)
    assert {"fraudgate-notes", "other-1"} < set(directories(models))


def refused(source: DirectorySource, models: Path, error: type[ModelExportError], reason: str) -> None:
    """A pull fails with the reason, and the directory is, file for file, what it was."""
    before = snapshot(models)
    with pytest.raises(error, match=reason):
        pull_models(models, source)
    assert snapshot(models) == before
    assert not list(models.glob(f"{INCOMING_PREFIX}*"))


@pytest.mark.parametrize("file", PACKAGE_FILES)
def test_a_corrupted_file_is_refused_and_the_old_model_stays(source: DirectorySource, models: Path, file: str) -> None:
    source.add("1", "champion")
    pull_models(models, source)
    kept = source.add("2", "champion", seed=2)
    content = bytearray((kept / file).read_bytes())
    content[len(content) // 2] ^= 1
    (kept / file).write_bytes(content)
    refused(source, models, PackageRefusedError, f"{file} is corrupted")


@pytest.mark.parametrize("file", PACKAGE_FILES)
def test_a_missing_file_is_refused(source: DirectorySource, models: Path, file: str) -> None:
    source.add("1", "champion")
    pull_models(models, source)
    (source.add("2", "champion", seed=2) / file).unlink()
    refused(source, models, PackageRefusedError, f"{file} is missing")


def test_a_bad_challenger_keeps_the_good_champion_from_being_published_alone(source: DirectorySource, models: Path) -> None:
    source.add("1", "champion")
    pull_models(models, source)
    source.add("2", "champion", seed=2)
    (source.add("3", "challenger", seed=3) / MODEL_FILE).write_bytes(b"")
    refused(source, models, PackageRefusedError, "version 3")


def rewrite(source: DirectorySource, kept: Path, file: str, content: bytes) -> None:
    """Changes a file and what the registry recorded of it: consistent, and still wrong."""
    (kept / file).write_bytes(content)
    source.aliases["champion"].sha256[file] = sha256_file(kept / file)


def test_a_model_for_other_features_is_refused(source: DirectorySource, models: Path) -> None:
    kept = source.add("1", "champion")
    metadata = msgspec.json.decode((kept / METADATA_FILE).read_bytes(), type=ModelMetadata)
    other = msgspec.structs.replace(metadata, feature_fingerprint="0123456789abcdef")
    rewrite(source, kept, METADATA_FILE, msgspec.json.encode(other))
    refused(source, models, PackageRefusedError, "trained for features 0123456789abcdef")


def test_metadata_of_another_version_are_refused(source: DirectorySource, models: Path) -> None:
    kept = source.add("1", "champion")
    metadata = msgspec.json.decode((kept / METADATA_FILE).read_bytes(), type=ModelMetadata)
    rewrite(source, kept, METADATA_FILE, msgspec.json.encode(msgspec.structs.replace(metadata, version="9")))
    refused(source, models, PackageRefusedError, "is of fraudgate version 9")


def test_metadata_that_are_no_metadata_are_refused(source: DirectorySource, models: Path) -> None:
    rewrite(source, source.add("1", "champion"), METADATA_FILE, b'{"name": 3}')
    refused(source, models, PackageRefusedError, "metadata.json can't be read")


def test_a_model_file_that_its_metadata_does_not_name_is_refused(source: DirectorySource, models: Path) -> None:
    rewrite(source, source.add("1", "champion"), MODEL_FILE, b"another model")
    refused(source, models, PackageRefusedError, "not the file that metadata.json names")


def test_golden_rows_that_cannot_be_read_are_refused(source: DirectorySource, models: Path) -> None:
    rewrite(source, source.add("1", "champion"), GOLDEN_FILE, b"PK but no zip")
    refused(source, models, PackageRefusedError, "golden.npz can't be read")


def test_golden_rows_of_a_wrong_width_are_refused(source: DirectorySource, models: Path, tmp_path: Path) -> None:
    kept = source.add("1", "champion")
    np.savez(tmp_path / GOLDEN_FILE, features=np.zeros((5, 3), np.float32), probability=np.zeros(5, np.float32))
    rewrite(source, kept, GOLDEN_FILE, (tmp_path / GOLDEN_FILE).read_bytes())
    refused(source, models, PackageRefusedError, "has shapes")


def test_a_version_whose_registration_did_not_end_is_refused(source: DirectorySource, models: Path) -> None:
    source.add("1", "champion")
    source.aliases["champion"].sha256.clear()
    refused(source, models, PackageRefusedError, "registration did not come to its end")


def test_without_a_champion_the_way_to_one_is_told(source: DirectorySource, models: Path) -> None:
    source.add("1", "challenger")
    refused(source, models, RegistryRefusedError, "fraudgate train")


def test_a_registry_that_is_down_leaves_the_models(source: DirectorySource, models: Path) -> None:
    source.add("1", "champion")
    pull_models(models, source)
    source.up = False
    refused(source, models, RegistryUnavailableError, "it is down")


def test_a_download_that_breaks_off_leaves_the_models(source: DirectorySource, models: Path) -> None:
    source.add("1", "champion")
    pull_models(models, source)
    shutil.rmtree(source.add("2", "champion", seed=2))
    before = snapshot(models)
    with pytest.raises(FileNotFoundError):
        pull_models(models, source)
    assert snapshot(models) == before


def test_what_a_killed_pull_left_behind_is_cleared_and_does_no_harm(source: DirectorySource, models: Path) -> None:
    source.add("1", "champion")
    half = models / f"{INCOMING_PREFIX}fraudgate-1"
    half.mkdir(parents=True)
    (half / MODEL_FILE).write_bytes(b"half a mod")
    (models / f"{MANIFEST_FILE}.partial").write_bytes(b'{"rou')
    pull_models(models, source)
    assert directories(models) == ["fraudgate-1"]
    assert read_manifest(models).routes["champion"].version == "1"


def test_a_damaged_local_copy_is_replaced(source: DirectorySource, models: Path) -> None:
    source.add("1", "champion")
    pull_models(models, source)
    (models / "fraudgate-1" / MODEL_FILE).write_bytes(b"bit rot")
    assert pull_models(models, source).fetched == ["1"]
    entry = read_manifest(models).routes["champion"]
    assert sha256_file(models / "fraudgate-1" / MODEL_FILE) == entry.files[MODEL_FILE]
    assert directories(models) == ["fraudgate-1"]


def test_an_unreadable_manifest_is_replaced(source: DirectorySource, models: Path) -> None:
    source.add("1", "champion")
    models.mkdir()
    (models / MANIFEST_FILE).write_text("{")
    assert pull_models(models, source).changed
    assert read_manifest(models).routes["champion"].version == "1"


def test_two_pulls_do_not_work_on_one_directory(source: DirectorySource, models: Path) -> None:
    source.add("1", "champion")
    models.mkdir()
    lock = os.open(models / LOCK_FILE, os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        refused(source, models, PullRunningError, "at work")
    finally:
        os.close(lock)
    assert pull_models(models, source).changed
