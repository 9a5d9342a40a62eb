"""Where texts of a batch lie in [0, 1): the hash that shares cards between models and draws explorations. 20 ns a row.

Its slow twin is gateway.contracts.routing.point_of (tests/agreement).
"""

from __future__ import annotations

import numpy as np

from gateway.contracts.routing import FNV_PRIME, MIX_1, MIX_2
from gateway.kernels.compiled import compiled
from gateway.kernels.intake import Floats, Int64s
from gateway.kernels.raw import Bytes

PRIME, MULTIPLY_1, MULTIPLY_2 = np.uint64(FNV_PRIME), np.uint64(MIX_1), np.uint64(MIX_2)
SHIFT_30, SHIFT_27, SHIFT_31, SHIFT_11 = np.uint64(30), np.uint64(27), np.uint64(31), np.uint64(11)


@compiled
def points(buf: Bytes, starts: Int64s, lengths: Int64s, rows: Int64s, place: int, salt: np.uint64, out: Floats) -> None:
    """`out` (n,) gets the points of the text at column `place` of the intake's `starts` and `lengths`, of each of `rows` (n,)."""
    for k in range(len(rows)):
        row = rows[k]
        h = salt
        start = starts[row, place]
        for i in range(start, start + lengths[row, place]):
            h = (h ^ np.uint64(buf[i])) * PRIME
        h = (h ^ (h >> SHIFT_30)) * MULTIPLY_1
        h = (h ^ (h >> SHIFT_27)) * MULTIPLY_2
        out[k] = np.float64((h ^ (h >> SHIFT_31)) >> SHIFT_11) / 9007199254740992.0
