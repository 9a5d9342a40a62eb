"""Payments of a made-up shop, feature by feature, for tests of drift: quiet ones with a daily rhythm, and shifted ones."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from gateway.contracts.decision import Route
from gateway.contracts.features import FEATURE_INDEX, FEATURE_NAMES, FINGERPRINT
from gateway.contracts.model_meta import MODEL_FILE, REFERENCE_FILE, Manifest, ModelEntry, sha256_file, write_manifest
from gateway.contracts.reference import CLOCK_FEATURES, DAY_MS, HOUR_MS, OUTCOME_CODE, Reference, clock_values, encode
from model_export.reference import make_reference

# Monday.
START_MS = 1_767_571_200_000
AMOUNT = FEATURE_INDEX["amount_minor"]


def make_times(rows: int, days: float, seed: int = 1, from_ms: int = START_MS) -> npt.NDArray[np.int64]:
    """Event times (rows,) over `days`, in order; three times as many at noon as at midnight."""
    rng = np.random.default_rng(seed)
    t = rng.uniform(0, days * DAY_MS, 3 * rows)
    kept = rng.random(len(t)) < 0.5 - 0.25 * np.cos(2 * np.pi * t / DAY_MS)
    out: npt.NDArray[np.int64] = np.sort(t[kept][:rows]).astype(np.int64) + from_ms
    return out


def make_quiet(event_time_ms: npt.NDArray[np.int64], seed: int = 1) -> npt.NDArray[np.float32]:
    """(rows, features): log-normal values, a tenth of them missing; amounts are larger in the evening; the clock's own are right."""
    rng = np.random.default_rng(seed)
    rows = len(event_time_ms)
    x = rng.lognormal(1.0, 1.0, (rows, len(FEATURE_NAMES))).astype(np.float32)
    x[rng.random(x.shape) < 0.1] = np.nan
    hour = event_time_ms % DAY_MS / HOUR_MS
    x[:, AMOUNT] = np.round(rng.lognormal(8.0, 0.8, rows) * np.where(hour > 18, 2.0, 1.0))
    x[:, [FEATURE_INDEX[name] for name in CLOCK_FEATURES]] = clock_values(event_time_ms)
    return x


def make_frauds(rows: int, rate: float = 0.01, seed: int = 1) -> npt.NDArray[np.bool_]:
    out: npt.NDArray[np.bool_] = np.random.default_rng(seed + 1000).random(rows) < rate
    return out


def make_receipts(
    event_time_ms: npt.NDArray[np.int64],
    features: npt.NDArray[np.float32],
    probability: npt.NDArray[np.float64] | None = None,
    *,
    digest: str = "d1",
    name: str = "t",
    degraded: str | None = None,
) -> pa.Table:
    """Rows of the table `decisions`, as far as drift reads them; each of its own card, device and address."""
    rows = len(event_time_ms)
    p = np.random.default_rng([rows, int(event_time_ms[0])]).beta(0.3, 12, rows) if probability is None else probability
    ids = {column: [f"{name}-{column}-{i}" for i in range(rows)] for column in ("card_id", "merchant_id", "device_id", "ip")}
    return pa.table(
        {
            "transaction_id": [f"{name}-{i}" for i in range(rows)],
            "event_time_ms": pa.array(event_time_ms, pa.int64()),
            **ids,
            "features": pa.array(list(features), pa.list_(pa.float32())),
            "feature_fingerprint": [FINGERPRINT] * rows,
            "risk_score": pa.array(np.floor(p * 1000 + 0.5).astype(np.int32), pa.int32()),
            "probability": pa.array(p, pa.float64()),
            "decision": ["decline" if v > 0.5 else "approve" for v in p],
            "degraded": pa.array([[degraded] if degraded else []] * rows, pa.list_(pa.string())),
            "model_digest": [digest] * rows,
            "model_version": ["1"] * rows,
            "route": [Route.CHAMPION.value] * rows,
            "rule_hits": pa.array([[]] * rows, pa.list_(pa.string())),
        }
    )


def make_trained(rows: int = 30_000, days: float = 14) -> Reference:
    """Of quiet rows, with scores like those of make_receipts."""
    t = make_times(rows, days)
    p = np.random.default_rng(rows).beta(0.3, 12, rows)
    return make_reference(make_quiet(t), make_frauds(rows), t, p, decision=(p > 0.5) * OUTCOME_CODE["decline"])


def place_champion(models_path: Path, reference: Reference, *, digest: str = "d1", version: str = "1") -> None:
    """A model directory that holds nothing but a champion's reference."""
    folder = models_path / f"fraudgate-{version}"
    folder.mkdir(parents=True)
    (folder / REFERENCE_FILE).write_bytes(encode(reference))
    files = {MODEL_FILE: digest, REFERENCE_FILE: sha256_file(folder / REFERENCE_FILE)}
    entry = ModelEntry(name="fraudgate", version=version, directory=folder.name, files=files)
    write_manifest(models_path, Manifest(routes={Route.CHAMPION.value: entry}))
