"""Pictures of an evaluation: those of model_export.plots, and the cost by threshold. Called by `fraudgate evaluate`."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure

from model_export.cost import GRID, BandThresholds
from model_export.plots import DPI, plots


def evaluation_plots(
    is_fraud: npt.NDArray[np.bool_], probability: npt.NDArray[np.floating], bands: Sequence[BandThresholds] | None
) -> dict[str, bytes]:
    """PNG files by name; without `bands`, none of costs."""
    return plots(is_fraud, probability) | ({} if bands is None else {"cost.png": _costs(bands)})


def _costs(bands: Sequence[BandThresholds]) -> bytes:
    figure = Figure(figsize=(7, 4.5), dpi=DPI, layout="constrained")
    axes = figure.subplots()
    for i, band in enumerate(bands):
        if band.cost_of_approving_all == 0:
            continue
        name = "any amount" if band.up_to_minor is None else f"up to {band.up_to_minor / 100:.0f}"
        axes.plot(GRID, band.cost_curve / band.cost_of_approving_all, color=f"C{i}", label=f"{name} ({band.payments} payments)")
        axes.axvline(band.decline, linestyle=":", color=f"C{i}")
    axes.axhline(1, linestyle=":", color="grey")
    axes.set_ylim(0, 1.5)
    axes.set_xlabel("declined from this risk score on (dotted: chosen, with reviews below it)")
    axes.set_ylabel("cost, of approving all")
    axes.legend(loc="upper right")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
