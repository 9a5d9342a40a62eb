"""Champion against challenger (or a shadow) on live receipts and matured labels: scores, decisions, precision and recall, money, verdict.

Called by `fraudgate compare`. Each receipt has the features that its model saw, so both models are asked about each payment again: a
paired comparison, whoever answered then. Reads Delta and the local model directory alone; 100,000 receipts take some 5 s.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt
from scipy.stats import beta, ks_2samp

from gateway.contracts.decision import SEVERITY, Outcome, Route
from gateway.contracts.drift import histogram, psi
from gateway.contracts.model_meta import (
    INPUT_NAME,
    METADATA_FILE,
    MODEL_FILE,
    OUTPUT_NAME,
    ModelEntry,
    ModelMetadata,
    read_manifest,
    sha256_file,
)
from gateway.contracts.reference import bins_of, padded, value_edges
from gateway.contracts.settings import Settings
from model_export.checks import open_session
from model_export.errors import ModelExportError, PackageRefusedError
from model_export.live import DAY_MS, Labels, Receipts, read_labels, read_receipts
from model_export.offpolicy import CONFIDENCE, Interval, Logged, Worth, naive_worth, worth
from model_export.policy_bands import Asked, Bands, read_asked, read_bands, risk_scores
from model_export.verdict import Costs, Verdict, judge

# A label that was to come has come by then, as for the training set.
MATURE_DAYS = 7
BATCH_ROWS = 4_096
DECLINE, REVIEW = SEVERITY[Outcome.DECLINE], SEVERITY[Outcome.REVIEW]
LEVELS = {"decline": DECLINE, "review or decline": REVIEW}
OUTCOMES = tuple(outcome.value for outcome in Outcome)

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


class NoModelError(ModelExportError):
    """A model that is to be compared isn't in the model directory."""


class ScoreShift(msgspec.Struct, frozen=True, kw_only=True):
    """Of the risk scores of the same payments under both models; `largest_difference` of a logged score from the one computed again."""

    psi: float
    ks: float
    mean_champion: float
    mean_challenger: float
    recomputed: int
    largest_difference: float


class Arm(msgspec.Struct, frozen=True, kw_only=True):
    """Receipts that a model answered for, and the rate at which it declined."""

    route: str
    receipts: int
    declined: Interval


class Side(msgspec.Struct, frozen=True, kw_only=True):
    """One model over all matured receipts. `worth` by level, `naive` the same from the labels as they are; `cost_minor` by Costs."""

    worth: dict[str, Worth]
    naive: dict[str, Worth]
    cost_minor: Interval


class Comparison(msgspec.Struct, frozen=True, kw_only=True):
    """`differing[i][j]`: receipts that the champion gives outcome i and the challenger j, by OUTCOMES."""

    champion: str
    challenger: str
    alias: str
    from_ms: int
    to_ms: int
    as_of_ms: int
    receipts: int
    left_out: int
    matured: int
    frauds_labelled: int
    explored: int
    shift: ScoreShift
    arms: list[Arm]
    differing: list[list[int]]
    champion_side: Side
    challenger_side: Side
    verdict: Verdict

    @property
    def decisions_differ(self) -> int:
        return sum(n for i, row in enumerate(self.differing) for j, n in enumerate(row) if i != j)


@dataclass(frozen=True)
class Scorer:
    """A model of the local directory, opened."""

    entry: ModelEntry
    digest: str
    probability: Callable[[npt.NDArray[np.float32]], Floats]

    @property
    def name(self) -> str:
        return f"{self.entry.name} version {self.entry.version}"


def compare(
    settings: Settings,
    *,
    from_ms: int | None = None,
    to_ms: int | None = None,
    alias: str = Route.CHALLENGER.value,
    costs: Costs | None = None,
    mature_days: int = MATURE_DAYS,
    as_of_ms: int | None = None,
) -> Comparison:
    """Receipts with event times in [from_ms, to_ms), with the labels known at `as_of_ms` (default: the newest event time or label).

    Raises a `ModelExportError`.
    """
    champion, challenger = (open_model(settings.models_path, route) for route in (Route.CHAMPION.value, alias))
    bands, asked = read_bands(settings.policy_path), read_asked(settings.policy_path)
    receipts = read_receipts(settings, from_ms, to_ms)
    labels = read_labels(settings, receipts.transaction_id, as_of_ms)
    as_of_ms = max(int(receipts.event_time_ms[-1]), labels.newest_ms) if as_of_ms is None else as_of_ms
    return compare_columns(receipts, labels, champion, challenger, bands, asked, costs or Costs(), alias, as_of_ms, mature_days)


