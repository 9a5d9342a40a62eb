"""A backtest counts a planted fraud ring exactly: hits, money, overlaps, changed decisions, and what it can't know."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from deltalake import DeltaTable, write_deltalake

from deploy.history.backtest import EXAMPLES_MAX, Samples, compare
from deploy.history.backtest_command import backtest
from deploy.history.backtest_rows import DeltaHistory, Known, NoHistoryError
from deploy.history.list_books import BOOKS_MAX, ListBooks, read_books
from gateway.contracts import tables
from gateway.contracts.lists import ListAction, ListChange, book_as_of
from gateway.contracts.settings import Settings
from gateway.policy import load_policy
from model_export.cost import CostModel
from tests.factories_backtest import AS_OF_MS, DAY_MS, PLANTED, RING, START_MS, Payment, write_history, write_policies, write_policy
from tests.unit.deploy.test_evaluate import make_rows, write

NO_BOOKS = ListBooks([])


@pytest.fixture
def local(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    monkeypatch.setenv("FRAUDGATE_HOME", str(tmp_path))
    return Settings(home=str(tmp_path))


def run(capsys: pytest.CaptureFixture[str], *argv: object) -> dict[str, Any]:
    assert backtest([str(a) for a in argv] + ["--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def planted(local: Settings, capsys: pytest.CaptureFixture[str], as_of_ms: int = AS_OF_MS) -> dict[str, Any]:
    write_history(local)
    current, new = write_policies(Path(local.home) / "policies")
    return run(capsys, new, "--policy", current, "--labels-as-of", as_of_ms)


def known(fraud: int = 0, genuine: int = 0, young: int = 0, unseen: int = 0) -> dict[str, int]:
    return {"fraud": fraud, "genuine": genuine, "young": young, "unseen": unseen}


def test_each_rule_is_counted_to_the_payment_and_to_the_minor_unit(local: Settings, capsys: pytest.CaptureFixture[str]) -> None:
    found = planted(local, capsys)
    assert found["payments"] == len(PLANTED)
    assert found["known"] == known(fraud=6, genuine=13, young=1, unseen=1)
    rules = {rule["id"]: rule for rule in found["new"]["rules"]}
    ring = rules["ring"]
    assert (ring["hits"], ring["by_known"]) == (7, known(fraud=4, genuine=1, young=1, unseen=1))
    # The score alone would decline the last of the ring, and what was declined; all else changes with the rule.
    assert ring["alone"] == known(fraud=3, genuine=1, young=1)
    assert (ring["fraud_minor"], ring["good_customers"]) == (16_000, 1)
    assert (ring["overlap_score"], ring["overlap_others"]) == (2, 0)
    # Without it the first fraud is reviewed by the cheap rule, the second passes, the third is reviewed by its score: a review costs 300
    # and misses a tenth of what approving costs, the amount and a fee of 1,500. The good customer would have been reviewed, not declined.
    assert ring["saved_minor"] == pytest.approx((300 + 250) + 4_500 + (300 + 650))
    assert ring["lost_minor"] == pytest.approx((500 + 150) - 300)
    assert set(ring["examples"]["fraud"]) == {"p00", "p01", "p02", "p03"}
    assert ring["examples"]["genuine"] == ["p04"]
    cheap = rules["cheap-ring"]
    assert (cheap["hits"], cheap["by_known"], cheap["alone"]) == (2, known(fraud=1, genuine=1), known())
    assert (cheap["saved_minor"], cheap["lost_minor"], cheap["overlap_others"]) == (0, 0, 2)
    assert found["new"]["overlaps"] == [{"rules": ["rule/ring", "rule/cheap-ring"], "hits": 2}]


def test_shadow_rules_say_what_they_would_have_changed(local: Settings, capsys: pytest.CaptureFixture[str]) -> None:
    rules = {rule["id"]: rule for rule in planted(local, capsys)["new"]["rules"]}
    large, abroad = rules["large"], rules["abroad"]
    assert (large["state"], large["by_known"], large["alone"]) == ("shadow", known(fraud=1, genuine=1), known(fraud=1, genuine=1))
    assert large["saved_minor"] == pytest.approx(151_500 - (300 + 15_150))
    assert large["lost_minor"] == pytest.approx(300)
    assert (abroad["by_known"], abroad["saved_minor"], abroad["lost_minor"]) == (known(fraud=1, genuine=1), 7_500, 1_000)


def test_decisions_that_change_are_counted_by_what_they_were_with_their_money(
    local: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    found = planted(local, capsys)
    changes = {(c["from"], c["to"]): c for c in found["changes"]}
    assert {kind: c["known"] for kind, c in changes.items()} == {
        ("approve", "decline"): known(fraud=2, genuine=1, young=1),
        ("review", "approve"): known(fraud=1, genuine=1),
        ("review", "decline"): known(fraud=1),
    }
    stopped, loosened = changes["approve", "decline"], changes["review", "approve"]
    assert set(stopped["examples"]) == {"p00", "p01", "p04", "p05"}
    assert (stopped["saved_minor"], stopped["lost_minor"]) == (2_500 + 4_500, 650)
    assert (loosened["saved_minor"], loosened["lost_minor"]) == (300, 151_500 - (300 + 15_150))
    assert found["changed"] == 7
    assert found["saved_minor"] - found["lost_minor"] == pytest.approx(found["current"]["cost_minor"] - found["new"]["cost_minor"])
    assert found["current"]["outcomes"]["decline"] == known(fraud=1, unseen=1)
    assert sum(sum(kinds.values()) for kinds in found["new"]["outcomes"].values()) == len(PLANTED)
    assert sum(day["payments"] for day in found["days"].values()) == len(PLANTED)


def test_an_unchanged_policy_decides_as_the_receipts_say_and_changes_nothing(
    local: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    write_history(local)
    current, _ = write_policies(Path(local.home) / "policies")
    found = run(capsys, current, "--policy", current, "--labels-as-of", AS_OF_MS)
    assert (found["current"]["as_logged"], found["current"]["logged"]) == (len(PLANTED), len(PLANTED))
    assert (found["changed"], found["saved_minor"], found["lost_minor"]) == (0, 0, 0)


def test_labels_count_as_of_the_time_asked_for_and_what_is_young_is_never_genuine(
    local: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    # Six days after the payments: the analyst has spoken, the first chargebacks came, one of them not reversed yet; all else is young.
    early = planted(local, capsys, START_MS + 9 * DAY_MS)
    assert early["known"] == known(fraud=6, young=15)
    [ring] = [rule for rule in early["new"]["rules"] if rule["id"] == "ring"]
    assert ring["by_known"] == known(fraud=4, young=3)


def test_history_is_the_same_in_parts_of_any_size(local: Settings) -> None:
    write_history(local, commits=3)
    current, new = (load_policy(str(p)) for p in write_policies(Path(local.home) / "policies"))
    found = []
    for part_rows in (1, 4, 100):
        history = DeltaHistory(local, None, None, AS_OF_MS, 7, part_rows)
        b = compare(current, new, history.parts(), NO_BOOKS, CostModel())
        hits = {key: tally.hits.tolist() for key, tally in b.new.tallies.items()}
        found.append((b.changes.tolist(), round(b.new.cost_minor, 6), hits))
        assert [s.ids for s in b.examples.values()] != []
    assert found[0] == found[1] == found[2]


def test_only_payments_of_the_time_asked_for_are_replayed(local: Settings, capsys: pytest.CaptureFixture[str]) -> None:
    write_history(local)
    current, new = write_policies(Path(local.home) / "policies")
    found = run(capsys, new, "--policy", current, "--from", START_MS + 30 * DAY_MS, "--to", START_MS + 37 * DAY_MS)
    assert found["payments"] == 1
    assert backtest([str(new), "--policy", str(current), "--from", str(START_MS + 38 * DAY_MS)]) == 1
    assert "no receipts of that time" in capsys.readouterr().err


def test_a_new_policy_is_tried_with_the_lists_as_they_were(local: Settings, capsys: pytest.CaptureFixture[str]) -> None:
    """The ring's device came onto the list between the first payment and the second, and off it before the third."""
    payments = tuple(Payment(1_000, 10, "approve", device_id=RING, lists_version=version) for version in (4, 5, 6, -1))
    write_history(local, payments)
    change = ListChange(
        list_id="blocked-devices",
        entity_field="device_id",
        action=ListAction.ADD,
        entity_value=RING,
        expires_at_ms=None,
        reason="a ring",
        who="ann",
        at_ms=1,
    )
    other = {"list_id": "elsewhere", "entity_value": "x"}
    rows = [
        _row(change, 0, **other),
        _row(change, 4),
        _row(change, 5, action="remove"),
        _row(change, 6),
    ]
    write_deltalake(tables.table_uri(local.tables, tables.LIST_CHANGES), pa.Table.from_pylist(rows, LIST_CHANGES))
    policies = Path(local.home) / "policies"
    current, new = write_policy(policies / "current", "current", []), write_policy(policies / "new", "lists", [], lists=True)
    found = run(capsys, new, "--policy", current, "--labels-as-of", AS_OF_MS)
    assert [(c["from"], c["to"], c["examples"]) for c in found["changes"]] == [("approve", "decline", ["p01"])]
    [blocked] = found["new"]["rules"]
    assert (blocked["kind"], blocked["hits"], blocked["alone"]) == ("block list", 1, known(genuine=1))
    books = read_books(local)
    changes = books._changes
    for version in [6, 0, 5, 7, 4, 1, *range(BOOKS_MAX + 3), 5]:
        assert books.at(version).digest == book_as_of(changes, version).digest
    assert len(books._books) <= BOOKS_MAX


