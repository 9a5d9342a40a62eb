"""The policy as people steer it: lists, rules, thresholds by amount band, alert routes. docs/policy.md is its page."""

from gateway.policy.decisions import NO_LISTS, Columns, Decisions
from gateway.policy.policy import OUTCOMES, Policy, load_policy

__all__ = ["NO_LISTS", "OUTCOMES", "Columns", "Decisions", "Policy", "load_policy"]
