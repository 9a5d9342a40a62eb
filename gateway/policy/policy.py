"""The policy: from lists, risk scores, features and fields to outcomes and reasons, for a whole batch at a time.

A policy is a folder (gateway/default_policy/, or the setting `policy_path`); docs/policy.md says what stands in it and in which order it
is evaluated. Every name in it is resolved when it is loaded, so that a misspelt feature is refused with its place and nothing is looked
up on the hot path. Its digest stands in each receipt. `fraudgate bench policy` measures a decision.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from gateway.contracts.decision import SEVERITY, Outcome
from gateway.contracts.features import FEATURE_NAMES
from gateway.contracts.lists import ListBook
from gateway.contracts.reasons import REASONS_MAX, Reason
from gateway.kernels import rules as kernel
from gateway.policy.decisions import NO_LISTS, Columns, Decisions, Floats, Int64s
from gateway.policy.declared import DEFAULT_OUTCOME, declared
from gateway.policy.document import AlertRoute, ListDeclaration, ListKind, Rule, RuleState
from gateway.policy.folder import SHIPPED, digest_of, read_folder
from gateway.policy.program import compare_values, compile_rules

OUTCOMES: tuple[Outcome, ...] = tuple(Outcome)
DEFAULT_REASON: dict[ListKind, Reason] = {ListKind.BLOCK: Reason.ON_BLOCK_LIST, ListKind.WATCH: Reason.ON_WATCH_LIST}
_KINDS = {ListKind.ALLOW: kernel.ALLOW, ListKind.BLOCK: kernel.BLOCK, ListKind.WATCH: kernel.WATCH}
# Shared by all rows that have none, or just that one.
_NOTHING: list[str] = []
_NO_REASONS: list[Reason] = []
_BY_SCORE: list[Reason] = [Reason.MODEL_SCORE_HIGH]
_BY_NO_MODEL: list[Reason] = [Reason.NO_MODEL]


class Policy:
    """A loaded policy. `files` are its bytes by name, `digest` is their sha256 (gateway.policy.folder.digest_of).

    `rules` are all, the most severe first, `lists` and `alerts` as declared. `compared` are the features, the amount by its field too, that
    bands and rules compare with constants, with each constant: where a decision can change.
    """

    def __init__(self, files: Mapping[str, bytes], source: str) -> None:
        """Raises `PolicyRefusedError`, which names `source` and the place of each problem."""
        found = declared(files, source)
        self.files: dict[str, bytes] = dict(files)
        self.digest = digest_of(files)
        self.name = found.name
        self.bands = found.bands
        self.lists: tuple[ListDeclaration, ...] = found.lists
        self.alerts: tuple[AlertRoute, ...] = found.alerts
        # Most severe first, so that the first reasons found are those that stay.
        ordered = sorted(found.rules, key=lambda rule: -SEVERITY[rule[0].outcome])
        self.rules: tuple[Rule, ...] = tuple(rule for rule, _, _ in ordered)
        self.file_of: dict[str, str] = {rule.id: file for rule, _, file in ordered}
        self.rule_ids: tuple[str, ...] = tuple(rule.id for rule in self.rules)
        evaluated = [(rule, test) for rule, test, _ in ordered if rule.state is not RuleState.OFF]
        self._evaluated: tuple[Rule, ...] = tuple(rule for rule, _ in evaluated)
        self._program = compile_rules([test for _, test in evaluated], {d.id: i for i, d in enumerate(found.lists)})
        self._rule_severity = np.array([SEVERITY[rule.outcome] for rule in self._evaluated], np.int64)
        self._rule_flags = np.array(
            [(rule.state is RuleState.SHADOW) * kernel.IS_SHADOW | rule.hard * kernel.IS_HARD for rule in self._evaluated], np.int64
        )
        self._list_fields = tuple(dict.fromkeys(d.field for d in found.lists))
        self._list_columns = np.array([self._list_fields.index(d.field) for d in found.lists], np.int64)
        self._list_kinds = np.array([_KINDS[d.kind] for d in found.lists], np.int64)
        outcomes = [d.outcome or DEFAULT_OUTCOME[d.kind] for d in found.lists]
        self._list_severity = np.array([SEVERITY[outcome] for outcome in outcomes], np.int64)
        self._list_reasons = [d.reason or DEFAULT_REASON.get(d.kind) for d in found.lists]
        self._bound = self._bind(NO_LISTS)
        edges = [b.up_to_minor for b in found.bands if b.up_to_minor is not None]
        self._edges = np.array(edges, np.int64)
        self._thresholds = np.array([[b.challenge, b.review, b.decline] for b in found.bands], np.float64)
        self._without_model = np.array([SEVERITY[b.without_model] for b in found.bands], np.int64)
        self.compared: tuple[tuple[str, float], ...] = (
            *(("amount_minor", float(edge)) for edge in edges),
            *(pair for _, test in evaluated for pair in compare_values(test)),
        )

    def decide(self, columns: Columns, has_features: bool, lists: ListBook) -> Decisions:
        """Outcomes of a batch: the most severe of what the lists, the rules and the score ask for.

        Where no model scored and there are no features either, the band's `without_model` outcome stands in for the score's.
        """
        requests, n, program = columns.requests, len(columns.rows), self._program
        matrix = columns.matrix
        if not (matrix.flags.c_contiguous and matrix.flags.writeable):
            # The kernel is compiled for just one kind of array.
            matrix = matrix.copy()
        assert matrix.shape == (n, len(FEATURE_NAMES)), "the kernel doesn't check its indices"
        assert len(columns.score) == len(columns.received_at_ms) == n
        bits, masks = self._masks(columns, lists)
        by_row, floors = np.empty((4, n), np.int64), np.empty((n, 3))
        count, hits = 0, np.empty((2 * n + 16, 3), np.int64)
        while True:
            count = kernel.decide_rows(
                program.code,
                program.entries,
                self._rule_severity,
                self._rule_flags,
                program.constants,
                program.texts,
                program.text_edges,
                program.sets,
                bits,
                self._list_columns,
                self._list_kinds,
                self._list_severity,
                self._edges,
                self._thresholds,
                self._without_model,
                requests.buf,
                requests.starts,
                requests.lengths,
                requests.numbers,
                requests.places,
                columns.rows,
                matrix,
                columns.score,
                masks,
                has_features,
                by_row,
                floors,
                hits,
            )
            if count <= len(hits):
                break
            hits = np.empty((count, 3), np.int64)
        severity, by_score, ruled, _ = by_row
        places = severity.tolist()
        told = _Told(n)
        if any(places) or count:
            self._tell(told, by_score, columns.score, hits[:count].tolist())
        return Decisions(
            outcome=[OUTCOMES[place] for place in places],
            severity=severity,
            reasons=told.reasons,
            rule_hits=told.rule_hits,
            list_hits=told.list_hits,
            shadow_hits=told.shadow_hits,
            rule_errors=told.rule_errors,
            floors=floors,
            ruled=ruled if count and ruled.any() else None,
        )

    def _masks(self, columns: Columns, lists: ListBook) -> tuple[Int64s, Int64s]:
        """The lists' bits, and what each row stands on by field, (rows, fields)."""
        bound, bits, holds = self._bound
        if bound is not lists:
            # One batch may see the binding of another's lists only whole.
            self._bound = _, bits, holds = self._bind(lists)
        masks = np.zeros((len(columns.rows), len(self._list_fields)), np.int64)
        for place in holds:
            name = self._list_fields[place]
            masks[:, place] = lists.masks(name, columns.requests.texts(name, columns.rows), columns.received_at_ms)
        return bits, masks

    def _bind(self, lists: ListBook) -> tuple[ListBook, Int64s, list[int]]:
        """`lists`, the bits of the declared lists in them, and the places of the fields on whose lists anything stands."""
        bits = np.array([lists.bit(d.id) for d in self.lists], np.int64)
        return lists, bits, sorted(set(self._list_columns[bits != 0].tolist()))

    def _tell(self, told: _Told, by_score: Int64s, score: Floats, hits: list[tuple[int, int, int]]) -> None:
        """Fills in the hits and reasons of the rows that have any: the most severe reasons first, among equals lists, score, rules."""
        scored = np.flatnonzero(by_score)
        for row, of_row in zip(scored.tolist(), score[scored].tolist(), strict=True):
            told.reasons[row] = _BY_SCORE if of_row == of_row else _BY_NO_MODEL
        if not hits:
            return
        # By row: how severe, in which turn, why.
        found: dict[int, list[tuple[int, int, Reason]]] = {}
        for row, kind, i in hits:
            if kind == kernel.HIT_LIST:
                told.add(told.list_hits, row, self.lists[i].id)
                asks, turn, reason = int(self._list_severity[i]), 0, self._list_reasons[i]
            elif kind == kernel.HIT_RULE:
                rule = self._evaluated[i]
                told.add(told.rule_hits, row, rule.id)
                asks, turn, reason = SEVERITY[rule.outcome], 2, rule.reason
            else:
                told.add(told.shadow_hits if kind == kernel.HIT_SHADOW else told.rule_errors, row, self._evaluated[i].id)
                continue
            if asks and reason is not None:
                found.setdefault(row, []).append((asks, turn, reason))
        for row, reasons in found.items():
            reasons += [(int(by_score[row]), 1, reason) for reason in told.reasons[row]]
            reasons.sort(key=lambda r: (-r[0], r[1]))
            told.reasons[row] = list(dict.fromkeys(reason for _, _, reason in reasons))[:REASONS_MAX]


class _Told:
    """Of each row what is told of it; nothing so far."""

    def __init__(self, rows: int) -> None:
        self.reasons: list[list[Reason]] = [_NO_REASONS] * rows
        self.rule_hits: list[list[str]] = [_NOTHING] * rows
        self.list_hits: list[list[str]] = [_NOTHING] * rows
        self.shadow_hits: list[list[str]] = [_NOTHING] * rows
        self.rule_errors: list[list[str]] = [_NOTHING] * rows

    @staticmethod
    def add(of: list[list[str]], row: int, one: str) -> None:
        if of[row] is _NOTHING:
            of[row] = [one]
        else:
            of[row].append(one)


def load_policy(path: str) -> Policy:
    """The policy in the folder `path`, or the one that ships with the gateway when it is empty. Raises `PolicyRefusedError`."""
    folder = Path(path).expanduser() if path else SHIPPED
    return Policy(read_folder(folder), str(folder) if path else "default_policy")
