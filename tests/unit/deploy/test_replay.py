"""`fraudgate replay-decision` and `fraudgate why` on real Delta tables and real models, after model, policy and lists have changed."""

from __future__ import annotations

import json
import math
import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import pytest

from deploy.history.replay import replay_decision
from deploy.history.upkeep import order_receipts, vacuum
from deploy.history.why import why
from gateway.contracts import tables
from gateway.contracts.audit import POLICY_LOADED
from gateway.contracts.decision import Outcome, Receipt, Route, risk_score
from gateway.contracts.features import FEATURE_INDEX, FEATURES
from gateway.contracts.lists import ListAction, ListChange, book_as_of
from gateway.contracts.settings import Settings, load_settings
from gateway.explanations.counterfactual import decide_cases
from gateway.explanations.what_if import Case
from gateway.kafka.avro import encode_receipt, receipt_of
from gateway.models.model import Model, load_model
from gateway.policy import Policy, load_policy
from tests.factories_history import (
    amended,
    make_receipt,
    read_rows,
    rewrite_decisions,
    write_decisions,
    write_many_decisions,
    write_rows,
)
from tests.factories_model import make_model_dir, risky_row, safe_row
from tests.unit.gateway.factories import NOW_MS, make_transaction

BLOCKED = "card-blocked"


def rows_of_policy(settings: Settings, model: Model, policy: Policy) -> list[Receipt]:
    """Receipts as the gateway would have written them: risky, safe, of a blocked card, explained, explored and without a model."""
    changes = [(0, change_of(BLOCKED, ListAction.ADD)), (1, change_of("card-other", ListAction.ADD))]
    book = book_as_of(changes, 1)
    write_rows(settings, tables.LIST_CHANGES, [msgspec.to_builtins(c) | {"offset": i, "partition": 0} for i, c in changes])
    made = []
    for name, card, row in (("risky", "c1", risky_row()), ("safe", "c2", safe_row()), ("blocked", BLOCKED, safe_row())):
        t = make_transaction(name, card_id=card, amount_minor=int(row[0, 0]), channel="pos")
        fit(row)
        decisions, probability = decide_cases(model, policy, [Case(t, row[0])], book, NOW_MS)
        made.append(
            make_receipt(
                t,
                received_at_ms=NOW_MS,
                decision=decisions.outcome[0],
                policy_decision=decisions.outcome[0].value,
                risk_score=risk_score(float(probability[0])),
                probability=float(probability[0]),
                reasons=[r.value for r in decisions.reasons[0]],
                rule_hits=decisions.rule_hits[0],
                list_hits=decisions.list_hits[0],
                shadow_hits=decisions.shadow_hits[0],
                rule_errors=decisions.rule_errors[0],
                lists_version=1,
                model_name=model.ref.name,
                model_version=model.ref.version,
                model_digest=model.digest,
                policy_digest=policy.digest,
                features=row[0].tolist(),
            )
        )
    risky = made[0]
    assert model.explainer is not None
    codes = [r.value for r in model.explainer.codes(np.array([risky.features], np.float32))[0]]
    assert codes
    made.append(renamed(risky, "explained", reasons=codes))
    made.append(renamed(risky, "explored", decision=Outcome.APPROVE, reasons=[], propensity=0.02))
    bare = {"model_name": None, "model_version": None, "model_digest": None, "route": None, "probability": None}
    made.append(
        renamed(
            made[1], "bare", **bare, risk_score=0, degraded=["static_policy"], features=[math.nan] * len(FEATURES), lists_version=-1
        )
    )
    return made


def fit(row: npt.NDArray[np.float32]) -> None:
    row[0, FEATURE_INDEX["channel"]] = 0
    row[0, [i for i, f in enumerate(FEATURES) if f.aggregate in ("ratio", "ratio_before", "zscore")]] = math.nan


def renamed(receipt: Receipt, name: str, **changes: Any) -> Receipt:
    return amended(
        receipt, transaction_id=name, transaction=msgspec.structs.replace(receipt.transaction, transaction_id=name), **changes
    )


