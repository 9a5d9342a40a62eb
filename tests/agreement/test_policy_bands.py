"""The thresholds that models are judged at are those that the gateway's policy decides by."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import pytest

from gateway.contracts.decision import risk_score
from gateway.contracts.features import FEATURE_NAMES
from gateway.job import requests_of
from gateway.policy import Columns, load_policy
from model_export.errors import PolicyUnreadableError
from model_export.policy_bands import read_bands, risk_scores
from tests.unit.gateway.factories import make_job, make_transaction

OWN_POLICY = """
version: 1
name: own
bands:
  - {up_to_minor: 777, challenge: 1, review: 500, decline: 1001, without_model: approve}
  - {up_to_minor: null, challenge: 250, review: 250, decline: 900, without_model: review}
rules: []
"""


@pytest.mark.parametrize("text", [None, OWN_POLICY])
def test_a_score_and_an_amount_decide_as_the_gateway_decides(tmp_path: Path, text: str | None) -> None:
    path = ""
    if text is not None:
        path = str(tmp_path / "policy.yaml")
        Path(path).write_text(text)
    edges = [1, 776, 777, 778, 1999, 2000, 2001, 19_999, 20_000, 20_001, 100_000, 100_001, 4_999_999]
    scores = [0, 1, 249, 250, 299, 300, 399, 400, 499, 500, 599, 600, 799, 800, 849, 850, 879, 880, 899, 900, 920, 1000]
    amounts, score = (np.array(a).ravel() for a in np.meshgrid(edges, scores))
    requests = requests_of([make_job(make_transaction(f"t{i}", amount_minor=int(a))) for i, a in enumerate(amounts)])
    columns = Columns(
        requests=requests,
        rows=np.arange(len(score)),
        matrix=np.full((len(score), len(FEATURE_NAMES)), np.nan, np.float32),
        score=score.astype(np.float64),
    )
    decided = load_policy(path).decide(columns, has_features=True).severity
    assert read_bands(path).severity(score, amounts.astype(np.float32)).tolist() == decided.tolist()
    assert len(set(decided.tolist())) == 4


def test_scores_are_rounded_as_the_contract_rounds_them() -> None:
    probability = np.concatenate([np.linspace(0, 1, 20_001), [0.0005, 0.3995, 0.39949999, 1.0]])
    assert risk_scores(probability).tolist() == [risk_score(p) for p in probability.tolist()]


@pytest.mark.parametrize("text", ["", "bands: []", "bands: 7", "version: [", "bands:\n- {up_to_minor: null, challenge: x}"])
def test_a_policy_that_is_none_is_refused_with_its_path(tmp_path: Path, text: str) -> None:
    path = tmp_path / "policy.yaml"
    path.write_text(text)
    with pytest.raises(PolicyUnreadableError, match=str(path)):
        read_bands(str(path))
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
