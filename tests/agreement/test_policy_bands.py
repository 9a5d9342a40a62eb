"""The thresholds that models are judged at are those that the gateway's policy decides by."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

import msgspec
import numpy as np
import pytest

from gateway.contracts.decision import risk_score
from gateway.contracts.features import FEATURE_NAMES
from gateway.policy import NO_LISTS, Columns, load_policy
from gateway.scoring.job import requests_of
from model_export.errors import PolicyUnreadableError
from model_export.policy_bands import read_asked, read_bands, risk_scores
from tests.unit.gateway.factories import make_job, make_transaction
from tests.unit.gateway.policy.factories import make_book, make_columns, make_list, make_rule, policy_files

OWN_BANDS = (
    {"up_to_minor": 777, "challenge": 1, "review": 500, "decline": 1001, "without_model": "approve"},
    {"up_to_minor": None, "challenge": 250, "review": 250, "decline": 900, "without_model": "review"},
)


def write(folder: Path, files: dict[str, bytes]) -> str:
    (folder / "rules").mkdir()
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return str(folder)


@pytest.mark.parametrize("own", [False, True])
def test_a_score_and_an_amount_decide_as_the_gateway_decides(tmp_path: Path, own: bool) -> None:
    path = write(tmp_path, policy_files(bands=OWN_BANDS)) if own else ""
    edges = [1, 776, 777, 778, 1999, 2000, 2001, 19_999, 20_000, 20_001, 100_000, 100_001, 4_999_999]
    scores = [0, 1, 249, 250, 299, 300, 399, 400, 499, 500, 599, 600, 799, 800, 849, 850, 879, 880, 899, 900, 920, 1000]
    amounts, score = (np.array(a).ravel() for a in np.meshgrid(edges, scores))
    requests = requests_of([make_job(make_transaction(f"t{i}", amount_minor=int(a))) for i, a in enumerate(amounts)])
    columns = Columns(
        requests=requests,
        rows=np.arange(len(score)),
        matrix=np.full((len(score), len(FEATURE_NAMES)), np.nan, np.float32),
        score=score.astype(np.float64),
        received_at_ms=np.zeros(len(score), np.int64),
    )
    decided = load_policy(path).decide(columns, has_features=True, lists=NO_LISTS).severity
    assert read_bands(path).severity(score, amounts.astype(np.float32)).tolist() == decided.tolist()
    assert len(set(decided.tolist())) == 4


def test_hits_of_rules_and_lists_decide_as_the_gateway_decided(tmp_path: Path) -> None:
    lists = (
        make_list("bad", "block", "card_id"),
        make_list("odd-bin", "block", "card_bin", outcome="review"),
        make_list("looked-at", "watch", "merchant_id"),
        make_list("only-told", "watch", "ip", outcome="approve"),
        make_list("good", "allow", "customer_id"),
    )
    rules = [
        make_rule("amount_minor > 900", "soft", outcome="challenge"),
        make_rule("amount_minor > 2000", "hard", outcome="decline", hard=True),
        make_rule("amount_minor > 0", "tried", outcome="decline", state="shadow"),
        make_rule("amount_minor > 0", "resting", outcome="decline", state="off"),
    ]
    path = write(tmp_path, policy_files(*rules, lists=lists))
    values = {"card_id": "c", "card_bin": "123456", "merchant_id": "m", "ip": "i", "customer_id": "u"}
    book = make_book(lists, {declared["id"]: values[declared["field"]] for declared in lists})
    batch, score = [], []
    for i, (chosen, amount, of_score) in enumerate(itertools.product(range(2 ** len(values)), (10, 1000, 3000), (0, 450, 999))):
        fields = {name: value for bit, (name, value) in enumerate(values.items()) if chosen >> bit & 1}
        batch.append(make_transaction(f"t{i}", amount_minor=amount, **fields))
        score.append(of_score)
    columns = dataclasses.replace(make_columns(batch), score=np.array(score, np.float64))
    decided = load_policy(path).decide(columns, has_features=True, lists=book)
    by_score = read_bands(path).severity(np.array(score), np.array([t.amount_minor for t in batch], np.float32))
    found = read_asked(path).severity(decided.rule_hits, decided.list_hits, by_score)
    assert found.tolist() == decided.severity.tolist()
    assert len(set(decided.severity.tolist())) == 4


def test_scores_are_rounded_as_the_contract_rounds_them() -> None:
    probability = np.concatenate([np.linspace(0, 1, 20_001), [0.0005, 0.3995, 0.39949999, 1.0]])
    assert risk_scores(probability).tolist() == [risk_score(p) for p in probability.tolist()]


@pytest.mark.parametrize("text", ["", "bands: []", "bands: 7", "version: [", "bands:\n- {up_to_minor: null, challenge: x}"])
def test_a_policy_that_is_none_is_refused_with_its_path(tmp_path: Path, text: str) -> None:
    (tmp_path / "policy.yaml").write_text(text)
    with pytest.raises(PolicyUnreadableError, match=str(tmp_path)):
        read_bands(str(tmp_path))
    with pytest.raises(PolicyUnreadableError, match="nowhere"):
        read_bands(str(tmp_path / "nowhere"))


def test_bands_have_names_for_a_person() -> None:
    assert read_bands("").names() == [
        "amount <= 2000",
        "2000 < amount <= 20000",
        "20000 < amount <= 100000",
        "amount > 100000",
    ]
    assert msgspec.json.encode(read_bands("").floors.tolist()) == b"[[600,800,920],[500,700,880],[400,600,850],[300,500,800]]"
