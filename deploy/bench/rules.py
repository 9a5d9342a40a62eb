"""`fraudgate bench policy`: what a decision of the policy costs, by rules and batch. Pinned to one core; about ten seconds.

Features are lognormal, a fifth of them unknown, and limits so high that a rule fires for about one payment in fifty: as in use, most
rules end at their first test. The last lines have rules that fire for every payment, and lists to be looked up.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import yaml

from gateway.contracts.features import FEATURE_NAMES
from gateway.contracts.lists import ListAction, ListBook, ListChange
from gateway.contracts.transaction import Transaction
from gateway.kafka.avro import encode_transaction
from gateway.policy import NO_LISTS, Columns, Policy, load_policy
from gateway.policy.document import POLICY_FILE
from gateway.policy.folder import SHIPPED, read_folder
from gateway.scoring.requests import read_requests

RUNS, REPEATS = 15, 30
BATCHES = (1, 64, 256)
# What the issue of the policy asks for: so many rules, at so many payments a batch, cost at most so much a decision.
PROMISED_RULES, PROMISED_BATCH, PROMISED_US = 50, 64, 5.0
SEED = 7
ENTRIES = 10_000
NOW_MS = 1_795_500_000_000
# Five kinds of rules, as people write them; {a} and {b} are features, {n} a number that few payments reach.
KINDS = (
    "{a} >= {n} and {b} > 2",
    '{a} >= {n} and channel in ["ecom", "moto"] and amount_minor <= 50000',
    "amount_minor > {n} * card_amount_mean_30d + 90000 and not ({a} <= 3 or {b} <= 3)",
    "country != card_country and {a} / {b} > {n}",
    'card_speed > {n}00 and card_distance_km > 100 and mcc in ["7995", "6051"]',
)
COUNTS = tuple(name for name in FEATURE_NAMES if "_count_" in name or "_distinct_" in name)


def policy_of(rules: int, always: bool = False) -> Policy:
    """The shipped bands and lists with so many rules; `always`: each fires for every payment."""
    written = []
    for i in range(rules):
        a, b = COUNTS[i % len(COUNTS)], COUNTS[(7 * i + 3) % len(COUNTS)]
        when = "amount_minor >= 0" if always else KINDS[i % len(KINDS)].format(a=a, b=b, n=50 + i % 7)
        rule = {"id": f"r{i}", "state": "live", "owner": "o", "text": "t", "when": when, "outcome": "review"}
        written.append(rule | {"reason": "CARD_VELOCITY"})
    files = {POLICY_FILE: read_folder(SHIPPED)[POLICY_FILE], "rules/all.yaml": yaml.safe_dump({"rules": written}).encode()}
    return Policy(files, "bench")


def columns_of(rows: int) -> Columns:
    rng = np.random.default_rng(SEED)
    payloads = [
        encode_transaction(
            Transaction(
                transaction_id=f"t{i}",
                event_time_ms=NOW_MS,
                card_id=f"card-{i}",
                customer_id=f"customer-{i}",
                merchant_id=f"merchant-{i % 20}",
                amount_minor=int(rng.lognormal(8, 1)),
                currency="EUR",
                channel="ecom" if i % 2 else "pos",
                mcc="5411",
                country="DE",
                device_id=f"device-{i}",
                ip=f"10.0.0.{i}",
                card_country="DE" if i % 10 else "FR",
            )
        )
        for i in range(rows)
    ]
    matrix = rng.lognormal(1.0, 1.0, (rows, len(FEATURE_NAMES))).astype(np.float32)
    matrix[rng.random(matrix.shape) < 0.2] = np.nan
    return Columns(
        read_requests(payloads, np.full(rows, -1, np.int64)),
        np.arange(rows),
        matrix,
        np.floor(rng.beta(1, 12, rows) * 1000),
        np.full(rows, NOW_MS, np.int64),
    )


def book_of(policy: Policy) -> ListBook:
    """ENTRIES values on each of the policy's lists, none of which pays."""
    changes = (
        ListChange(
            list_id=declared.id,
            entity_field=declared.field,
            action=ListAction.ADD,
            entity_value=f"nobody-{i}",
            expires_at_ms=None,
            reason="",
            who="bench",
            at_ms=0,
        )
        for declared in policy.lists
        for i in range(ENTRIES)
    )
    return ListBook().applied(enumerate(changes))


@dataclass(frozen=True)
class Cost:
    """Microseconds of CPU a decision: the median of RUNS runs, the least and the most."""

    median: float
    least: float
    most: float
    hits: float


def cost_of(policy: Policy, columns: Columns, lists: ListBook) -> Cost:
    rows = len(columns.rows)
    found = []
    for _ in range(RUNS):
        begin_s = time.thread_time()
        for _ in range(REPEATS):
            decided = policy.decide(columns, True, lists)
        found.append((time.thread_time() - begin_s) / REPEATS / rows * 1e6)
    return Cost(statistics.median(found), min(found), max(found), sum(map(len, decided.rule_hits)) / rows)


def bench(argv: Sequence[str]) -> int:
    """Exit status 1 when the promise is not kept."""
    parser = argparse.ArgumentParser(prog="fraudgate bench policy", description="what a decision of the policy costs")
    parser.add_argument("--most-us", type=float, default=PROMISED_US, help="fail above, for 50 rules at a batch of 64")
    args = parser.parse_args(argv)
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    shipped, always = load_policy(""), policy_of(PROMISED_RULES, always=True)
    cases = [(f"{len(shipped.rules)}, as shipped", shipped, NO_LISTS)]
    cases += [(f"{n}", policy_of(n), NO_LISTS) for n in (PROMISED_RULES, 200, 1000)]
    promised = policy_of(PROMISED_RULES)
    entries = f"{PROMISED_RULES}, {len(promised.lists)} lists of {ENTRIES:,}"
    cases += [(entries, promised, book_of(promised)), (f"{PROMISED_RULES}, all fire", always, NO_LISTS)]
    print(f"us of CPU a decision: median (least to most of {RUNS} runs), hits a decision\n")
    print(f"{'rules':<28}" + "".join(f"{f'batch of {batch}':>30}" for batch in BATCHES))
    kept = True
    for name, policy, lists in cases:
        shown = ""
        for batch in BATCHES:
            columns = columns_of(batch)
            policy.decide(columns, True, lists)
            cost = cost_of(policy, columns, lists)
            shown += f"{f'{cost.median:.2f} ({cost.least:.2f} to {cost.most:.2f}), {cost.hits:.2f}':>30}"
            if name == str(PROMISED_RULES) and batch == PROMISED_BATCH:
                kept = cost.median <= args.most_us
        print(f"{name:<28}{shown}", flush=True)
    if not kept:
        print(f"bench policy: {PROMISED_RULES} rules cost more than {args.most_us} us a decision", file=sys.stderr)
    return 0 if kept else 1
