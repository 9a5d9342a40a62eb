"""The nearest payment that would have been approved: "would have been approved if ..." for a payment that wasn't.

A beam search over the levers of gateway/explanations/what_if.py, at the values where a tree or a rule changes its mind. Every candidate is
decided by the model and the policy themselves, so what is found does flip the decision. Bounded: some thousand evaluations, under a second.
Called on request (`fraudgate explain`), never on the way of a decision.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from gateway.contracts.decision import RISK_SCORE_MAX, SEVERITY, Outcome
from gateway.contracts.features import FEATURE_INDEX
from gateway.contracts.lists import ListBook
from gateway.explanations.what_if import LEVERS, Case, Lever, Thresholds
from gateway.kafka.avro import encode_transaction
from gateway.policy import NO_LISTS, Columns, Decisions, Policy
from gateway.scoring.requests import read_requests

CHANGES_MAX = 3
# Cases that are gone on from, after each change.
BEAM = 6
EVALUATIONS_MAX = 60_000
BATCH = 1024
APPROVED = SEVERITY[Outcome.APPROVE]


class Scores(Protocol):
    """A model: gateway.models.model.Model."""

    def probability(self, matrix: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
        """The probability of fraud of each row, (n,)."""


@dataclass(frozen=True)
class Change:
    """A lever set to `after`."""

    feature: str
    before: float
    after: float


@dataclass(frozen=True)
class Counterfactual:
    """The changes in order, the payment that they make of it, and its probability. `effort` is what they were chosen by."""

    changes: tuple[Change, ...]
    case: Case
    probability: float
    effort: float


@dataclass(frozen=True)
class _Path:
    """Changes that led to a case."""

    case: Case
    changes: tuple[tuple[Lever, float], ...] = ()
    effort: float = 0.0


def decide_cases(
    model: Scores, policy: Policy, cases: Sequence[Case], lists: ListBook = NO_LISTS, received_at_ms: int = 0
) -> tuple[Decisions, npt.NDArray[np.float64]]:
    """What the model and the policy make of each case, and the probabilities, (n,), just as the scorer has them decide.

    `lists` are as of `received_at_ms`.
    """
    matrix = np.array([case.row for case in cases], np.float32)
    probability = model.probability(matrix)
    payloads = [encode_transaction(case.transaction) for case in cases]
    columns = Columns(
        requests=read_requests(payloads, np.full(len(cases), -1, np.int64)),
        rows=np.arange(len(cases)),
        matrix=matrix,
        score=np.minimum(np.floor(probability * RISK_SCORE_MAX + 0.5), RISK_SCORE_MAX),
        received_at_ms=np.full(len(cases), received_at_ms, np.int64),
    )
    return policy.decide(columns, has_features=True, lists=lists), probability


def find_counterfactual(
    model: Scores,
    policy: Policy,
    thresholds: Thresholds,
    case: Case,
    levers: Sequence[Lever] = LEVERS,
    lists: ListBook = NO_LISTS,
    received_at_ms: int = 0,
) -> Counterfactual | None:
    """The nearest that is approved with at most CHANGES_MAX changes, fewer changes first; None when none was found within the bounds.

    `thresholds` are those of the model's trees; the policy's are added. None too for a case that is approved as it is, and for one that
    `lists` as of `received_at_ms` don't let through: who pays, and where, is nothing that is changed.
    """
    search = _Search(model, policy, _with_policy(thresholds, policy), levers, lists, received_at_ms)
    start = _Path(case)
    severity, _ = search.decide([start])
    if severity[0] == APPROVED:
        return None
    beam = [start]
    for _ in range(CHANGES_MAX):
        found, beam = search.widen(beam)
        if found is not None:
            return search.result(case, search.tighten(case, search.without_needless(case, found)))
        if not beam:
            return None
    return None


class _Search:
    """What stays the same while a payment is looked at."""

    def __init__(
        self, model: Scores, policy: Policy, thresholds: Thresholds, levers: Sequence[Lever], lists: ListBook, received_at_ms: int
    ) -> None:
        self._model, self._policy, self._thresholds, self._levers = model, policy, thresholds, levers
        self._lists, self._received_at_ms = lists, received_at_ms
        self._left = EVALUATIONS_MAX

    def decide(self, paths: Sequence[_Path]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
        """Severities and probabilities, (n,). Counted against EVALUATIONS_MAX."""
        self._left -= len(paths)
        severity, probability = [], []
        for i in range(0, len(paths), BATCH):
            cases = [path.case for path in paths[i : i + BATCH]]
            decisions, p = decide_cases(self._model, self._policy, cases, self._lists, self._received_at_ms)
            severity.append(decisions.severity)
            probability.append(p)
        return np.concatenate(severity), np.concatenate(probability)

    def next_of(self, path: _Path, levers: Sequence[Lever]) -> list[_Path]:
        """`path` with one more of `levers` pulled, each at every value worth trying."""
        found = []
        for lever in levers:
            before = path.case.of(lever.name)
            for value in lever.values(path.case, self._thresholds):
                case = lever.apply(path.case, value)
                if case is not None:
                    effort = path.effort + lever.effort_of(before, value)
                    found.append(_Path(case, (*path.changes, (lever, value)), effort))
        return found

    def widen(self, beam: Sequence[_Path]) -> tuple[_Path | None, list[_Path]]:
        """The nearest that is approved with one more change; without one, the most promising to go on from: of each lever its best."""
        paths: list[_Path] = []
        for path in beam:
            used = {lever.name for lever, _ in path.changes}
            paths += self.next_of(path, [lever for lever in self._levers if lever.name not in used])
        paths = paths[: max(self._left, 0)]
        if not paths:
            return None, []
        severity, probability = self.decide(paths)
        approved = np.flatnonzero(severity == APPROVED).tolist()
        if approved:
            return paths[min(approved, key=lambda i: paths[i].effort)], []
        best: dict[tuple[str, ...], int] = {}
        for i in np.lexsort((np.array([path.effort for path in paths]), probability, severity)).tolist():
            best.setdefault(tuple(sorted(lever.name for lever, _ in paths[i].changes)), i)
        return None, [paths[i] for i in list(best.values())[:BEAM]]

    def without_needless(self, case: Case, found: _Path) -> _Path:
        """`found` without the changes that it is approved without."""
        kept = found
        for change in found.changes:
            fewer = self._again(case, [c for c in kept.changes if c is not change])
            if fewer is not None and fewer.changes and self.decide([fewer])[0][0] == APPROVED:
                kept = fewer
        return kept

    def tighten(self, case: Case, found: _Path) -> _Path:
        """Each change made as small as the others allow, one after the other."""
        for place in range(len(found.changes)):
            before = self._again(case, found.changes[:place])
            if before is None:
                continue
            lever, _ = found.changes[place]
            candidates = []
            for path in self.next_of(before, [lever]):
                whole: _Path | None = path
                for change in found.changes[place + 1 :]:
                    whole = None if whole is None else self._pull(whole, *change)
                if whole is not None and whole.effort < found.effort:
                    candidates.append(whole)
            candidates = candidates[: max(self._left, 0)]
            if candidates:
                severity, _ = self.decide(candidates)
                found = min(
                    [found, *(c for c, s in zip(candidates, severity, strict=True) if s == APPROVED)], key=lambda p: p.effort
                )
        return found

    def _again(self, case: Case, changes: Sequence[tuple[Lever, float]]) -> _Path | None:
        path: _Path | None = _Path(case)
        for change in changes:
            path = None if path is None else self._pull(path, *change)
        return path

    @staticmethod
    def _pull(path: _Path, lever: Lever, value: float) -> _Path | None:
        case = lever.apply(path.case, value)
        if case is None:
            return None
        effort = path.effort + lever.effort_of(path.case.of(lever.name), value)
        return _Path(case, (*path.changes, (lever, value)), effort)

    def result(self, case: Case, found: _Path) -> Counterfactual:
        _, probability = self.decide([found])
        changes = tuple(Change(lever.name, case.of(lever.name), value) for lever, value in found.changes)
        return Counterfactual(changes, found.case, float(probability[0]), found.effort)


def _with_policy(thresholds: Thresholds, policy: Policy) -> Thresholds:
    """The trees' thresholds and what the policy compares features and amounts with."""
    out = {column: list(values) for column, values in thresholds.items()}
    for name, value in policy.compared:
        out.setdefault(FEATURE_INDEX[name], []).append(value)
    return {column: np.unique(values) for column, values in out.items()}
