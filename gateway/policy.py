"""The policy: from risk scores, features and fields to outcomes and reasons, for a whole batch at a time.

A policy is a YAML file (gateway/default_policy.yaml, or the setting `policy_path`). Every name in it is resolved when it is
loaded, so that a misspelt feature is refused with its place and nothing is looked up on the hot path. Its sha256 stands in each
receipt.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np
import numpy.typing as npt
import yaml

from gateway.contracts.decision import RISK_SCORE_MAX, SEVERITY, Outcome
from gateway.contracts.features import FEATURE_INDEX
from gateway.contracts.reasons import REASONS_MAX, Reason
from gateway.contracts.transaction import FIELDS, TEXT_FIELDS
from gateway.errors import PolicyRefusedError
from gateway.requests import Requests

DEFAULT_POLICY = "default_policy.yaml"
POLICY_VERSION = 1
RULES_MAX = 1000
OUTCOMES: tuple[Outcome, ...] = tuple(Outcome)

Bools = npt.NDArray[np.bool_]
Matrix = npt.NDArray[np.float32]
Op = Literal["==", "!=", "<", "<=", ">", ">=", "in", "not_in"]
Value = float | int | str | bool | list[str | float | int]


class Band(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Amounts up to `up_to_minor` (included; null: any), and the least scores of each outcome, 0..1000."""

    up_to_minor: int | None
    challenge: int
    review: int
    decline: int
    without_model: Outcome


