"""Receipts and labels of two real models in Delta tables, as the streams write them, with exploration; the truth is known."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from deltalake import write_deltalake

from gateway.contracts import tables
from gateway.contracts.decision import Route
from gateway.contracts.features import FINGERPRINT
from gateway.contracts.reference import OUTCOME_CODE
from gateway.contracts.settings import Settings
from loadtest.simulator.exploration import explore
from model_export.compare import OUTCOMES, open_model
from model_export.policy_bands import read_bands, risk_scores
from tests.factories_model import AMOUNT, make_features, make_labels, make_model_dir

DAY_MS = 86_400_000
START_MS = 1_767_571_200_000
DAYS = 21
DECLINE = OUTCOME_CODE["decline"]


@dataclass(frozen=True)
class Written:
    """What is true of the receipts written, (rows,): whether each payment is fraud and what either model would decide."""

    is_fraud: npt.NDArray[np.bool_]
    champion: npt.NDArray[np.int64]
    challenger: npt.NDArray[np.int64]
    explored: npt.NDArray[np.bool_]
    amount_minor: npt.NDArray[np.float64]
    event_time_ms: npt.NDArray[np.int64]


def make_two_models(settings: Settings, *, weak: str | None = "champion", alias: str = "challenger") -> None:
    """Two models in the local model directory; the one whose route is `weak` was trained on few rows. None: they are the same."""
    for version, route in (("1", Route.CHAMPION.value), ("2", alias)):
        rows, seed = (700, 3) if route == weak else (3_000, 1)
        make_model_dir(settings.models_path, version=version, route=route, rows=rows, seed=seed)


def write_receipts(
    settings: Settings, rows: int = 20_000, *, share: float = 0.1, seed: int = 5, columns: bool = True, alias: str = "challenger"
) -> Written:
    """Receipts over DAYS, the champion having decided all; `share` of the payments it declined are explored, and frauds that went
    through are labelled two days later. `columns`: with those of exploration."""
    features = make_features(rows, seed)
    is_fraud = make_labels(features, seed)
    t_ms = np.sort(np.random.default_rng(seed).integers(0, DAYS * DAY_MS, rows)) + START_MS
    amount = features[:, AMOUNT].astype(np.float64)
    bands = read_bands("")
    models = [open_model(settings.models_path, route) for route in (Route.CHAMPION.value, alias)]
    probability = [m.probability(features) for m in models]
    scores = [risk_scores(p) for p in probability]
    outcomes = [bands.severity(s, amount) for s in scores]
    declined = outcomes[0] == DECLINE
    seen = explore(
        declined, amount.astype(np.int64), t_ms, share=share, amount_max_minor=10**9, loss_max_minor_per_day=10**12, seed=seed
    )
    given = np.where(declined & seen.let_through, OUTCOME_CODE["approve"], outcomes[0])
    explored = declined & seen.let_through
    propensity = np.where(declined, np.where(explored, seen.chance, 1 - seen.chance), 1.0)
    ids = [f"p{i:06d}" for i in range(rows)]
    cards = [f"card-{i}" for i in np.random.default_rng(seed + 1).integers(0, rows // 4, rows)]
    table = {
        "transaction_id": pa.array(ids),
        "event_time_ms": pa.array(t_ms, pa.int64()),
        "card_id": pa.array(cards),
        "features": pa.array(list(features), pa.list_(pa.float32())),
        "feature_fingerprint": pa.array([FINGERPRINT] * rows),
        "risk_score": pa.array(scores[0].astype(np.int32), pa.int32()),
        "probability": pa.array(probability[0]),
        "decision": pa.array([OUTCOMES[o] for o in given]),
        "degraded": pa.array([[]] * rows, pa.list_(pa.string())),
        "rule_hits": pa.array([[]] * rows, pa.list_(pa.string())),
        "model_version": pa.array(["1"] * rows),
        "model_digest": pa.array([models[0].digest] * rows),
        "route": pa.array([Route.CHAMPION.value] * rows),
    }
    if columns:
        table |= {
            "routed_by": pa.array(["share"] * rows),
            "policy_decision": pa.array([OUTCOMES[o] for o in outcomes[0]]),
            "propensity": pa.array(propensity),
        }
    write_deltalake(tables.table_uri(settings.tables, tables.DECISIONS), pa.table(table), mode="overwrite", schema_mode="overwrite")
    known = is_fraud & (given != DECLINE)
    labels = {
        "transaction_id": [ids[i] for i in np.flatnonzero(known)],
        "is_fraud": [True] * int(known.sum()),
        "reported_at_ms": pa.array(t_ms[known] + 2 * DAY_MS, pa.int64()),
    }
    write_deltalake(tables.table_uri(settings.tables, tables.LABELS), pa.table(labels), mode="overwrite")
    return Written(is_fraud, outcomes[0], outcomes[1], explored, amount, t_ms)
