"""A decision: what the caller is answered, and the receipt that lets anyone reproduce it."""

from __future__ import annotations

from enum import StrEnum

import msgspec

from gateway.contracts.transaction import Transaction

RISK_SCORE_MAX = 1000


class Outcome(StrEnum):
    """What to do with the payment, from the mildest to the most severe. When several rules apply, the most severe wins."""

    APPROVE = "approve"
    CHALLENGE = "challenge"
    REVIEW = "review"
    DECLINE = "decline"


SEVERITY: dict[Outcome, int] = {outcome: i for i, outcome in enumerate(Outcome)}


class Route(StrEnum):
    """Which model of the registry scored: names of MLflow aliases."""

    CHAMPION = "champion"
    CHALLENGER = "challenger"


class RoutedBy(StrEnum):
    """Why a payment went to the model that scored it."""

    # There is no challenger.
    ONLY = "only"
    # By the stable hash of the card (contracts.routing).
    SHARE = "share"
    # The guard has taken the challenger out: all go to the champion.
    GUARD = "guard"


class Door(StrEnum):
    """How a transaction came in."""

    HTTP = "http"
    KAFKA = "kafka"


class ReasonText(msgspec.Struct, frozen=True, gc=False):
    """`text` is for analysts, `cardholder_text` what a cardholder may be told."""

    code: str
    text: str
    # Absent from answers that an earlier version keeps for retries.
    cardholder_text: str = ""


class ModelRef(msgspec.Struct, frozen=True, gc=False):
    name: str
    version: str
    route: str


class Answer(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """The reply of POST /score. `probability` and `model` are null when no model could score."""

    transaction_id: str
    decision: Outcome
    risk_score: int
    probability: float | None
    reasons: list[ReasonText]
    rule_hits: list[str]
    model: ModelRef | None
    degraded: list[str]
    latency_ms: float


class Receipt(msgspec.Struct, frozen=True, kw_only=True):
    """One record of the decisions topic; `schemas/decision.avsc` has the same fields in the same order.

    `features` are the float32 values that the model saw, in the order that `feature_fingerprint` names. `observed_seq` is the
    transaction's place in each entity's order of observation (-1: not observed), by contracts.features.ENTITIES. `label_changes` is how
    many label changes had been applied to each entity that counts labels, by contracts.features.LABELLED (-1: not observed).
    `tiles_age_ms` is the age of the tiles the features were read from (null: unknown). `policy_decision` is what the policy came to,
    which exploration may have answered otherwise, and `propensity` the probability under which such a payment is given `decision`: 1.0
    where exploration can't touch it. Receipts written before these fields were there read "" and 1.0: nothing was explored then.

    `list_hits` are the ids of the policy's lists that an entity of the transaction stood on, `shadow_hits` those of the rules in shadow
    that would have fired, `rule_errors` those of the rules that could not be evaluated. `lists_version` says how many changes of lists had
    been applied (contracts.lists), -1 where no lists were known, as in receipts written before these fields were there.
    """

    transaction_id: str
    transaction: Transaction
    door: Door
    source_partition: int | None
    source_offset: int | None
    received_at_ms: int
    decided_at_ms: int
    decision: Outcome
    risk_score: int
    probability: float | None
    reasons: list[str]
    rule_hits: list[str]
    degraded: list[str]
    model_name: str | None
    model_version: str | None
    model_digest: str | None
    route: str | None
    feature_fingerprint: str
    features: list[float]
    observed_seq: list[int]
    label_changes: list[int]
    tiles_age_ms: int | None
    policy_digest: str
    code_version: str
    admit_us: int
    features_us: int
    model_us: int
    policy_us: int
    routed_by: str
    policy_decision: str
    propensity: float
    list_hits: list[str] = []
    shadow_hits: list[str] = []
    rule_errors: list[str] = []
    lists_version: int = -1


def risk_score(probability: float) -> int:
    """The documented monotone map from probability to 0..1000: a thousand times the probability, rounded half up."""
    return min(RISK_SCORE_MAX, int(probability * RISK_SCORE_MAX + 0.5))
