"""The scores at which the gateway's policy challenges, reviews and declines, and what its rules and lists ask for, read from its folder.

Called by the admission of a model, which asks whether an export decides otherwise than what was trained, and by the comparison of two
models on receipts, whose rule and list hits are known. What a rule looks at is the gateway's affair (gateway/policy/), and
`tests/agreement/test_policy_bands.py` holds the two together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt
import yaml

from gateway.contracts.decision import RISK_SCORE_MAX, SEVERITY, Outcome
from model_export.errors import PolicyUnreadableError

# The policy that ships with the gateway is data of its package.
SHIPPED = Path(str(files("gateway").joinpath("default_policy")))
POLICY_FILE, RULES = "policy.yaml", "rules/*.yaml"
# What a list asks for that doesn't say.
DEFAULT_OUTCOME = {"block": Outcome.DECLINE, "watch": Outcome.REVIEW}


class _Band(msgspec.Struct, frozen=True, kw_only=True):
    up_to_minor: int | None
    challenge: int
    review: int
    decline: int


class _List(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    kind: str
    outcome: Outcome | None = None


class _Rule(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    outcome: Outcome


class _File(msgspec.Struct, frozen=True, kw_only=True):
    bands: list[_Band]
    lists: list[_List] = []


class _Rules(msgspec.Struct, frozen=True, kw_only=True):
    rules: list[_Rule]


@dataclass(frozen=True)
class Bands:
    """`edges` (bands - 1,): the largest amount of each band but the last, minor units. `floors` (bands, 3): the scores from which
    challenge, review and decline begin.
    """

    edges: npt.NDArray[np.int64]
    floors: npt.NDArray[np.int64]

    def of(self, amount_minor: npt.NDArray[np.floating]) -> npt.NDArray[np.intp]:
        """The band of each amount."""
        return np.searchsorted(self.edges, amount_minor, side="left")

    def severity(self, score: npt.NDArray[np.int64], amount_minor: npt.NDArray[np.floating]) -> npt.NDArray[np.int64]:
        """What a score alone decides, as a place in contracts.decision.SEVERITY: 0 approve ... 3 decline."""
        out: npt.NDArray[np.int64] = (score[:, None] >= self.floors[self.of(amount_minor)]).sum(axis=1)
        return out

    def names(self) -> list[str]:
        """For a person, by band: amount <= 2000, 2000 < amount <= 20000, ... in minor units."""
        edges = self.edges.tolist()
        if not edges:
            return ["any amount"]
        between = [f"{low} < amount <= {high}" for low, high in zip(edges, edges[1:], strict=False)]
        return [f"amount <= {edges[0]}", *between, f"amount > {edges[-1]}"]


@dataclass(frozen=True)
class Asked:
    """The severity of what each rule and each block or watch list asks for, by id; and the allow lists, which keep the score silent."""

    rules: dict[str, int]
    lists: dict[str, int]
    blocking: frozenset[str]
    allowing: frozenset[str]

    def severity(
        self, rule_hits: Sequence[Sequence[str]], list_hits: Sequence[Sequence[str]], by_score: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.int64]:
        """What becomes of payments with these hits, (rows,), whose scores ask for `by_score`. Unknown ids don't count."""
        out = by_score.copy()
        for i, (rules, lists) in enumerate(zip(rule_hits, list_hits, strict=True)):
            if not rules and not lists:
                continue
            if not self.allowing.isdisjoint(lists) and self.blocking.isdisjoint(lists):
                out[i] = 0
            asked = [self.rules.get(rule, 0) for rule in rules] + [self.lists.get(one, 0) for one in lists]
            out[i] = max(int(out[i]), *asked)
        return out


def read_asked(policy_path: str) -> Asked:
    """Of the policy at `policy_path` (the setting; empty: the one that ships). Raises `PolicyUnreadableError`."""
    policy, rules = _read(policy_path)
    asking = {"block", "watch"}
    return Asked(
        rules={rule.id: SEVERITY[rule.outcome] for rule in rules},
        lists={one.id: SEVERITY[one.outcome or DEFAULT_OUTCOME[one.kind]] for one in policy.lists if one.kind in asking},
        blocking=frozenset(one.id for one in policy.lists if one.kind == "block"),
        allowing=frozenset(one.id for one in policy.lists if one.kind == "allow"),
    )


def _read(policy_path: str) -> tuple[_File, list[_Rule]]:
    folder = Path(policy_path).expanduser() if policy_path else SHIPPED
    try:
        policy = msgspec.convert(yaml.safe_load((folder / POLICY_FILE).read_bytes()), _File)
        files = [path for path in sorted(folder.glob(RULES)) if not path.name.startswith(".")]
        rules = [rule for path in files for rule in msgspec.convert(yaml.safe_load(path.read_bytes()), _Rules).rules]
    except (OSError, yaml.YAMLError, msgspec.ValidationError, UnicodeDecodeError) as exc:
        raise PolicyUnreadableError(f"the policy {folder} can't be read: {exc}") from exc
    return policy, rules


def read_bands(policy_path: str) -> Bands:
    """The bands of the policy at `policy_path` (the setting; empty: the one that ships). Raises `PolicyUnreadableError`."""
    bands = _read(policy_path)[0].bands
    if not bands or any(b.up_to_minor is None for b in bands[:-1]):
        raise PolicyUnreadableError(f"the policy {policy_path or SHIPPED} has no bands, or one without a limit before the last")
    return Bands(
        edges=np.array([b.up_to_minor for b in bands if b.up_to_minor is not None], np.int64),
        floors=np.array([[b.challenge, b.review, b.decline] for b in bands], np.int64),
    )


def risk_scores(probability: npt.NDArray[np.floating]) -> npt.NDArray[np.int64]:
    """contracts.decision.risk_score of each probability."""
    scores = (probability.astype(np.float64) * RISK_SCORE_MAX + 0.5).astype(np.int64)
    out: npt.NDArray[np.int64] = np.minimum(scores, RISK_SCORE_MAX)
    return out
