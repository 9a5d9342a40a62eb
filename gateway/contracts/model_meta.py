"""What accompanies a model: its metadata, its golden rows, and the manifest of the gateway's model directory.

<model_dir>/manifest.json             Manifest: which model serves which route; replaced by one rename
<model_dir>/<name>-<version>/model.onnx      input "features" float32 (n, features); output "probabilities" float32 (n, 2)
<model_dir>/<name>-<version>/metadata.json   ModelMetadata
<model_dir>/<name>-<version>/golden.npz      "features" float32 (n, features), "probability" float32 (n,)

A package may hold further files, its extras, which travel with it and are checked like the others; a reader does without those it
doesn't find.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import msgspec

from gateway.contracts.decision import Route

MANIFEST_FILE = "manifest.json"
MODEL_FILE = "model.onnx"
METADATA_FILE = "metadata.json"
GOLDEN_FILE = "golden.npz"
# What every package has.
PACKAGE_FILES = (MODEL_FILE, METADATA_FILE, GOLDEN_FILE)
# Extras: what explains the model's decisions, what its training data and scores looked like, and why it was admitted.
EXPLANATION_FILE = "explanation.npz"
REFERENCE_FILE = "reference.npz"
ADMISSION_FILE = "admission.json"
# Names come from the registry and the manifest and become paths, so they are names and nothing else.
FILE_NAME = re.compile(r"[a-z0-9][a-z0-9_.-]{0,63}")
# Aliases that begin so name models that score in the slack and never answer.
SHADOW_PREFIX = "shadow"
INPUT_NAME = "features"
OUTPUT_NAME = "probabilities"
# Keys of the ONNX file's own metadata_props.
PROP_FINGERPRINT = "fraudgate.feature_fingerprint"
PROP_FEATURES = "fraudgate.features"
# The largest difference between a golden row's stored and recomputed probability.
GOLDEN_TOLERANCE = 1e-5
REGISTERED_NAME = "fraudgate"


class ModelMetadata(msgspec.Struct, frozen=True, kw_only=True):
    """`training_table_version` is the Delta version the training rows were read at.

    `training_end_ms` is the event time of the newest row that the trees were grown or stopped on; None in older packages.
    """

    name: str
    version: str
    created_at_ms: int
    feature_fingerprint: str
    feature_names: list[str]
    onnx_sha256: str
    training_table: str
    training_table_version: int
    training_rows: int
    training_frauds: int
    metrics: dict[str, float]
    training_end_ms: int | None = None


class ModelEntry(msgspec.Struct, frozen=True, kw_only=True):
    """One model of the directory. `files` maps each file name, extras included, to its sha256 in hex.

    `signature` is Ed25519 over `signed_bytes`, in hex; None where the training side has no key.
    """

    name: str
    version: str
    directory: str
    files: dict[str, str]
    signature: str | None = None


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """`routes` maps a route (champion, challenger, shadow...) to its model."""

    routes: dict[str, ModelEntry]


def signed_bytes(entry: ModelEntry) -> bytes:
    """What a signature covers: name, version and the digest of each file, in one spelling."""
    return msgspec.json.encode([entry.name, entry.version, sorted(entry.files.items())])


def is_route(alias: str) -> bool:
    """Whether an alias of the registry is one that the gateway serves or shadows."""
    return alias in (Route.CHAMPION.value, Route.CHALLENGER.value) or alias.startswith(SHADOW_PREFIX)


def is_file_name(name: str) -> bool:
    """Whether `name` may be a file of a package."""
    return FILE_NAME.fullmatch(name) is not None


def sha256_file(path: Path) -> str:
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def read_manifest(model_dir: Path) -> Manifest:
    """Raises FileNotFoundError, or msgspec.DecodeError when it isn't a manifest."""
    return msgspec.json.decode((model_dir / MANIFEST_FILE).read_bytes(), type=Manifest)


def write_manifest(model_dir: Path, manifest: Manifest) -> None:
    """Replaced by one rename, so that a reader sees the old or the new one."""
    model_dir.mkdir(parents=True, exist_ok=True)
    partial = model_dir / f"{MANIFEST_FILE}.partial"
    partial.write_bytes(msgspec.json.format(msgspec.json.encode(manifest), indent=2))
    partial.replace(model_dir / MANIFEST_FILE)
