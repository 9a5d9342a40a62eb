"""How well probabilities separate frauds from genuine payments. Pure functions of labels and probabilities."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from sklearn.calibration import calibration_curve
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score, brier_score_loss, log_loss, roc_auc_score

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


CALIBRATION_BINS = 20
_LOGIT_MIN = 1e-7


def calibration(is_fraud: npt.NDArray[np.bool_], probability: npt.NDArray[np.floating]) -> dict[str, float]:
    """How far (rows,) probabilities can be taken at their word.

    expected_calibration_error: the mean over CALIBRATION_BINS groups of equal size, by probability, of |share of frauds - mean
    probability|. slope: that of a logistic regression of the label on the probability's logit, 1 when it is as sure as it should be, less
    when too sure (Cox 1958). brier and brier_of_rate: mean squared error, and that of always saying the share of frauds.
    """
    p = np.clip(probability.astype(np.float64), _LOGIT_MIN, 1 - _LOGIT_MIN)
    share, mean = calibration_curve(is_fraud, p, n_bins=CALIBRATION_BINS, strategy="quantile")
    logit = np.log(p / (1 - p))[:, None]
    fitted = LogisticRegression(C=np.inf, max_iter=1000).fit(logit, is_fraud)
    rate = float(is_fraud.mean())
    return {
        "fraud_rate": rate,
        "mean_probability": float(p.mean()),
        "expected_calibration_error": float(np.abs(share - mean).mean()),
        "slope": float(fitted.coef_[0, 0]),
        "brier": float(brier_score_loss(is_fraud, p)),
        "brier_of_rate": rate * (1 - rate),
    }
