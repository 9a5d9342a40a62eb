"""What an analyst sees of a decision: its receipt with the features by name. Written down when the review is queued.

So it can be read for as long as the review is kept, whatever features and schemas come later.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from gateway.contracts.features import FEATURES, FINGERPRINT
from gateway.contracts.reasons import REASON_TEXT, Reason

_TEXTS: dict[str, str] = {reason.value: text for reason, text in REASON_TEXT.items()}
assert set(_TEXTS) == {reason.value for reason in Reason}


def story_of(receipt: Mapping[str, Any]) -> dict[str, Any]:
    """A receipt's fields as JSON for people.

    `features`: name, value (null: unknown) and age in milliseconds: 0 for what the payment itself says, the tiles' age for the rest (null:
    unknown). The features of another fingerprint than this code's have no names here.
    """
    known = receipt["feature_fingerprint"] == FINGERPRINT and len(receipt["features"]) == len(FEATURES)
    return {
        "transaction_id": receipt["transaction_id"],
        "transaction": dict(receipt["transaction"]),
        "decision": receipt["decision"],
        "policy_decision": receipt["policy_decision"],
        "risk_score": receipt["risk_score"],
        "probability": receipt["probability"],
        "reasons": [{"code": code, "text": _TEXTS.get(code, "")} for code in receipt["reasons"]],
        "rule_hits": list(receipt["rule_hits"]),
        "list_hits": list(receipt.get("list_hits", ())),
        "shadow_hits": list(receipt.get("shadow_hits", ())),
        "rule_errors": list(receipt.get("rule_errors", ())),
        "degraded": list(receipt["degraded"]),
        "features": _features(receipt) if known else None,
        "model": {"name": receipt["model_name"], "version": receipt["model_version"], "route": receipt["route"]},
        "digests": {
            "model": receipt["model_digest"],
            "policy": receipt["policy_digest"],
            "features": receipt["feature_fingerprint"],
            "lists_version": receipt.get("lists_version", -1),
        },
        "code_version": receipt["code_version"],
        "door": receipt["door"],
        "received_at_ms": receipt["received_at_ms"],
        "decided_at_ms": receipt["decided_at_ms"],
        "timings_us": {step: receipt[f"{step}_us"] for step in ("admit", "features", "model", "policy")},
    }


def _features(receipt: Mapping[str, Any]) -> list[dict[str, Any]]:
    age_ms = receipt["tiles_age_ms"]
    return [
        {
            "name": feature.name,
            "value": None if math.isnan(value) else float(f"{value:.9g}"),
            "age_ms": 0 if feature.entity is None else age_ms,
        }
        for feature, value in zip(FEATURES, receipt["features"], strict=True)
    ]