class Condition(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Exactly one of `feature`, `field`, `derived` and `score: true` names what is compared."""

    op: Op
    value: Value
    feature: str | None = None
    field: str | None = None
    derived: str | None = None
    score: bool = False


class Rule(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    id: str
    description: str
    when: list[Condition]
    outcome: Outcome
    reason: Reason


class PolicyFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The file as it is written."""

    version: int
    name: str
    bands: list[Band]
    rules: list[Rule]


@dataclass(frozen=True)
class Columns:
    """What the rules see of a batch: `rows` of `requests`. `matrix` is (rows, features), `score` (rows,), NaN where no model scored."""

    requests: Requests
    rows: npt.NDArray[np.int64]
    matrix: Matrix
    score: npt.NDArray[np.float64]

    def number(self, field: str) -> npt.NDArray[np.float64]:
        """(rows,), NaN where it isn't given."""
        of, column = {
            "event_time_ms": (self.requests.numbers, 0),
            "amount_minor": (self.requests.numbers, 1),
            "latitude": (self.requests.places, 0),
            "longitude": (self.requests.places, 1),
        }[field]
        found: npt.NDArray[np.float64] = of[self.rows, column].astype(np.float64)
        return found


@dataclass(frozen=True)
class Decisions:
    """By row: the outcome and its place in SEVERITY, the reasons (most severe first), the ids of the rules that fired, and `floors`, the
    scores from which challenge, review and decline begin, (rows, 3). `ruled` is the most severe outcome of a rule that fired, 0 where none
    did; None when none did anywhere. Most rows have neither reasons nor hits, and share one empty list.
    """

    outcome: list[Outcome]
    severity: npt.NDArray[np.int64]
    reasons: list[list[Reason]]
    rule_hits: list[list[str]]
    floors: npt.NDArray[np.float64]
    ruled: npt.NDArray[np.int64] | None = None

    def stand_in(self) -> npt.NDArray[np.int64]:
        """A score for a decision without one, (rows,): where its outcome begins."""
        floors = np.take_along_axis(self.floors, np.maximum(self.severity - 1, 0)[:, None], axis=1)[:, 0]
        return np.where(self.severity > 0, floors, 0).astype(np.int64)


def _card_distance_km(m: Matrix) -> npt.NDArray[np.float64]:
    """Kilometres from the card's last place: speed times the time since, of which at least a second counts."""
    hours = np.maximum(m[:, FEATURE_INDEX["card_since_last"]].astype(np.float64), 1.0) / 3600
    out: npt.NDArray[np.float64] = m[:, FEATURE_INDEX["card_speed"]].astype(np.float64) * hours
    return out


# What a rule may compare beyond fields and features.
DERIVED: dict[str, Callable[[Matrix], npt.NDArray[np.float64]]] = {"card_distance_km": _card_distance_km}
_COMPARE: dict[str, np.ufunc] = {
    "==": np.equal,
    "!=": np.not_equal,
    "<": np.less,
    "<=": np.less_equal,
    ">": np.greater,
    ">=": np.greater_equal,
}
Check = Callable[[Columns], Bools]
_NOTHING: list[str] = []
_NO_REASONS: list[Reason] = []


def _numbers_of(c: Condition) -> Callable[[Columns], npt.NDArray[np.floating[Any]]]:
    """The numeric column that a condition names."""
    if c.feature is not None:
        index = FEATURE_INDEX[c.feature]
        return lambda columns: columns.matrix[:, index]
    if c.derived is not None:
        derive = DERIVED[c.derived]
        return lambda columns: derive(columns.matrix)
    if c.score:
        return lambda columns: columns.score
    name = c.field
    assert name is not None
    return lambda columns: columns.number(name)


def _compile(c: Condition, place: str) -> Check:
    """The condition as a function of a batch. Raises `PolicyRefusedError` with `place`."""
    named = [n for n in (c.feature, c.field, c.derived) if n is not None]
    if len(named) + c.score != 1:
        raise PolicyRefusedError(f"{place}: name exactly one of feature, field, derived or score: true")
    for name, known, what in (
        (c.feature, FEATURE_INDEX, "feature"),
        (c.field, FIELDS, "field"),
        (c.derived, DERIVED, "derived value"),
    ):
        if name is not None and name not in known:
            raise PolicyRefusedError(f"{place}: there is no {what} {name!r}")
    is_list = isinstance(c.value, list)
    if is_list != (c.op in ("in", "not_in")):
        raise PolicyRefusedError(f"{place}: op {c.op!r} takes {'a list' if c.op in ('in', 'not_in') else 'one value'}")
    values = list(c.value) if isinstance(c.value, list) else [c.value]
    if isinstance(c.value, bool) or not values:
        raise PolicyRefusedError(f"{place}: the value must be a number, a text, or a list of them that is not empty")
    if c.field in TEXT_FIELDS:
        return _compile_text(c, values, place)
    numbers_given: list[float] = []
    for value in values:
        if isinstance(value, str | bool) or not math.isfinite(value):
            raise PolicyRefusedError(f"{place}: compares a number, so the value must be a finite number")
        numbers_given.append(float(value))
    column = _numbers_of(c)
    if c.op in _COMPARE:
        compare, value = _COMPARE[c.op], numbers_given[0]
        if c.op == "!=":
            return lambda columns: _not_equal(column(columns), value)
        return lambda columns: compare(column(columns), value)
    allowed = np.array(numbers_given)
    if c.op == "in":
        return lambda columns: np.isin(column(columns), allowed)
    return lambda columns: _not_in(column(columns), allowed)


def _screen(rule: Rule) -> tuple[int, float] | None:
    """A feature and what it must reach for the rule to fire, None when no condition is of this kind."""
    for c in rule.when:
        if c.feature is not None and c.op in (">", ">=") and isinstance(c.value, int | float):
            return FEATURE_INDEX[c.feature], float(c.value)
    return None


def _not_equal(x: npt.NDArray[np.floating[Any]], value: float) -> Bools:
    out: Bools = (x != value) & ~np.isnan(x)
    return out


def _not_in(x: npt.NDArray[np.floating[Any]], values: npt.NDArray[np.float64]) -> Bools:
    out: Bools = ~np.isin(x, values) & ~np.isnan(x)
    return out


def _compile_text(c: Condition, values: list[Any], place: str) -> Check:
    if c.op not in ("==", "!=", "in", "not_in"):
        raise PolicyRefusedError(f"{place}: a text can't be compared with {c.op!r}")
    if not all(isinstance(v, str) for v in values):
        raise PolicyRefusedError(f"{place}: compares a text, so the value must be a text (in quotation marks)")
    name, wanted, negated = c.field, frozenset(values), c.op in ("!=", "not_in")
    assert name is not None
    return lambda columns: np.array(
        [v is not None and (v in wanted) != negated for v in columns.requests.texts(name, columns.rows)], bool
    )


class Policy:
    """A loaded policy. `digest` is the sha256 of the file's bytes."""

    def __init__(self, text: bytes, source: str) -> None:
        """Raises `PolicyRefusedError`, which names `source` and the place."""
        self.digest = hashlib.sha256(text).hexdigest()
        try:
            parsed = msgspec.convert(yaml.safe_load(text), PolicyFile)
        except (yaml.YAMLError, msgspec.ValidationError, UnicodeDecodeError) as exc:
            raise PolicyRefusedError(f"{source}: {exc}") from exc
        self.name = parsed.name
        if parsed.version != POLICY_VERSION:
            raise PolicyRefusedError(f"{source}: version {parsed.version}, this gateway reads version {POLICY_VERSION}")
        _check_bands(parsed.bands, source)
        if len(parsed.rules) > RULES_MAX:
            raise PolicyRefusedError(f"{source}: more than {RULES_MAX} rules")
        self._rules: list[tuple[Rule, list[Check]]] = []
        ids: set[str] = set()
        for rule in parsed.rules:
            place = f"{source}: rule {rule.id!r}"
            if rule.id in ids:
                raise PolicyRefusedError(f"{place}: the id is given twice")
            if not rule.when:
                raise PolicyRefusedError(f"{place}: has no condition")
            ids.add(rule.id)
            self._rules.append((rule, [_compile(c, f"{place}, condition {i + 1}") for i, c in enumerate(rule.when)]))
        # Most severe first, so that the first reasons found are those that stay.
        self._rules.sort(key=lambda r: -SEVERITY[r[0].outcome])
        self.rule_ids: tuple[str, ...] = tuple(rule.id for rule, _ in self._rules)
        # Most rules fire for no row of a batch, which one comparison tells for all of them, in the precision of the features.
        screens = [_screen(rule) for rule, _ in self._rules]
        self._screened = [i for i, screen in enumerate(screens) if screen is not None]
        self._screen_features = np.array([screen[0] for screen in screens if screen is not None], np.intp)
        self._screen_values = np.array([screen[1] for screen in screens if screen is not None], np.float32)
        self._edges = np.array([b.up_to_minor for b in parsed.bands if b.up_to_minor is not None], np.int64)
        self._thresholds = np.array([[b.challenge, b.review, b.decline] for b in parsed.bands], np.float64)
        self._without_model = np.array([SEVERITY[b.without_model] for b in parsed.bands], np.int64)

    def decide(self, columns: Columns, has_features: bool) -> Decisions:
        """Outcomes of a batch: the most severe of the model's and the rules'.

        Where no model scored and there are no features either, the band's `without_model` outcome stands in for the model's.
        """
        rows = len(columns.rows)
        band = np.searchsorted(self._edges, columns.requests.amount_minor[columns.rows], side="left")
        thresholds = self._thresholds[band]
        no_score = np.isnan(columns.score)
        base = (columns.score[:, None] >= thresholds).sum(axis=1)
        if not has_features:
            base = np.where(no_score, self._without_model[band], base)
        severity = base
        ruled: npt.NDArray[np.int64] | None = None
        hits: list[tuple[Rule, npt.NDArray[np.intp]]] = []
        may_fire = np.ones(len(self._rules), bool)
        may_fire[self._screened] = (columns.matrix[:, self._screen_features] >= self._screen_values).any(axis=0)
        for i in np.flatnonzero(may_fire).tolist():
            rule, checks = self._rules[i]
            fired = checks[0](columns)
            for check in checks[1:]:
                if not fired.any():
                    break
                fired = fired & check(columns)
            if fired.any():
                hits.append((rule, np.flatnonzero(fired)))
                if ruled is None:
                    ruled = np.zeros(rows, np.int64)
                np.maximum(ruled, np.where(fired, SEVERITY[rule.outcome], 0), out=ruled)
        if ruled is not None:
            severity = np.maximum(base, ruled)
        found: dict[int, list[tuple[int, Reason]]] = {}
        rule_hits: list[list[str]] = [_NOTHING] * rows
        for row in np.flatnonzero(base > 0).tolist():
            found[row] = [(int(base[row]), Reason.NO_MODEL if no_score[row] else Reason.MODEL_SCORE_HIGH)]
        for rule, where in hits:
            for row in where.tolist():
                found.setdefault(row, []).append((SEVERITY[rule.outcome], rule.reason))
                rule_hits[row] = [*rule_hits[row], rule.id]
        reasons: list[list[Reason]] = [_NO_REASONS] * rows
        for row, of_row in found.items():
            reasons[row] = _reasons(of_row)
        return Decisions(
            outcome=[OUTCOMES[s] for s in severity.tolist()],
            severity=severity,
            reasons=reasons,
            rule_hits=rule_hits,
            floors=thresholds,
            ruled=ruled,
        )


def _reasons(found: list[tuple[int, Reason]]) -> list[Reason]:
    """At most REASONS_MAX different ones, most severe first; among equals the model's, then the file's order."""
    found.sort(key=lambda f: -f[0])
    return list(dict.fromkeys(reason for _, reason in found))[:REASONS_MAX]


def _check_bands(bands: list[Band], source: str) -> None:
    if not bands or bands[-1].up_to_minor is not None:
        raise PolicyRefusedError(f"{source}: the last of the bands must have up_to_minor: null")
    last = 0
    for i, band in enumerate(bands):
        place = f"{source}: band {i + 1}"
        if band.up_to_minor is None and i < len(bands) - 1:
            raise PolicyRefusedError(f"{place}: only the last band may have up_to_minor: null")
        if band.up_to_minor is not None and band.up_to_minor <= last:
            raise PolicyRefusedError(f"{place}: up_to_minor must rise from band to band")
        last = band.up_to_minor or last
        if not 0 < band.challenge <= band.review <= band.decline <= RISK_SCORE_MAX + 1:
            raise PolicyRefusedError(f"{place}: scores must rise from challenge to decline, within 1..{RISK_SCORE_MAX + 1}")


def load_policy(path: str) -> Policy:
    """The policy at `path`, or the one that ships with the gateway when it is empty. Raises `PolicyRefusedError`."""
    if not path:
        return Policy(files("gateway").joinpath(DEFAULT_POLICY).read_bytes(), DEFAULT_POLICY)
    try:
        text = Path(path).expanduser().read_bytes()
    except OSError as exc:
        raise PolicyRefusedError(f"{path}: {exc.strerror}") from exc
    return Policy(text, path)
