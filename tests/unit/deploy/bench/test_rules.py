"""What a decision of the policy costs, measured as `fraudgate bench policy` does."""

from __future__ import annotations

from deploy.bench.rules import PROMISED_BATCH, PROMISED_RULES, PROMISED_US, columns_of, cost_of, policy_of
from gateway.policy import NO_LISTS


def test_fifty_rules_cost_at_most_what_was_promised() -> None:
    policy, columns = policy_of(PROMISED_RULES), columns_of(PROMISED_BATCH)
    policy.decide(columns, True, NO_LISTS)
    cost = cost_of(policy, columns, NO_LISTS)
    # The least of the runs is what others on this machine disturbed least.
    assert cost.least <= PROMISED_US


def test_a_benchmarks_rules_fire_now_and_then_and_all_of_them_where_they_should() -> None:
    columns = columns_of(256)
    assert len(policy_of(PROMISED_RULES).rules) == PROMISED_RULES
    fired = sum(map(len, policy_of(200).decide(columns, True, NO_LISTS).rule_hits))
    assert 0 < fired < 100
    always = policy_of(3, always=True).decide(columns, True, NO_LISTS)
    assert always.rule_hits == [["r0", "r1", "r2"]] * 256
