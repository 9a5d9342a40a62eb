"""POST /score in the OpenAPI document: FastAPI doesn't route it, so it is described from the same types that decode it."""

from __future__ import annotations

from typing import Any

import msgspec

from gateway.contracts.decision import Answer
from gateway.contracts.transaction import (
    AMOUNT_MINOR_MAX,
    AMOUNT_MINOR_MIN,
    BIN_PATTERN,
    COUNTRY_PATTERN,
    ID_FIELDS,
    ID_PATTERN,
    MCC_PATTERN,
    Transaction,
)
from gateway.errors import HTTP_ERRORS, REFUSAL_STATUS, Problem
from gateway.http.door import SCORE_PATH


def describe_score(schema: dict[str, Any]) -> None:
    """Add POST /score, which FastAPI doesn't route, to the OpenAPI document."""
    refs, components = msgspec.json.schema_components((Transaction, Answer, Problem), ref_template="#/components/schemas/{name}")
    _add_bounds(components["Transaction"]["properties"])
    schema.setdefault("components", {}).setdefault("schemas", {}).update(components)
    # Asked for when the setting api_keys_path is set.
    schema["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer", "description": "fraudgate keys create"}}
    transaction, answer, problem = refs
    by_status: dict[int, list[str]] = {}
    for refusal, status in REFUSAL_STATUS.items():
        by_status.setdefault(status, []).append(refusal.value)
    for error in HTTP_ERRORS:
        if error.http_status != 405:
            by_status.setdefault(error.http_status, []).append(error.reason)
    responses: dict[str, Any] = {
        str(status): {
            "description": f"reason: {', '.join(reasons)}",
            "content": {"application/problem+json": {"schema": problem}},
        }
        for status, reasons in sorted(by_status.items())
    }
    responses["200"] = {"description": "the decision", "content": {"application/json": {"schema": answer}}}
    schema["paths"][SCORE_PATH] = {
        "post": {
            "summary": "Decide one transaction",
            "operationId": "score",
            "security": [{"key": []}, {}],
            "requestBody": {"required": True, "content": {"application/json": {"schema": transaction}}},
            "responses": responses,
        }
    }


def _add_bounds(properties: dict[str, Any]) -> None:
    """The bounds that contracts.transaction.check applies, for readers of the OpenAPI document."""
    patterns = {**dict.fromkeys(ID_FIELDS, ID_PATTERN), "mcc": MCC_PATTERN, "country": COUNTRY_PATTERN}
    patterns |= {"card_country": COUNTRY_PATTERN, "card_bin": BIN_PATTERN, "currency": r"^[A-Z]{3}$"}
    for name, pattern in patterns.items():
        for variant in properties[name].get("anyOf", [properties[name]]):
            if variant.get("type") == "string":
                variant["pattern"] = pattern
    properties["amount_minor"] |= {"minimum": AMOUNT_MINOR_MIN, "maximum": AMOUNT_MINOR_MAX}
    for name, limit in (("latitude", 90), ("longitude", 180)):
        for variant in properties[name]["anyOf"]:
            if variant.get("type") == "number":
                variant.update(minimum=-limit, maximum=limit)
