"""The 15 features of "Reproducible Machine Learning for Credit Card Fraud Detection" (Le Borgne, Siblini, Lebichot, Bontempi; 2022)
in this feature language: a yardstick for the offline engine, and the baseline to compare models with. No gateway serves them.

Definitions: chapter 3, BaselineFeatureTransformation. Windows are (t - W, t], the payment itself in them, on whole seconds; a
terminal's end seven days ago, and its risk is the share of frauds.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from feature_jobs.known_labels import label_changes
from feature_jobs.offline import Definition, EntityColumns, History, offline_features
from feature_jobs.training_set import codes_of, history_of
from gateway.contracts.features import AGGREGATES, Entity, Feature, Floats, RequestColumns
from gateway.contracts.windows import DAY_MS, LABEL_DELAY_MS, Aggregates, Window

DAYS = (1, 7, 30)
NO_BOUND = 2**40


def _count_with_own(a: Aggregates, w: int | slice, _: RequestColumns) -> Floats:
    out: Floats = a.count[w].astype(np.float64) + 1
    return out


def _mean_with_own(a: Aggregates, w: int | slice, r: RequestColumns) -> Floats:
    out: Floats = (a.total[w] + r.amount_minor) / (a.count[w] + 1.0)
    return out


CUSTOMER = Entity("customer", "customer_id", "merchant_id", "merchant_id", "merchant_id", NO_BOUND)
TERMINAL = Entity("terminal", "merchant_id", "customer_id", "customer_id", "customer_id", NO_BOUND, labelled=True)

HANDBOOK = Definition(
    features=(
        Feature("TX_AMOUNT", None, "amount_minor", None),
        Feature("TX_DURING_WEEKEND", None, "is_weekend", None),
        Feature("TX_DURING_NIGHT", None, "is_night", None),
        *(Feature(f"CUSTOMER_ID_NB_TX_{d}DAY_WINDOW", "customer", "count_with_own", f"{d}d") for d in DAYS),
        *(Feature(f"CUSTOMER_ID_AVG_AMOUNT_{d}DAY_WINDOW", "customer", "mean_with_own", f"{d}d") for d in DAYS),
        *(Feature(f"TERMINAL_ID_NB_TX_{d}DAY_WINDOW", "terminal", "label_count", f"{d}d") for d in DAYS),
        *(Feature(f"TERMINAL_ID_RISK_{d}DAY_WINDOW", "terminal", "label_rate", f"{d}d") for d in DAYS),
    ),
    entities=(CUSTOMER, TERMINAL),
    # Open at the older end, which a millisecond less makes of ours.
    windows=tuple(Window(f"{d}d", d * DAY_MS - 1, 0) for d in DAYS),
    label_windows=tuple(Window(f"{d}d", d * DAY_MS, 0, LABEL_DELAY_MS - 1) for d in DAYS),
    aggregates=tuple({**AGGREGATES, "count_with_own": _count_with_own, "mean_with_own": _mean_with_own}.items()),
)
assert len(HANDBOOK.features) == 15


def handbook_features(silver: pa.Table, labels: pa.Table) -> npt.NDArray[np.float64]:
    """(rows, 15) in the book's units: money in units of its currency, 0 for the risk of a terminal without payments.

    `silver` is sorted by (event_time_ms, transaction_id); `labels` has transaction_id, is_fraud, reported_at_ms.
    """
    no_dim = np.zeros(silver.num_rows, np.uint16)
    changes = label_changes(silver["transaction_id"], labels)
    entities = tuple(EntityColumns(codes_of(silver[e.field])[0], no_dim, no_dim, no_dim) for e in HANDBOOK.entities)
    history = History(history_of(silver).request, entities, tuple(changes if e.labelled else None for e in HANDBOOK.entities))
    found = offline_features(history, HANDBOOK, np.float64)
    for i, feature in enumerate(HANDBOOK.features):
        if "AMOUNT" in feature.name:
            found[:, i] /= 100
        elif "RISK" in feature.name:
            found[:, i] = np.nan_to_num(found[:, i])
    return found
