"""Training sets with a rule that can be learnt, and model directories of a tiny real model, for any test that needs one.

The rule: a payment is mostly fraud when its amount is above 20,000 minor units while its card paid at five or more merchants within
the hour (or its device used five or more cards within a day). safe_row() and risky_row() differ in nothing else, and their
probabilities lie far apart in every model made here.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from deltalake import CommitProperties, write_deltalake

from gateway.contracts.features import FEATURE_INDEX, FEATURE_NAMES, FINGERPRINT
from gateway.contracts.model_meta import REGISTERED_NAME, Manifest, sha256_file
from gateway.contracts.tables import TRAINING_SET, table_uri
from model_export.dataset import FINGERPRINT_PREFIX, TrainingSet, training_set_of
from model_export.export import export, write_export
from model_export.package import INCOMING_PREFIX, current_manifest, metadata_of, place, publish, verify_package, write_metadata
from model_export.training import train

AMOUNT = FEATURE_INDEX["amount_minor"]
MERCHANTS = FEATURE_INDEX["card_distinct_merchants_1h"]
CARDS = FEATURE_INDEX["device_distinct_cards_24h"]
START_MS = 1_750_000_000_000
ROW_MS = 10_000


def make_features(rows: int, seed: int = 1) -> npt.NDArray[np.float32]:
    """(rows, features) of plausible size, a fifth of them NaN in all but the request's own columns."""
    rng = np.random.default_rng(seed)
    x = rng.lognormal(1.0, 1.0, (rows, len(FEATURE_NAMES))).astype(np.float32)
    request = [i for i, name in enumerate(FEATURE_NAMES) if i < FEATURE_INDEX["cross_border"]]
    missing = rng.random(x.shape) < 0.2
    missing[:, request] = False
    x[missing] = np.nan
    x[:, AMOUNT] = np.round(rng.lognormal(9.5, 1.2, rows))
    x[:, FEATURE_INDEX["hour"]] = rng.integers(0, 24, rows)
    x[:, FEATURE_INDEX["weekday"]] = rng.integers(0, 7, rows)
    x[:, MERCHANTS] = rng.choice([1, 2, 3, 5, 6, 8], rows, p=[0.5, 0.2, 0.1, 0.1, 0.05, 0.05])
    x[:, CARDS] = rng.choice([np.nan, 1, 2, 5, 9], rows, p=[0.2, 0.6, 0.12, 0.05, 0.03])
    return x


def make_labels(features: npt.NDArray[np.float32], seed: int = 1) -> npt.NDArray[np.bool_]:
    """By the rule above, with 2 % of either kind mislabelled among the risky and 0.2 % among the others."""
    rng = np.random.default_rng(seed + 1)
    risky = (features[:, AMOUNT] > 20_000) & ((features[:, MERCHANTS] >= 5) | (features[:, CARDS] >= 5))
    out: npt.NDArray[np.bool_] = np.where(risky, rng.random(len(risky)) < 0.98, rng.random(len(risky)) < 0.002)
    return out


def safe_row() -> npt.NDArray[np.float32]:
    """(1, features): a small payment of a quiet card."""
    row = make_features(1)
    row[0, [AMOUNT, MERCHANTS, CARDS]] = 2_000, 1, 1
    return row


def risky_row() -> npt.NDArray[np.float32]:
    """(1, features): the same, but large and the eighth merchant within the hour."""
    row = safe_row()
    row[0, [AMOUNT, MERCHANTS]] = 200_000, 8
    return row


def make_rows(rows: int = 3000, seed: int = 1) -> pa.Table:
    """A training set as the Delta table holds it, in a shuffled order."""
    features = make_features(rows, seed)
    is_fraud = make_labels(features, seed)
    order = np.random.default_rng(seed + 2).permutation(rows)
    columns: dict[str, pa.Array] = {
        "transaction_id": pa.array([f"t{i:07d}" for i in order]),
        "event_time_ms": pa.array(START_MS + ROW_MS * order, pa.int64()),
    }
    columns |= {name: pa.array(features[order, i], pa.float32()) for i, name in enumerate(FEATURE_NAMES)}
    columns["is_fraud"] = pa.array(is_fraud[order], pa.bool_())
    return pa.table(columns)


def write_training_set(
    tables: Path | str, rows: int = 3000, seed: int = 1, *, fingerprint: str = FINGERPRINT, data: pa.Table | None = None
) -> str:
    """Replaces the rows of the table `training_set` under `tables` by `data` or by synthetic ones, as a new version.

    Returns the table's address.
    """
    uri = table_uri(str(tables), TRAINING_SET)
    said = CommitProperties(custom_metadata={"userMetadata": FINGERPRINT_PREFIX + fingerprint})
    write_deltalake(uri, make_rows(rows, seed) if data is None else data, mode="overwrite", commit_properties=said)
    return uri


def make_training_set(rows: int = 3000, seed: int = 1) -> TrainingSet:
    return training_set_of(make_rows(rows, seed), "training_set", 0)


def make_model_dir(
    path: Path,
    *,
    version: str = "1",
    name: str = REGISTERED_NAME,
    route: str = "champion",
    rows: int = 3000,
    seed: int = 1,
    trees: int = 60,
) -> Manifest:
    """Trains a tiny real model on synthetic rows and makes it the model of `route` in the gateway model directory `path`.

    Other routes stay. Another `seed` gives another model. Takes under a second once the libraries are loaded.
    """
    data = make_training_set(rows, seed)
    model = train(data, threads=1, rounds_max=trees)
    package = path / f"{INCOMING_PREFIX}{name}-{version}"
    if package.exists():
        shutil.rmtree(package)
    package.mkdir(parents=True)
    write_export(export(model.booster, data.features), package)
    write_metadata(metadata_of(name, version, data, model, sha256_file(package / "model.onnx")), package)
    entry = verify_package(package, name, version)
    place(path, package, entry)
    before = current_manifest(path)
    routes = {**(before.routes if before else {}), route: entry}
    publish(path, routes)
    return Manifest(routes=routes)
