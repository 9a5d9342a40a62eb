"""The rules of the house. Each rule is a function from text to complaints, which is tested on a bad sample of its own."""

from __future__ import annotations

import ast
import json
import re
import sys
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from deploy.pages import features as features_page
from deploy.pages import metrics as metrics_page
from deploy.pages.settings import PAGE_PATH, page
from gateway.contracts.audit import AuditRecord
from gateway.contracts.decision import Receipt
from gateway.contracts.label import Label
from gateway.contracts.lists import ListChange
from gateway.contracts.metrics import BY_NAME, SERIES
from gateway.contracts.topics import AUDIT, DECISIONS, LABELS, LIST_CHANGES, TOPICS, TRANSACTIONS
from gateway.contracts.transaction import Transaction

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("deploy", "feature_jobs", "gateway", "loadtest", "model_export", "tests")
MODULE_LINES_MAX = 500
# What the image of the gateway must not need.
HEAVY = frozenset({"delta", "mlflow", "pandas", "pyspark", "xgboost"})
CONTRACTS_MAY_IMPORT = frozenset({"msgspec", "numpy"}) | sys.stdlib_module_names
# Spelled apart, so that this file keeps its own rule.
LEFTOVER_WORDS = tuple("".join(parts) for parts in (("FIX", "ME"), ("TO", "DO"), ("XX", "X")))
# In quotation marks the last of them is ISO 4217's code for no currency.
LEFTOVER = re.compile(rf"(?<![\"'])\b(?:{'|'.join(LEFTOVER_WORDS)})\b(?![\"'])")
# Says on a line that its sleep isn't a wait for something to become ready: a fake that is slow on purpose, a pace to keep.
SLEEP_REASON = "# sleeps:"
METRIC = re.compile(r"(?<![A-Za-z0-9_.])fraudgate_[a-z0-9_]+")
NO_METRICS: frozenset[str] = frozenset()
# The changelog tells what an older version exported, and the test of the conventions needs bad names.
TELLS_OLD_NAMES = {Path("CHANGELOG.md"), Path("tests/unit/contracts/test_metrics_catalogue.py")}
TEXT_SUFFIXES = frozenset({"", ".avsc", ".json", ".lua", ".md", ".properties", ".py", ".toml", ".txt", ".xml", ".yaml", ".yml"})


def python_files(*folders: str) -> Iterator[Path]:
    for folder in folders:
        yield from sorted((ROOT / folder).rglob("*.py"))


def text_files() -> Iterator[Path]:
    for path in sorted(ROOT.iterdir()):
        if path.is_file() and path.suffix in TEXT_SUFFIXES and path.name != ".git":
            yield path
    for folder in (*PACKAGES, "docs", ".ci"):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.is_file() and path.suffix in TEXT_SUFFIXES and "__pycache__" not in path.parts:
                yield path


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports_of(source: str, module: str, *, is_package: bool = False) -> set[str]:
    """The modules that `source` imports, anywhere in it, as absolute names; `from a import b` counts as a.b."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = module.split(".")
                anchor = parents[: len(parents) - node.level + is_package]
                base = ".".join([*anchor, base] if base else anchor)
            found |= {f"{base}.{alias.name}" for alias in node.names}
    return found


def boundary_complaints(source: str, module: str, *, is_package: bool = False) -> list[str]:
    """Imports that cross the layout of docs/architecture.md: heavy depends on light, and siblings don't know each other."""
    package = module.split(".")[0]
    complaints = []
    for name in sorted(imports_of(source, module, is_package=is_package)):
        top = name.split(".")[0]
        contracts = name == "gateway.contracts" or name.startswith("gateway.contracts.")
        if module == "gateway.contracts" or module.startswith("gateway.contracts."):
            allowed = contracts or top in CONTRACTS_MAY_IMPORT
        elif package == "gateway":
            allowed = top == "gateway" if top in PACKAGES else top not in HEAVY
        elif package in ("feature_jobs", "loadtest", "model_export"):
            allowed = top == package or contracts if top in PACKAGES else True
        elif package == "deploy":
            allowed = top != "tests"
        else:
            allowed = True
        if not allowed:
            complaints.append(f"{module} imports {name}")
    return complaints


