"""Two policies over the same history: what each rule and list met, what that was worth, and which decisions differ. About 3 us a receipt.

`compare` is called by deploy/history/backtest_command.py with parts from deploy/history/backtest_rows.py (receipts) or backtest_public.py
(public data). What it holds grows with the policies, not with history.

What a rule saves and loses is measured against the same policy without it: a payment of which another rule, a list or the score asks as
much counts among its hits, and changes nothing. For a shadow rule it is what it would have changed, had it been live. Only payments of
which it is known whether they were frauds have a cost; the others are counted beside them.
"""

from __future__ import annotations

import heapq
import zlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from deploy.history.backtest_rows import DAY_MS, Floats, Int64s, Known, Part
from deploy.history.list_books import ListBooks
from gateway.contracts.decision import SEVERITY, Outcome
from gateway.policy import Columns, Decisions, Policy
from gateway.policy.declared import DEFAULT_OUTCOME
from gateway.policy.document import ListKind, RuleState
from model_export.cost import CostModel

OUTCOMES = tuple(sorted(Outcome, key=lambda outcome: SEVERITY[outcome]))
DECLINE = SEVERITY[Outcome.DECLINE]
# Transaction ids that are shown of each rule and each changed decision.
EXAMPLES_MAX = 5
# Customers that are told apart for each rule; of more it is said that there are at least so many.
CUSTOMERS_MAX = 50_000
# Pairs of rules that met the same payments, the most frequent of which are shown.
PAIRS_MAX = 10_000
KINDS = len(Known)
CURRENT, NEW = "current", "new"


@dataclass
class Samples:
    """A few ids, the same ones whatever the order in which history is read: those that hash lowest."""

    held: list[tuple[int, str]] = field(default_factory=list)

    def add(self, ids: Iterable[str]) -> None:
        for one in ids:
            entry = (-zlib.crc32(one.encode()), one)
            if len(self.held) < EXAMPLES_MAX:
                heapq.heappush(self.held, entry)
            elif entry > self.held[0]:
                heapq.heapreplace(self.held, entry)

    @property
    def ids(self) -> list[str]:
        return [one for _, one in sorted(self.held, reverse=True)]


@dataclass
class Tally:
    """One rule or list of one policy. `hits` by Known; `alone` those of them that only it decides, by Known. Money in minor units.

    `saved` and `lost` are the cost of the same payments without it less that with it, where that is more, and where it is less.
    `by_score` and `by_others` are hits of which the score, another rule or a list asks as much.
    """

    id: str
    kind: str
    state: str
    owner: str
    text: str
    severity: int
    hits: Int64s = field(default_factory=lambda: np.zeros(KINDS, np.int64))
    alone: Int64s = field(default_factory=lambda: np.zeros(KINDS, np.int64))
    fraud_minor: int = 0
    saved_minor: float = 0.0
    lost_minor: float = 0.0
    by_score: int = 0
    by_others: int = 0
    errors: int = 0
    customers: set[str] = field(default_factory=set)
    frauds: Samples = field(default_factory=Samples)
    genuine: Samples = field(default_factory=Samples)


@dataclass
class Side:
    """One policy over all of history. `outcomes` (outcomes, known) counts, `amount_minor` likewise adds up, `cost_minor` of the known."""

    policy: Policy
    tallies: dict[str, Tally]
    outcomes: Int64s = field(default_factory=lambda: np.zeros((len(OUTCOMES), KINDS), np.int64))
    amount_minor: Int64s = field(default_factory=lambda: np.zeros((len(OUTCOMES), KINDS), np.int64))
    cost_minor: float = 0.0
    pairs: Counter[tuple[str, str]] = field(default_factory=Counter)
    as_logged: int = 0
    logged: int = 0


@dataclass
class Day:
    """Of one day of event time: payments, frauds among them, and by policy what it cost and how many it declined."""

    payments: int = 0
    frauds: int = 0
    cost_minor: dict[str, float] = field(default_factory=lambda: {CURRENT: 0.0, NEW: 0.0})
    declined: dict[str, int] = field(default_factory=lambda: {CURRENT: 0, NEW: 0})


