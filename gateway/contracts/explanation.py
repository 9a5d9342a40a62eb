"""What explains a model's scores: its trees as arrays, in the package's file explanation.npz. Written at export, read by the gateway.

Beside the trees it holds what proves that they are the model's (its margins on the golden rows) and what is usual for each feature.
"""

from __future__ import annotations

import io
import zipfile
from dataclasses import dataclass, fields

import numpy as np
import numpy.typing as npt

from gateway.contracts.features import FEATURES

TREES_MAX = 5_000
NODES_MAX = 500_000
# Unpacked; the arrays of so many nodes take half of it.
EXPLANATION_BYTES_MAX = 32 * 1024 * 1024
NO_NODE = -1
# Percentile of the training rows beyond which a value is unusual.
UNUSUAL_PERCENTILE = 95

Int32s = npt.NDArray[np.int32]
Float32s = npt.NDArray[np.float32]


class ExplanationError(ValueError):
    """A file is no explanation that can be used. The message says why."""


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """Trees one after the other: those of tree i from `tree_starts[i]` to `tree_starts[i + 1]` - 1, root first, parents before children.

    By node: `feature` (-1: a leaf), `threshold` (a smaller value goes left), `left` and `right` (places among all nodes, -1: none),
    `missing_left` (whether an unknown value goes left), `value` (a leaf's, added to the margin; 0 elsewhere) and `cover` (the training
    rows' weight that came here). `base_margin` (1,) is the margin before any tree. `golden_margin` (rows,) are the model's margins on
    the golden rows of its package. `median` and `unusual` (features,) are the training rows' median and UNUSUAL_PERCENTILE, NaN
    where a feature was never known.
    """

    tree_starts: Int32s
    feature: Int32s
    threshold: Float32s
    left: Int32s
    right: Int32s
    missing_left: npt.NDArray[np.bool_]
    value: Float32s
    cover: Float32s
    base_margin: npt.NDArray[np.float64]
    golden_margin: Float32s
    median: Float32s
    unusual: Float32s

    @property
    def trees(self) -> int:
        return len(self.tree_starts) - 1


_BY_NODE = ("feature", "threshold", "left", "right", "missing_left", "value", "cover")
_DTYPES = {
    **dict.fromkeys(("tree_starts", "feature", "left", "right"), np.int32),
    **dict.fromkeys(("threshold", "value", "cover", "golden_margin", "median", "unusual"), np.float32),
    "missing_left": np.bool_,
    "base_margin": np.float64,
}
assert set(_DTYPES) == {f.name for f in fields(Explanation)}


def encode_explanation(explanation: Explanation) -> bytes:
    """The file. The same explanation gives the same bytes."""
    check_explanation(explanation)
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **{f.name: getattr(explanation, f.name) for f in fields(Explanation)})
    return buffer.getvalue()


def decode_explanation(content: bytes) -> Explanation:
    """From the bytes of the file. Raises `ExplanationError` for what isn't whole and sound."""
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            unpacked = sum(entry.file_size for entry in archive.infolist())
        if unpacked > EXPLANATION_BYTES_MAX:
            raise ExplanationError(f"it has {unpacked} bytes, at most {EXPLANATION_BYTES_MAX} are allowed")
        with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
            found = Explanation(**{name: arrays[name] for name in _DTYPES})
    except (zipfile.BadZipFile, KeyError, OSError, ValueError, EOFError) as exc:
        raise ExplanationError(str(exc)) from exc
    check_explanation(found)
    return found


def check_explanation(e: Explanation) -> None:
    """Raises `ExplanationError` unless every walk from a root ends at a leaf of its tree and every number can be computed with."""
    for name, dtype in _DTYPES.items():
        array = getattr(e, name)
        if array.dtype != dtype or array.ndim != 1:
            raise ExplanationError(f"{name} is not one row of {np.dtype(dtype).name}")
    nodes = len(e.feature)
    if any(len(getattr(e, name)) != nodes for name in _BY_NODE):
        raise ExplanationError("the arrays of the nodes differ in length")
    if not 1 <= e.trees <= TREES_MAX or not e.trees <= nodes <= NODES_MAX:
        raise ExplanationError(f"it has {e.trees} trees of {nodes} nodes, at most {TREES_MAX} of {NODES_MAX} are allowed")
    starts = e.tree_starts
    if starts[0] != 0 or starts[-1] != nodes or not (np.diff(starts) > 0).all():
        raise ExplanationError("the trees don't lie one after the other")
    if len(e.base_margin) != 1 or len(e.median) != len(FEATURES) or len(e.unusual) != len(FEATURES):
        raise ExplanationError(f"it is not of {len(FEATURES)} features")
    split = e.feature != NO_NODE
    if not ((e.feature[split] >= 0) & (e.feature[split] < len(FEATURES))).all():
        raise ExplanationError("a split is by a feature that isn't there")
    if not all(np.isfinite(a).all() for a in (e.threshold[split], e.value, e.cover, e.base_margin, e.golden_margin)):
        raise ExplanationError("a number is not finite")
    if not (e.cover > 0).all() or e.value[split].any():
        raise ExplanationError("a node without cover, or a value beside a leaf's")
    _check_children(e, split)


def _check_children(e: Explanation, split: npt.NDArray[np.bool_]) -> None:
    """Each node but the roots is the child of one split, which stands before it in the same tree."""
    at = np.flatnonzero(split)
    children = np.concatenate([e.left[at], e.right[at]])
    parents = np.concatenate([at, at])
    tree_end = e.tree_starts[np.searchsorted(e.tree_starts, parents, side="right")]
    if not ((children > parents) & (children < tree_end)).all():
        raise ExplanationError("a child doesn't stand behind its parent in the same tree")
    born = np.zeros(len(e.feature), np.int64)
    np.add.at(born, children, 1)
    born[e.tree_starts[:-1]] += 1
    if not (born == 1).all() or (e.left[~split] != NO_NODE).any() or (e.right[~split] != NO_NODE).any():
        raise ExplanationError("a node has no parent or several, or a leaf has children")
