"""`fraudgate explain` on real Delta tables and a real model, without Spark and without a gateway."""

from __future__ import annotations

import io
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pytest
from deltalake import write_deltalake

from deploy.explain import explain
from gateway.contracts import tables
from gateway.contracts.decision import Outcome, Route
from gateway.contracts.features import FEATURE_INDEX, FEATURES, FINGERPRINT
from gateway.contracts.settings import Settings, load_settings
from gateway.contracts.transaction import FIELDS, Transaction
from gateway.explanations.counterfactual import decide_cases
from gateway.explanations.what_if import Case
from gateway.models.model import Model, load_model
from gateway.policy import Policy, load_policy
from tests.factories_model import make_model_dir, risky_row, safe_row
from tests.unit.gateway.factories import make_transaction
from tests.unit.gateway.policy.factories import NEVER_BY_SCORE, policy_files


@dataclass(frozen=True)
class Home:
    """A home with a model, and two payments of which both tables know."""

    settings: Settings
    model: Model
    policy: Policy

    def receipt(self, t: Transaction, row: npt.NDArray[np.float32]) -> dict[str, Any]:
        """The receipt that the gateway would have written, as far as it matters here."""
        decisions, probability = decide_cases(self.model, self.policy, [Case(t, row[0])])
        return {
            "transaction_id": t.transaction_id,
            "decision": decisions.outcome[0].value,
            "risk_score": round(float(probability[0]) * 1000),
            "probability": float(probability[0]),
            "reasons": [r.value for r in decisions.reasons[0]],
            "rule_hits": decisions.rule_hits[0],
            "degraded": [],
            "model_name": self.model.ref.name,
            "model_version": self.model.ref.version,
            "model_digest": self.model.digest,
            "route": "champion",
            "feature_fingerprint": FINGERPRINT,
            "policy_digest": self.policy.digest,
            "received_at_ms": t.event_time_ms + 1,
            "decided_at_ms": t.event_time_ms + 5,
            "event_time_ms": t.event_time_ms,
            "features": row[0].tolist(),
        }


def payment(transaction_id: str, row: npt.NDArray[np.float32]) -> Transaction:
    """A payment that fits `row`, whose comparisons with the past are made unknown: at random they fit no past."""
    row[0, FEATURE_INDEX["channel"]] = 0
    row[0, [i for i, f in enumerate(FEATURES) if f.aggregate in ("ratio", "ratio_before", "zscore")]] = math.nan
    return make_transaction(transaction_id, amount_minor=int(row[0, 0]), channel="pos")


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Home:
    monkeypatch.setenv("FRAUDGATE_HOME", str(tmp_path))
    settings = load_settings()
    make_model_dir(settings.models_path)
    model = load_model(settings.models_path, Route.CHAMPION.value)
    assert model is not None
    made = Home(settings, model, load_policy(""))
    rows = {"risky": risky_row(), "safe": safe_row()}
    payments = {name: payment(name, row) for name, row in rows.items()}
    write(settings, tables.DECISIONS, [made.receipt(payments[name], row) for name, row in rows.items()])
    write(settings, tables.SILVER, [{f: getattr(t, f) for f in FIELDS} for t in payments.values()])
    return made


def write(settings: Settings, name: str, rows: list[dict[str, Any]]) -> None:
    table = pa.Table.from_pylist(rows)
    typed = [pa.string() if pa.types.is_null(t) else t for t in table.schema.types]
    typed = [pa.list_(pa.string()) if t == pa.list_(pa.null()) else t for t in typed]
    table = table.cast(pa.schema(list(zip(table.column_names, typed, strict=True))))
    write_deltalake(tables.table_uri(settings.tables, name), table, mode="overwrite", schema_mode="overwrite")


