"""What a registry knows of its versions, as plain values: nothing here asks MLflow. Read by `fraudgate models`, `promote`, `retrain`."""

from __future__ import annotations

import hashlib
import importlib.metadata
import subprocess
from pathlib import Path

import msgspec

from gateway.contracts.features import FINGERPRINT
from model_export.dataset import TrainingSet

ROOT = Path(__file__).resolve().parent.parent
GIT_TIMEOUT_S = 5


class ModelVersion(msgspec.Struct, frozen=True, kw_only=True):
    """One version of a registered model. What older versions don't say is None.

    `admission` is "passed" or "refused"; None when the registration did not come to its end. `against` is the version that was champion
    then and that it was compared with, None when there was none. `training_data` is a digest of the rows
    that it was made of; `training_as_of_ms` and `training_until_ms` say until when labels and payments were looked at.
    """

    name: str
    version: str
    aliases: list[str]
    admission: str | None
    against: str | None
    created_at_ms: int
    training_table: str | None = None
    training_table_version: int | None = None
    training_rows: int | None = None
    training_data: str | None = None
    training_as_of_ms: int | None = None
    training_until_ms: int | None = None
    code_version: str | None = None
    metrics: dict[str, float] = {}


def data_digest(data: TrainingSet) -> str:
    """Equal for equal rows, whichever version of a table they come from."""
    digest = hashlib.sha256(FINGERPRINT.encode())
    for column in (data.event_time_ms, data.is_fraud, data.features):
        digest.update(column.data)
    return digest.hexdigest()


def code_version() -> str:
    """The package's version, and behind it what `git describe` says where the code runs from a checkout."""
    version = importlib.metadata.version("fraudgate")
    if not (ROOT / ".git").exists():
        return version
    argv = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        described = subprocess.run(argv, capture_output=True, text=True, timeout=GIT_TIMEOUT_S, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return version
    return f"{version}+{described}"
