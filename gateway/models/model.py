"""The models that score: loaded from the local model directory, checked, warmed, and swapped between two batches.

Nothing here talks to MLflow. `fraudgate pull` puts files and a manifest into the directory (gateway/contracts/model_meta.py);
`ModelSlot.watch` polls the manifest, loads beside the serving model off the event loop, and refuses what fails a check.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import onnxruntime as ort
from onnxruntime.capi import onnxruntime_pybind11_state as ort_errors

from gateway.contracts.decision import ModelRef, Route, RoutedBy
from gateway.contracts.explanation import ExplanationError
from gateway.contracts.features import FEATURE_NAMES, FINGERPRINT
from gateway.contracts.model_meta import (
    EXPLANATION_FILE,
    GOLDEN_FILE,
    GOLDEN_TOLERANCE,
    INPUT_NAME,
    MANIFEST_FILE,
    METADATA_FILE,
    MODEL_FILE,
    OUTPUT_NAME,
    PACKAGE_FILES,
    SHADOW_PREFIX,
    Manifest,
    ModelEntry,
    ModelMetadata,
    is_file_name,
    read_manifest,
    sha256_file,
)
from gateway.contracts.routing import GUARD_FILE, ROUTING_FILE, Routing, RoutingError, read_guard, read_routing, route_salt
from gateway.errors import ModelRefusedError
from gateway.explanations.explain import Explainer, load_explainer

log = logging.getLogger(__name__)

POLL_S = 1.0
WARM_ROWS = (1, 32, 256)
MODEL_BYTES_MAX = 256 * 1024 * 1024
# More shadows than this are not loaded: each costs what the champion costs, in memory and CPU.
SHADOWS_MAX = 8
ORT_ERRORS = (ort_errors.Fail, ort_errors.InvalidArgument, ort_errors.InvalidGraph, ort_errors.InvalidProtobuf, ort_errors.NoModel)


class Model:
    """One loaded and checked model. `probability` costs 5 to 10 us a row and doesn't wait."""

    def __init__(self, session: Any, metadata: ModelMetadata, route: str, explainer: Explainer | None = None) -> None:
        """`explainer` is None for a model whose package has no explanation that can be used."""
        self._session = session
        self.explainer = explainer
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
    manifest = _manifest(model_dir)
    entry = None if manifest is None else manifest.routes.get(route)
    return None if entry is None else _checked(model_dir, entry, route)


def _manifest(model_dir: Path) -> Manifest | None:
    try:
        return read_manifest(model_dir)
    except FileNotFoundError:
        return None
    except (msgspec.DecodeError, msgspec.ValidationError, OSError) as exc:
        raise ModelRefusedError(f"{MANIFEST_FILE} can't be read: {exc}") from exc


def _checked(model_dir: Path, entry: ModelEntry, route: str) -> Model:
    folder = (model_dir / entry.directory).resolve()
    if not folder.is_relative_to(model_dir.resolve()):
        raise ModelRefusedError("the manifest names a directory outside of the model directory")
    return load_package(folder, entry, route)


def load_package(folder: Path, entry: ModelEntry, route: str) -> Model:
    """The model in `folder`, whose files `entry` names. Raises `ModelRefusedError`."""
    try:
        return _load(folder, entry, route)
    except (OSError, ValueError, KeyError, *ORT_ERRORS) as exc:
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
    model.explainer = _load_explainer(folder, entry, rows, expected)
    return model


def _load_explainer(
    folder: Path, entry: ModelEntry, golden: npt.NDArray[np.float32], probability: npt.NDArray[np.float32]
) -> Explainer | None:
    """What explains the model, None without one: scores go without reasons of their own then, which is no cause to refuse a model."""
    what = f"{entry.name} {entry.version}"
    if EXPLANATION_FILE not in entry.files:
        log.warning("model: %s has no explanation; its scores get the reason MODEL_SCORE_HIGH alone", what)
        return None
    try:
        explainer = load_explainer((folder / EXPLANATION_FILE).read_bytes(), golden, probability)
    except ExplanationError as exc:
        log.error("model: the explanation of %s can't be used: %s", what, exc)  # noqa: TRY400
        return None
    for n in WARM_ROWS:
        explainer.codes(np.full((n, len(FEATURE_NAMES)), np.nan, np.float32))
    return explainer