def compare_columns(
    receipts: Receipts,
    labels: Labels,
    champion: Scorer,
    challenger: Scorer,
    bands: Bands,
    asked: Asked,
    costs: Costs,
    alias: str,
    as_of_ms: int,
    mature_days: int = MATURE_DAYS,
) -> Comparison:
    """The same of columns that have been read. `asked`: by the policy's rules and lists."""
    chosen = receipts.whole
    if not chosen.any():
        raise NoModelError(f"none of {len(receipts)} receipts was scored by a model with all of its features")
    probability = [model.probability(receipts.features) for model in (champion, challenger)]
    scores = [risk_scores(p) for p in probability]
    outcomes = [
        asked.severity(receipts.rule_hits, receipts.list_hits, bands.severity(score, receipts.amount_minor)) for score in scores
    ]
    mature = chosen & (receipts.event_time_ms < as_of_ms - mature_days * DAY_MS)
    logged = logged_of(receipts, labels).take(mature)
    first, second = (o[mature] for o in outcomes)
    table = np.zeros((len(OUTCOMES), len(OUTCOMES)), np.int64)
    np.add.at(table, (outcomes[0][chosen], outcomes[1][chosen]), 1)
    return Comparison(
        champion=champion.name,
        challenger=challenger.name,
        alias=alias,
        from_ms=int(receipts.event_time_ms[0]),
        to_ms=int(receipts.event_time_ms[-1]),
        as_of_ms=as_of_ms,
        receipts=int(chosen.sum()),
        left_out=receipts.left_out + int((~chosen).sum()),
        matured=int(mature.sum()),
        frauds_labelled=int(logged.is_fraud.sum()),
        explored=int((logged.seen & (logged.chance < 1)).sum()),
        shift=_shift(receipts, scores, (champion.digest, challenger.digest)),
        arms=_arms(receipts),
        differing=table.tolist(),
        champion_side=_side(logged, first, costs),
        challenger_side=_side(logged, second, costs),
        verdict=judge(first, second, logged.amount_minor, logged.is_fraud, logged.seen, logged.chance, costs),
    )


def logged_of(receipts: Receipts, labels: Labels) -> Logged:
    """What was let through, and under which chance it was.

    A payment that the policy declines is seen only when exploration approved it, with the chance logged; where exploration can't touch
    it, a decline is sure. A label of a declined payment (an analyst's) is not used: such labels come to few, and not at random.
    """
    declined, wanted = receipts.decision == DECLINE, receipts.policy_decision == DECLINE
    # Of a decline that stood, the propensity is that of declining.
    chance = np.where(~wanted, 1.0, np.where(declined, 1.0 - receipts.propensity, receipts.propensity))
    return Logged(receipts.card, receipts.amount_minor, labels.is_fraud & ~declined, ~declined, np.clip(chance, 0.0, 1.0))


def _side(logged: Logged, outcome: Ints, costs: Costs) -> Side:
    found = {name: worth(logged, outcome >= level) for name, level in LEVELS.items()}
    naive = {name: naive_worth(logged, outcome >= level) for name, level in LEVELS.items()}
    return Side(worth=found, naive=naive, cost_minor=_cost(logged, outcome, costs))


