"""The models that score: loaded from the local model directory, checked, warmed, and swapped between two batches.

Nothing here talks to MLflow. `fraudgate pull` puts files and a manifest into the directory (gateway/contracts/model_meta.py);
`ModelSlot.watch` polls the manifest, loads beside the serving model off the event loop, and refuses what fails a check.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import onnxruntime as ort
from onnxruntime.capi import onnxruntime_pybind11_state as ort_errors

from gateway.contracts.decision import ModelRef, Route
from gateway.contracts.features import FEATURE_NAMES, FINGERPRINT
from gateway.contracts.model_meta import (
    GOLDEN_FILE,
    GOLDEN_TOLERANCE,
    INPUT_NAME,
    MANIFEST_FILE,
    METADATA_FILE,
    MODEL_FILE,
    OUTPUT_NAME,
    PACKAGE_FILES,
    ModelEntry,
    ModelMetadata,
    is_file_name,
    read_manifest,
    sha256_file,
)
from gateway.errors import ModelRefusedError

log = logging.getLogger(__name__)

POLL_S = 1.0
WARM_ROWS = (1, 32, 256)
MODEL_BYTES_MAX = 256 * 1024 * 1024
_ORT_ERRORS = (ort_errors.Fail, ort_errors.InvalidArgument, ort_errors.InvalidGraph, ort_errors.InvalidProtobuf, ort_errors.NoModel)


class Model:
    """One loaded and checked model. `probability` costs 5 to 10 us a row and doesn't wait."""

    def __init__(self, session: Any, metadata: ModelMetadata, route: str) -> None:
        self._session = session
        self._outputs = [OUTPUT_NAME]
        self.metadata = metadata
        self.ref = ModelRef(name=metadata.name, version=metadata.version, route=route)
        self.digest = metadata.onnx_sha256

    def probability(self, matrix: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
        """The probability of fraud of each row, (n,), from `matrix` (n, features) float32."""
        probabilities = self._session.run(self._outputs, {INPUT_NAME: matrix})[0]
        out: npt.NDArray[np.float64] = probabilities[:, 1].astype(np.float64)
        return out


def load_model(model_dir: Path, route: str) -> Model | None:
    """The model that the manifest names for `route`, or None when there is no manifest or no such route.

    Raises `ModelRefusedError`, with the failed check in its message.
    """
    try:
        manifest = read_manifest(model_dir)
    except FileNotFoundError:
        return None
    except (msgspec.DecodeError, msgspec.ValidationError, OSError) as exc:
        raise ModelRefusedError(f"{MANIFEST_FILE} can't be read: {exc}") from exc
    entry = manifest.routes.get(route)
    if entry is None:
        return None
    folder = (model_dir / entry.directory).resolve()
    if not folder.is_relative_to(model_dir.resolve()):
        raise ModelRefusedError("the manifest names a directory outside of the model directory")
    try:
        return _load(folder, entry, route)
    except (OSError, ValueError, KeyError, *_ORT_ERRORS) as exc:
        raise ModelRefusedError(f"{entry.name} {entry.version}: {exc}") from exc


def _load(folder: Path, entry: ModelEntry, route: str) -> Model:
    what = f"{entry.name} {entry.version}"
    for name in PACKAGE_FILES:
        if name not in entry.files:
            raise ModelRefusedError(f"{what}: the manifest has no checksum of {name}")
    # Extras too: what explains the model or says how it was admitted must not be another's.
    for name, digest in entry.files.items():
        if not is_file_name(name):
            raise ModelRefusedError(f"{what}: the manifest names a file that can't be one of a package")
        if sha256_file(folder / name) != digest:
            raise ModelRefusedError(f"{what}: {name} is not what the manifest says")
    metadata = msgspec.json.decode((folder / METADATA_FILE).read_bytes(), type=ModelMetadata)
    if metadata.onnx_sha256 != entry.files[MODEL_FILE]:
        raise ModelRefusedError(f"{what}: the metadata belong to another model file")
    if metadata.feature_fingerprint != FINGERPRINT:
        raise ModelRefusedError(f"{what}: trained on features {metadata.feature_fingerprint}, the gateway computes {FINGERPRINT}")
    if tuple(metadata.feature_names) != FEATURE_NAMES:
        raise ModelRefusedError(f"{what}: its features have other names or another order")
    if (folder / MODEL_FILE).stat().st_size > MODEL_BYTES_MAX:
        raise ModelRefusedError(f"{what}: the model file is larger than {MODEL_BYTES_MAX} bytes")
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = ort.InferenceSession(folder / MODEL_FILE, options, providers=["CPUExecutionProvider"])
    inputs = {i.name: i.shape for i in session.get_inputs()}
    if INPUT_NAME not in inputs or inputs[INPUT_NAME][-1] != len(FEATURE_NAMES):
        raise ModelRefusedError(f"{what}: its input is not {INPUT_NAME} of {len(FEATURE_NAMES)} columns")
    if OUTPUT_NAME not in {o.name for o in session.get_outputs()}:
        raise ModelRefusedError(f"{what}: it has no output {OUTPUT_NAME}")
    model = Model(session, metadata, route)
    with np.load(folder / GOLDEN_FILE, allow_pickle=False) as golden:
        rows, expected = golden["features"].astype(np.float32), golden["probability"]
    if len(rows) == 0 or rows.shape[1] != len(FEATURE_NAMES) or len(rows) != len(expected):
        raise ModelRefusedError(f"{what}: the golden rows have a wrong shape")
    difference = float(np.max(np.abs(model.probability(rows) - expected)))
    # Written so that NaN fails too.
    if not difference <= GOLDEN_TOLERANCE:
        raise ModelRefusedError(f"{what}: a golden row differs by {difference:.2g}, at most {GOLDEN_TOLERANCE:g} is allowed")
    for n in WARM_ROWS:
        model.probability(np.full((n, len(FEATURE_NAMES)), np.nan, np.float32))
    return model


class ModelSlot:
    """Holds the serving model, which the scorer reads once a batch. `on_change` and `on_refused` feed the metrics."""

    def __init__(
        self,
        model_dir: Path,
        on_change: Callable[[Model | None], None] = lambda _: None,
        on_refused: Callable[[], None] = lambda: None,
    ) -> None:
        self._dir = model_dir
        self._on_change = on_change
        self._on_refused = on_refused
        self._seen: tuple[int, int, int] | None = None
        self.model: Model | None = None
        self.refused: str | None = None

    def _signature(self) -> tuple[int, int, int] | None:
        try:
            stat = (self._dir / MANIFEST_FILE).stat()
        except OSError:
            return None
        return stat.st_mtime_ns, stat.st_ino, stat.st_size

    async def refresh(self) -> None:
        """Load what the manifest names if it has changed. A refused model leaves the old one serving."""
        signature = await asyncio.to_thread(self._signature)
        if signature is None or signature == self._seen:
            return
        try:
            model = await asyncio.to_thread(load_model, self._dir, Route.CHAMPION.value)
        except ModelRefusedError as exc:
            log.error("model: refused, %s stays: %s", "none" if self.model is None else self.model.ref.version, exc)  # noqa: TRY400
            self.refused = str(exc)
            self._seen = signature
            self._on_refused()
            return
        self._seen = signature
        self.refused = None
        if model is not None:
            self.model = model
            log.info("model: %s version %s serves", model.ref.name, model.ref.version)
            self._on_change(model)

    async def watch(self, poll_s: float = POLL_S) -> None:
        """Refreshes until cancelled."""
        while True:
            await asyncio.sleep(poll_s)
            await self.refresh()
