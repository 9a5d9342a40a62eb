"""Writes docs/policy.schema.json from the structs that a policy is read with: python -m deploy.pages.policy_schema (make docs)."""

from __future__ import annotations

import json
from pathlib import Path

from gateway.policy.schema import schema

SCHEMA_PATH = Path(__file__).resolve().parents[2] / "docs/policy.schema.json"


def page() -> str:
    return json.dumps(schema(), indent=2) + "\n"


if __name__ == "__main__":
    SCHEMA_PATH.write_text(page())
    print(f"{SCHEMA_PATH} written")
