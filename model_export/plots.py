"""Pictures of a model on the newest rows, for the registry's pages: precision-recall curve, calibration, histogram of scores.

Called by `fraudgate train`; about a second for all three. Drawn without a display.
"""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure
from sklearn.calibration import calibration_curve
from sklearn.metrics import average_precision_score, precision_recall_curve

from gateway.contracts.decision import RISK_SCORE_MAX

DPI = 110
CALIBRATION_BINS = 10
HISTOGRAM_BINS = 50


def plots(is_fraud: npt.NDArray[np.bool_], probability: npt.NDArray[np.floating]) -> dict[str, bytes]:
    """PNG files by name, of (rows,) labels and probabilities with both kinds of payments."""
    return {
        "precision_recall.png": _png(_precision_recall(is_fraud, probability)),
        "calibration.png": _png(_calibration(is_fraud, probability)),
        "score_histogram.png": _png(_histogram(is_fraud, probability)),
    }


def _precision_recall(is_fraud: npt.NDArray[np.bool_], probability: npt.NDArray[np.floating]) -> Figure:
    precision, recall, _ = precision_recall_curve(is_fraud, probability)
    figure, axes = _figure("recall", "precision")
    axes.plot(recall, precision, drawstyle="steps-post")
    axes.axhline(float(is_fraud.mean()), linestyle=":", color="grey")
    axes.set_title(f"average precision {average_precision_score(is_fraud, probability):.4f}; dotted: chance")
    axes.set_ylim(0, 1.02)
    return figure


def _calibration(is_fraud: npt.NDArray[np.bool_], probability: npt.NDArray[np.floating]) -> Figure:
    share, mean = calibration_curve(is_fraud, np.clip(probability, 0, 1), n_bins=CALIBRATION_BINS, strategy="quantile")
    figure, axes = _figure("mean probability", "share of frauds")
    axes.plot([0, 1], [0, 1], linestyle=":", color="grey")
    axes.plot(mean, share, marker="o")
    axes.set_title(f"calibration, {len(share)} groups by score; dotted: perfect")
    return figure


def _histogram(is_fraud: npt.NDArray[np.bool_], probability: npt.NDArray[np.floating]) -> Figure:
    figure, axes = _figure("risk score", "payments")
    edges = np.linspace(0, RISK_SCORE_MAX, HISTOGRAM_BINS + 1)
    for label, rows in (("genuine", ~is_fraud), ("fraud", is_fraud)):
        axes.hist(probability[rows] * RISK_SCORE_MAX, bins=edges, label=f"{label} ({int(rows.sum())})", alpha=0.6)
    axes.set_yscale("log")
    axes.legend(loc="upper right")
    axes.set_title("scores")
    return figure


def _figure(x: str, y: str) -> tuple[Figure, Any]:
    # A Figure of one's own, and not pyplot's, keeps no state between calls and needs no display.
    figure = Figure(figsize=(6, 4.5), layout="constrained")
    axes = figure.add_subplot()
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    return figure, axes


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI)
    return buffer.getvalue()
