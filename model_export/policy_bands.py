"""The scores at which the gateway's policy challenges, reviews and declines, read from the policy's file.

Called by the admission of a model, which asks whether an export decides otherwise than what was trained. Only the bands are read here;
the whole policy is the gateway's (gateway/policy.py), and `tests/agreement/test_policy_bands.py` holds the two together.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt
import yaml

from gateway.contracts.decision import RISK_SCORE_MAX
from model_export.errors import PolicyUnreadableError

# The policy that ships with the gateway is data of its package.
SHIPPED = files("gateway").joinpath("default_policy.yaml")


class _Band(msgspec.Struct, frozen=True, kw_only=True):
    up_to_minor: int | None
    challenge: int
    review: int
    decline: int


class _File(msgspec.Struct, frozen=True, kw_only=True):
    bands: list[_Band]


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


def read_bands(policy_path: str) -> Bands:
    """The bands of the policy at `policy_path` (the setting; empty: the one that ships). Raises `PolicyUnreadableError`."""
    try:
        text = SHIPPED.read_bytes() if not policy_path else Path(policy_path).expanduser().read_bytes()
        bands = msgspec.convert(yaml.safe_load(text), _File).bands
    except (OSError, yaml.YAMLError, msgspec.ValidationError, UnicodeDecodeError) as exc:
        raise PolicyUnreadableError(f"the policy {policy_path or SHIPPED} can't be read: {exc}") from exc
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