def explained(capsys: pytest.CaptureFixture[str], *argv: str) -> dict[str, Any]:
    assert explain([*argv, "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_a_receipt_is_explained_and_its_counterfactual_flips_it(home: Home, capsys: pytest.CaptureFixture[str]) -> None:
    found = explained(capsys, "risky")
    assert found["decision"] == found["decided_again"] != Outcome.APPROVE.value
    assert found["notes"] == []
    contributions = sum(part["contribution"] for part in found["by_feature"])
    assert contributions + found["expected"] == pytest.approx(found["margin"], abs=1e-5)
    assert 1 / (1 + math.exp(-found["margin"])) == pytest.approx(found["probability"], abs=1e-5)
    assert sum(part["contribution"] for part in found["by_reason"]) == pytest.approx(contributions)
    assert {part["reason"] for part in found["by_reason"][:2]} == {"AMOUNT_HIGH", "CARD_MANY_MERCHANTS"}
    # What is told of the other payment is enough to make it.
    told = found["approved_if"]
    row = risky_row()[0]
    names = list(told["features"])
    assert {c["feature"] for c in told["changes"]} <= set(names)
    for name, (before, after) in told["features"].items():
        place = home.model.metadata.feature_names.index(name)
        assert row[place] == pytest.approx(before, nan_ok=True) or before is None
        row[place] = math.nan if after is None else after
    t = payment("other", row[None])
    decisions, probability = decide_cases(home.model, home.policy, [Case(t, row)])
    assert decisions.outcome == [Outcome.APPROVE]
    assert probability[0] == pytest.approx(told["probability"], abs=1e-6)


def test_it_reads_like_an_answer(home: Home, capsys: pytest.CaptureFixture[str]) -> None:
    assert explain(["risky"]) == 0
    text = capsys.readouterr().out
    assert "It would have been approved if" in text
    assert "the amount had been" in text
    assert "card_distinct_merchants_1h" in text
    assert "the amount is higher than that of most payments" in text


def test_an_approved_payment_has_contributions_and_no_counterfactual(home: Home, capsys: pytest.CaptureFixture[str]) -> None:
    found = explained(capsys, "safe")
    assert found["decision"] == "approve"
    assert found["approved_if"] is None
    assert found["why_not"] == "it is approved"
    assert found["by_feature"]


def test_what_was_let_through_to_explore_says_so(home: Home, capsys: pytest.CaptureFixture[str]) -> None:
    row = risky_row()
    logged = home.receipt(payment("risky", row), row)
    write(home.settings, tables.DECISIONS, [logged | {"decision": "approve", "policy_decision": logged["decision"]}])
    found = explained(capsys, "risky")
    assert found["decided_again"] == logged["decision"] != found["decision"] == "approve"
    assert [note.split(";")[0] for note in found["notes"]] == [f"the policy came to {logged['decision']}"]
    assert found["approved_if"]


def test_a_receipt_can_be_given_as_json(
    home: Home, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    row = risky_row()
    t = payment("elsewhere", row)
    receipt = home.receipt(t, row) | {"transaction": msgspec.to_builtins(t)}
    receipt["features"] = [None if math.isnan(v) else v for v in receipt["features"]]
    path = tmp_path / "receipt.json"
    path.write_text(json.dumps(receipt))
    assert explained(capsys, "--receipt", str(path))["approved_if"]
    monkeypatch.setattr("sys.stdin", io.StringIO(path.read_text()))
    assert explained(capsys, "--receipt", "-")["transaction_id"] == "elsewhere"
    path.write_text("{}")
    assert explain(["--receipt", str(path)]) == 1
    assert "this is no receipt" in capsys.readouterr().err


def test_an_older_version_that_lies_in_the_directory_is_found_by_its_digest(home: Home, capsys: pytest.CaptureFixture[str]) -> None:
    make_model_dir(home.settings.models_path, version="2", seed=5)
    found = explained(capsys, "risky")
    assert found["model"].startswith("fraudgate 1 (champion)")
    assert found["notes"] == []


def test_a_payment_is_decided_again_with_the_lists_of_its_time(home: Home, capsys: pytest.CaptureFixture[str]) -> None:
    row = safe_row()
    t = payment("listed", row)
    told = {"decision": "decline", "list_hits": ["blocked-cards"], "lists_version": 1}
    write(home.settings, tables.DECISIONS, [home.receipt(t, row) | told])
    write(home.settings, tables.SILVER, [{f: getattr(t, f) for f in FIELDS}])
    change: dict[str, Any] = {"list_id": "blocked-cards", "entity_field": "card_id", "action": "add", "entity_value": t.card_id}
    change |= {"expires_at_ms": t.event_time_ms + 2, "reason": "r", "who": "w", "at_ms": 0, "offset": 0}
    removed = change | {"action": "remove", "offset": 1}
    write(home.settings, tables.LIST_CHANGES, [change, removed])
    found = explained(capsys, "listed")
    assert (found["decided_again"], found["approved_if"], found["notes"]) == ("decline", None, [])
    assert explain(["listed"]) == 0
    assert "lists        blocked-cards" in capsys.readouterr().out


def test_another_policy_is_said(home: Home, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "policy.yaml").write_bytes(policy_files(bands=NEVER_BY_SCORE, name="mild")["policy.yaml"])
    found = explained(capsys, "risky", "--policy", str(tmp_path))
    assert found["decided_again"] == "approve"
    assert len(found["notes"]) == 2
    assert "the policy 'mild' is another" in found["notes"][0]


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"feature_fingerprint": "0" * 16}, "explain it with the code of its time"),
        (
            {"model_digest": None, "model_name": None, "degraded": ["rules_only"]},
            "no model scored risky: it was decided without (rules_only)",
        ),
        ({"model_digest": "0" * 64}, "MLflow does not answer"),
    ],
)
def test_what_cannot_be_explained_says_why(
    home: Home, change: dict[str, Any], why: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FRAUDGATE_MLFLOW_URL", "http://127.0.0.1:1")
    row = risky_row()
    receipt = home.receipt(payment("risky", row), row) | change
    write(home.settings, tables.DECISIONS, [receipt])
    assert explain(["risky"]) == 1
    assert why in capsys.readouterr().err


def test_an_unknown_transaction_and_no_table_say_where_receipts_come_from(
    home: Home, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for home_path in (home.settings.home_path, tmp_path / "empty"):
        monkeypatch.setenv("FRAUDGATE_HOME", str(home_path))
        assert explain(["t-unknown"]) == 1
        assert "there is no receipt of t-unknown in the table decisions" in capsys.readouterr().err


def test_a_payment_that_silver_does_not_know_yet_has_no_counterfactual(home: Home, capsys: pytest.CaptureFixture[str]) -> None:
    write(home.settings, tables.SILVER, [{f: getattr(make_transaction("x"), f) for f in FIELDS}])
    found = explained(capsys, "risky")
    assert found["approved_if"] is None
    assert found["why_not"] == "the payment isn't in silver yet"
    assert found["by_feature"]
