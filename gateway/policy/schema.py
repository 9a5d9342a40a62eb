"""The JSON Schema of a policy's files, published as docs/policy.schema.json (`make docs`). Editors complete and check YAML by it.

Made from the structs that the gateway reads them with (gateway/policy/document.py). What a schema can't say (that scores rise, that an
expression is right) `fraudgate policy check` tells.
"""

from __future__ import annotations

from typing import Any

import msgspec

from gateway.policy.document import PolicyFile, RulesFile

DIALECT = "https://json-schema.org/draft/2020-12/schema"


def schema() -> dict[str, Any]:
    """One schema for both kinds of file: policy.yaml and rules/*.yaml."""
    references, definitions = msgspec.json.schema_components([PolicyFile, RulesFile], ref_template="#/$defs/{name}")
    return {
        "$schema": DIALECT,
        "title": "A file of a Fraudgate policy: policy.yaml or rules/*.yaml",
        "anyOf": list(references),
        "$defs": definitions,
    }
