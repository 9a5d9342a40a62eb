"""Policies for tests, made of what matters to them; and decisions of payments that differ in little."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import yaml

from gateway.contracts.features import FEATURE_INDEX, FEATURE_NAMES
from gateway.contracts.lists import ListAction, ListBook, ListChange
from gateway.contracts.transaction import Transaction
from gateway.policy import NO_LISTS, Columns, Decisions, Policy
from gateway.scoring.job import requests_of
from tests.unit.gateway.factories import NOW_MS, make_job

BANDS: tuple[dict[str, Any], ...] = (
    {"up_to_minor": 1000, "challenge": 500, "review": 700, "decline": 900, "without_model": "approve"},
    {"up_to_minor": None, "challenge": 300, "review": 400, "decline": 500, "without_model": "review"},
)
# No score asks for anything.
NEVER_BY_SCORE: tuple[dict[str, Any], ...] = (
    {"up_to_minor": None, "challenge": 1001, "review": 1001, "decline": 1001, "without_model": "approve"},
)


def make_rule(when: str, id: str = "r1", **changes: Any) -> dict[str, Any]:
    given = {"id": id, "state": "live", "owner": "risk", "text": "d", "when": when, "outcome": "review", "reason": "CARD_VELOCITY"}
    return given | changes


def make_list(id: str, kind: str, field: str = "card_id", **changes: Any) -> dict[str, Any]:
    return {"id": id, "field": field, "kind": kind, "owner": "risk", "text": "d"} | changes


def policy_files(
    *rules: dict[str, Any],
    bands: tuple[dict[str, Any], ...] = BANDS,
    lists: tuple[dict[str, Any], ...] = (),
    alerts: tuple[dict[str, Any], ...] = (),
    name: str = "test",
) -> dict[str, bytes]:
    policy = {"version": 2, "name": name, "bands": list(bands), "lists": list(lists), "alerts": list(alerts)}
    files = {"policy.yaml": policy, "rules/all.yaml": {"rules": list(rules)}}
    # By way of JSON, so that nothing is the same object twice, which YAML would write as an alias.
    plain = json.loads(json.dumps(files))
    return {name: yaml.safe_dump(data, sort_keys=False, width=10_000).encode() for name, data in plain.items()}


def make_policy(*rules: dict[str, Any], **parts: Any) -> Policy:
    return Policy(policy_files(*rules, **parts), "test")


def make_columns(batch: list[Transaction], score: float = math.nan, at_ms: int = NOW_MS, **features: float) -> Columns:
    """All with the same score and features; features that aren't named are unknown."""
    matrix = np.full((len(batch), len(FEATURE_NAMES)), np.nan, np.float32)
    for name, value in features.items():
        matrix[:, FEATURE_INDEX[name]] = value
    n = len(batch)
    return Columns(requests_of([make_job(t) for t in batch]), np.arange(n), matrix, np.full(n, score), np.full(n, at_ms, np.int64))


def decide(
    policy: Policy,
    *batch: Transaction,
    score: float = math.nan,
    has_features: bool = True,
    lists: ListBook = NO_LISTS,
    at_ms: int = NOW_MS,
    **features: float,
) -> Decisions:
    return policy.decide(make_columns(list(batch), score, at_ms, **features), has_features, lists)


def make_book(lists: tuple[dict[str, Any], ...], standing: dict[str, str | list[str]], ends_ms: int | None = None) -> ListBook:
    """The book of `lists` in which values stand on some of them, by list, until `ends_ms`."""
    fields = {declared["id"]: declared["field"] for declared in lists}
    changes = [
        ListChange(
            list_id=list_id,
            entity_field=fields[list_id],
            action=ListAction.ADD,
            entity_value=value,
            expires_at_ms=ends_ms,
            reason="r",
            who="w",
            at_ms=0,
        )
        for list_id, values in standing.items()
        for value in ([values] if isinstance(values, str) else values)
    ]
    return ListBook().applied(enumerate(changes))