def _cost(logged: Logged, outcome: Ints, costs: Costs) -> Interval:
    """What the outcomes cost together: by cells of outcome and of how the label is seen, weighted to the cell's size; normal interval by
    card. Cells of which nothing was seen are left out of it, which `Worth.unreachable` tells."""
    if not len(outcome):
        return Interval(value=None, low=None, high=None)
    weight = np.zeros(len(outcome))
    np.divide(1.0, logged.chance, out=weight, where=logged.seen)
    cell = 2 * outcome + (logged.chance < 1)
    size, held = np.bincount(cell), np.bincount(cell, weight)
    scaled = weight * np.divide(size, held, out=np.zeros(len(size)), where=held > 0)[cell]
    each = costs.of(outcome, logged.amount_minor, logged.is_fraud)
    total = float((scaled * each).sum())
    mean = np.divide(np.bincount(cell, scaled * each), size, out=np.zeros(len(size)), where=size > 0)
    by_card = np.bincount(np.unique(logged.card, return_inverse=True)[1], scaled * (each - mean[cell]))
    margin = 1.96 * float(np.sqrt((by_card**2).sum()))
    return Interval(value=total, low=max(0.0, total - margin), high=total + margin)


def _shift(receipts: Receipts, scores: list[Ints], digests: tuple[str, str]) -> ScoreShift:
    one, other = (s[receipts.whole].astype(np.float64) for s in scores)
    edges, bins = padded([value_edges(one)])
    counts = [histogram(bins_of(edges, bins, s[:, None])) for s in (one, other)]
    differences = [
        np.abs(receipts.score - s)[receipts.whole & (receipts.model_digest == digest)]
        for digest, s in dict(zip(digests, scores, strict=True)).items()
    ]
    logged = np.concatenate(differences)
    return ScoreShift(
        psi=float(psi(counts[1], counts[0], bins)[0]),
        ks=float(ks_2samp(one, other, method="asymp").statistic),
        mean_champion=float(one.mean()),
        mean_challenger=float(other.mean()),
        recomputed=len(logged),
        largest_difference=float(logged.max(initial=0)),
    )


def _arms(receipts: Receipts) -> list[Arm]:
    arms = []
    for route in sorted(set(receipts.route[receipts.whole].tolist())):
        mine = receipts.whole & (receipts.route == route)
        n, k = int(mine.sum()), int((mine & (receipts.policy_decision == DECLINE)).sum())
        arms.append(Arm(route=route, receipts=n, declined=share(k, n)))
    return arms


def share(k: float, n: float, confidence: float = CONFIDENCE) -> Interval:
    """k of n with its Clopper-Pearson interval; effective numbers need not be whole (Korn and Graubard, Survey Methodology 24, 1998)."""
    tail = (1 - confidence) / 2
    low = float(beta.ppf(tail, k, n - k + 1)) if k else 0.0
    high = float(beta.isf(tail, k + 1, n - k)) if k < n else 1.0
    return Interval(value=k / n if n else None, low=low if n else None, high=high if n else None)


def open_model(models_path: Path, alias: str) -> Scorer:
    """The model that the manifest names for `alias`, its files compared with the manifest. Raises a `ModelExportError`."""
    try:
        entry = read_manifest(models_path).routes.get(alias)
    except FileNotFoundError as exc:
        raise NoModelError(f"there is no model directory at {models_path}; bring models with: fraudgate pull") from exc
    except msgspec.DecodeError as exc:
        raise NoModelError(f"the manifest at {models_path} can't be read: {exc}") from exc
    if entry is None:
        raise NoModelError(
            f"the model directory {models_path} has no {alias}; give a version that alias (fraudgate train --alias {alias}, or fraudgate "
            "promote) and bring it with: fraudgate pull"
        )
    folder = models_path / entry.directory
    try:
        for file in (MODEL_FILE, METADATA_FILE):
            if sha256_file(folder / file) != entry.files.get(file):
                raise PackageRefusedError(f"{entry.name} version {entry.version}: {file} is not the file that the manifest names")
        metadata = msgspec.json.decode((folder / METADATA_FILE).read_bytes(), type=ModelMetadata)
    except (OSError, msgspec.DecodeError) as exc:
        raise PackageRefusedError(f"{entry.name} version {entry.version} can't be read: {exc}") from exc
    session = open_session((folder / MODEL_FILE).read_bytes())

    def probability(features: npt.NDArray[np.float32]) -> Floats:
        out = np.empty(len(features))
        for first in range(0, len(features), BATCH_ROWS):
            part = features[first : first + BATCH_ROWS]
            out[first : first + BATCH_ROWS] = session.run([OUTPUT_NAME], {INPUT_NAME: part})[0][:, 1]
        return out

    return Scorer(entry, metadata.onnx_sha256, probability)
