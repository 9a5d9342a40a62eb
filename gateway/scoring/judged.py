"""Transactions of a batch that nothing settled: what model, policy and exploration made of them, and what is written of that.

Called by the scorer, once a batch; waits for nothing. Arrays and lists are by row, in the order of the jobs.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from gateway.contracts.decision import RISK_SCORE_MAX, Answer, Door, Outcome, RoutedBy
from gateway.contracts.features import ENTITIES, LABELLED
from gateway.contracts.reasons import Degraded, Reason
from gateway.models.explore import Explorer
from gateway.models.model import Live, Model
from gateway.policy import OUTCOMES, Columns, Decisions
from gateway.policy.slot import Steering
from gateway.redis.store import Observation
from gateway.scoring.answers import AnswerRecords, encode_answers, gather, make_answers
from gateway.scoring.job import Job
from gateway.scoring.receipts import Decided, Tail, encode_receipts
from gateway.scoring.requests import Requests
from gateway.tracing.trace import Steps

Int64s = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Matrix = npt.NDArray[np.float32]

# What holds for every row where nothing is shared and nothing explored, for as many rows as a batch has.
_READY_ROWS = 512
_FIRST, _CERTAIN = np.zeros(_READY_ROWS, np.int64), np.ones(_READY_ROWS)


def first_of_all(rows: int) -> Int64s:
    """The place of the model where there is one, (rows,). Not to be written to."""
    return _FIRST[:rows] if rows <= _READY_ROWS else np.zeros(rows, np.int64)


def certain(rows: int) -> Floats:
    """The propensity where nothing is explored, (rows,). Not to be written to."""
    return _CERTAIN[:rows] if rows <= _READY_ROWS else np.ones(rows)


@dataclass(slots=True)
class Timing:
    """time.monotonic() at the end of each step of a batch."""

    started_s: float
    observed_s: float
    # Whether Redis was asked in the first.
    asked: bool
    modelled_s: float = 0.0
    decided_s: float = 0.0
    explained_s: float = 0.0

    @property
    def steps_us(self) -> list[int]:
        """Microseconds of features, model and policy."""
        ends = (self.started_s, self.observed_s, self.modelled_s, self.decided_s)
        return [round((b - a) * 1e6) for a, b in zip(ends, ends[1:], strict=False)]


@dataclass(slots=True)
class Scored:
    """`probability`, None where no model scored; the place in `models` of the one that did, as `model` (rows,).

    `by_challenger` says the same as a mask where cards are shared with a challenger, else None.
    """

    probability: Floats | None
    models: list[Model | None]
    model: Int64s
    by_challenger: npt.NDArray[np.bool_] | None = None


@dataclass(slots=True)
class Judged:
    """What `jobs`, which are `rows` of `requests`, came to. `matrix` (rows, features) is what the model saw.

    `decisions` are the policy's; `severity` (rows,), `outcomes` and `reasons` what is answered, which exploration may have made milder,
    with `propensity` (rows,). `reasons` may still get the model's. `degraded` are the rungs of the ladder.
    """

    jobs: list[Job]
    requests: Requests
    rows: Int64s
    observation: Observation | None
    matrix: Matrix
    live: Live
    steering: Steering
    scored: Scored
    columns: Columns
    decisions: Decisions
    severity: Int64s
    outcomes: list[Outcome]
    reasons: list[list[Reason]]
    propensity: Floats
    degraded: list[list[str]]

    @property
    def received_s(self) -> Floats:
        return np.fromiter((job.received_s for job in self.jobs), np.float64, len(self.jobs))

    def steps(self, timing: Timing) -> Steps:
        """What a trace says of the batch."""
        return Steps(
            timing.started_s,
            timing.observed_s,
            timing.modelled_s,
            timing.decided_s,
            timing.explained_s,
            asked=timing.asked,
            observed=self.observation is not None,
            rows=len(self.jobs),
            policy_digest=self.steering.policy.digest,
            lists_version=self.steering.lists.version,
        )


@dataclass(slots=True)
class Written:
    """Of each job its receipt, its idempotency record and the answer, None where nobody reads it."""

    receipts: list[bytes]
    stored: AnswerRecords
    answers: list[Answer | None]


def judge(
    jobs: list[Job],
    requests: Requests,
    rows: Int64s,
    observation: Observation | None,
    matrix: Matrix,
    live: Live,
    steering: Steering,
    scored: Scored,
    explorer: Explorer | None,
) -> Judged:
    """One policy and one state of the lists for the whole batch, and for all that is said of it."""
    probability = scored.probability
    columns = Columns(
        requests=requests,
        rows=rows,
        matrix=matrix,
        score=np.full(len(jobs), np.nan) if probability is None else np.floor(probability * 1000 + 0.5),
        received_at_ms=np.fromiter((job.received_ms for job in jobs), np.int64, len(jobs)),
    )
    decisions = steering.policy.decide(columns, has_features=observation is not None, lists=steering.lists)
    severity, outcomes, reasons = decisions.severity, decisions.outcome, decisions.reasons
    propensity = certain(len(jobs))
    if live.routing.explore_share > 0 and probability is not None and explorer is not None:
        severity, propensity = explorer.explore(live.routing, requests, rows, decisions)
        if severity is not decisions.severity:
            outcomes = [OUTCOMES[s] for s in severity.tolist()]
            # An approved payment has no reasons, whatever the policy had.
            reasons = [[] if s == 0 else found for s, found in zip(severity.tolist(), reasons, strict=True)]
    return Judged(
        jobs=jobs,
        requests=requests,
        rows=rows,
        observation=observation,
        matrix=matrix,
        live=live,
        steering=steering,
        scored=scored,
        columns=columns,
        decisions=decisions,
        severity=severity,
        outcomes=outcomes,
        reasons=reasons,
        propensity=propensity,
        degraded=degraded(rows, observation, scored=probability is not None),
    )


def degraded(rows: Int64s, observation: Observation | None, *, scored: bool) -> list[list[str]]:
    """By row, the rungs of the ladder that the decision stands on."""
    if observation is None:
        kind = Degraded.REQUEST_ONLY if scored else Degraded.STATIC_POLICY
        return [[kind.value]] * len(rows)
    without_model = [] if scored else [Degraded.RULES_ONLY.value]
    stale = [Degraded.STALE_FEATURES.value, *without_model]
    return [stale if is_stale else without_model for is_stale in observation.stale[rows].tolist()]


def write(
    judged: Judged, timing: Timing, routed_by: RoutedBy, *, decided_at_ms: int, code_version: str, claim_ttl_ms: int
) -> Written:
    """Receipts, records and answers say the same. `decided_at_ms` is the wall clock."""
    jobs, rows, observation, scored = judged.jobs, judged.rows, judged.observation, judged.scored
    # contracts.decision.risk_score, for a batch.
    score = (
        judged.decisions.stand_in()
        if scored.probability is None
        else np.minimum(judged.columns.score, RISK_SCORE_MAX).astype(np.int64)
    )
    received_s = judged.received_s
    given = np.full(len(jobs), np.nan) if scored.probability is None else scored.probability
    notes = gather(
        [
            (tuple([r.value for r in reasons]), tuple(hits), tuple(kinds))
            for reasons, hits, kinds in zip(judged.reasons, judged.decisions.rule_hits, judged.degraded, strict=True)
        ]
    )
    receipts = encode_receipts(
        Decided(
            requests=judged.requests,
            rows=rows,
            jobs=jobs,
            decided_at_ms=decided_at_ms,
            severity=judged.severity,
            score=score,
            probability=given,
            notes=notes,
            models=scored.models,
            model=scored.model,
            routed_by=routed_by,
            policy_severity=judged.decisions.severity,
            propensity=judged.propensity,
            matrix=judged.matrix,
            seq=np.full((len(jobs), len(ENTITIES)), -1) if observation is None else observation.seq[rows],
            label_changes=np.full((len(jobs), len(LABELLED)), -1) if observation is None else observation.label_changes[rows],
            tiles_age_ms=None if observation is None else observation.tiles_age_ms,
            policy_digest=judged.steering.policy.digest,
            code_version=code_version,
            admit_us=np.rint((timing.started_s - received_s) * 1e6).astype(np.int64),
            steps_us=timing.steps_us,
            tails=_tails(judged.decisions),
            lists_version=judged.steering.lists.version,
        )
    )
    refs = [None if m is None else m.ref for m in scored.models]
    latency_ms = np.round((timing.explained_s - received_s) * 1000, 3)
    stored = encode_answers(
        judged.requests,
        rows,
        b"".join([job.claim for job in jobs]),
        judged.severity,
        score,
        given,
        notes,
        refs,
        scored.model,
        latency_ms,
        claim_ttl_ms,
    )
    answers: list[Answer | None] = [None] * len(jobs)
    # Nobody at the Kafka door reads them.
    if jobs[0].door is Door.HTTP:
        ids = [job.transaction_id for job in jobs]
        answers = make_answers(ids, judged.outcomes, score, scored.probability, notes, refs, scored.model, latency_ms)
    return Written(receipts, stored, answers)


def _tails(decisions: Decisions) -> list[Tail] | None:
    """What the receipts alone say of lists, shadow rules and errors, by row; None where nobody has any of it."""
    if not (any(decisions.list_hits) or any(decisions.shadow_hits) or any(decisions.rule_errors)):
        return None
    return [
        (tuple(lists), tuple(shadow), tuple(errors))
        for lists, shadow, errors in zip(decisions.list_hits, decisions.shadow_hits, decisions.rule_errors, strict=True)
    ]
