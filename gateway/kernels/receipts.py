"""The receipts of a batch as records of schemas/decision.avsc, one after the other.

Called by gateway/scoring/receipts.py; half a microsecond each. Its slow twin is gateway.kafka.avro.encode_receipt (tests/agreement).
"""

from __future__ import annotations

import numpy as np

from gateway.kernels.compiled import compiled
from gateway.kernels.intake import TRANSACTION_ID, Floats, Int64s
from gateway.kernels.raw import Bytes, put_bytes, put_f64, put_long

LONG_BYTES_MAX = 10
# partition, offset, received, decided, score, tiles' age, admit, features, model, policy: and a byte each for what may be null; then
# probability and propensity
NUMBERS_BYTES_MAX = 10 * (LONG_BYTES_MAX + 1) + 9 + 8


@compiled
def _put_nullable(out: Bytes, at: int, value: int) -> int:
    """A union of null and long; -1 stands for null."""
    if value < 0:
        out[at] = 0
        return at + 1
    out[at] = 2
    return put_long(out, at + 1, value)


@compiled
def _put_double(out: Bytes, at: int, value: float) -> int:
    """A union of null and double; NaN stands for null."""
    if np.isnan(value):
        out[at] = 0
        return at + 1
    out[at] = 2
    return put_f64(out, at + 1, value)


@compiled
def _put_longs(out: Bytes, at: int, values: Int64s) -> int:
    """An array of long in one block."""
    at = put_long(out, at, len(values))
    for i in range(len(values)):
        at = put_long(out, at, values[i])
    if len(values) > 0:
        out[at] = 0
        at += 1
    return at


@compiled
def write_receipts(
    buf: Bytes,
    edges: Int64s,
    starts: Int64s,
    lengths: Int64s,
    rows: Int64s,
    door: Bytes,
    source: Int64s,
    times_ms: Int64s,
    decisions: Bytes,
    decision_edges: Int64s,
    decision: Int64s,
    score: Int64s,
    probability: Floats,
    notes: Bytes,
    note_edges: Int64s,
    note: Int64s,
    models: Bytes,
    model_edges: Int64s,
    model: Int64s,
    features: Bytes,
    seq: Int64s,
    label_changes: Int64s,
    tiles_age_ms: int,
    versions: Bytes,
    admit_us: Int64s,
    steps_us: Int64s,
    routed_by: Bytes,
    policy_decision: Int64s,
    propensity: Floats,
    tails: Bytes,
    tail_edges: Int64s,
    tail: Int64s,
    out: Bytes,
    ends: Int64s,
) -> None:
    """Writes a receipt for each of `rows` (n,), which names rows of the intake's `edges`, `starts` and `lengths`.

    By receipt (n, ...): `source` (n, 2) partition and offset, -1: none; `times_ms` (n, 2) received and decided; `decision`,
    `policy_decision`, `note`, `model` and `tail` say which of the texts that lie in `decisions`, `notes`, `models` and `tails` between
    their edges;
    `score`; `probability`, NaN: none; `features` (n * bytes of a row) float32; `seq` (n, entities); `label_changes` (n, labelled);
    `admit_us`; `propensity`. The same for all: `door`, `versions`, `routed_by` (as Avro), `tiles_age_ms` (-1: unknown), `steps_us` (3,).
    `ends` (n,) gets the end of each receipt in `out`.
    """
    at = 0
    count = len(rows)
    row_bytes = len(features) // count
    for k in range(count):
        row = rows[k]
        start = edges[row]
        size = edges[row + 1] - start
        # A transaction's record begins with its id, and so does the receipt.
        at = put_bytes(out, at, buf, start, starts[row, TRANSACTION_ID] + lengths[row, TRANSACTION_ID] - start)
        at = put_bytes(out, at, buf, start, size)
        at = put_bytes(out, at, door, 0, len(door))
        at = _put_nullable(out, at, source[k, 0])
        at = _put_nullable(out, at, source[k, 1])
        at = put_long(out, at, times_ms[k, 0])
        at = put_long(out, at, times_ms[k, 1])
        d = decision[k]
        at = put_bytes(out, at, decisions, decision_edges[d], decision_edges[d + 1] - decision_edges[d])
        at = put_long(out, at, score[k])
        at = _put_double(out, at, probability[k])
        d = note[k]
        at = put_bytes(out, at, notes, note_edges[d], note_edges[d + 1] - note_edges[d])
        d = model[k]
        at = put_bytes(out, at, models, model_edges[d], model_edges[d + 1] - model_edges[d])
        at = put_long(out, at, row_bytes // 4)
        at = put_bytes(out, at, features, k * row_bytes, row_bytes)
        out[at] = 0
        at = _put_longs(out, at + 1, seq[k])
        at = _put_longs(out, at, label_changes[k])
        at = _put_nullable(out, at, tiles_age_ms)
        at = put_bytes(out, at, versions, 0, len(versions))
        at = put_long(out, at, admit_us[k])
        for i in range(len(steps_us)):
            at = put_long(out, at, steps_us[i])
        at = put_bytes(out, at, routed_by, 0, len(routed_by))
        d = policy_decision[k]
        at = put_bytes(out, at, decisions, decision_edges[d], decision_edges[d + 1] - decision_edges[d])
        at = put_f64(out, at, propensity[k])
        d = tail[k]
        at = put_bytes(out, at, tails, tail_edges[d], tail_edges[d + 1] - tail_edges[d])
        ends[k] = at


def receipts_bytes_max(count: int, payload_bytes: int, fixed_bytes: int, feature_bytes: int, longs: int) -> int:
    """How many bytes `count` receipts can have at most: `fixed_bytes` are those texts of one that aren't the transaction's."""
    return 2 * payload_bytes + feature_bytes + count * (fixed_bytes + NUMBERS_BYTES_MAX + LONG_BYTES_MAX * (longs + 4))