@dataclass
class Backtest:
    """`changes` (from, to, known) counts decisions; `saved_minor` and `lost_minor` by the same. `known` counts payments."""

    current: Side
    new: Side
    costs: CostModel
    known: Int64s = field(default_factory=lambda: np.zeros(KINDS, np.int64))
    changes: Int64s = field(default_factory=lambda: np.zeros((len(OUTCOMES), len(OUTCOMES), KINDS), np.int64))
    saved_minor: Floats = field(default_factory=lambda: np.zeros((len(OUTCOMES), len(OUTCOMES))))
    lost_minor: Floats = field(default_factory=lambda: np.zeros((len(OUTCOMES), len(OUTCOMES))))
    examples: dict[tuple[int, int], Samples] = field(default_factory=dict)
    days: dict[int, Day] = field(default_factory=dict)

    @property
    def payments(self) -> int:
        return int(self.known.sum())

    @property
    def changed(self) -> int:
        return self.payments - int(np.trace(self.changes.sum(axis=2)))


def compare(current: Policy, new: Policy, parts: Iterable[Part], books: ListBooks, costs: CostModel) -> Backtest:
    """Decides every part by both policies."""
    found = Backtest(Side(current, tallies_of(current)), Side(new, tallies_of(new)), costs)
    for part in parts:
        _add(found, part, books)
    return found


def tallies_of(policy: Policy) -> dict[str, Tally]:
    """An empty tally for each list and each rule that isn't off, by "kind/id"."""
    found = [
        Tally(d.id, f"{d.kind.value} list", RuleState.LIVE.value, d.owner, d.text, SEVERITY[d.outcome or DEFAULT_OUTCOME[d.kind]])
        for d in policy.lists
    ]
    found += [
        Tally(r.id, "rule", r.state.value, r.owner, r.text, SEVERITY[r.outcome])
        for r in policy.rules
        if r.state is not RuleState.OFF
    ]
    return {_key("rule" if tally.kind == "rule" else "list", tally.id): tally for tally in found}


def decide(policy: Policy, part: Part, books: ListBooks) -> Decisions:
    """All rows of a part, each with the lists of its version and with or without features as it was."""
    groups = np.stack([part.lists_version, part.has_features.astype(np.int64)], axis=1)
    distinct, group = np.unique(groups, axis=0, return_inverse=True)
    group = group.reshape(-1)
    whole = Decisions(
        outcome=[Outcome.APPROVE] * len(part),
        severity=np.zeros(len(part), np.int64),
        reasons=[[]] * len(part),
        rule_hits=[[]] * len(part),
        list_hits=[[]] * len(part),
        shadow_hits=[[]] * len(part),
        rule_errors=[[]] * len(part),
        floors=np.zeros((len(part), 3)),
    )
    for i, (version, has_features) in enumerate(distinct.tolist()):
        rows = np.flatnonzero(group == i)
        columns = Columns(part.requests, rows, part.matrix[rows], part.score[rows], part.received_at_ms[rows])
        some = policy.decide(columns, has_features=bool(has_features), lists=books.at(version))
        whole.severity[rows] = some.severity
        whole.floors[rows] = some.floors
        for to, of in (
            (whole.rule_hits, some.rule_hits),
            (whole.list_hits, some.list_hits),
            (whole.shadow_hits, some.shadow_hits),
            (whole.rule_errors, some.rule_errors),
        ):
            for row, hits in zip(rows.tolist(), of, strict=True):
                if hits:
                    to[row] = hits
    return whole


@dataclass(frozen=True)
class _Hits:
    """(hits,) each: the row, the place of what hit in `keys`, and what it asks for."""

    row: Int64s
    of: Int64s
    severity: Int64s


def _add(found: Backtest, part: Part, books: ListBooks) -> None:
    ids = part.transaction_id
    customers = part.customer_id
    known = part.known.astype(np.int64)
    amount = part.requests.amount_minor
    costed = known <= Known.GENUINE
    costs = np.stack([found.costs.of(np.full(len(part), s), amount, known == Known.FRAUD) for s in range(len(OUTCOMES))])
    costs[:, ~costed] = 0.0
    severity: dict[str, Int64s] = {}
    for name, side in ((CURRENT, found.current), (NEW, found.new)):
        decisions = decide(side.policy, part, books)
        severity[name] = decisions.severity
        np.add.at(side.outcomes, (decisions.severity, known), 1)
        np.add.at(side.amount_minor, (decisions.severity, known), amount)
        side.cost_minor += float(_picked(costs, decisions.severity).sum())
        side.logged += int((part.logged >= 0).sum())
        side.as_logged += int((part.logged == decisions.severity).sum())
        _add_hits(side, part, decisions, known, amount, costs, (ids, customers))
    found.known += np.bincount(known, minlength=KINDS)
    before, after = severity[CURRENT], severity[NEW]
    np.add.at(found.changes, (before, after, known), 1)
    saving = _picked(costs, before) - _picked(costs, after)
    np.add.at(found.saved_minor, (before, after), np.maximum(saving, 0.0))
    np.add.at(found.lost_minor, (before, after), np.maximum(-saving, 0.0))
    for b, a in np.unique(np.stack([before, after], axis=1)[before != after], axis=0).tolist():
        rows = np.flatnonzero((before == b) & (after == a))
        found.examples.setdefault((b, a), Samples()).add(ids.take(rows).to_pylist())
    _add_days(found, part, severity, costs, known)