@dataclass(frozen=True, slots=True)
class Live:
    """What serves, resolved when anything of it changes and read once a batch.

    `challenger` is the one that gets the cards below `share` by the hash begun with `salt`; None when it gets none. `standby` is the
    challenger that is loaded, whether or not it gets any.
    """

    champion: Model | None = None
    challenger: Model | None = None
    standby: Model | None = None
    shadows: tuple[Model, ...] = ()
    routing: Routing = Routing(challenger_share=0.0)
    routed_by: RoutedBy = RoutedBy.ONLY
    share: float = 0.0
    salt: np.uint64 = np.uint64(0)


Signature = tuple[int, int, int] | None


def _signature(path: Path) -> Signature:
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_mtime_ns, stat.st_ino, stat.st_size


@dataclass(frozen=True, slots=True)
class _Loaded:
    """What the manifest named, by route; `refused` says why some of it isn't there."""

    by_route: dict[str, Model]
    refused: dict[str, str]


class ModelSlot:
    """Holds what serves. `on_change` is called with the champion when that is another, `on_live` with all when anything of it is, and
    `on_refused` for each model, or file, that can't be used. `routing` is what holds where there is no routing.json.
    """

    def __init__(
        self,
        model_dir: Path,
        on_change: Callable[[Model | None], None] = lambda _: None,
        on_refused: Callable[[], None] = lambda: None,
        *,
        routing: Routing | None = None,
        on_live: Callable[[Live], None] = lambda _: None,
    ) -> None:
        self._dir = model_dir
        self._on_change = on_change
        self._on_refused = on_refused
        self._on_live = on_live
        self._default = Routing() if routing is None else routing
        self._routing = self._default
        self._manifest_seen: Signature = None
        self._routing_seen: Signature = None
        self._guard_seen: Signature = None
        self._entries: dict[str, ModelEntry] = {}
        self._models: dict[str, Model] = {}
        # Digests of challengers that are out; everything is when the guard's file can't be read.
        self._out: frozenset[str] = frozenset()
        self._all_out = False
        self.live = Live()
        # A challenger that failed while it served.
        self.broken: Model | None = None
        self.refused: str | None = None

    @property
    def model(self) -> Model | None:
        """The champion."""
        return self.live.champion

    @model.setter
    def model(self, model: Model | None) -> None:
        self._models = {} if model is None else {Route.CHAMPION.value: model}
        self._go_live()

    async def refresh(self) -> None:
        """Load what the manifest names if it has changed, and read the shares if they have.

        A refused champion leaves the old one serving; a refused challenger leaves the champion with all traffic.
        """
        seen = await asyncio.to_thread(lambda: [_signature(self._dir / f) for f in (MANIFEST_FILE, ROUTING_FILE, GUARD_FILE)])
        manifest, routing, guard = seen
        changed = False
        if manifest is not None and manifest != self._manifest_seen:
            changed = await self._load()
            self._manifest_seen = manifest
        if routing != self._routing_seen:
            await asyncio.to_thread(self._read_routing)
            self._routing_seen, changed = routing, True
        if guard != self._guard_seen:
            await asyncio.to_thread(self._read_guard)
            self._guard_seen, changed = guard, True
        if changed:
            self._go_live()

    async def _load(self) -> bool:
        """True when there is a manifest that can be read."""
        try:
            manifest = await asyncio.to_thread(_manifest, self._dir)
        except ModelRefusedError as exc:
            log.error("model: refused, %s stays: %s", self._serving, exc)  # noqa: TRY400
            self.refused = str(exc)
            self._on_refused()
            return False
        if manifest is None:
            return False
        loaded = await asyncio.to_thread(self._load_all, manifest)
        for route, why in loaded.refused.items():
            log.error("model: %s refused, champion %s stays: %s", route, self._serving, why)
            self._on_refused()
        self.refused = "; ".join(loaded.refused.values()) or None
        champion = loaded.by_route.get(Route.CHAMPION.value) or self.live.champion
        self._models = loaded.by_route if champion is None else {**loaded.by_route, Route.CHAMPION.value: champion}
        self._entries = {route: entry for route, entry in manifest.routes.items() if route in loaded.by_route}
        return True

    @property
    def _serving(self) -> str:
        return "none" if self.live.champion is None else self.live.champion.ref.version

    def _load_all(self, manifest: Manifest) -> _Loaded:
        loaded = _Loaded({}, {})
        shadows = sorted(route for route in manifest.routes if route.startswith(SHADOW_PREFIX))
        for route in (Route.CHAMPION.value, Route.CHALLENGER.value, *shadows):
            entry = manifest.routes.get(route)
            if entry is None:
                continue
            if route in shadows[SHADOWS_MAX:]:
                loaded.refused[route] = f"{entry.name} {entry.version}: there are {SHADOWS_MAX} shadow models already"
            elif self._entries.get(route) == entry:
                loaded.by_route[route] = self._models[route]
            else:
                try:
                    loaded.by_route[route] = _checked(self._dir, entry, route)
                except ModelRefusedError as exc:
                    loaded.refused[route] = str(exc)
        return loaded

    def _read_routing(self) -> None:
        try:
            self._routing = read_routing(self._dir) or self._default
        except RoutingError as exc:
            log.error("routing: the shares stay as they are: %s", exc)  # noqa: TRY400
            self._on_refused()

    def _read_guard(self) -> None:
        try:
            self._out, self._all_out = frozenset(read_guard(self._dir).out), False
        except RoutingError as exc:
            # Who is out isn't known: nobody but the champion is in.
            log.error("routing: all traffic goes to the champion: %s", exc)  # noqa: TRY400
            self._all_out = True
            self._on_refused()

    def failed(self, challenger: Model) -> None:
        """It raised, or gave what is no number: it is out, and the guard will say so."""
        self.broken = challenger
        self.take_out(challenger.digest)

    def take_out(self, digest: str) -> None:
        """From the next batch on the champion has all traffic of the challenger with that file, until the guard's file is removed."""
        self._out |= {digest}
        self._go_live()

    def is_out(self, digest: str) -> bool:
        return self._all_out or digest in self._out

    def _go_live(self) -> None:
        before, champion = self.live, self._models.get(Route.CHAMPION.value)
        standby = None if champion is None else self._models.get(Route.CHALLENGER.value)
        out = standby is not None and self.is_out(standby.digest)
        share = 0.0 if standby is None or out else self._routing.challenger_share
        self.live = Live(
            champion=champion,
            challenger=standby if share > 0 else None,
            standby=standby,
            shadows=tuple(m for route, m in sorted(self._models.items()) if route.startswith(SHADOW_PREFIX)),
            routing=self._routing,
            routed_by=RoutedBy.ONLY if standby is None else RoutedBy.GUARD if out else RoutedBy.SHARE,
            share=share,
            salt=np.uint64(0 if standby is None else route_salt(standby.digest)),
        )
        if champion is not before.champion and champion is not None:
            log.info("model: %s version %s serves", champion.ref.name, champion.ref.version)
            self._on_change(champion)
        if (standby, share) != (before.standby, before.share) and standby is not None:
            log.info("model: challenger %s gets %.4g of the cards", standby.ref.version, share)
        self._on_live(self.live)

    async def watch(self, poll_s: float = POLL_S) -> None:
        """Refreshes until cancelled."""
        while True:
            await asyncio.sleep(poll_s)
            await self.refresh()