LIST_CHANGES = pa.schema(
    [(name, pa.int64() if name.endswith("_ms") else pa.string()) for name in ListChange.__struct_fields__]
    + [("offset", pa.int64())]
)


def _row(change: ListChange, offset: int, **own: str) -> dict[str, Any]:
    return {name: getattr(change, name) for name in ListChange.__struct_fields__} | own | {"offset": offset}


def test_receipts_that_cannot_be_replayed_are_counted_and_left_out(local: Settings) -> None:
    write_history(local)
    decisions = tables.table_uri(local.tables, tables.DECISIONS)
    held = DeltaTable(decisions).to_pyarrow_table()
    orphan = held.slice(0, 1).set_column(0, "transaction_id", pa.array(["nobody"]))
    older = held.slice(1, 2).set_column(4, "feature_fingerprint", pa.array(["older"] * 2))
    write_deltalake(decisions, pa.concat_tables([orphan, older]), mode="append")
    current, new = (load_policy(str(p)) for p in write_policies(Path(local.home) / "policies"))
    history = DeltaHistory(local, None, None, AS_OF_MS, 7)
    found = compare(current, new, history.parts(), NO_BOOKS, CostModel())
    assert found.payments == len(PLANTED)
    assert dict(history.left_out) == {"other features than this code computes": 2, "no payment in silver": 1}