def _add_days(found: Backtest, part: Part, severity: dict[str, Int64s], costs: Floats, known: Int64s) -> None:
    day = part.requests.t_ms // DAY_MS
    for d in np.unique(day).tolist():
        here = day == d
        of_day = found.days.setdefault(d, Day())
        of_day.payments += int(here.sum())
        of_day.frauds += int((known[here] == Known.FRAUD).sum())
        for name, decided in severity.items():
            of_day.cost_minor[name] += float(_picked(costs, decided)[here].sum())
            of_day.declined[name] += int((decided[here] == DECLINE).sum())


def _picked(costs: Floats, severity: Int64s) -> Floats:
    """(rows,): what the outcome of each row costs."""
    out: Floats = np.take_along_axis(costs, severity[None, :], axis=0)[0]
    return out


def _add_hits(
    side: Side, part: Part, decisions: Decisions, known: Int64s, amount: Int64s, costs: Floats, names: tuple[object, object]
) -> None:
    keys = list(side.tallies)
    place = {key: i for i, key in enumerate(keys)}
    asks = np.array([tally.severity for tally in side.tallies.values()], np.int64)
    live = _join(_hits(decisions.list_hits, "list", place, asks), _hits(decisions.rule_hits, "rule", place, asks))
    score = _by_score(side.policy, part, decisions)
    # What the live ones ask for at each row, and without each single one of them.
    top, ties, second = _tops(live, len(part))
    others = np.where((live.severity < top[live.row]) | (ties[live.row] > 1), top[live.row], second[live.row])
    without = np.maximum(others, score[live.row])
    # An allow list silences: what would be asked without it, this doesn't know.
    silencing = np.array([tally.kind == f"{ListKind.ALLOW.value} list" for tally in side.tallies.values()], bool)
    without = np.where(silencing[live.of], decisions.severity[live.row], without)
    _count(side, keys, live, (without, decisions.severity[live.row]), (others, score[live.row]), known, amount, costs, names)
    shadow = _hits(decisions.shadow_hits, "rule", place, asks)
    now = decisions.severity[shadow.row]
    _count(
        side,
        keys,
        shadow,
        (now, np.maximum(now, shadow.severity)),
        (top[shadow.row], score[shadow.row]),
        known,
        amount,
        costs,
        names,
    )
    failed = _hits(decisions.rule_errors, "rule", place, asks)
    for i, n in Counter(failed.of.tolist()).items():
        side.tallies[keys[i]].errors += n
    _add_pairs(side, keys, _join(live, shadow))


def _by_score(policy: Policy, part: Part, decisions: Decisions) -> Int64s:
    """What the score alone asks for, (rows,), 0 where a list keeps it silent."""
    asked = (part.score[:, None] >= decisions.floors).sum(axis=1)
    edges = np.array([band.up_to_minor for band in policy.bands if band.up_to_minor is not None], np.int64)
    without_model = np.array([SEVERITY[band.without_model] for band in policy.bands], np.int64)
    static = np.isnan(part.score) & ~part.has_features
    asked = np.where(static, without_model[np.searchsorted(edges, part.requests.amount_minor, side="left")], asked)
    declared = {d.id: d for d in policy.lists}
    for row, hits in enumerate(decisions.list_hits):
        if hits:
            blocking = [
                SEVERITY[declared[h].outcome or DEFAULT_OUTCOME[ListKind.BLOCK]] for h in hits if _is(declared[h], ListKind.BLOCK)
            ]
            allowed = not blocking and any(_is(declared[h], ListKind.ALLOW) for h in hits)
            if allowed or DECLINE in blocking:
                asked[row] = 0
    return asked.astype(np.int64)


