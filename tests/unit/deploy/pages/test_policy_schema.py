"""The published JSON Schema is current, takes the policy that ships, and says no to what the gateway says no to by it."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import yaml

from deploy.pages.policy_schema import SCHEMA_PATH, page
from gateway.errors import PolicyRefusedError
from gateway.policy import Policy
from gateway.policy.folder import SHIPPED, read_folder
from tests.unit.gateway.policy.factories import make_list, make_rule, policy_files

TYPES: dict[str, Any] = {"object": dict, "array": list, "string": str, "integer": int, "boolean": bool, "null": type(None)}
UNDERSTOOD = {
    *("$schema", "$defs", "$ref", "title", "description", "default", "anyOf", "type", "enum", "properties", "required"),
    *("additionalProperties", "items", "minItems", "maxItems", "pattern", "minLength", "maxLength", "minimum", "maximum"),
}


def valid(value: Any, schema: dict[str, Any], root: dict[str, Any]) -> bool:
    """What of JSON Schema (2020-12) the page uses; asserts that it uses no more."""
    assert set(schema) <= UNDERSTOOD, set(schema) - UNDERSTOOD
    if "$ref" in schema and not valid(value, root["$defs"][schema["$ref"].removeprefix("#/$defs/")], root):
        return False
    if "anyOf" in schema and not any(valid(value, one, root) for one in schema["anyOf"]):
        return False
    if "enum" in schema and value not in schema["enum"]:
        return False
    if "type" in schema:
        if not isinstance(value, TYPES[schema["type"]]) or (isinstance(value, bool) and schema["type"] == "integer"):
            return False
    if isinstance(value, dict) and "properties" in schema:
        known = schema["properties"]
        if not set(schema.get("required", ())) <= set(value) <= set(known):
            return False
        return all(valid(v, known[k], root) for k, v in value.items())
    if isinstance(value, list):
        right = schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", len(value))
        return right and all(valid(item, schema.get("items", {}), root) for item in value)
    if isinstance(value, str):
        right = schema.get("minLength", 0) <= len(value) <= schema.get("maxLength", len(value))
        return right and ("pattern" not in schema or re.search(schema["pattern"], value) is not None)
    if isinstance(value, int):
        return bool(schema.get("minimum", value) <= value <= schema.get("maximum", value))
    return True


@pytest.fixture
def schema() -> dict[str, Any]:
    held: dict[str, Any] = json.loads(SCHEMA_PATH.read_text())
    return held


def test_the_schema_that_is_published_is_that_of_the_structs() -> None:
    assert SCHEMA_PATH.read_text() == page(), "run make docs"


def test_the_policy_that_ships_is_valid_and_says_where_its_schema_is(schema: dict[str, Any]) -> None:
    files = read_folder(SHIPPED)
    assert len(files) > 1
    for name, data in files.items():
        assert valid(yaml.safe_load(data), schema, schema), name
        said = re.match(rb"# yaml-language-server: \$schema=(\S+)", data)
        assert said is not None, name
        assert (SHIPPED / name).parent.joinpath(said[1].decode()).resolve() == SCHEMA_PATH


@pytest.mark.parametrize(
    "change",
    [
        lambda p, r: p.update(version=1),
        lambda p, r: p.update(more=1),
        lambda p, r: p.pop("name"),
        lambda p, r: p.update(bands=[]),
        lambda p, r: p["bands"][0].update(decline=1002),
        lambda p, r: p["bands"][0].update(challenge="500"),
        lambda p, r: p["bands"][0].update(challenge=True),
        lambda p, r: p["bands"][0].update(without_model="open"),
        lambda p, r: p["lists"][0].update(kind="grey"),
        lambda p, r: p["lists"][0].update(id="a b"),
        lambda p, r: p["lists"][0].update(id="a\n"),
        lambda p, r: p["lists"][0].update(field="card"),
        lambda p, r: p["lists"][0].update(owner=""),
        lambda p, r: p["alerts"][0].update(outcomes=["no"]),
        lambda p, r: p["alerts"][0].update(webhooks=["w"] * 21),
        lambda p, r: p["alerts"][0].update(amount_minor_least=-1),
        lambda p, r: r["rules"][0].update(state="on"),
        lambda p, r: r["rules"][0].update(reason="NOPE"),
        lambda p, r: r["rules"][0].update(hard="yes"),
        lambda p, r: r["rules"][0].update(when=["score > 1"]),
        lambda p, r: r["rules"][0].update(when=""),
        lambda p, r: r["rules"][0].pop("owner"),
    ],
)
def test_what_the_schema_refuses_the_gateway_refuses_too(schema: dict[str, Any], change: Any) -> None:
    alert = {"name": "a", "outcomes": ["decline"]}
    files = policy_files(make_rule("score > 1"), lists=(make_list("l", "block"),), alerts=(alert,))
    policy, rules = yaml.safe_load(files["policy.yaml"]), yaml.safe_load(files["rules/all.yaml"])
    assert valid(policy, schema, schema) and valid(rules, schema, schema)
    Policy(files, "good")
    change(policy, rules)
    assert not (valid(policy, schema, schema) and valid(rules, schema, schema))
    with pytest.raises(PolicyRefusedError):
        Policy({"policy.yaml": yaml.safe_dump(policy).encode(), "rules/all.yaml": yaml.safe_dump(rules).encode()}, "bad")
