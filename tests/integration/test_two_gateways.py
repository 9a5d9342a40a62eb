"""Many charges on one card at the same instant, through both doors and two gateway processes: the k-th sees exactly k - 1."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from deploy.ports import free_ports
from deploy.stack import Stack
from gateway.contracts.decision import Receipt
from gateway.contracts.features import FEATURE_INDEX
from gateway.contracts.settings import Settings
from gateway.contracts.transaction import Transaction, encode_json
from tests.helpers import running_command
from tests.integration.gateway_helpers import Decisions, make_transaction, name, post_together, produce, ready_without
from tests.unit.gateway.factories import write_model

pytestmark = pytest.mark.integration

READY_WITHIN_S = 60
CHARGES = 50


@pytest.fixture(scope="module")
def pair(stack: Stack, settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Settings, Settings]]:
    """The settings of two running gateways of one consumer group."""
    folder: Path = tmp_path_factory.mktemp("pair")
    write_model(folder / "models")
    # Wide budgets: what is tested here is what is counted, on machines however busy.
    wide = dataclasses.replace(
        settings, model_dir=str(folder / "models"), feature_budget_ms=2000, decision_budget_ms=10_000, publish_budget_ms=2000
    )
    one, two = (dataclasses.replace(wide, gateway_port=port, instance_id=f"pair-{i}") for i, port in enumerate(free_ports(2)))
    with (
        running_command(one, "serve", log_path=folder / "one.log") as first,
        running_command(two, "serve", log_path=folder / "two.log") as second,
    ):
        for command, own in ((first, one), (second, two)):
            command.wait_until(lambda own=own: ready_without(own, "redis", "model", "kafka"), READY_WITHIN_S, "both are ready")  # type: ignore[misc]
        yield one, two


@pytest.fixture
def decisions(pair: tuple[Settings, Settings]) -> Iterator[Decisions]:
    tail = Decisions(pair[0])
    yield tail
    tail.close()


def charges(count: int) -> list[Transaction]:
    """Payments of one card at one instant, each at a merchant of its own."""
    card, now_ms = name("card"), time.time_ns() // 1_000_000
    return [make_transaction(name("t"), now_ms, card_id=card, customer_id=f"of-{card}") for _ in range(count)]


def to_kafka(settings: Settings, some: list[Transaction]) -> None:
    produce(settings, [(t.card_id, encode_json(t)) for t in some])


def together(*calls: Callable[[], object]) -> None:
    threads = [threading.Thread(target=call) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def assert_the_kth_saw_k_minus_1(receipts: list[Receipt]) -> None:
    in_order = sorted(receipts, key=lambda r: r.observed_seq[0])
    assert [r.degraded for r in in_order if "request_only" in r.degraded] == []
    for feature in ("card_count_5m", "card_count_24h", "customer_count_1h"):
        assert [int(r.features[FEATURE_INDEX[feature]]) for r in in_order] == list(range(len(receipts))), feature
    first = in_order[0].observed_seq[0]
    assert [r.observed_seq[0] - first for r in in_order] == list(range(len(receipts)))


def test_50_charges_over_http_through_two_gateways(pair: tuple[Settings, Settings], decisions: Decisions) -> None:
    sent = charges(CHARGES)
    one, two = pair
    together(lambda: post_together(one, sent[: CHARGES // 2]), lambda: post_together(two, sent[CHARGES // 2 :]))
    assert_the_kth_saw_k_minus_1(list(decisions.of(t.transaction_id for t in sent).values()))


def test_50_charges_through_kafka(pair: tuple[Settings, Settings], decisions: Decisions) -> None:
    sent = charges(CHARGES)
    to_kafka(pair[0], sent)
    assert_the_kth_saw_k_minus_1(list(decisions.of(t.transaction_id for t in sent).values()))


def test_50_charges_through_both_doors_of_both_gateways(pair: tuple[Settings, Settings], decisions: Decisions) -> None:
    sent = charges(CHARGES)
    one, two = pair
    together(lambda: post_together(one, sent[:15]), lambda: post_together(two, sent[15:30]), lambda: to_kafka(one, sent[30:]))
    assert_the_kth_saw_k_minus_1(list(decisions.of(t.transaction_id for t in sent).values()))


def test_a_retry_through_the_other_gateway_counts_once(pair: tuple[Settings, Settings], decisions: Decisions) -> None:
    one, two = pair
    first, second = charges(2)
    answers = post_together(one, [first]) + post_together(two, [first, second])
    assert [status for status, _ in answers] == [200, 200, 200]
    assert answers[0][1]["risk_score"] == answers[1][1]["risk_score"]
    assert_the_kth_saw_k_minus_1(list(decisions.of([first.transaction_id, second.transaction_id]).values()))