def sleep_complaints(source: str) -> list[str]:
    """Calls of any `sleep` but sleep(0), unless the line says why it sleeps."""
    lines = source.splitlines()
    complaints = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        called = node.func.attr if isinstance(node.func, ast.Attribute) else node.func.id if isinstance(node.func, ast.Name) else ""
        yields = len(node.args) == 1 and isinstance(node.args[0], ast.Constant) and node.args[0].value == 0
        if called == "sleep" and not yields and SLEEP_REASON not in lines[node.lineno - 1]:
            complaints.append(f"line {node.lineno} sleeps")
    return complaints


def leftover_complaints(text: str) -> list[str]:
    return [f"line {i}: {line.strip()}" for i, line in enumerate(text.splitlines(), 1) if LEFTOVER.search(line)]


def metric_complaints(text: str) -> list[str]:
    """Names that look like metrics of ours and aren't in the catalogue. The beginning of one, before a `*`, is fine."""
    complaints = []
    for i, line in enumerate(text.splitlines(), 1):
        for found in METRIC.finditer(line):
            name, behind = found[0], line[found.end() : found.end() + 1]
            if name in SERIES or name in BY_NAME or name in NO_METRICS:
                continue
            if not (behind in ("*", "=") or name.endswith("_") and any(known.startswith(name) for known in SERIES)):
                complaints.append(f"line {i} names {name}")
    return complaints


def schema_complaints(schema: dict[str, Any], struct: type[msgspec.Struct]) -> list[str]:
    """Differences between an Avro record and a struct: names, their order, and which may be null."""
    hints = typing.get_type_hints(struct)
    in_struct = [(name, types.NoneType in typing.get_args(hints[name])) for name in struct.__struct_fields__]
    in_schema = [(f["name"], isinstance(f["type"], list) and "null" in f["type"]) for f in schema["fields"]]
    if in_struct == in_schema:
        return []
    return [f"{struct.__name__}: {a} in the struct, {b} in the schema" for a, b in _pairs(in_struct, in_schema) if a != b]


def _pairs(a: list[Any], b: list[Any]) -> list[tuple[Any, Any]]:
    length = max(len(a), len(b))
    return list(zip(a + [None] * (length - len(a)), b + [None] * (length - len(b)), strict=True))


def test_packages_import_only_what_the_layout_allows() -> None:
    complaints = []
    for path in python_files(*PACKAGES):
        complaints += boundary_complaints(path.read_text(), module_name(path), is_package=path.name == "__init__.py")
    assert complaints == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("gateway.scoring.scorer", "import mlflow"),
        ("gateway.scoring.scorer", "from pyspark.sql import SparkSession"),
        ("gateway.scoring.scorer", "def late():\n    import feature_jobs.tiles"),
        ("gateway.contracts.windows", "import orjson"),
        ("gateway.contracts.windows", "from gateway import metrics"),
        ("gateway.contracts.windows", "from .. import metrics"),
        ("feature_jobs.tiles", "from gateway.app import make_app"),
        ("feature_jobs.tiles", "import model_export"),
        ("model_export.export", "from loadtest.simulator import Simulator"),
        ("loadtest.driver", "import deploy.stack"),
        ("deploy.stack", "from tests.helpers import wait_until"),
    ],
)
def test_an_import_across_a_boundary_is_seen(module: str, source: str) -> None:
    assert len(boundary_complaints(source, module)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("gateway.contracts.windows", "from . import layout\nimport json\nimport numpy as np"),
        ("gateway.app", "from gateway.contracts.settings import Settings\nimport fastapi"),
        ("feature_jobs.tiles", "from gateway.contracts import layout\nimport pyspark"),
        ("deploy.demo", "import loadtest.commands"),
    ],
)
def test_an_import_within_the_layout_is_fine(module: str, source: str) -> None:
    assert boundary_complaints(source, module) == []


def test_gateway_package_is_empty_so_that_contracts_stay_cheap_to_import() -> None:
    assert (ROOT / "gateway/__init__.py").read_text() == ""


def test_nothing_is_left_over() -> None:
    complaints = [f"{path.relative_to(ROOT)} {c}" for path in text_files() for c in leftover_complaints(path.read_text())]
    assert complaints == []


