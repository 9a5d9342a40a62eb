"""The receipts of a batch of decisions, as records of schemas/decision.avsc. Called by the scorer.

Texts that repeat are encoded once: what a batch has in common, and each combination of reasons, rule hits and degradations that
was ever seen, of which there are few.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from gateway.contracts.decision import SEVERITY, Door, ModelRef, Outcome, RoutedBy
from gateway.contracts.features import FINGERPRINT
from gateway.kafka.avro import encode_long, encode_text, encode_text_or_null, encode_texts
from gateway.kernels.raw import Bytes
from gateway.kernels.receipts import receipts_bytes_max, write_receipts
from gateway.models.model import Model
from gateway.scoring.answers import Notes
from gateway.scoring.job import Job
from gateway.scoring.requests import Requests

Int64s = npt.NDArray[np.int64]
Tail = tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]

_DOORS = {door: np.frombuffer(encode_text(door.value), np.uint8) for door in Door}
_OUTCOMES = [encode_text(outcome.value) for outcome in Outcome]
_DECISIONS = np.frombuffer(b"".join(_OUTCOMES), np.uint8)
_DECISION_EDGES = np.cumsum([0, *map(len, _OUTCOMES)])
assert list(SEVERITY.values()) == list(range(len(_OUTCOMES)))
_ROUTED = {by: np.frombuffer(encode_text(by.value), np.uint8) for by in RoutedBy}
_NO_TAIL = encode_texts(()) * 3
_NO_MODEL = encode_text_or_null(None) * 4 + encode_text(FINGERPRINT)


@dataclass(slots=True)
class Decided:
    """A decision for each of `jobs`, which are `rows` of `requests`, all through one door. Arrays are by job.

    `severity` is the outcome's place, `probability` (n,) NaN where no model scored. `notes` are reasons, rule hits and degradations.
    `models` are those that scored (None: none did), `model` the place of each row's among them. `policy_severity` is the place of the
    outcome that the policy came to, `propensity` the probability of the one that was given. `tails` are list hits, shadow hits and rule
    errors, None where no row has any; `lists_version` is that of the lists the policy saw, -1 where it had none.

    `matrix` (n, features), `seq` (n, entities), `label_changes` (n, labelled entities). `steps_us`: features, model, policy.
    """

    requests: Requests
    rows: Int64s
    jobs: Sequence[Job]
    decided_at_ms: int
    severity: Int64s
    score: Int64s
    probability: npt.NDArray[np.float64]
    notes: Notes
    models: Sequence[Model | None]
    model: Int64s
    routed_by: RoutedBy
    policy_severity: Int64s
    propensity: npt.NDArray[np.float64]
    matrix: npt.NDArray[np.float32]
    seq: Int64s
    label_changes: Int64s
    tiles_age_ms: int | None
    policy_digest: str
    code_version: str
    admit_us: Int64s
    steps_us: Sequence[int]
    tails: Sequence[Tail] | None = None
    lists_version: int = -1


def encode_receipts(d: Decided) -> list[bytes]:
    """One record for each decision."""
    count = len(d.jobs)
    by_row = (d.notes.place, d.model, d.policy_severity, d.propensity)
    assert all(len(column) == count for column in by_row), "the kernel doesn't check its indices"
    tails, tail_edges, tail, longest_tail = _tails(d.tails, d.lists_version, count)
    notes = [_note(*n) for n in d.notes.distinct]
    note_edges = np.cumsum([0, *map(len, notes)])
    door = _DOORS[d.jobs[0].door]
    models, model_edges, longest = _models(tuple([None if m is None else (m.ref, m.digest) for m in d.models]))
    routed_by = _ROUTED[d.routed_by]
    versions = _versions(d.policy_digest, d.code_version)
    source = np.array([(-1, -1) if j.partition is None else (j.partition, j.offset) for j in d.jobs], np.int64)
    times_ms = np.empty((count, 2), np.int64)
    times_ms[:, 0] = np.fromiter((j.received_ms for j in d.jobs), np.int64, count)
    times_ms[:, 1] = d.decided_at_ms
    features = np.ascontiguousarray(d.matrix).view(np.uint8).reshape(-1)
    # The longest of each text, for every receipt.
    fixed = (
        len(door) + longest + len(versions) + max(map(len, notes)) + 2 * max(map(len, _OUTCOMES)) + len(routed_by) + longest_tail
    )
    longs = d.seq.shape[1] + d.label_changes.shape[1]
    out = np.empty(receipts_bytes_max(count, len(d.requests.buf), fixed, len(features), longs), np.uint8)
    ends = np.empty(count, np.int64)
    write_receipts(
        d.requests.buf,
        d.requests.edges,
        d.requests.starts,
        d.requests.lengths,
        d.rows,
        door,
        source,
        times_ms,
        _DECISIONS,
        _DECISION_EDGES,
        d.severity,
        d.score,
        d.probability,
        np.frombuffer(b"".join(notes), np.uint8),
        note_edges,
        d.notes.place,
        models,
        model_edges,
        d.model,
        features,
        d.seq,
        d.label_changes,
        -1 if d.tiles_age_ms is None else d.tiles_age_ms,
        np.frombuffer(versions, np.uint8),
        d.admit_us,
        np.array(d.steps_us, np.int64),
        routed_by,
        d.policy_severity,
        d.propensity,
        tails,
        tail_edges,
        tail,
        out,
        ends,
    )
    stops = ends.tolist()
    written = out[: stops[-1]].tobytes()
    return [written[a:b] for a, b in zip([0, *stops[:-1]], stops, strict=True)]


@lru_cache(maxsize=4096)
def _note(first: tuple[str, ...], second: tuple[str, ...], third: tuple[str, ...]) -> bytes:
    return encode_texts(first) + encode_texts(second) + encode_texts(third)


def _tails(tails: Sequence[Tail] | None, lists_version: int, count: int) -> tuple[Bytes, Int64s, Int64s, int]:
    """What the receipts end with, one after the other, the edges between them, which is each row's, and the length of the longest."""
    version = encode_long(lists_version)
    if tails is None:
        text = _NO_TAIL + version
        return np.frombuffer(text, np.uint8), np.array([0, len(text)]), np.zeros(count, np.int64), len(text)
    places: dict[Tail, int] = {}
    tail = np.fromiter((places.setdefault(t, len(places)) for t in tails), np.int64, count)
    texts = [_note(*t) + version for t in places]
    return np.frombuffer(b"".join(texts), np.uint8), np.cumsum([0, *map(len, texts)]), tail, max(map(len, texts))


@lru_cache(maxsize=16)
def _models(models: tuple[tuple[ModelRef, str] | None, ...]) -> tuple[Bytes, Int64s, int]:
    """The texts of models and their digests, one after the other, the edges between them, and the length of the longest."""
    texts = [_NO_MODEL if model is None else _model(*model) for model in models]
    return np.frombuffer(b"".join(texts), np.uint8), np.cumsum([0, *map(len, texts)]), max(map(len, texts))


def _model(ref: ModelRef, digest: str) -> bytes:
    return b"".join(encode_text_or_null(text) for text in (ref.name, ref.version, digest, ref.route)) + encode_text(FINGERPRINT)


@lru_cache(maxsize=8)
def _versions(policy_digest: str, code_version: str) -> bytes:
    return encode_text(policy_digest) + encode_text(code_version)
