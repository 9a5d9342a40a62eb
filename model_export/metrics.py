"""How well probabilities separate frauds from genuine payments. Pure functions of labels and probabilities."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from sklearn.metrics import average_precision_score, log_loss, roc_auc_score

# Probabilities at which precision and recall are reported: where the policy that ships with the gateway challenges, reviews and
# declines a payment of 200 to 1,000 units of its currency.
REPORT_THRESHOLDS = (0.4, 0.6, 0.85)


def quality(is_fraud: npt.NDArray[np.bool_], probability: npt.NDArray[np.float32]) -> dict[str, float]:
    """Metrics of (rows,) probabilities: auc, average_precision, log_loss, fraud_rate, mean_probability and at each threshold
    precision_at_*, recall_at_* and alert_rate_at_*. Precision is NaN where nothing reaches the threshold.
    """
    assert is_fraud.any(), "a metric needs a fraud"
    assert not is_fraud.all(), "a metric needs a genuine payment"
    p = probability.astype(np.float64)
    result = {
        "auc": float(roc_auc_score(is_fraud, p)),
        "average_precision": float(average_precision_score(is_fraud, p)),
        "log_loss": float(log_loss(is_fraud, p, labels=[False, True])),
        "fraud_rate": float(is_fraud.mean()),
        "mean_probability": float(p.mean()),
    }
    for threshold in REPORT_THRESHOLDS:
        alerted = p >= threshold
        caught = int((alerted & is_fraud).sum())
        key = f"at_{threshold:g}"
        result[f"precision_{key}"] = caught / int(alerted.sum()) if alerted.any() else float("nan")
        result[f"recall_{key}"] = caught / int(is_fraud.sum())
        result[f"alert_rate_{key}"] = float(alerted.mean())
    return result