def test_a_leftover_is_seen() -> None:
    for word in LEFTOVER_WORDS:
        assert len(leftover_complaints(f"a = 1\n# {word}: b\n")) == 1
    assert leftover_complaints(f'currency = "{LEFTOVER_WORDS[2]}"') == []
    assert leftover_complaints(f"a list to do, {LEFTOVER_WORDS[1].lower()}, {LEFTOVER_WORDS[1]}S\n") == []


def test_every_setting_stands_on_its_page() -> None:
    assert PAGE_PATH.read_text() == page(), "run make docs"


def test_every_feature_is_documented() -> None:
    text = features_page.PAGE_PATH.read_text()
    assert text == features_page.page(text), "run make docs"


def test_every_metric_stands_on_its_page() -> None:
    assert metrics_page.PAGE_PATH.read_text() == metrics_page.page(), "run make docs"


def test_every_metric_that_is_named_anywhere_is_one_of_the_catalogue() -> None:
    complaints = []
    for path in text_files():
        if path != Path(__file__) and path.relative_to(ROOT) not in TELLS_OLD_NAMES:
            complaints += [f"{path.relative_to(ROOT)}: {c}" for c in metric_complaints(path.read_text())]
    assert complaints == []


def test_a_metric_that_nobody_exports_is_seen() -> None:
    assert metric_complaints("rate(fraudgate_decisions[5m])") == ["line 1 names fraudgate_decisions"]
    assert metric_complaints("histogram_quantile(0.99, fraudgate_decision_latency_ms_bucket)") != []
    assert (
        metric_complaints(
            "fraudgate_decision_latency_seconds_bucket, fraudgate_jobs_up{query}, `fraudgate_cases_*`, job_fraudgate_x"
        )
        == []
    )
    assert metric_complaints("fraudgate_webhook_queued_total and fraudgate_spool_bytes") == []


def test_every_setting_says_what_it_is() -> None:
    rows = [line for line in page().splitlines() if line.startswith("| `")]
    assert rows
    assert all(len(line.split("|")[4].strip()) > 10 for line in rows)


def test_no_module_is_too_long() -> None:
    lengths = {str(p.relative_to(ROOT)): len(p.read_text().splitlines()) for p in python_files(*PACKAGES)}
    assert {name: n for name, n in lengths.items() if n > MODULE_LINES_MAX} == {}


def test_tests_wait_on_conditions_and_do_not_sleep() -> None:
    complaints = []
    for path in python_files("tests"):
        # The one place that polls.
        if path != ROOT / "tests/helpers.py":
            complaints += [f"{path.relative_to(ROOT)}: {c}" for c in sleep_complaints(path.read_text())]
    assert complaints == []


def test_a_sleep_is_seen() -> None:
    assert len(sleep_complaints("import time\ntime.sleep(1)\n")) == 1
    assert len(sleep_complaints("async def f():\n    await asyncio.sleep(0.1)\n")) == 1
    assert sleep_complaints("async def f():\n    await asyncio.sleep(0)\n") == []
    assert sleep_complaints("async def f():\n    await asyncio.sleep(2)  # sleeps: a Redis that is slow on purpose\n") == []


@pytest.mark.parametrize(
    ("topic", "struct"),
    [
        (TRANSACTIONS, Transaction),
        (DECISIONS, Receipt),
        (LABELS, Label),
        (LIST_CHANGES, ListChange),
        (AUDIT, AuditRecord),
    ],
)
def test_a_schema_has_the_fields_of_its_struct_in_order(topic: str, struct: type[msgspec.Struct]) -> None:
    assert schema_complaints(json.loads(TOPICS[topic].schema_text), struct) == []


def test_the_transaction_inside_a_receipt_is_the_transaction() -> None:
    receipt = json.loads(TOPICS[DECISIONS].schema_text)
    nested = next(f["type"] for f in receipt["fields"] if f["name"] == "transaction")
    assert nested == json.loads(TOPICS[TRANSACTIONS].schema_text)


def test_a_schema_that_differs_from_its_struct_is_seen() -> None:
    schema = json.loads(TOPICS[LABELS].schema_text)
    first, second, *rest = schema["fields"]
    assert schema_complaints({"fields": [second, first, *rest]}, Label)
    assert schema_complaints({"fields": [first, second]}, Label)
    assert schema_complaints({"fields": [first | {"type": ["null", "string"]}, second, *rest]}, Label)