def change_of(card: str, action: ListAction) -> ListChange:
    return ListChange(
        list_id="blocked-cards",
        entity_field="card_id",
        action=action,
        entity_value=card,
        expires_at_ms=None,
        reason="stolen",
        who="ann",
        at_ms=NOW_MS,
    )


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home whose decisions were made by another model, policy and lists than it has now."""
    home = tmp_path_factory.mktemp("past")
    settings = load_settings({"FRAUDGATE_HOME": str(home), "FRAUDGATE_REGISTRY_URL": "http://127.0.0.1:9"})
    make_model_dir(settings.models_path)
    model = load_model(settings.models_path, Route.CHAMPION.value)
    assert model is not None
    policy = load_policy("")
    write_decisions(settings, rows_of_policy(settings, model, policy))
    files = {name: text.decode() for name, text in policy.files.items()}
    entry = {"at_ms": NOW_MS, "who": "gateway", "action": POLICY_LOADED, "subject": policy.digest, "reason": ""}
    write_rows(settings, tables.AUDIT, [entry | {"detail": json.dumps(files), "offset": 0}])
    label = {
        "transaction_id": "risky",
        "is_fraud": True,
        "source": "chargeback",
        "state": "confirmed",
        "reported_at_ms": NOW_MS + 9,
    }
    write_rows(settings, tables.LABELS, [label | {"kafka_timestamp": NOW_MS * 1000 + 90_000_000}])
    make_model_dir(settings.models_path, version="2", seed=2)
    for name, text in files.items():
        path = home / "policy" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text.replace("challenge: 600", "challenge: 601"))
    return home


@pytest.fixture
def settings(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    shutil.copytree(made, tmp_path / "home")
    monkeypatch.setenv("FRAUDGATE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("FRAUDGATE_POLICY_PATH", str(tmp_path / "home/policy"))
    monkeypatch.setenv("FRAUDGATE_REGISTRY_URL", "http://127.0.0.1:9")
    # What isn't in the model directory can't be had.
    monkeypatch.setenv("FRAUDGATE_MLFLOW_URL", "http://127.0.0.1:9")
    return load_settings()


def tamper(settings: Settings, transaction_id: str, **changes: Any) -> None:
    rows = read_rows(settings, tables.DECISIONS)
    for row in rows:
        if row["transaction_id"] == transaction_id:
            row["payload"] = encode_receipt(amended(receipt_of(row["payload"]), **changes))
    rewrite_decisions(settings, rows)


def test_every_kind_of_decision_comes_out_identical_after_all_has_changed(
    settings: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    order_receipts(settings, always=True)
    vacuum(settings, tables.DECISIONS, hours=0)
    assert replay_decision(["--all"]) == 0
    assert "6 decisions: 6 identical, 0 different" in capsys.readouterr().out
    assert replay_decision(["risky", "blocked"]) == 0
    assert "2 decisions: 2 identical" in capsys.readouterr().out
    assert replay_decision(["--last", "3"]) == 0
    assert replay_decision(["--sample", "4"]) == 0
    assert "4 decisions: 4 identical" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("transaction_id", "changes", "said"),
    [
        ("risky", {"risk_score": 1}, "risk_score: the receipt says 1"),
        ("risky", {"rule_hits": []}, ""),
        ("safe", {"policy_decision": "decline"}, "policy_decision: the receipt says decline, now it is approve"),
        ("safe", {"received_at_ms": NOW_MS}, ""),
        ("blocked", {"list_hits": []}, "list_hits: the receipt says []"),
        ("explained", {"reasons": ["AMOUNT_UNUSUAL"]}, "reasons: the receipt says ['AMOUNT_UNUSUAL']"),
        ("blocked", {"lists_version": 0}, "policy_decision"),
    ],
)
def test_what_a_receipt_says_otherwise_is_told(
    settings: Settings, capsys: pytest.CaptureFixture[str], transaction_id: str, changes: dict[str, Any], said: str
) -> None:
    tamper(settings, transaction_id, **changes)
    assert replay_decision(["--all"]) == (1 if said else 0)
    assert said in capsys.readouterr().out


def test_a_changed_feature_shows(settings: Settings) -> None:
    [row] = [r for r in read_rows(settings, tables.DECISIONS) if r["transaction_id"] == "risky"]
    features = list(receipt_of(row["payload"]).features)
    features[FEATURE_INDEX["amount_minor"]] = 1.0
    tamper(settings, "risky", features=features)
    assert replay_decision(["risky"]) == 1


@pytest.mark.parametrize(
    ("gone", "said"),
    [
        ("models/fraudgate-1", "fraudgate version 1 is not"),
        ("tables/audit", "is neither the one in use nor in the table audit"),
        ("tables/list_changes", "the lists of version 1 can't be made again"),
    ],
)
def test_what_cannot_be_replayed_says_why(settings: Settings, capsys: pytest.CaptureFixture[str], gone: str, said: str) -> None:
    shutil.rmtree(settings.home_path / gone)
    assert replay_decision(["risky"]) == 1
    out = capsys.readouterr().out
    assert "0 identical" in out
    assert f"1 not replayed: {said}" in out or said in out


def test_an_unknown_transaction_is_an_error(settings: Settings, capsys: pytest.CaptureFixture[str]) -> None:
    assert replay_decision(["nobody"]) == 1
    assert "there is no receipt of nobody" in capsys.readouterr().err
    assert why(["nobody"]) == 1
    assert "there is no receipt of nobody" in capsys.readouterr().err


def test_why_tells_the_story(settings: Settings, capsys: pytest.CaptureFixture[str]) -> None:
    assert why(["risky"]) == 0
    out = capsys.readouterr().out
    assert "asked to pay 2,000.00 EUR to merchant merchant-1" in out
    assert "for such an amount the policy challenges from" in out
    assert "decided again from the receipt it comes out identical" in out
    assert "card_distinct_merchants_1h" in out
    assert "it would have been approved if" in out
    assert "fraud, chargeback confirmed" in out


def test_why_names_lists_by_the_policy_of_the_time(settings: Settings, capsys: pytest.CaptureFixture[str]) -> None:
    assert why(["blocked"]) == 0
    out = capsys.readouterr().out
    assert "DECLINE" in out
    assert "block list of card_id blocked-cards: Cards that are known to be in other hands." in out
    assert "what would have changed it: it stands on blocked-cards, whatever the payment is like" in out


def test_why_as_of_a_time_knows_what_was_known_then(settings: Settings, capsys: pytest.CaptureFixture[str]) -> None:
    assert why(["risky", "--as-of", "2026-11-26T23:00:00"]) in (0, 1)
    capsys.readouterr()
    assert why(["risky", "--json", "--as-of", "2100-01-01"]) == 0
    assert len(json.loads(capsys.readouterr().out)["labels"]) == 1
    then = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(NOW_MS / 1000 + 30))
    assert why(["risky", "--json", "--as-of", then]) == 0
    assert json.loads(capsys.readouterr().out)["labels"] == []
    assert why(["risky", "--as-of", "2001-01-01"]) == 1
    assert why(["risky", "--as-of", "0"]) == 0
    assert why(["risky", "--as-of", "77"]) == 1


def test_why_without_a_model_and_without_the_policy_still_tells_what_the_receipt_says(
    settings: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    assert why(["bare"]) == 0
    assert "the amount's band decided" in capsys.readouterr().out
    shutil.rmtree(settings.home_path / "tables/audit")
    assert why(["risky", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["explanation"] is None
    assert "neither the one in use nor in the table audit" in found["not_explained"]


def test_why_and_its_libraries_keep_spark_and_mlflow_out() -> None:
    code = "import sys; import deploy.history.why, deploy.history.audit, deploy.history.replay, deploy.history.erase; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ).stdout.split()
    assert not {"mlflow", "pyspark", "xgboost", "sklearn"} & set(loaded)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_look_up_among_a_million_receipts_costs_less_than_three_seconds(tmp_path: Path) -> None:
    """Of CPU, from the command's start to its end: what else runs on the machine doesn't count."""
    env = {
        "FRAUDGATE_HOME": str(tmp_path),
        "FRAUDGATE_REGISTRY_URL": "http://127.0.0.1:9",
        "FRAUDGATE_MLFLOW_URL": "http://127.0.0.1:9",
    }
    settings = load_settings(env)
    write_many_decisions(settings, 1_000_000)
    order_receipts(settings, always=True)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    argv = [sys.executable, "-m", "deploy.cli", "why", "m0654321"]
    told = subprocess.run(argv, capture_output=True, text=True, check=True, env=os.environ | env)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert told.stdout.startswith("APPROVE  m0654321")
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 3.0
