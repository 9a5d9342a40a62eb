"""A model for benchmarks: real XGBoost on made-up rows, exported, checked and placed where the gateway looks for it.

What it says is of no interest, how much work it is does: TREES trees of the depth and kind that `fraudgate train` grows. The answer it
learns is a noisy function of many features, so that each tree still finds something to split. Payments of benchmarks and of the soak
look little like its rows, and it would suspect every tenth: CALM makes that some in a thousand, whose reasons are worked out
(`explained_share`).
"""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import xgboost

from gateway.contracts.decision import Route
from gateway.contracts.features import FEATURE_INDEX, FEATURE_NAMES
from gateway.contracts.model_meta import MODEL_FILE, REGISTERED_NAME, sha256_file
from model_export.dataset import TrainingSet
from model_export.export import export, write_export
from model_export.package import INCOMING_PREFIX, metadata_of, place, publish, verify_package, write_metadata
from model_export.training import train

TREES = 200
# So many that training doesn't stop early for want of frauds.
ROWS = 150_000
TREES_SHARE_MIN = 0.9
FRAUD_SHARE = 0.015
# Taken off each margin.
CALM = 1.0
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


def calmer(booster: xgboost.Booster) -> xgboost.Booster:
    """The same trees with CALM less to begin with."""
    saved = json.loads(booster.save_raw("json"))
    params = saved["learner"]["learner_model_param"]
    share = float(params["base_score"].strip("[]"))
    params["base_score"] = f"[{1 / (1 + (1 - share) / share * math.exp(CALM))}]"
    found = xgboost.Booster()
    found.load_model(bytearray(json.dumps(saved).encode()))
    return found


def make_model(models_path: Path, trees: int = TREES, version: str = "1", seed: int = SEED) -> tuple[Path, int]:
    """Trains and publishes it as champion. The ONNX file and how many trees it has, nearly as many as asked for. Takes some seconds.

    Raises ValueError when training stopped much earlier: a smaller model is another benchmark.
    """
    data = made_up_rows(seed=seed)
    model = train(data, rounds_max=trees)
    if model.trees < TREES_SHARE_MIN * trees:
        raise ValueError(f"training stopped at {model.trees} of {trees} trees")
    model = replace(model, booster=calmer(model.booster))
    package = models_path / f"{INCOMING_PREFIX}{REGISTERED_NAME}-{version}"
    package.mkdir(parents=True)
    write_export(export(model.booster, data.features), package)
    write_metadata(metadata_of(REGISTERED_NAME, version, data, model, sha256_file(package / MODEL_FILE)), package)
    entry = verify_package(package, REGISTERED_NAME, version)
    place(models_path, package, entry)
    publish(models_path, {Route.CHAMPION.value: entry})
    return models_path / entry.directory / MODEL_FILE, model.trees
