"""The features that a request alone says, for a whole batch. Called by gateway/redis/store.py.

Their slow twin is contracts.feature_matrix (tests/agreement).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from gateway.contracts.features import FEATURES
from gateway.contracts.windows import DAY_MS, HOUR_MS
from gateway.kernels.compiled import compiled
from gateway.kernels.intake import Floats, Int64s

REQUEST_CODES = ("amount_minor", "hour", "weekday", "is_night", "is_weekend", "channel", "mcc", "cross_border")
_OF_REQUEST = np.array([(REQUEST_CODES.index(f.aggregate), i) for i, f in enumerate(FEATURES) if f.entity is None], np.int64)
_REQUEST_FEATURES = len(_OF_REQUEST)


@compiled
def request_features(numbers: Int64s, places: Floats, out: npt.NDArray[np.float32]) -> None:
    """Fills in the columns of `out` (rows, features) that the request alone says."""
    for row in range(len(out)):
        t_ms = numbers[row, 0]
        weekday = (t_ms // DAY_MS + 3) % 7
        for i in range(_REQUEST_FEATURES):
            code, column = _OF_REQUEST[i]
            value = 0.0
            if code == 0:
                value = np.float64(numbers[row, 1])
            elif code == 1:
                value = np.float64(t_ms % DAY_MS // HOUR_MS)
            elif code == 2:
                value = np.float64(weekday)
            elif code == 3:
                value = 1.0 if t_ms % DAY_MS < 7 * HOUR_MS else 0.0
            elif code == 4:
                value = 1.0 if weekday >= 5 else 0.0
            elif code == 5:
                value = np.float64(numbers[row, 2])
            elif code == 6:
                value = np.float64(numbers[row, 3])
            else:
                value = places[row, 2]
            out[row, column] = value
