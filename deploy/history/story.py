"""What is known of one decision, put together for a person: the receipt, how its outcome came about, why, and what became known since."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds

from deploy.explain import Explanation, explanation_of
from deploy.history.again import Again, decide_again, differences
from deploy.history.find import Found
from deploy.history.lake import NoTableError, instant_of, open_table, rows_of
from deploy.history.models import NoModelError, model_by_digest
from deploy.history.policies import Books, NoPolicyError, Policies
from deploy.receipts import CannotExplainError, Loaded, Logged, explainer_of
from gateway.contracts import tables
from gateway.contracts.decision import Outcome
from gateway.contracts.features import FEATURE_NAMES, FINGERPRINT
from gateway.contracts.reasons import REASON_TEXT
from gateway.contracts.settings import Settings
from gateway.contracts.transaction import Transaction
from gateway.policy import Policy

LABEL_COLUMNS = ["is_fraud", "source", "state", "reported_at_ms", "kafka_timestamp"]
TIMINGS = ("admit_us", "features_us", "model_us", "policy_us")
RUNGS = {
    "stale_features": "Redis' tiles were older than they may be",
    "request_only": "Redis didn't answer in time: the model saw only the payment itself",
    "rules_only": "no model scored in time: rules alone decided",
    "static_policy": "neither features nor a model: the amount's band decided",
}


class Rule(msgspec.Struct, frozen=True, kw_only=True):
    """A rule or list that said something. `text` is the policy's, empty where the policy isn't known any more."""

    id: str
    kind: str
    outcome: str
    text: str


class Label(msgspec.Struct, frozen=True, kw_only=True):
    """What became known of the payment."""

    is_fraud: bool
    source: str
    state: str
    reported_at_ms: int


class Story(msgspec.Struct, frozen=True, kw_only=True):
    """The answer of `fraudgate why`. `receipt` is without the feature values, which stand in `features`, unknown as null.

    `thresholds` are the scores from which the band of the payment's amount challenges, reviews and declines; null where its policy isn't
    known. `replay` says whether the decision comes out again, `explanation` is null where `not_explained` says why.
    """

    transaction_id: str
    as_of: str | None
    erased_at_ms: int | None
    receipt: dict[str, Any]
    thresholds: tuple[float, float, float] | None
    said: list[Rule]
    reasons: list[tuple[str, str]]
    features: dict[str, float | None]
    labels: list[Label]
    replay: str
    explanation: Explanation | None
    not_explained: str | None


def story_of(settings: Settings, found: Found, as_of: str | None) -> Story:
    """All of it, as far as policy, model and lists can be had."""
    receipt = found.receipt
    labels = _labels(settings, found.transaction_id, as_of)
    if receipt is None:
        kept = {name: value for name, value in found.row.items() if not isinstance(value, bytes) and value is not None}
        kept.pop("kafka_timestamp", None)
        return Story(
            transaction_id=found.transaction_id,
            as_of=as_of,
            erased_at_ms=found.erased_at_ms,
            receipt=kept,
            thresholds=None,
            said=[],
            reasons=_reasons(kept["reasons"]),
            features={},
            labels=labels,
            replay="the customer's data were erased: it can't be decided again",
            explanation=None,
            not_explained="the customer's data were erased",
        )
    policy, again, replay, explanation, why_not = _looked_into(settings, receipt)
    values = {} if receipt["feature_fingerprint"] != FINGERPRINT else dict(zip(FEATURE_NAMES, receipt["features"], strict=True))
    return Story(
        transaction_id=found.transaction_id,
        as_of=as_of,
        erased_at_ms=None,
        receipt={n: v for n, v in receipt.items() if n != "features" and not isinstance(v, bytes) and n != "kafka_timestamp"},
        thresholds=None if again is None else again.floors,
        said=_said(receipt, policy),
        reasons=_reasons(receipt["reasons"]),
        features={name: None if value is None or np.isnan(value) else float(value) for name, value in values.items()},
        labels=labels,
        replay=replay,
        explanation=explanation,
        not_explained=why_not,
    )


def _looked_into(
    settings: Settings, receipt: dict[str, Any]
) -> tuple[Policy | None, Again | None, str, Explanation | None, str | None]:
    """(its policy, the decision made again, what came of that, the model's explanation, or why there is none)."""
    policy = None
    if receipt["feature_fingerprint"] != FINGERPRINT:
        why_not = f"it is of features {receipt['feature_fingerprint']}, this code knows {FINGERPRINT}"
        return None, None, why_not, None, why_not
    if receipt["transaction"] is None:
        return None, None, "its payment isn't known", None, "its payment isn't known"
    try:
        policy = Policies(settings).by_digest(receipt["policy_digest"])
        lists = Books(settings).as_of(receipt.get("lists_version", -1))
    except NoPolicyError as exc:
        return policy, None, str(exc), None, str(exc)
    if receipt["model_digest"] is None:
        [again] = decide_again([receipt], None, policy, lists)
        return policy, again, _compared(receipt, again), None, "no model scored it"
    try:
        with model_by_digest(settings, receipt["model_name"], receipt["model_version"], receipt["model_digest"]) as kept:
            [again] = decide_again([receipt], kept.model, policy, lists)
            replay = _compared(receipt, again)
            loaded = Loaded(kept.model, explainer_of(kept))
            explanation = _with_lists(explanation_of(_logged(receipt), loaded, policy), receipt)
    except NoModelError as exc:
        return policy, None, str(exc), None, str(exc)
    except CannotExplainError as exc:
        return policy, again, replay, None, str(exc)
    return policy, again, replay, explanation, None


def _with_lists(explanation: Explanation, receipt: dict[str, Any]) -> Explanation:
    """The counterfactual knows no lists: what one of them asks for no change of the payment changes."""
    hits = receipt.get("list_hits") or []
    if not hits or receipt["decision"] == Outcome.APPROVE.value:
        return explanation
    why_not = f"it stands on {', '.join(hits)}, whatever the payment is like"
    return msgspec.structs.replace(explanation, approved_if=None, why_not=why_not)


def _compared(receipt: dict[str, Any], again: Again) -> str:
    differing = differences(receipt, again)
    return "; ".join(differing) if differing else "decided again from the receipt it comes out identical"


def _logged(receipt: dict[str, Any]) -> Logged:
    named = {name: receipt.get(name) for name in Logged.__dataclass_fields__}
    return Logged(
        **named
        | {
            "policy_decision": receipt["policy_decision"] or None,
            "features": np.array(receipt["features"], np.float32),
            "transaction": msgspec.convert(receipt["transaction"], Transaction),
        }
    )


def _said(receipt: dict[str, Any], policy: Policy | None) -> list[Rule]:
    rules = {} if policy is None else {rule.id: rule for rule in policy.rules}
    lists = {} if policy is None else {declared.id: declared for declared in policy.lists}
    found = []
    for kind, ids in (
        ("rule", receipt["rule_hits"]),
        ("shadow rule", receipt.get("shadow_hits") or []),
        ("failed rule", receipt.get("rule_errors") or []),
    ):
        for rule_id in ids:
            rule = rules.get(rule_id)
            found.append(
                Rule(
                    id=rule_id,
                    kind=kind,
                    outcome="" if rule is None else rule.outcome.value,
                    text="" if rule is None else rule.text,
                )
            )
    for list_id in receipt.get("list_hits") or []:
        declared = lists.get(list_id)
        kind = "list" if declared is None else f"{declared.kind.value} list of {declared.field}"
        found.append(Rule(id=list_id, kind=kind, outcome="", text="" if declared is None else declared.text))
    return found


def _reasons(codes: list[str]) -> list[tuple[str, str]]:
    known = {reason.value: text for reason, text in REASON_TEXT.items()}
    return [(code, known.get(code, "")) for code in codes]


def _labels(settings: Settings, transaction_id: str, as_of: str | None) -> list[Label]:
    """What was known by then, the oldest first."""
    chosen = ds.field("transaction_id") == transaction_id
    try:
        until = as_of_instant(settings, as_of)
        if until is not None:
            chosen &= ds.field("kafka_timestamp") <= until
        rows = rows_of(open_table(settings, tables.LABELS), LABEL_COLUMNS, chosen)
    except NoTableError:
        return []
    rows.sort(key=lambda row: row["reported_at_ms"])
    return [Label(**{name: row[name] for name in Label.__struct_fields__}) for row in rows]


def as_of_instant(settings: Settings, as_of: str | None) -> pa.Scalar | None:
    """The time that --as-of means: itself, or when that version of `decisions` was written."""
    if as_of is None:
        return None
    if as_of.isdigit():
        table = open_table(settings, tables.DECISIONS, as_of)
        [commit] = table.history(1)
        return pa.scalar(commit["timestamp"] * 1000, pa.timestamp("us", "UTC"))
    return pa.scalar(instant_of(as_of), pa.timestamp("us", "UTC"))


def ages_of(receipt: dict[str, Any]) -> list[str]:
    """How old what the features were read from was, in words."""
    if receipt["tiles_age_ms"] is None:
        return []
    return [f"history in Redis {receipt['tiles_age_ms'] / 1000:.1f} s old"]
