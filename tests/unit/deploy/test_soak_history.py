"""The history checker of the soak finds what it is there to find: each violation is planted into a clean history, and named."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from deploy.soak.history import History, Poison, Recorded, Sent, check
from deploy.soak.tables import Features, check_tables
from loadtest.openloop.outcomes import ACKNOWLEDGED, FAILED, MIXED_UP, NOT_DUE, is_kafka

COUNT = 40
# Of the HTTP door, and of the Kafka door.
POSTED, FED = 7, 9
assert not is_kafka(POSTED) and is_kafka(FED)


def make_sent(**changed: dict[int, int]) -> Sent:
    """Every payment accepted, with different answers; `changed` sets single values of a column."""
    number = np.arange(COUNT)
    posted = number % 10 != 9
    columns = {
        "status": np.where(posted, 200, ACKNOWLEDGED),
        "attempts": np.ones(COUNT, np.int64),
        "outcome": np.where(posted, number % 4, -1),
        "score": np.where(posted, number * 7, -1),
        "degraded": np.where(posted, number % 3, 0),
        "reasons": np.where(posted, number * 11, 0),
        "latency_us": np.full(COUNT, 5_000),
        "late_us": np.full(COUNT, 100),
    }
    for name, values in changed.items():
        for at, value in values.items():
            columns[name][at] = value
    return Sent(**{name: column.astype(np.int64) for name, column in columns.items()})


def make_recorded(**changed: dict[int, int]) -> Recorded:
    """One receipt and one transaction for each payment, that say what the callers were told."""
    number = np.arange(COUNT)
    columns = {
        "receipts": np.ones(COUNT, np.int64),
        "transactions": np.ones(COUNT, np.int64),
        "outcome": number % 4,
        "score": number * 7,
        "degraded": number % 3,
        "reasons": number * 11,
        "without_redis": np.zeros(COUNT, np.int64),
    }
    for name, values in changed.items():
        for at, value in values.items():
            columns[name][at] = value
    held = {name: column.astype(np.int64) for name, column in columns.items()}
    without_redis = held.pop("without_redis") > 0
    return Recorded(**held, without_redis=without_redis, strangers=[])


def wrong(history: History) -> dict[str, list[str]]:
    return {name: found for name, found in history.wrong.items() if found}


def test_a_history_in_which_all_is_well_has_no_complaints() -> None:
    history = check(make_sent(), make_recorded(), Poison([(0, 5), (1, 3)], [(1, 3), (0, 5)]))
    assert history.clean and history.complaints() == []
    assert (history.accepted, history.decided, history.unanswered_decided) == (COUNT, COUNT, 0)


@pytest.mark.parametrize("number", [POSTED, FED])
def test_an_accepted_payment_without_a_receipt_is_lost(number: int) -> None:
    assert wrong(check(make_sent(), make_recorded(receipts={number: 0}), Poison())) == {"lost": [str(number)]}


@pytest.mark.parametrize("number", [POSTED, FED])
def test_a_payment_with_two_receipts_is_duplicated(number: int) -> None:
    assert wrong(check(make_sent(), make_recorded(receipts={number: 2}), Poison())) == {"duplicated": [str(number)]}


def test_a_payment_sent_twice_while_redis_was_away_is_told_apart_from_a_duplicate() -> None:
    twice = {"receipts": {POSTED: 2}, "transactions": {POSTED: 2}, "outcome": {POSTED: 99}}
    anew = check(make_sent(attempts={POSTED: 2}), make_recorded(**twice, without_redis={POSTED: 1}), Poison())
    assert anew.clean and anew.decided_anew == 1
    # Sent once, or decided with Redis both times: that is our doing.
    for sent, away in ((make_sent(), 1), (make_sent(attempts={POSTED: 2}), 0)):
        history = check(sent, make_recorded(**twice, without_redis={POSTED: away}), Poison())
        assert wrong(history).keys() == {"duplicated", "changed", "published_twice"}
        assert history.decided_anew == 0


def test_two_receipts_are_a_violation_also_when_nobody_got_an_answer() -> None:
    history = check(make_sent(status={POSTED: FAILED}), make_recorded(receipts={POSTED: 2}), Poison())
    assert wrong(history) == {"duplicated": [str(POSTED)]}


def test_a_payment_that_failed_may_be_decided_or_not() -> None:
    sent = make_sent(status={POSTED: FAILED, 8: 429})
    history = check(sent, make_recorded(receipts={8: 0}, transactions={8: 0}), Poison())
    assert history.clean
    assert (history.accepted, history.unanswered_decided) == (COUNT - 2, 1)


def test_a_receipt_of_a_payment_that_was_never_sent_is_invented() -> None:
    history = check(make_sent(status={POSTED: NOT_DUE}), make_recorded(), Poison())
    assert wrong(history) == {"invented": [str(POSTED)]}


def test_a_receipt_with_a_foreign_name_is_invented() -> None:
    recorded = dataclasses.replace(make_recorded(), strangers=["poison-n00001"])
    assert wrong(check(make_sent(), recorded, Poison())) == {"invented": ["poison-n00001"]}


@pytest.mark.parametrize("column", ["outcome", "score", "degraded", "reasons"])
def test_an_answer_that_is_not_the_receipts_is_changed(column: str) -> None:
    assert wrong(check(make_sent(), make_recorded(**{column: {POSTED: 99}}), Poison())) == {"changed": [str(POSTED)]}


def test_what_nobody_was_told_cannot_be_changed() -> None:
    assert check(make_sent(), make_recorded(outcome={FED: 99}), Poison()).clean


def test_an_answer_of_another_payment_is_told() -> None:
    assert wrong(check(make_sent(status={POSTED: MIXED_UP}), make_recorded(), Poison())) == {"mixed_up": [str(POSTED)]}


def test_a_payment_missing_on_the_topic_of_transactions_or_twice_there_is_told() -> None:
    history = check(make_sent(), make_recorded(transactions={POSTED: 0, FED: 2}), Poison())
    assert wrong(history) == {"not_published": [str(POSTED)], "published_twice": [str(FED)]}


def test_poison_is_in_quarantine_once_and_nothing_else_is() -> None:
    history = check(make_sent(), make_recorded(), Poison([(0, 1), (0, 2), (0, 3)], [(0, 2), (0, 3), (0, 3), (2, 9)]))
    assert wrong(history) == {"poison_lost": ["0:1"], "poison_twice": ["0:3"], "quarantined_unasked": ["2:9"]}


def test_a_complaint_says_how_many_and_names_the_first_ten() -> None:
    [complaint] = check(make_sent(), make_recorded(receipts=dict.fromkeys(range(12), 0)), Poison()).complaints()
    assert complaint == "accepted, and no decision stands on the topic decisions: 12 (0, 1, 2, 3, 4, 5, 6, 7, 8, 9 ...)"


def test_tables_hold_what_was_accepted_once_each() -> None:
    accepted, once = make_sent(status={3: FAILED}).accepted, np.ones(COUNT, np.int64)
    silver, decisions = once.copy(), once.copy()
    silver[[3, 4]], decisions[5] = 0, 2
    found = {name: numbers for name, numbers in check_tables(accepted, silver, decisions).items() if numbers}
    assert found == {"not in silver": ["4"], "twice in the table decisions": ["5"]}


def make_features(**changed: int) -> Features:
    values = {
        "receipts": 100,
        "compared": 90,
        "values": 5400,
        "different": 0,
        "without": 5,
        "stale": 5,
        "unverifiable": 0,
        "late": 2,
    }
    return Features(**values | changed, examples=["t-1 card_count_1h 3.0 instead of 2.0"])


def test_a_wrong_feature_value_is_a_complaint_that_names_it() -> None:
    assert make_features().complaints() == []
    [complaint] = make_features(different=1).complaints()
    assert complaint == "1 of 5,400 feature values are not what they should be: t-1 card_count_1h 3.0 instead of 2.0"


def test_features_of_which_none_could_be_compared_are_no_proof() -> None:
    assert make_features(receipts=0, compared=0, values=0).complaints() == ["no receipt was there to compare features of"]
    assert make_features(compared=0, values=0, unverifiable=2).complaints() == ["no feature value could be compared"]
    assert make_features(unverifiable=6).complaints() == ["6 of 100 receipts rest on an order that nobody can tell"]
