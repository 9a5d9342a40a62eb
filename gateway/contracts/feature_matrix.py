"""The model's input from what a batch's entities had done, by numpy, on the list of contracts.features.

The slow twin of gateway/kernels/features.py, and what feature_jobs/recount.py computes with.
"""

from __future__ import annotations

from dataclasses import fields

import numpy as np
import numpy.typing as npt

from gateway.contracts.features import (
    AGGREGATES,
    ENTITY_INDEX,
    FEATURES,
    LABEL_AGGREGATES,
    REQUEST_FEATURES,
    RequestColumns,
)
from gateway.contracts.windows import LABEL_WINDOWS, WINDOWS, Aggregates

_ALL_WINDOWS = slice(None)


def _blocks() -> list[tuple[str, int]]:
    """Each aggregate that some feature is of, and how many rows it has: a window each, or one."""
    used = dict.fromkeys(f.aggregate for f in FEATURES if f.entity is not None)
    lasting = {f.aggregate for f in FEATURES if f.entity is not None and f.window is None}
    return [(name, 1 if name in lasting else len(LABEL_WINDOWS if name in LABEL_AGGREGATES else WINDOWS)) for name in used]


# What `feature_matrix` computes once for all entities and windows, and where each feature then stands.
_BLOCKS = _blocks()
_BLOCK_START = dict(zip((name for name, _ in _BLOCKS), np.cumsum([0, *(rows for _, rows in _BLOCKS)]).tolist(), strict=False))
_ENTITY_COLUMNS = np.array([i for i, f in enumerate(FEATURES) if f.entity is not None])
_OF_ENTITY = np.array([ENTITY_INDEX[f.entity] for f in FEATURES if f.entity is not None])
_ROWS = np.array([_BLOCK_START[f.aggregate] + (f.window_index or 0) for f in FEATURES if f.entity is not None])


def feature_matrix(request: RequestColumns, aggregates: Aggregates, known: npt.NDArray[np.bool_]) -> npt.NDArray[np.float32]:
    """The model's input, (batch, len(FEATURES)), float32.

    `aggregates` has an owner for each transaction and entity, by transaction, then entity; `known` is (batch, len(ENTITIES)), False
    where the transaction doesn't name the entity or its state couldn't be read: those features are NaN.
    """
    batch, entities = known.shape
    each = RequestColumns(*(np.repeat(getattr(request, f.name), entities) for f in fields(RequestColumns)))
    values = np.empty((sum(rows for _, rows in _BLOCKS), batch * entities))
    at = 0
    for name, rows in _BLOCKS:
        values[at : at + rows] = AGGREGATES[name](aggregates, _ALL_WINDOWS, each)
        at += rows
    values[:, ~known.reshape(-1)] = np.nan
    out = np.empty((batch, len(FEATURES)), np.float32)
    out[:, _ENTITY_COLUMNS] = values.reshape(-1, batch, entities)[_ROWS, :, _OF_ENTITY].T
    for i, f in enumerate(FEATURES):
        if f.entity is None:
            out[:, i] = REQUEST_FEATURES[f.aggregate](request)
    return out
