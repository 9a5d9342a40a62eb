"""What a batch was answered, packed for retries and written as the commands that store it. Called by gateway/scoring/answers.py.

A record is a claim and, behind it, the answer in MessagePack as msgspec encodes contracts.decision.Answer: its slow twin (tests/agreement).
About a third of a microsecond each; made one by one in Python it was five.
"""

from __future__ import annotations

import numpy as np

from gateway.contracts.layout import CLAIM_BYTES, PREFIX
from gateway.kernels.asking import put_bulk, put_end
from gateway.kernels.compiled import compiled
from gateway.kernels.intake import TRANSACTION_ID, Floats, Int64s
from gateway.kernels.raw import Bytes, bits_of, put_bytes

# A map of nine fields, the first of them the id.
_BEGIN = np.frombuffer(b"\x89\xaetransaction_id", np.uint8)
_RISK_SCORE = np.frombuffer(b"\xaarisk_score", np.uint8)
_PROBABILITY = np.frombuffer(b"\xabprobability", np.uint8)
_LATENCY = np.frombuffer(b"\xaalatency_ms", np.uint8)
_KEY_START = np.frombuffer(f"{PREFIX}:i:{{".encode(), np.uint8)
_KEY_END = np.frombuffer(b"}", np.uint8)
_SET = np.frombuffer(b"*5\r\n$3\r\nSET\r\n", np.uint8)
_NIL, _DOUBLE, _SHORT_TEXT, _TEXT, _BYTE, _TWO_BYTES = 0xC0, 0xCB, 0xA0, 0xD9, 0xCC, 0xCD
_DOUBLE_BYTES = 9
# Texts, numbers with their marks, RESP's lines: all of an answer and its command but what comes with them.
FIXED_BYTES_MAX = 256
assert (
    sum(map(len, (_BEGIN, _RISK_SCORE, _PROBABILITY, _LATENCY, _KEY_START, _KEY_END, _SET))) + CLAIM_BYTES + 2 * _DOUBLE_BYTES + 80
    < FIXED_BYTES_MAX
)


@compiled
def _put_double(out: Bytes, at: int, value: float) -> int:
    """MessagePack's float 64, the highest byte first."""
    out[at] = _DOUBLE
    bits = bits_of(value)
    for i in range(8):
        out[at + 1 + i] = np.uint8(bits >> np.uint64(56 - 8 * i))
    return at + _DOUBLE_BYTES


@compiled
def _score_bytes(score: int) -> int:
    return 1 if score < 128 else (2 if score < 256 else 3)


@compiled
def _put_score(out: Bytes, at: int, score: int) -> int:
    """From 0 to 65,535, as short as MessagePack allows."""
    if score < 128:
        out[at] = score
        return at + 1
    if score < 256:
        out[at] = _BYTE
        out[at + 1] = score
        return at + 2
    out[at] = _TWO_BYTES
    out[at + 1] = score >> 8
    out[at + 2] = score & 0xFF
    return at + 3


@compiled
def write_answers(
    buf: Bytes,
    starts: Int64s,
    lengths: Int64s,
    rows: Int64s,
    claims: Bytes,
    decisions: Bytes,
    decision_edges: Int64s,
    decision: Int64s,
    score: Int64s,
    probability: Floats,
    whys: Bytes,
    why_edges: Int64s,
    withouts: Bytes,
    without_edges: Int64s,
    note: Int64s,
    models: Bytes,
    model_edges: Int64s,
    model: Int64s,
    latency_ms: Floats,
    expiry: Bytes,
    out: Bytes,
    places: Int64s,
) -> int:
    """Writes a SET command for each of `rows` (n,) of the intake; returns the length of all. Ids have at most 255 bytes.

    By answer: `claims` (n * CLAIM_BYTES,); `decision`, `model` and `note` (of `whys`: reasons, rule hits; of `withouts`: degradations)
    say which of the texts between edges; `score`; `probability`, NaN: none; `latency_ms`. `expiry` ends each command. `places` (n, 2) gets
    where each record begins and ends in `out`.
    """
    at = 0
    for k in range(len(rows)):
        start, own = starts[rows[k], TRANSACTION_ID], lengths[rows[k], TRANSACTION_ID]
        d, w, m = decision[k], note[k], model[k]
        decision_bytes = decision_edges[d + 1] - decision_edges[d]
        why_bytes = why_edges[w + 1] - why_edges[w]
        without_bytes = without_edges[w + 1] - without_edges[w]
        model_bytes = model_edges[m + 1] - model_edges[m]
        unknown = np.isnan(probability[k])
        size = CLAIM_BYTES + len(_BEGIN) + (1 if own < 32 else 2) + own + decision_bytes
        size += len(_RISK_SCORE) + _score_bytes(score[k]) + len(_PROBABILITY) + (1 if unknown else _DOUBLE_BYTES)
        size += why_bytes + model_bytes + without_bytes + len(_LATENCY) + _DOUBLE_BYTES

        at = put_bytes(out, at, _SET, 0, len(_SET))
        at = put_bulk(out, at, len(_KEY_START) + own + len(_KEY_END))
        at = put_bytes(out, at, _KEY_START, 0, len(_KEY_START))
        at = put_bytes(out, at, buf, start, own)
        at = put_bytes(out, at, _KEY_END, 0, len(_KEY_END))
        at = put_bulk(out, put_end(out, at), size)

        places[k, 0] = at
        at = put_bytes(out, at, claims, k * CLAIM_BYTES, CLAIM_BYTES)
        at = put_bytes(out, at, _BEGIN, 0, len(_BEGIN))
        if own < 32:
            out[at] = _SHORT_TEXT | own
            at += 1
        else:
            out[at] = _TEXT
            out[at + 1] = own
            at += 2
        at = put_bytes(out, at, buf, start, own)
        at = put_bytes(out, at, decisions, decision_edges[d], decision_bytes)
        at = put_bytes(out, at, _RISK_SCORE, 0, len(_RISK_SCORE))
        at = _put_score(out, at, score[k])
        at = put_bytes(out, at, _PROBABILITY, 0, len(_PROBABILITY))
        if unknown:
            out[at] = _NIL
            at += 1
        else:
            at = _put_double(out, at, probability[k])
        at = put_bytes(out, at, whys, why_edges[w], why_bytes)
        at = put_bytes(out, at, models, model_edges[m], model_bytes)
        at = put_bytes(out, at, withouts, without_edges[w], without_bytes)
        at = put_bytes(out, at, _LATENCY, 0, len(_LATENCY))
        at = _put_double(out, at, latency_ms[k])
        places[k, 1] = at
        at = put_bytes(out, put_end(out, at), expiry, 0, len(expiry))
    return at