def _is(declaration: object, kind: ListKind) -> bool:
    return getattr(declaration, "kind", None) is kind


def _hits(of: Sequence[Sequence[str]], kind: str, place: dict[str, int], asks: Int64s) -> _Hits:
    rows: list[int] = []
    what: list[int] = []
    for row, hits in enumerate(of):
        for one in hits:
            rows.append(row)
            what.append(place[_key(kind, one)])
    of_what = np.array(what, np.int64)
    return _Hits(np.array(rows, np.int64), of_what, asks[of_what] if len(asks) else of_what)


def _join(a: _Hits, b: _Hits) -> _Hits:
    return _Hits(*(np.concatenate([getattr(a, name), getattr(b, name)]) for name in ("row", "of", "severity")))


def _key(kind: str, one: str) -> str:
    return f"{kind}/{one}"


def _tops(hits: _Hits, rows: int) -> tuple[Int64s, Int64s, Int64s]:
    """By row: the most that any asks for, how many ask for that, and the most that the others ask for; 0 without any."""
    by_row = np.zeros((rows, len(OUTCOMES)), np.int64)
    np.add.at(by_row, (hits.row, hits.severity), 1)
    place = np.arange(len(OUTCOMES))
    top = (np.where(by_row > 0, place, 0)).max(axis=1, initial=0)
    ties = np.take_along_axis(by_row, top[:, None], axis=1)[:, 0]
    second = np.where((by_row > 0) & (place < top[:, None]), place, 0).max(axis=1, initial=0)
    return top, ties, second


def _count(
    side: Side,
    keys: list[str],
    hits: _Hits,
    without_and_with: tuple[Int64s, Int64s],
    others_and_score: tuple[Int64s, Int64s],
    known: Int64s,
    amount: Int64s,
    costs: Floats,
    names: tuple[object, object],
) -> None:
    """Adds hits to their tallies. Pairs are (hits,) each: outcomes without and with it; what others ask for, and what the score does."""
    without, having = without_and_with
    others, score = others_and_score
    ids, customers = names
    saving = costs[without, hits.row] - costs[having, hits.row]
    for i in np.unique(hits.of).tolist():
        mine = hits.of == i
        tally, rows = side.tallies[keys[i]], hits.row[mine]
        tally.hits += np.bincount(known[rows], minlength=KINDS)
        tally.alone += np.bincount(known[rows[without[mine] != having[mine]]], minlength=KINDS)
        tally.fraud_minor += int(amount[rows[known[rows] == Known.FRAUD]].sum())
        tally.saved_minor += float(np.maximum(saving[mine], 0.0).sum())
        tally.lost_minor += float(np.maximum(-saving[mine], 0.0).sum())
        tally.by_score += int(((score[mine] >= tally.severity) & (tally.severity > 0)).sum())
        tally.by_others += int(((others[mine] >= tally.severity) & (tally.severity > 0)).sum())
        genuine = rows[known[rows] == Known.GENUINE]
        tally.genuine.add(_texts(ids, genuine))
        tally.frauds.add(_texts(ids, rows[known[rows] == Known.FRAUD]))
        if len(tally.customers) < CUSTOMERS_MAX:
            tally.customers.update(_texts(customers, genuine)[: CUSTOMERS_MAX - len(tally.customers)])


def _texts(column: object, rows: npt.NDArray[np.int64]) -> list[str]:
    found: list[str] = column.take(rows).to_pylist()  # type: ignore[attr-defined]
    return found


def _add_pairs(side: Side, keys: list[str], hits: _Hits) -> None:
    """Counts the pairs that met the same payment."""
    order = np.lexsort((hits.of, hits.row))
    row, of = hits.row[order], hits.of[order]
    for ahead in range(1, len(row)):
        same = row[ahead:] == row[:-ahead]
        if not same.any():
            break
        pairs, counts = np.unique(np.stack([of[:-ahead][same], of[ahead:][same]], axis=1), axis=0, return_counts=True)
        for (a, b), n in zip(pairs.tolist(), counts.tolist(), strict=True):
            pair = (keys[a], keys[b])
            if pair in side.pairs or len(side.pairs) < PAIRS_MAX:
                side.pairs[pair] += n
