"""A model for benchmarks: real XGBoost on made-up rows, exported, checked and placed where the gateway looks for it.

What it says is of no interest, how much work it is does: TREES trees of the depth and kind that `fraudgate train` grows. The answer it
learns is a noisy function of many features, so that each tree still finds something to split. FRAUD_SHARE is such that some payments in a
thousand, of benchmarks and of the soak, are worth a second look: those have their reasons worked out (`explained_share`).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from gateway.contracts.decision import Route
from gateway.contracts.features import FEATURE_INDEX, FEATURE_NAMES
from gateway.contracts.model_meta import MODEL_FILE, REGISTERED_NAME, sha256_file
from model_export.dataset import TrainingSet
from model_export.export import export, write_export
from model_export.package import INCOMING_PREFIX, metadata_of, place, publish, verify_package, write_metadata
from model_export.training import train

TREES = 200
ROWS = 30_000
FRAUD_SHARE = 0.015
SEED = 11
# Of what makes a payment fraud: it is the same for every model, as a retrained one learns the same world from other payments.
WORLD_SEED = 12
START_MS, ROW_MS = 1_750_000_000_000, 10_000


def made_up_rows(rows: int = ROWS, seed: int = SEED) -> TrainingSet:
    """Features of plausible size, a fifth unknown in all but the request's own; fraud by the sum of many of them."""
    rng = np.random.default_rng(seed)
    width = len(FEATURE_NAMES)
    x = rng.lognormal(1.0, 1.0, (rows, width)).astype(np.float32)
    x[:, FEATURE_INDEX["amount_minor"]] = np.round(rng.lognormal(8, 1.2, rows))
    x[:, FEATURE_INDEX["hour"]] = rng.integers(0, 24, rows)
    weights = np.random.default_rng(WORLD_SEED).normal(0, 1, width)
    says = np.tanh(np.log(x + 1) - 1.3) @ weights + rng.normal(0, 0.3, rows)
    is_fraud = says > np.quantile(says, 1 - FRAUD_SHARE)
    unknown = rng.random(x.shape) < 0.2
    unknown[:, : FEATURE_INDEX["cross_border"]] = False
    x[unknown] = np.nan
    times = START_MS + ROW_MS * np.arange(rows, dtype=np.int64)
    return TrainingSet(features=x, is_fraud=is_fraud, event_time_ms=times, table="made up", version=0)


def make_model(models_path: Path, trees: int = TREES, version: str = "1", seed: int = SEED) -> tuple[Path, int]:
    """Trains and publishes it as champion. The ONNX file and how many trees it has. Takes some seconds."""
    data = made_up_rows(seed=seed)
    model = train(data, rounds_max=trees)
    package = models_path / f"{INCOMING_PREFIX}{REGISTERED_NAME}-{version}"
    package.mkdir(parents=True)
    write_export(export(model.booster, data.features), package)
    write_metadata(metadata_of(REGISTERED_NAME, version, data, model, sha256_file(package / MODEL_FILE)), package)
    entry = verify_package(package, REGISTERED_NAME, version)
    place(models_path, package, entry)
    publish(models_path, {Route.CHAMPION.value: entry})
    return models_path / entry.directory / MODEL_FILE, model.trees
