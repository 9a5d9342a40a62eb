"""A decision made once more from its receipt: the same payment and features, the same model, policy and lists. Pure but for the model.

What must come out is what the receipt says: probability and score to the bit, outcome, hits and reasons. Called by `fraudgate
replay-decision` for many at a time and by `fraudgate why` for one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from gateway.contracts.decision import RISK_SCORE_MAX, Outcome
from gateway.contracts.lists import ListBook
from gateway.contracts.reasons import Degraded, Reason
from gateway.contracts.transaction import Transaction
from gateway.explanations.explain import with_model_codes
from gateway.kafka.avro import encode_transaction
from gateway.models.model import Model
from gateway.policy import Columns, Decisions, Policy
from gateway.scoring.requests import read_requests

Floats = npt.NDArray[np.float64]
# Rungs of the ladder on which there were no features of the past.
_WITHOUT_FEATURES = frozenset({Degraded.REQUEST_ONLY.value, Degraded.STATIC_POLICY.value})


@dataclass(frozen=True)
class Again:
    """What came out for one receipt; `floors` are the scores from which challenge, review and decline begin."""

    probability: float | None
    risk_score: int
    policy_decision: Outcome
    reasons: list[str]
    rule_hits: list[str]
    list_hits: list[str]
    shadow_hits: list[str]
    rule_errors: list[str]
    floors: tuple[float, float, float]


def rung(receipt: dict[str, Any]) -> tuple[bool, bool]:
    """(a model scored, there were features), which decisions that are made together share."""
    return receipt["probability"] is not None, not _WITHOUT_FEATURES & set(receipt["degraded"])


def decide_again(receipts: Sequence[dict[str, Any]], model: Model | None, policy: Policy, lists: ListBook) -> list[Again]:
    """For each of `receipts`, which share model, policy, version of the lists and `rung`.

    `model` is None where none scored. The reasons of a score are worked out where the receipt has them: the gateway leaves
    MODEL_SCORE_HIGH where there was no time. A probability that doesn't come out to the bit in the company of others is computed
    alone: the gateway's batch had another size.
    """
    scored, has_features = rung(receipts[0])
    transactions = [msgspec.convert(r["transaction"], Transaction) for r in receipts]
    matrix = np.array([r["features"] for r in receipts], np.float32)
    assert (model is not None) == scored
    probability = None if model is None else _probability(receipts, model, matrix)
    columns = Columns(
        requests=read_requests([encode_transaction(t) for t in transactions], np.full(len(receipts), -1, np.int64)),
        rows=np.arange(len(receipts)),
        matrix=matrix,
        score=np.full(len(receipts), np.nan) if probability is None else np.floor(probability * RISK_SCORE_MAX + 0.5),
        received_at_ms=np.array([r["received_at_ms"] for r in receipts], np.int64),
    )
    decisions = policy.decide(columns, has_features, lists)
    score = decisions.stand_in() if probability is None else np.minimum(columns.score, RISK_SCORE_MAX).astype(np.int64)
    reasons = _reasons(receipts, decisions, model, matrix)
    return [
        Again(
            probability=None if probability is None else float(probability[i]),
            risk_score=int(score[i]),
            policy_decision=decisions.outcome[i],
            reasons=reasons[i],
            rule_hits=list(decisions.rule_hits[i]),
            list_hits=list(decisions.list_hits[i]),
            shadow_hits=list(decisions.shadow_hits[i]),
            rule_errors=list(decisions.rule_errors[i]),
            floors=(float(decisions.floors[i, 0]), float(decisions.floors[i, 1]), float(decisions.floors[i, 2])),
        )
        for i in range(len(receipts))
    ]


def _probability(receipts: Sequence[dict[str, Any]], model: Model, matrix: npt.NDArray[np.float32]) -> Floats:
    found = model.probability(matrix)
    said = np.array([receipt["probability"] for receipt in receipts])
    for row in np.flatnonzero(found != said).tolist():
        found[row] = model.probability(matrix[row : row + 1])[0]
    return found


def _reasons(
    receipts: Sequence[dict[str, Any]], decisions: Decisions, model: Model | None, matrix: npt.NDArray[np.float32]
) -> list[list[str]]:
    """The policy's, with the model's own in the score's place where the receipt has them, as gateway.explanations does."""
    # What was let through to explore has none of the policy's.
    by_policy: list[Sequence[Reason]] = [
        [] if receipt["decision"] == Outcome.APPROVE.value and outcome is not Outcome.APPROVE else reasons
        for receipt, outcome, reasons in zip(receipts, decisions.outcome, decisions.reasons, strict=True)
    ]
    found = [[reason.value for reason in reasons] for reasons in by_policy]
    rows = [i for i, receipt in enumerate(receipts) if receipt["reasons"] != found[i]]
    if rows and model is not None and model.explainer is not None:
        codes = model.explainer.codes(np.ascontiguousarray(matrix[rows]))
        for row, of_row in zip(rows, codes, strict=True):
            found[row] = [reason.value for reason in with_model_codes(by_policy[row], of_row)]
    return found


def differences(receipt: dict[str, Any], again: Again) -> list[str]:
    """A line for each field of the receipt that came out otherwise; floats to the bit."""
    said_by_policy = receipt["policy_decision"] or receipt["decision"]
    pairs: list[tuple[str, Any, Any]] = [
        ("probability", receipt["probability"], again.probability),
        ("risk_score", receipt["risk_score"], again.risk_score),
        ("policy_decision", said_by_policy, again.policy_decision.value),
        ("reasons", receipt["reasons"], again.reasons),
        ("rule_hits", receipt["rule_hits"], again.rule_hits),
        ("list_hits", receipt["list_hits"], again.list_hits),
        ("shadow_hits", receipt["shadow_hits"], again.shadow_hits),
        ("rule_errors", receipt["rule_errors"], again.rule_errors),
    ]
    return [f"{name}: the receipt says {ours}, now it is {theirs}" for name, ours, theirs in pairs if not _equal(ours, theirs)]


def _equal(a: Any, b: Any) -> bool:
    return a == b or (isinstance(a, float) and isinstance(b, float) and math.isnan(a) and math.isnan(b))
