"""The simulator: the same seed gives the same bytes, every transaction is valid, fraud is as asked for."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.contracts.label import Label
from gateway.contracts.transaction import check, encode_json
from loadtest.events import Event
from loadtest.simulator import PATTERNS, Simulator, SimulatorConfig
from loadtest.simulator.config import DAY_MS, HOUR_MS, SEED_MAX
from loadtest.simulator.stream import RECENT_EVENTS_MAX

DIGEST = """
import hashlib
from gateway.contracts.transaction import encode_json
from loadtest.simulator import Simulator, SimulatorConfig
s = Simulator(SimulatorConfig(seed=11, cards=500))
h = hashlib.sha256()
for e in s.events(3000):
    h.update(encode_json(e.transaction) + b"\\n" + str(e.pattern).encode())
for l in s.labels_remaining():
    h.update(repr(l).encode())
print(h.hexdigest())
"""


def digest(events: list[Event], labels: list[Label]) -> str:
    h = hashlib.sha256()
    for e in events:
        h.update(encode_json(e.transaction) + b"\n" + str(e.pattern).encode())
    for label in labels:
        h.update(repr(label).encode())
    return h.hexdigest()


@pytest.fixture(scope="module")
def run() -> tuple[Simulator, list[Event]]:
    simulator = Simulator(SimulatorConfig())
    return simulator, list(simulator.events(60_000))


def test_the_same_seed_gives_the_same_bytes_in_every_process() -> None:
    simulator = Simulator(SimulatorConfig(seed=11, cards=500))
    here = digest(list(simulator.events(3000)), simulator.labels_remaining())
    for hash_seed in ("1", "2"):
        env = {**os.environ, "PYTHONHASHSEED": hash_seed}
        out = subprocess.run([sys.executable, "-c", DIGEST], env=env, capture_output=True, text=True, check=True, timeout=60)
        assert out.stdout.strip() == here


def test_another_seed_gives_other_bytes() -> None:
    one, other = (list(Simulator(SimulatorConfig(seed=s, cards=300)).events(200)) for s in (1, 2))
    assert [e.transaction.card_id for e in one] != [e.transaction.card_id for e in other]


def test_a_simulation_taken_in_pieces_is_the_same_simulation() -> None:
    whole, pieces = Simulator(SimulatorConfig(cards=300)), Simulator(SimulatorConfig(cards=300))
    expected = list(whole.events(2_000))
    assert [e for count in (1, 0, 999, 1_000) for e in pieces.events(count)] == expected
    assert pieces.labels_remaining() == whole.labels_remaining()


@settings(max_examples=20, deadline=None)
@given(st.integers(0, SEED_MAX), st.sampled_from([200, 1_000]), st.sampled_from([500, 20_000, 5_000_000]))
def test_every_transaction_of_every_seed_passes_the_checks(seed: int, cards: int, events_per_day: int) -> None:
    config = SimulatorConfig(seed=seed, cards=cards, events_per_day=events_per_day, fraud_rate=0.1)
    last_ms, ids = config.start_ms, set()
    for event in Simulator(config).events(1_500):
        t = event.transaction
        check(t, t.event_time_ms)
        assert t.event_time_ms >= last_ms
        last_ms = t.event_time_ms
        ids.add(t.transaction_id)
    assert len(ids) == 1_500


def test_ids_sort_like_event_times(run: tuple[Simulator, list[Event]]) -> None:
    ids = [e.transaction.transaction_id for e in run[1]]
    assert ids == sorted(ids)


def test_fraud_is_one_to_two_percent_and_of_every_pattern(run: tuple[Simulator, list[Event]]) -> None:
    events = run[1]
    for stretch in (events[:20_000], events):
        rate = sum(e.is_fraud for e in stretch) / len(stretch)
        assert 0.01 <= rate <= 0.02
        assert {e.pattern for e in stretch} == {None, *(p.name for p in PATTERNS)}
    assert all(e.is_fraud == (e.pattern is not None) for e in events)


def test_no_merchant_has_more_than_two_percent_of_the_traffic(run: tuple[Simulator, list[Event]]) -> None:
    merchants = Counter(e.transaction.merchant_id for e in run[1])
    assert max(merchants.values()) / len(run[1]) < 0.02
    # And it is a skewed world all the same: a tenth of the merchants has a quarter of the traffic at least.
    busiest = merchants.most_common(len(merchants) // 10)
    assert sum(count for _, count in busiest) / len(run[1]) > 0.25


def test_people_sleep_at_night(run: tuple[Simulator, list[Event]]) -> None:
    german = Counter((e.transaction.event_time_ms + HOUR_MS) % DAY_MS // HOUR_MS for e in run[1] if e.transaction.country == "DE")
    assert german[18] > 5 * german[3]


def test_some_customers_have_two_cards_and_some_addresses_two_customers(run: tuple[Simulator, list[Event]]) -> None:
    cards = {(e.transaction.customer_id, e.transaction.card_id) for e in run[1]}
    per_customer = Counter(Counter(customer for customer, _ in cards).values())
    assert per_customer[1] > 5 * per_customer[2] > 0
    homes = {(e.transaction.ip, e.transaction.customer_id) for e in run[1] if e.transaction.ip and not e.is_fraud}
    assert any(count > 1 for count in Counter(ip for ip, _ in homes).values())


def test_card_testing_is_a_burst_of_tiny_amounts_from_one_device_at_one_merchant(run: tuple[Simulator, list[Event]]) -> None:
    incident = next(i for i in run[0].incidents if i.pattern == "card_testing")
    assert len(incident.cards) >= 15
    assert len(incident.devices) == len(incident.ips) == len(incident.merchants) == 1
    assert incident.rows[-1][0] - incident.rows[0][0] <= 25 * 60_000


def test_cards_of_a_compromised_merchant_had_been_there(run: tuple[Simulator, list[Event]]) -> None:
    incident = next(i for i in run[0].incidents if i.pattern == "compromised_merchant")
    visited: dict[str, set[str]] = {}
    for e in run[1]:
        if not e.is_fraud and e.transaction.event_time_ms < incident.started_ms:
            visited.setdefault(e.transaction.card_id, set()).add(e.transaction.merchant_id)
    assert set.intersection(*(visited[card] for card in incident.cards))


def test_a_taken_over_account_pays_too_far_away_from_where_it_just_paid(run: tuple[Simulator, list[Event]]) -> None:
    incident = next(i for i in run[0].incidents if i.pattern == "account_takeover")
    known = {e.transaction.device_id for e in run[1] if e.transaction.card_id == incident.cards[0] and not e.is_fraud}
    assert len(incident.cards) == 1
    assert not known & set(incident.devices)
    assert incident.rows[0][13] is not None


def test_a_bin_attack_keeps_to_one_issuer_and_merchant(run: tuple[Simulator, list[Event]]) -> None:
    incident = next(i for i in run[0].incidents if i.pattern == "bin_attack")
    assert len({row[11] for row in incident.rows}) == len(incident.merchants) == 1
    assert len(incident.cards) == len(incident.rows) > 10


def test_inflated_amounts_are_about_five_times_the_usual(run: tuple[Simulator, list[Event]]) -> None:
    usual = sorted(e.transaction.amount_minor for e in run[1] if e.pattern is None)
    inflated = sorted(e.transaction.amount_minor for e in run[1] if e.pattern == "amount_inflation")
    assert 3 < inflated[len(inflated) // 2] / usual[len(usual) // 2] < 8


def test_only_the_chosen_patterns_happen() -> None:
    events = list(Simulator(SimulatorConfig(shares={"bin_attack": 1.0}, fraud_rate=0.05)).events(10_000))
    assert {e.pattern for e in events} == {None, "bin_attack"}
    assert not any(e.is_fraud for e in Simulator(SimulatorConfig(fraud_rate=0.0)).events(5_000))


def test_labels_come_in_order_after_their_payments_and_genuine_ones_are_rare() -> None:
    simulator = Simulator(SimulatorConfig())
    events = {e.transaction.transaction_id: e for e in simulator.events(50_000)}
    middle_ms = simulator.config.start_ms + 3 * DAY_MS
    due = simulator.labels_due(middle_ms)
    assert due and all(label.reported_at_ms <= middle_ms for label in due)
    labels = due + simulator.labels_remaining()
    assert [label.reported_at_ms for label in labels] == sorted(label.reported_at_ms for label in labels)
    last = {label.transaction_id: label for label in labels if label.transaction_id in events}
    assert all(label.reported_at_ms > events[i].transaction.event_time_ms for i, label in last.items())
    # The last word about a payment is the truth, and most fraud is reported in the end.
    assert all(label.is_fraud == events[i].is_fraud for i, label in last.items())
    frauds = [i for i, e in events.items() if e.is_fraud]
    assert 0.9 < sum(i in last for i in frauds) / len(frauds) < 1.0
    assert sum(i in last for i in events) - len(frauds) < 0.02 * len(events)
    states = {(label.source, label.state) for label in labels}
    assert states >= {
        ("chargeback", "reported"),
        ("chargeback", "confirmed"),
        ("chargeback", "reversed"),
        ("analyst", "false_positive"),
    }


def test_memory_stays_bounded_however_long_it_runs() -> None:
    simulator = Simulator(SimulatorConfig(cards=1_000, events_per_day=200_000))
    for _ in simulator.events(120_000):
        pass
    assert sum(len(s.card) for s in simulator._recent) <= RECENT_EVENTS_MAX + 10_000
    assert all(not s.rows for s in simulator._recent)


@pytest.mark.parametrize("wrong", [{"seed": -1}, {"seed": SEED_MAX + 1}, {"cards": 1}, {"fraud_rate": 0.9}, {"events_per_day": 0}])
def test_a_setting_out_of_bounds_is_named(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        SimulatorConfig(**wrong)  # type: ignore[arg-type]


def test_a_pattern_of_no_such_name_is_refused() -> None:
    with pytest.raises(ValueError, match="card_magic"):
        SimulatorConfig(shares={"card_magic": 1.0})
