"""Pictures for the registry's pages are drawn without a display, whatever the scores."""

from __future__ import annotations

import numpy as np
import pytest

from model_export.plots import plots

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.mark.parametrize("probability", [np.linspace(0, 1, 100), np.full(100, 0.25), np.repeat([0.0, 1.0], 50)])
def test_three_pictures_of_any_scores(probability: np.ndarray) -> None:
    is_fraud = np.arange(100) % 7 == 0
    made = plots(is_fraud, probability.astype(np.float32))
    assert set(made) == {"precision_recall.png", "calibration.png", "score_histogram.png"}
    assert all(content.startswith(PNG) and len(content) > 5_000 for content in made.values())
