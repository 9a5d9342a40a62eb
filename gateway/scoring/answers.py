"""What a batch was answered, for retries: idempotency records, and the commands that store them. Called by the scorer.

Texts that repeat are packed once: outcomes, models, and each combination of reasons, rule hits and degradations, of which there are few.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import msgspec
import numpy as np
import numpy.typing as npt

from gateway.contracts.decision import SEVERITY, Answer, ModelRef, Outcome, ReasonText
from gateway.contracts.layout import CLAIM_BYTES
from gateway.contracts.reasons import CARDHOLDER_TEXT, REASON_TEXT, Reason
from gateway.kernels.answers import FIXED_BYTES_MAX, write_answers
from gateway.kernels.intake import TRANSACTION_ID
from gateway.scoring.requests import Requests

Int64s = npt.NDArray[np.int64]
# Codes of reasons, ids of rules, kinds of degradation.
Note = tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]

REASONS: dict[str, ReasonText] = {r.value: ReasonText(r.value, text, CARDHOLDER_TEXT[r]) for r, text in REASON_TEXT.items()}
assert set(REASONS) == {r.value for r in Reason}
_pack = msgspec.msgpack.Encoder().encode
_unpack = msgspec.msgpack.Decoder(Answer).decode


def _texts(texts: Sequence[bytes]) -> tuple[npt.NDArray[np.uint8], Int64s]:
    """`texts` one after the other, and the edges between them."""
    return np.frombuffer(b"".join(texts), np.uint8), np.cumsum([0, *map(len, texts)])


def _field(name: str, value: object) -> bytes:
    return _pack(name) + _pack(value)


_OUTCOMES = [_field("decision", outcome) for outcome in Outcome]
_DECISIONS, _DECISION_EDGES = _texts(_OUTCOMES)
assert list(SEVERITY.values()) == list(range(len(_OUTCOMES)))


@dataclass(slots=True)
class Notes:
    """`distinct` combinations, and for each row the `place` of its own among them, (rows,)."""

    distinct: list[Note]
    place: Int64s


def gather(notes: Sequence[Note]) -> Notes:
    places: dict[Note, int] = {}
    place = np.fromiter((places.setdefault(n, len(places)) for n in notes), np.int64, len(notes))
    return Notes(list(places), place)


@lru_cache(maxsize=4096)
def _why(reasons: tuple[str, ...], hits: tuple[str, ...]) -> bytes:
    return _field("reasons", [REASONS[code] for code in reasons]) + _field("rule_hits", hits)


@lru_cache(maxsize=256)
def _without(kinds: tuple[str, ...]) -> bytes:
    return _field("degraded", kinds)


@lru_cache(maxsize=64)
def _model(ref: ModelRef | None) -> bytes:
    return _field("model", ref)


@dataclass(slots=True)
class AnswerRecords:
    """An idempotency record for each answer, claim and packed answer; and all of them as the `commands` that store them."""

    records: list[bytes]
    commands: bytes


def encode_answers(
    requests: Requests,
    rows: Int64s,
    claims: bytes,
    severity: Int64s,
    score: Int64s,
    probability: npt.NDArray[np.float64],
    notes: Notes,
    refs: Sequence[ModelRef | None],
    model: Int64s,
    latency_ms: npt.NDArray[np.float64],
    ttl_ms: int,
) -> AnswerRecords:
    """One for each of `rows`. As in receipts: `severity` is the outcome's place, `probability` NaN where no model scored, `model` a place
    in `refs`. `claims` are CLAIM_BYTES each.
    """
    count = len(rows)
    assert len(claims) == count * CLAIM_BYTES
    assert len(severity) == len(score) == len(probability) == len(notes.place) == len(model) == len(latency_ms) == count
    whys = [_why(reasons, hits) for reasons, hits, _ in notes.distinct]
    withouts = [_without(kinds) for _, _, kinds in notes.distinct]
    models = [_model(ref) for ref in refs]
    expiry = b"$2\r\nPX\r\n$%d\r\n%d\r\n" % (len(str(ttl_ms)), ttl_ms)
    longest = max(map(len, whys)) + max(map(len, withouts)) + max(map(len, models)) + max(map(len, _OUTCOMES)) + len(expiry)
    ids = 2 * int(requests.lengths[rows, TRANSACTION_ID].sum())
    out = np.empty(ids + count * (longest + FIXED_BYTES_MAX), np.uint8)
    places = np.empty((count, 2), np.int64)
    size = write_answers(
        requests.buf,
        requests.starts,
        requests.lengths,
        rows,
        np.frombuffer(claims, np.uint8),
        _DECISIONS,
        _DECISION_EDGES,
        severity,
        score,
        probability,
        *_texts(whys),
        *_texts(withouts),
        notes.place,
        *_texts(models),
        model,
        latency_ms,
        np.frombuffer(expiry, np.uint8),
        out,
        places,
    )
    commands = out[:size].tobytes()
    return AnswerRecords([commands[a:b] for a, b in places.tolist()], commands)


def make_answers(
    ids: Sequence[str],
    outcomes: Sequence[Outcome],
    score: Int64s,
    probability: npt.NDArray[np.float64] | None,
    notes: Notes,
    refs: Sequence[ModelRef | None],
    model: Int64s,
    latency_ms: npt.NDArray[np.float64],
) -> list[Answer | None]:
    """The answers of a batch as objects, for callers that wait: what the records hold too."""
    said = [([REASONS[code] for code in reasons], list(hits), list(kinds)) for reasons, hits, kinds in notes.distinct]
    nobody: list[float | None] = [None] * len(ids)
    found: list[Answer | None] = []
    for transaction_id, outcome, risk, p, note, place, ms in zip(
        ids,
        outcomes,
        score.tolist(),
        nobody if probability is None else probability.tolist(),
        notes.place.tolist(),
        model.tolist(),
        latency_ms.tolist(),
        strict=True,
    ):
        reasons, hits, kinds = said[note]
        found.append(
            Answer(
                transaction_id=transaction_id,
                decision=outcome,
                risk_score=risk,
                probability=p,
                reasons=reasons,
                rule_hits=hits,
                model=refs[place],
                degraded=kinds,
                latency_ms=ms,
            )
        )
    return found


def answer_in(record: bytes) -> Answer:
    """The answer of an idempotency record that has one."""
    return _unpack(record[CLAIM_BYTES:])