def test_without_receipts_it_says_what_is_missing(local: Settings) -> None:
    with pytest.raises(NoHistoryError, match="fraudgate jobs writes it"):
        list(DeltaHistory(local, None, None, AS_OF_MS, 7).parts())


def test_the_text_and_the_page_have_each_rule_the_matrix_and_what_labels_cannot_tell(
    local: Settings, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    write_history(local)
    current, new = write_policies(Path(local.home) / "policies")
    page = tmp_path / "report.html"
    assert backtest([str(new), "--policy", str(current), "--labels-as-of", str(AS_OF_MS), "--html", str(page)]) == 0
    text = capsys.readouterr().out
    lines = text.splitlines()
    assert next(line for line in lines if line.startswith("ring ")).split()[:6] == ["ring", "live", "decline", "7", "4", "160.00"]
    assert next(line for line in lines if line.startswith("approve ->")).split()[3:7] == ["4", "2", "1", "1"]
    for said in ("1 too young to tell, 1 declined then and never seen", "decides 100.00% as the receipts say", "no chargeback"):
        assert said in text
    html = page.read_text()
    assert html.count("<svg") == 3
    assert all(f"<td>{name}</td>" in html for name in ("ring", "cheap-ring", "abroad", "large"))
    assert "no chargeback" in html


def test_examples_are_few_and_the_same_in_any_order() -> None:
    ids = [f"t{i}" for i in range(200)]
    one, other = Samples(), Samples()
    one.add(ids)
    for i in reversed(ids):
        other.add([i])
    assert one.ids == other.ids
    assert len(one.ids) == EXAMPLES_MAX


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["nowhere"], "nowhere"),
        (["nowhere", "--mature-days", "-1"], "negative"),
        (["nowhere", "--review-misses-share", "2"], "0..1"),
    ],
)
def test_what_cannot_be_meant_is_refused_with_its_reason(argv: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        assert backtest(argv) == 1
    except SystemExit as exc:
        assert exc.code == 2
    assert said in capsys.readouterr().err


def test_what_has_a_cost_comes_first_among_what_can_be_known() -> None:
    assert list(Known) == [Known.FRAUD, Known.GENUINE, Known.YOUNG, Known.UNSEEN]


def test_a_public_data_set_is_replayed_with_features_and_scores_made_from_what_was_known(
    local: Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = make_rows()
    file = write(tmp_path / "payments.parquet", rows)
    large = "amount_minor > 6000"
    policies = Path(local.home) / "policies"
    current = write_policy(policies / "current", "current", [])
    new = write_policy(policies / "new", "new", [("large", "live", large, "decline")])
    found = run(capsys, new, "--policy", current, "--data", file)
    # By default the newest month: these begin in April and end on the 20th of May.
    may = rows["TX_DATETIME"] >= np.datetime64("2018-05-01")
    over, fraud = rows["TX_AMOUNT"] > 60, rows["TX_FRAUD"] == 1
    assert found["payments"] == may.sum()
    assert found["known"] == known(fraud=int((may & fraud).sum()), genuine=int((may & ~fraud).sum()))
    [rule] = found["new"]["rules"]
    assert rule["by_known"] == known(fraud=int((may & over & fraud).sum()), genuine=int((may & over & ~fraud).sum()))
    # Models that know nothing of a payment's own fate still pass fewer of the frauds than of the good payments.
    passed = found["current"]["outcomes"]["approve"]
    assert passed["fraud"] / found["known"]["fraud"] < passed["genuine"] / found["known"]["genuine"]
    assert (found["current"]["logged"], found["left_out"]) == (0, {})
    assert "no policy had a hand" in found["note"]


def test_public_data_without_a_time_to_train_on_before_it_are_refused(
    local: Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(tmp_path / "payments.parquet", make_rows())
    policy = write_policy(Path(local.home) / "policy", "current", [])
    assert backtest([str(policy), "--data", str(file), "--from", "2018-04-01", "--to", "2018-04-03"]) == 1
    assert "to train a model on" in capsys.readouterr().err
    assert backtest([str(policy), "--data", str(file), "--from", "2019-04-01"]) == 1
    assert "no payments of that time" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_handbooks_august_is_backtested_with_the_shipped_policy_and_a_rule_for_each_scenario(
    local: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    path = Path(Settings().data_dir) / "handbook-2018-04-to-08.parquet"
    if not path.exists():
        pytest.skip(f"{path} is not there: the public data sets are optional")
    new = write_policy(Path(local.home) / "policy", "new", [("amount-220", "live", "amount_minor > 22_000", "decline")])
    found = run(capsys, new, "--data", path)
    [rule] = found["new"]["rules"]
    # The book's first scenario: every payment above 220 is a fraud.
    assert rule["by_known"]["genuine"] == 0
    assert rule["by_known"]["fraud"] > 0
    assert list(found["days"])[0] == "2018-08-01"
    assert list(found["days"])[-1] == "2018-08-31"
